"""One chunk at a time: score it, differentiate it, and add its gradients up. All chunks share one logits buffer.

Legend: T positions, N scored tokens, n tokens of a chunk, k some of them, D hidden width, V vocabulary
(local entries where it is split).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.head.cost import Job
from toolkit.head.kernel import Kernel
from toolkit.head.logits import LogitTransform
from toolkit.head.products import add_weight_gradient, input_gradient, logits_into
from toolkit.head.softmax import RowStats

FP16_HALF_RANGE = 2.0**15
MOVED_ROWS = 4
"""Rows moved at a time when a chunk is compacted: a temporary of half a megabyte or so."""
WORTH_SKIPPING = 0.95
"""Compact a chunk when at most this part of its rows has a coefficient."""


@dataclass(frozen=True)
class Chunk:
    """A chunk whose probabilities are in memory."""

    inputs: Tensor
    """[n, D] hidden states of its tokens."""
    positions: Tensor
    targets: Tensor
    transform: LogitTransform
    buffer: Tensor
    """The memory whose beginning is `probs`."""
    probs: Tensor
    """[n, V], later overwritten by the gradient; where the vocabulary is split, the softmax over local columns."""
    stats: RowStats


class HeadWork:
    """Buffers and accumulators of one forward (or backward) over the head."""

    def __init__(self, job: Job) -> None:
        inputs = self._inputs = job.inputs
        self._with_entropy = bool(job.entropy)
        self._hidden = inputs.hidden.detach()
        weight = self._weight = inputs.weight.detach().to(inputs.compute_dtype)
        local_mask = inputs.vocab.local_mask(inputs.transform.vocab_mask, weight.device)
        local_transform = replace(inputs.transform, vocab_mask=local_mask)
        self._rows = job.largest
        self._kernel = Kernel(local_transform, inputs.bias, inputs.vocab, wide=inputs.wide, rows=self._rows)
        self._free: list[Tensor] = []
        self._is_first = True
        self.hidden_grad_dtype = inputs.hidden_sum_dtype
        self._hidden_grad = self._weight_grad = self._bias_grad = None
        if job.needs.hidden:
            self._hidden_grad = self._hidden.new_zeros(self._hidden.shape, dtype=self.hidden_grad_dtype)
        if job.needs.weight:
            self._weight_grad = weight.new_empty(weight.shape, dtype=inputs.weight_sum_dtype(len(job.chunks)))
        if job.needs.bias:
            self._bias_grad = weight.new_zeros(weight.shape[0], dtype=inputs.wide)

    def score(self, span: slice, *, keep_rows: Tensor | None = None, known: RowStats | None = None) -> Chunk:
        """Compute probabilities and statistics of a chunk, the scored tokens of `span` (its `keep_rows` [k] only).

        `known` are the statistics of the full chunk, if the vocabulary is split and it was scored before.
        """
        positions, targets = self._inputs.positions[span], self._inputs.targets[span]
        if keep_rows is not None:
            positions, targets = positions.index_select(0, keep_rows), targets.index_select(0, keep_rows)
            known = None if known is None else known.select(keep_rows)
        inputs = self._hidden.index_select(0, positions).to(self._weight.dtype)
        buffer = self._free.pop() if self._free else self._weight.new_empty(self._rows, self._weight.shape[0])
        probs = buffer[: len(targets)]
        logits_into(probs, inputs, self._weight)
        transform = self._inputs.transform.at(positions)
        stats = self._kernel.probabilities_(probs, targets, transform, with_entropy=self._with_entropy, known=known)
        return Chunk(inputs, positions, targets, transform, buffer, probs, stats)

    def release(self, chunk: Chunk) -> None:
        """Return a chunk's logits buffer for reuse by the next one."""
        self._free.append(chunk.buffer)

    def differentiate(self, chunk: Chunk, logprob_grads: Tensor, entropy_grads: Tensor | None) -> None:
        """Add up the gradients of a chunk, given those of its scores; its probabilities are overwritten.

        Rows where both `logprob_grads` [n] and `entropy_grads` [n] are exactly 0 are skipped.
        """
        chunk, logprob_grads, entropy_grads = _without_idle_rows(chunk, logprob_grads, entropy_grads)
        if len(chunk.targets) == 0:
            return
        factor = self._kernel.gradient_(
            chunk.probs, chunk.targets, chunk.stats, chunk.transform, logprob_grads, entropy_grads
        )
        if self._hidden_grad is not None:
            products = input_gradient(chunk.probs, self._weight)
            self.set_hidden_gradient(chunk.positions, _scaled(products, factor, self.hidden_grad_dtype))
            del products  # free it before the larger ones below are made
        if self._weight_grad is not None:
            shrink = _fp16_shrink(factor, chunk.inputs) if chunk.inputs.dtype == torch.float16 else 1.0
            inputs = _scaled(chunk.inputs, None if factor is None else factor / shrink, chunk.inputs.dtype)
            add_weight_gradient(self._weight_grad, chunk.probs, inputs, is_first=self._is_first, factor=shrink)
            self._is_first = False
        if self._bias_grad is not None:
            self._kernel.add_bias_gradient(self._bias_grad, chunk.probs, factor)

    def keep_input_gradient(self, chunk: Chunk) -> Tensor:
        """Return d(-log p)/d(hidden) of a chunk's tokens, [n, D]; its probabilities are overwritten."""
        factor = self._kernel.gradient_(chunk.probs, chunk.targets, chunk.stats, chunk.transform, None, None)
        return _scaled(input_gradient(chunk.probs, self._weight), factor, self.hidden_grad_dtype)

    def set_hidden_gradient(self, positions: Tensor, rows: Tensor) -> None:
        """Write finished `rows` [n, D] of the hidden gradient at `positions` [n]."""
        assert self._hidden_grad is not None
        self._hidden_grad.index_copy_(0, positions, rows)

    def scale_hidden_gradient(self, positions: Tensor, factor: Tensor) -> None:
        """Multiply finished rows of the hidden gradient, at `positions` [n], by a `factor` each, [n]."""
        assert self._hidden_grad is not None
        rows = self._hidden_grad.index_select(0, positions)
        self.set_hidden_gradient(positions, _scaled(rows, factor, self.hidden_grad_dtype))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden [T, D], weight [V, D] and bias [V], None if not needed; frees the buffers.

        That of the hidden states is summed over the ranks that share the vocabulary; those of weight and bias are
        those of local rows.
        """
        self._free.clear()
        if self._hidden_grad is not None:
            self._inputs.vocab.sum_rows_(self._hidden_grad, self._inputs.positions)
        if self._weight_grad is not None and self._is_first:
            self._weight_grad.zero_()
        return self._hidden_grad, self._weight_grad, self._bias_grad


def _without_idle_rows(
    chunk: Chunk, logprob_grads: Tensor, entropy_grads: Tensor | None
) -> tuple[Chunk, Tensor, Tensor | None]:
    """Move the rows that have a coefficient to the front and drop the others; only the holes are filled."""
    is_live = logprob_grads != 0
    if entropy_grads is not None:
        is_live |= entropy_grads != 0
    total, kept = len(is_live), int(is_live.sum())
    if kept > WORTH_SKIPPING * total:
        return chunk, logprob_grads, entropy_grads
    order = torch.arange(kept, device=is_live.device)
    holes = (~is_live[:kept]).nonzero().squeeze(1)
    movers = is_live[kept:].nonzero().squeeze(1) + kept
    order[holes] = movers
    for start in range(0, len(holes), MOVED_ROWS):
        span = slice(start, start + MOVED_ROWS)
        chunk.probs.index_copy_(0, holes[span], chunk.probs.index_select(0, movers[span]))
    compact = replace(
        chunk,
        inputs=chunk.inputs.index_select(0, order),
        positions=chunk.positions.index_select(0, order),
        targets=chunk.targets.index_select(0, order),
        transform=chunk.transform.at(order),
        probs=chunk.probs[:kept],
        stats=chunk.stats.select(order),
    )
    return compact, logprob_grads[order], None if entropy_grads is None else entropy_grads[order]


def _scaled(rows: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``factor * rows`` in `dtype`, multiplied in fp32 or wider and rounded once; may overwrite `rows`."""
    if factor is None:
        return rows.to(dtype)
    if rows.dtype == factor.dtype:
        return rows.mul_(factor.unsqueeze(1)).to(dtype)
    return (rows * factor.unsqueeze(1)).to(dtype)  # the factor is wide, so is the product


def _fp16_shrink(factor: Tensor | None, inputs: Tensor) -> float:
    """Return a power of two by which the rows of an fp16 product are divided first, and its result multiplied after.

    It brings the largest factor near 1, away from fp16's smallest number, and the sum over all rows, at its worst,
    below its largest one: a mean over n tokens has factors of 1/n, whose division would let the sum overflow.
    """
    largest = 1.0 if factor is None else float(factor.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    worst_sum = 2 * len(inputs) * float(inputs.abs().max()) / FP16_HALF_RANGE
    return 2.0 ** (math.floor(math.log2(largest)) + max(0, math.ceil(math.log2(worst_sum)) if worst_sum > 0 else 0))
