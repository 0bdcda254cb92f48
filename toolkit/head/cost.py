"""What a pass will cost: products, operations, peak bytes.

Legend: T positions, N scored tokens, n tokens of the largest chunk, D hidden width, V vocabulary (local rows where it
is split over ranks: all costs are those of one rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.head.inputs import HeadInputs
from toolkit.head.kernel import block_rows
from toolkit.head.products import LOW_PRECISION_SLAB, slab_bytes

Group = tuple[slice, ...]
"""Chunks whose tokens the loss must see together."""


@dataclass(frozen=True)
class Course:
    """The properties of a call that determine its cost."""

    name: str
    """Of the pass."""
    groups: tuple[Group, ...]
    retained: int
    """Chunks that stay in memory, besides the last of a group if the loss is computed with the head."""
    is_fused: bool
    """Whether the loss is computed with the head."""
    with_entropy: bool
    """Whether the softmax pass computes entropies."""
    has_free_entropy: bool
    """Whether the frozen pass has them from its products instead."""
    entropy_has_grad: bool
    needs: tuple[bool, bool, bool]
    """Which of hidden states, weight and bias get a gradient."""

    @property
    def chunks(self) -> list[slice]:
        """All chunks in order."""
        return [span for group in self.groups for span in group]


def length_of(spans: Sequence[slice]) -> int:
    """Return the tokens of some chunks."""
    return sum(span.stop - span.start for span in spans)


def kept_of(group: Group, retained: int) -> int:
    """Return how many of a group's last chunks still have their probabilities when its loss is known."""
    return min(len(group), 1 + retained)


def products_of(course: Course, tokens: int) -> float:
    """Return the matrix products, in units of 2 N D V operations."""
    backward = course.needs[0] + course.needs[1]
    if course.name != "two-pass" or not tokens:
        return 1 + backward
    if course.is_fused:
        twice = sum(length_of(group[: len(group) - kept_of(group, course.retained)]) for group in course.groups)
    else:
        # Between forward and a separate backward only the chunks within the budget are kept.
        twice = length_of(course.chunks[: max(0, len(course.chunks) - course.retained)])
    return 1 + backward + twice / tokens


def gradient_bytes(inputs: HeadInputs, needs: tuple[bool, bool, bool]) -> int:
    """Return the bytes of the gradients that the caller gets."""
    tensors = (inputs.hidden, inputs.weight, inputs.bias)
    return sum(t.nbytes for t, is_needed in zip(tensors, needs, strict=True) if t is not None and is_needed)


def peak_bytes(inputs: HeadInputs, course: Course) -> int:
    """Return the peak bytes beyond the inputs: in forward, in backward, or when dtypes are changed."""
    parts = _parts(inputs, course)
    sums, casts = _sums(inputs, course)
    width, tokens = inputs.weight.shape[1], len(inputs.positions)
    slopes = tokens * width * _hidden_sum_size(inputs)
    if course.name == "no-grad":
        return parts.base + parts.buffer + parts.score_scratch
    if inputs.vocab.is_split and course.needs[0] and tokens < inputs.hidden.shape[0]:
        casts += slopes  # the scored rows of the hidden gradient while they are sent to the other ranks
    if course.is_fused:
        most = max((kept_of(group, course.retained) for group in course.groups), default=1)
        return max(sums + parts.base + most * parts.buffer + parts.scratch + parts.rows, sums + casts)
    if course.name == "frozen":
        forward = slopes + parts.base + parts.buffer + parts.scratch + parts.rows
        return max(forward, slopes + sums + parts.rows)
    number = len(course.chunks)
    kept = max(1, min(number, course.retained))
    forward = parts.base + kept * parts.buffer + parts.score_scratch
    backward = sums + parts.base + kept * parts.buffer + parts.grad_scratch + parts.rows
    return max(forward, backward, sums + casts)


