"""What a call does, and what that will cost: products, operations, peak bytes.

Legend: T positions, N scored tokens, n tokens of the largest chunk, D hidden width, V vocabulary (local rows where it
is split over ranks: all costs are those of one rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toolkit.head.inputs import HeadInputs, Needs
from toolkit.head.kernel import block_rows
from toolkit.head.options import Entropy
from toolkit.head.products import LOW_PRECISION_SLAB, slab_bytes
from toolkit.head.softmax import BUCKET

Group = tuple[slice, ...]
"""Chunks whose tokens the loss must see together."""
PassName = Literal["no-grad", "frozen", "one-pass", "two-pass", "general", "eager"]


@dataclass(frozen=True)
class Course:
    """Which pass is used, and in which chunks."""

    name: PassName
    why: str
    groups: tuple[Group, ...]
    """Chunks, as slices of the scored tokens, in groups that the loss sees together."""
    retained: int
    """Chunks of a group, besides its last, whose probabilities stay in memory."""

    @property
    def chunks(self) -> list[slice]:
        """All chunks in order."""
        return [span for group in self.groups for span in group]

    @property
    def largest(self) -> int:
        """Tokens of the largest chunk."""
        return max((length_of([span]) for span in self.chunks), default=0)


@dataclass(frozen=True)
class Job(Course):
    """Everything that decides what a pass does and costs."""

    inputs: HeadInputs
    needs: Needs
    entropy: Entropy
    is_fused: bool
    """Whether the loss is computed with the head; else only chunks within the budget stay, not the last one too."""


def length_of(spans: Sequence[slice]) -> int:
    """Return the tokens of some chunks."""
    return sum(span.stop - span.start for span in spans)


def kept_of(group: Group, retained: int) -> int:
    """Return how many of a group's last chunks still have their probabilities when its loss is known."""
    return min(len(group), 1 + retained)


def products_of(job: Job) -> float:
    """Return the matrix products, in units of 2 N D V operations."""
    backward, tokens = job.needs.hidden + job.needs.weight, len(job.inputs.positions)
    if job.name != "two-pass" or not tokens:
        return 1 + backward
    if job.is_fused:
        twice = sum(length_of(group[: len(group) - kept_of(group, job.retained)]) for group in job.groups)
    else:
        twice = length_of(job.chunks[: max(0, len(job.chunks) - job.retained)])
    return 1 + backward + twice / tokens


def gradient_bytes(job: Job) -> int:
    """Return the bytes of the gradients that the caller gets."""
    tensors = (job.inputs.hidden, job.inputs.weight, job.inputs.bias)
    return sum(t.nbytes for t, is_needed in zip(tensors, job.needs, strict=True) if t is not None and is_needed)


def peak_bytes(job: Job) -> int:
    """Return the peak bytes beyond the inputs: in forward, in backward, or when dtypes are changed."""
    inputs, tokens, largest = job.inputs, len(job.inputs.positions), job.largest
    (vocabulary, width), size, wide = inputs.weight.shape, inputs.compute_dtype.itemsize, inputs.wide.itemsize
    score_scratch, grad_scratch = _scratch(job)
    sums, casts = _sums(job)
    product = slab_bytes(largest, inputs.weight, inputs.compute_dtype)  # what oneDNN returns
    base = largest * width * size + product + (8 if inputs.vocab.is_split else 4) * tokens * wide
    if inputs.weight.dtype != inputs.compute_dtype:
        base += inputs.weight.numel() * size
    if inputs.bias is not None and inputs.bias.dtype.itemsize != wide:
        base += vocabulary * wide
    logits = largest * vocabulary * size
    # A chunk's part of the hidden gradient before it is written, or its scaled inputs.
    rows = largest * width * (2 * size + wide if size == 2 else size)
    slopes = tokens * width * inputs.hidden_sum_dtype.itemsize
    if job.name == "no-grad":
        return base + logits + score_scratch
    if inputs.vocab.is_split and job.needs.hidden and tokens < inputs.hidden.shape[0]:
        casts += slopes  # the scored rows of the hidden gradient while they are sent to the other ranks
    scratch = max(score_scratch, grad_scratch)
    if job.is_fused:
        most = max((kept_of(group, job.retained) for group in job.groups), default=1)
        return max(sums + base + most * logits + scratch + rows, sums + casts)
    if job.name == "frozen":
        return max(slopes + base + logits + scratch + rows, slopes + sums + rows)
    kept = base + max(1, min(len(job.chunks), job.retained)) * logits
    return max(kept + score_scratch, sums + kept + grad_scratch + rows, sums + casts)


def sent_bytes(job: Job) -> int:
    """Return the bytes that this rank contributes to sums over the ranks that share the vocabulary."""
    inputs = job.inputs
    if not inputs.vocab.is_split:
        return 0
    numbers = 4 + bool(job.entropy)
    dtype = inputs.hidden_sum_dtype if job.is_fused or job.name != "frozen" else inputs.hidden.dtype
    of_hidden = job.needs.hidden * inputs.hidden.shape[1] * dtype.itemsize
    return len(inputs.positions) * (numbers * inputs.wide.itemsize + of_hidden)


def _scratch(job: Job) -> tuple[int, int]:
    """Return the bytes of blocks of rows in forward, and in backward, there with a slab of the weight gradient."""
    inputs, size = job.inputs, job.inputs.compute_dtype.itemsize
    (vocabulary, width), is_low = inputs.weight.shape, size == 2
    rows = block_rows(job.largest, vocabulary, inputs.hidden.device.type)
    block = rows * vocabulary * inputs.wide.itemsize
    indices = rows * BUCKET * (8 + inputs.wide.itemsize)  # where the largest logits are
    extra = 2 if inputs.transform.softcap is not None else int(job.entropy is True)
    adds_up_wide = inputs.weight_sum_dtype(len(job.chunks)).itemsize > size
    slab = min(LOW_PRECISION_SLAB, vocabulary) * width * size if job.needs.weight and adds_up_wide else 0
    num_grad_blocks = is_low + max(extra, int(bool(job.entropy) and job.is_fused))
    return (is_low + bool(job.entropy)) * block + indices, num_grad_blocks * block + slab


def _sums(job: Job) -> tuple[int, int]:
    """Return the bytes of the running sums of the gradients, and of those that are cast at the end."""
    inputs = job.inputs
    dtypes = (inputs.hidden_sum_dtype, inputs.weight_sum_dtype(len(job.chunks)), inputs.wide)
    sums = casts = 0
    for tensor, is_needed, dtype in zip((inputs.hidden, inputs.weight, inputs.bias), job.needs, dtypes, strict=True):
        if tensor is not None and is_needed:
            sums += tensor.numel() * dtype.itemsize
            casts += tensor.nbytes if tensor.dtype.itemsize != dtype.itemsize else 0
    return sums, casts
