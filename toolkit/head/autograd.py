"""How the passes use autograd: no second derivative, no second copy of a gradient, no other hooks, no compiling.

Legend: [...] any shape, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.errors import DataError

Gradients = Sequence[Tensor | None]


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient; differentiating it again raises an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the head does not support second derivatives: its gradient is computed chunk by chunk without a graph; "
            "compute the logits with torch.nn.functional.linear (mode='eager')"
        )


def refuses_second_derivative(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Raise for second derivatives, also where ``once_differentiable`` would take the gradient for a constant."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            input_grads = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return input_grads
        anchor = torch.ones((), requires_grad=True)
        return tuple(_NoSecondDerivative.apply(g, anchor) if isinstance(g, Tensor) else g for g in input_grads)

    return wrapped


class _Positional(inspect.Signature):
    """The signature of a function that is called with every argument, and by position: there is nothing to bind."""

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        pass


def positional(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `forward` of an autograd function that has a `setup_context`, always called with every argument.

    PyTorch finds out and binds its signature in every call, which takes as long as ten operations on a few tokens.
    """
    forward.__signature__ = _Positional.from_callable(forward)  # type: ignore[attr-defined]
    return forward


class OtherLeaves(Exception):
    """The loss depends on leaves that autograd does not know of; they must become inputs before the first chunk."""

    def __init__(self, leaves: list[Tensor], group: int) -> None:
        super().__init__()
        self.leaves, self.group = leaves, group


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are complete when forward returns; backward multiplies them by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, Gradients]], extras: list[Any], *inputs: Tensor | None
    ) -> Tensor:
        loss, grads = run(extras, *inputs)
        ctx.dtypes = [
            None if grad is None or tensor is None else tensor.dtype for grad, tensor in zip(grads, inputs, strict=True)
        ]
        ctx.save_for_backward(*[grad for grad in grads if grad is not None])
        return loss

    @staticmethod
    @refuses_second_derivative
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        # Scaled before the cast: in fp32 a loss scale of 65536 is a number, and not inf as in fp16.
        scaled = [None if dtype is None else rescaled(next(saved), grad_loss).to(dtype) for dtype in ctx.dtypes]
        return None, None, *scaled


def loss_with_gradients(
    run: Callable[..., tuple[Tensor, Gradients]], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Any]]:
    """Return the 0-dim loss that `run` computes together with its gradients, and what else it returns.

    Args:
        run: ``f(extras, hidden, weight, bias, *others) -> (loss, a gradient of each tensor or None)``, called without
            grad; it appends to `extras`. Where it finds that the loss depends on leaves beside `others`, it raises
            `OtherLeaves` and is called again with them.
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.

    Raises:
        DataError: leaves are new in every call.
    """
    others: list[Tensor] = []
    group = -1
    while True:
        extras: list[Any] = []
        try:
            return _LossWithGradients.apply(run, extras, hidden, weight, bias, *others), extras
        except OtherLeaves as new:
            if new.group <= group:
                raise DataError(
                    "loss_fn depends on a tensor that requires a gradient and is a new one in every call (one that it "
                    "makes, or the scores of another chunk that it kept); detach it"
                ) from None
            others, group = others + new.leaves, new.group


def refuse_other_leaves(loss: Tensor, known: Iterable[Tensor | None], group: int) -> None:
    """Raise `OtherLeaves` if the 0-dim `loss` of a `group` depends on other leaves than `known` [...]."""
    known_ids = {id(tensor) for tensor in known}
    unknown = {id(leaf): leaf for leaf in _leaves_of(loss) if id(leaf) not in known_ids}
    if unknown:
        raise OtherLeaves(list(unknown.values()), group)


def _leaves_of(output: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that `output` was computed from and that require a gradient."""
    pending, seen = [output.grad_fn], set()
    if output.grad_fn is None and output.requires_grad:
        yield output
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the node of a leaf has one
        if variable is not None:
            yield variable
        pending += [parent for parent, _ in node.next_functions]


def total_of(losses: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """Return the sum of `losses`, [] each and at least one, in `wide` or their dtype, the wider one."""
    return torch.stack([loss.to(torch.promote_types(loss.dtype, wide)) for loss in losses]).sum()


def not_compiled(function: Any) -> Any:
    """Exclude a function from ``torch.compile``, as ``torch.compiler.disable`` does, which loads the compiler.

    Here, that happens only if something is compiled; other programs start more than a second sooner.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call


def rescaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return `grad` [...] times 0-dim `factor`, without a second V x D tensor if `grad` will not be used again."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keep_graph is None or keep_graph():  # retain_graph=True
        return grad * factor
    return grad if factor.device.type == "cpu" and float(factor) == 1 else grad.mul_(factor)


@contextlib.contextmanager
def quiet(hidden: Tensor) -> Iterator[None]:
    """No autocast on the device of `hidden` [...], no saved-tensor hooks."""
    device = hidden.device.type
    # Detached: a hook that kept a saved output would tie it to its graph, and neither would ever be freed.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with torch.autocast(device, enabled=False), hooks:
        yield