def sent_bytes(inputs: HeadInputs, course: Course) -> int:
    """Return the bytes that this rank contributes to sums over the ranks that share the vocabulary."""
    if not inputs.vocab.is_split:
        return 0
    tokens, wide = len(inputs.positions), 8 if inputs.compute_dtype == torch.float64 else 4
    numbers = 3 + (course.with_entropy or course.has_free_entropy)
    size = _hidden_sum_size(inputs) if course.is_fused or course.name != "frozen" else inputs.hidden.dtype.itemsize
    return tokens * (numbers * wide + course.needs[0] * inputs.hidden.shape[1] * size)


@dataclass(frozen=True)
class _Parts:
    buffer: int
    """Logits of a chunk."""
    base: int
    """Inputs of a chunk, what oneDNN returns, vectors, a weight in another dtype."""
    rows: int
    """A chunk's part of the hidden gradient before it is written, or its scaled inputs."""
    score_scratch: int
    """Blocks of rows in forward."""
    grad_scratch: int
    """Blocks of rows in backward, and a slab of the weight gradient."""

    @property
    def scratch(self) -> int:
        return max(self.score_scratch, self.grad_scratch)


def _parts(inputs: HeadInputs, course: Course) -> _Parts:
    (vocabulary, width), size = inputs.weight.shape, inputs.compute_dtype.itemsize
    rows = max((span.stop - span.start for span in course.chunks), default=0)
    is_low, wide = size == 2, 8 if inputs.compute_dtype == torch.float64 else 4
    device = inputs.hidden.device.type
    block = block_rows(rows, vocabulary, device) * vocabulary * wide
    extra = 2 if inputs.transform.softcap is not None else int(course.entropy_has_grad)
    product = slab_bytes(rows, inputs.weight, inputs.compute_dtype)
    weight_copy = inputs.weight.numel() * size if inputs.weight.dtype != inputs.compute_dtype else 0
    bias_copy = 0 if inputs.bias is None or inputs.bias.dtype.itemsize == wide else vocabulary * wide
    slab = (
        min(LOW_PRECISION_SLAB, vocabulary) * width * size if course.needs[1] and _adds_up_wide(inputs, course) else 0
    )
    vectors = 8 if inputs.vocab.is_split else 4
    return _Parts(
        buffer=rows * vocabulary * size,
        base=rows * width * size + product + weight_copy + bias_copy + vectors * len(inputs.positions) * wide,
        rows=rows * width * (2 * size + wide if is_low else size),
        score_scratch=(is_low + course.with_entropy) * block,
        grad_scratch=(is_low + max(extra, int(course.with_entropy and course.is_fused))) * block + slab,
    )


def _sums(inputs: HeadInputs, course: Course) -> tuple[int, int]:
    """Return the bytes of the running sums of the gradients, and of those that are cast at the end."""
    hidden, weight, bias = course.needs
    positions, width = inputs.hidden.shape
    sums = hidden * positions * width * _hidden_sum_size(inputs)
    casts = hidden * inputs.hidden.nbytes if inputs.hidden.dtype == torch.float16 else 0
    if weight:
        size = 4 if _adds_up_wide(inputs, course) else inputs.compute_dtype.itemsize
        sums += inputs.weight.numel() * size
        casts += inputs.weight.nbytes if inputs.weight.dtype.itemsize != size else 0
    if bias and inputs.bias is not None:
        wide = 8 if inputs.compute_dtype == torch.float64 else 4
        sums += inputs.bias.numel() * wide
        casts += inputs.bias.nbytes if inputs.bias.dtype.itemsize != wide else 0
    return sums, casts


def _adds_up_wide(inputs: HeadInputs, course: Course) -> bool:
    """Whether the weight gradient is added up in fp32 from low-precision products."""
    if inputs.compute_dtype.itemsize != 2:
        return False
    is_direct = len(course.chunks) == 1 and inputs.weight.dtype == inputs.compute_dtype
    return not is_direct or inputs.compute_dtype == torch.float16


def _hidden_sum_size(inputs: HeadInputs) -> int:
    return 4 if inputs.hidden.dtype == torch.float16 else inputs.hidden.dtype.itemsize
