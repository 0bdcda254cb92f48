"""Any loss that is a sum over tokens, computed chunk by chunk with the logits of one chunk alive at a time.

Legend: T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.gradients import HeadGradients, leaves_of

ChunkLoss = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Any]]
"""``f(hidden chunk, weight, bias, chunk index) -> (scalar loss, anything to keep)``."""


def chunked_loss(
    loss_fn: ChunkLoss, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, lengths: Sequence[int]
) -> tuple[Tensor, list[Any]]:
    """Sum `loss_fn` over chunks of the token axis; each chunk's gradient is taken in forward, then its graph is freed.

    The gradient reaches the three inputs and every other leaf that `loss_fn` depends on, such as a learnable
    temperature. Any upstream gradient is respected. A second derivative raises an error.

    Args:
        loss_fn: called once for each chunk; it may do anything with the chunk, logits included.
        hidden_states: [..., T, D].
        head_weight: [V, D].
        head_bias: [V], optional.
        lengths: positions of each chunk, T in all.

    Returns:
        The summed scalar loss (fp32 or wider), and what else `loss_fn` returned, a list with one entry per chunk.
    """
    if not torch.is_grad_enabled():
        parts = [
            loss_fn(chunk, head_weight, head_bias, index)
            for index, chunk in enumerate(hidden_states.split(list(lengths), dim=-2))
        ]
        return _total([loss for loss, _ in parts]), [extra for _, extra in parts]
    others: list[Tensor] = []
    before = -1
    while True:
        extras: list[Any] = []
        try:
            loss = _ChunkedLoss.apply(hidden_states, head_weight, head_bias, loss_fn, tuple(lengths), extras, *others)
        except _OtherLeaves as new:
            if new.index <= before:
                raise DataError(
                    "loss_fn makes a new tensor that requires a gradient in every call; detach it"
                ) from None
            others, before = others + new.leaves, new.index
            continue
        return loss, extras


class _OtherLeaves(Exception):
    """The loss depends on leaves that autograd does not know of; they must become inputs before the first chunk."""

    def __init__(self, leaves: list[Tensor], index: int) -> None:
        super().__init__()
        self.leaves, self.index = leaves, index


def _total(losses: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(losses[0].dtype, torch.float32)
    return torch.stack([loss.detach().to(wide) for loss in losses]).sum()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_fn: ChunkLoss,
        lengths: tuple[int, ...],
        extras: list[Any],
        *others: Tensor,
    ) -> Tensor:
        token_dim = hidden.dim() - 2
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], token_dim=token_dim, others=others)
        losses, start = [], 0
        for index, length in enumerate(lengths):
            span = slice(start, start + length)
            inputs = grads.leaves(hidden.narrow(token_dim, start, length))
            with torch.enable_grad():
                loss, extra = loss_fn(*inputs, index)
            known = {id(tensor) for tensor in (*inputs, *others)}
            unknown = {id(leaf): leaf for leaf in leaves_of(loss) if id(leaf) not in known}
            if unknown:
                raise _OtherLeaves(list(unknown.values()), index)
            grads.add([loss], None, inputs, span)
            losses.append(loss.detach())
            extras.append(extra)
            start = span.stop
        totals = grads.totals()
        tensors = (hidden, weight, bias, *others)
        ctx.dtypes = [
            None if total is None or tensor is None else tensor.dtype
            for total, tensor in zip(totals, tensors, strict=True)
        ]
        ctx.save_for_backward(*[total for total in totals if total is not None])
        return _total(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        # Scaled in fp32, where a loss scale of 65536 is a number and not inf as in fp16; and out of place, because
        # the saved gradients must survive a second backward (retain_graph=True).
        scaled = [None if dtype is None else (next(saved) * grad_loss).to(dtype) for dtype in ctx.dtypes]
        return (*scaled[:3], None, None, None, *scaled[3:])
