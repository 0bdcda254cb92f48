"""How the passes use autograd: no second derivative, no second copy of a gradient, no other hooks, no compiling.

Legend: [...] any shape, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


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
    if not _graph_is_freed():
        return grad * factor
    return grad if factor.device.type == "cpu" and float(factor) == 1 else grad.mul_(factor)


def _graph_is_freed() -> bool:
    """Whether the saved gradients will not be used again (``retain_graph=False``)."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is not None and not keep_graph()


@contextlib.contextmanager
def quiet(hidden: Tensor) -> Iterator[None]:
    """No autocast on the device of `hidden` [...], no saved-tensor hooks."""
    device = hidden.device.type
    # Detached: a hook that kept a saved output would tie it to its graph, and neither would ever be freed.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with torch.autocast(device, enabled=False), hooks:
        yield
