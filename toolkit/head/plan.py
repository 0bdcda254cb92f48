"""Which pass is used, in which chunks, and what it will cost; decided before the first product.

Legend: T positions, N scored tokens, D hidden width, V vocabulary (local rows where it is split over ranks); a product:
2 N D V operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from toolkit.display import html_table
from toolkit.errors import ConfigError, listed
from toolkit.head.cost import (
    Course,
    Group,
    Job,
    PassName,
    gradient_bytes,
    length_of,
    peak_bytes,
    products_of,
    sent_bytes,
)
from toolkit.head.inputs import HeadInputs, Needs
from toolkit.head.options import Entropy, HeadOptions
from toolkit.head.vocabulary import vocab_group

Scope = Literal["token", "sequence", "batch"]
"""What one token's loss depends on: itself, its sequence, or all tokens."""

CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
"""Memory for the logits of a chunk with ``chunk_size="auto"``: few chunks, because each one more reads and writes
the weight gradient."""
MIN_AUTO_CHUNK = 256


@dataclass(frozen=True)
class HeadPlan(Course):
    """What a call will do and what it will cost; ``print(plan)`` describes it."""

    tokens: int
    """N."""
    positions: int
    """T."""
    products: float
    """Matrix products, in units of 2 N D V operations; fewer where coefficients are exactly 0."""
    flops: int
    peak_bytes: int
    """Peak beyond the inputs, including the returned gradients."""
    gradient_bytes: int
    """The returned gradients alone."""
    ranks: int = 1
    """Ranks that share the vocabulary; bytes and operations are those of one."""
    sent_bytes: int = 0
    """Bytes that one rank sends for sums over them: a few numbers a token, and the hidden gradient once."""

    def __str__(self) -> str:
        recomputed = sum(length_of(group[:-1]) for group in self.groups) if self.name == "two-pass" else 0
        lines = [
            f"pass      {self.name}: {self.why}",
            f"tokens    {self.tokens:,} scored of {self.positions:,} positions",
            f"chunks    {len(self.chunks)} of at most {self.largest:,} tokens"
            + (f"; up to {recomputed:,} tokens are computed twice" if recomputed else ""),
            f"products  {self.products:.2f} x 2NDV = {self.flops / 1e9:,.1f} GFLOP at most",
            f"peak      {self.peak_bytes / 2**20:,.1f} MiB over the inputs, of which the returned gradients are "
            f"{self.gradient_bytes / 2**20:,.1f} MiB",
        ]
        if self.ranks > 1:
            lines.append(
                f"split     vocabulary split over {self.ranks} ranks: costs are those of one, which sends "
                f"{self.sent_bytes / 2**20:,.1f} MiB"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [line.split(maxsplit=1) for line in str(self).splitlines()]
        return html_table("head", (), rows)


def job_of(inputs: HeadInputs, options: HeadOptions, *, scope: Scope | None, sequence_ids: Tensor | None = None) -> Job:
    """Choose the pass and its chunks.

    `scope` is that of the loss that is computed with the head, None if the caller takes log-probabilities and
    differentiates later; `sequence_ids` [N], not decreasing, are for scope "sequence".
    """
    tokens, needs = len(inputs.positions), Needs.of(inputs.hidden, inputs.weight, inputs.bias)
    size, merged = _chunk_size(inputs, needs, tokens, options)
    groups = tuple(_groups(tokens, size, scope or "token", sequence_ids))
    name, why = _choose(needs, scope, options.entropy, fits=all(len(group) == 1 for group in groups))
    if merged:
        why += "; all tokens in one chunk, because a second one would need an fp32 weight gradient as large"
    job = Job(name, why, groups, 0, inputs, needs, options.entropy, scope is not None)
    if name != "two-pass":
        return job
    chunk_cost = max(1, job.largest) * inputs.vocab.most_rows * inputs.compute_dtype.itemsize
    return replace(job, retained=options.retain_bytes // chunk_cost)


def plan_of(job: Job) -> HeadPlan:
    """Return what a job will do and cost."""
    inputs, products = job.inputs, products_of(job)
    return HeadPlan(
        name=job.name,
        why=job.why,
        groups=job.groups,
        retained=job.retained,
        tokens=len(inputs.positions),
        positions=inputs.hidden.shape[0],
        products=products,
        flops=round(products * 2 * len(inputs.positions) * inputs.weight.numel()),
        peak_bytes=peak_bytes(job),
        gradient_bytes=gradient_bytes(job),
        ranks=inputs.vocab.ranks,
        sent_bytes=sent_bytes(job),
    )


def _choose(needs: Needs, scope: Scope | None, entropy: Entropy, *, fits: bool) -> tuple[PassName, str]:
    if not needs:
        return "no-grad", "no input requires a gradient, so each chunk is scored and discarded"
    is_at_once = scope is not None and fits
    if not (needs.weight or needs.bias) and (is_at_once or entropy is not True):
        return "frozen", "only the hidden states require a gradient, and d(-log p)/d(hidden) is enough for any loss"
    if scope is None:
        return "two-pass", "the loss is computed elsewhere: scores now, each chunk again in backward"
    if not fits:
        what = "a sequence is longer than a chunk" if scope == "sequence" else "the batch is larger than a chunk"
        return "two-pass", f"{what}, so scores come first; all but its last chunk are then computed again"
    reasons = {
        "token": "each token's loss depends on that token alone",
        "sequence": "every sequence fits a chunk",
        "batch": "the batch fits one chunk",
    }
    return "one-pass", f"{reasons[scope]}, so a chunk's gradient is taken while its logits are in memory"


def _chunk_size(inputs: HeadInputs, needs: Needs, tokens: int, options: HeadOptions) -> tuple[int, bool]:
    """Return the tokens of a chunk, and whether all were merged into one."""
    if options.chunk_size == "auto":
        device = inputs.hidden.device
        size = auto_chunk(inputs.vocab.most_rows, inputs.compute_dtype, device, options.chunk_bytes)
    else:
        size = int(options.chunk_size)
    # An fp32 sum of several chunks takes 4 V D bytes, as many as 2 D more rows of bf16 logits.
    is_wider = inputs.weight_sum_dtype(2) != inputs.weight_sum_dtype(1)
    if needs.weight and is_wider and size < tokens <= size + 2 * inputs.weight.shape[1]:
        return tokens, True
    return size, False


def auto_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """Return how many rows of logits fit `chunk_bytes`, or the device's budget (then at least `MIN_AUTO_CHUNK`)."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (vocabulary * dtype.itemsize))
    budget = CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES)
    return max(MIN_AUTO_CHUNK, budget // (vocabulary * dtype.itemsize))


def _groups(tokens: int, size: int, scope: Scope, ids: Tensor | None) -> Iterator[Group]:
    if scope not in get_args(Scope):
        raise ConfigError(f"scope={scope!r} is unknown; choose {listed(get_args(Scope))}")
    if tokens == 0:
        yield (slice(0, 0),)  # the loss is called even then, for its metrics
        return
    chunks = equal_chunks(0, tokens, size)
    if scope != "sequence":
        yield from ((span,) for span in chunks) if scope == "token" else [tuple(chunks)]
        return
    if ids is None:
        raise ConfigError("scope='sequence' needs sequence_ids, the sequence of each position")
    start = stop = 0
    for length in ids.unique_consecutive(return_counts=True)[1].tolist():
        if length > size:
            if stop > start:
                yield (slice(start, stop),)
            yield tuple(equal_chunks(stop, stop + length, size))
            start = stop = stop + length
        elif stop + length - start > size:
            yield (slice(start, stop),)
            start, stop = stop, stop + length
        else:
            stop += length
    if stop > start:
        yield (slice(start, stop),)


def equal_chunks(start: int, stop: int, size: int) -> list[slice]:
    """Cut into as few chunks as possible, whose lengths differ by at most 1: a small last chunk wastes a pass."""
    number = -(-(stop - start) // size)
    cuts = [start + (stop - start) * i // number for i in range(number + 1)] if number else []
    return [slice(a, b) for a, b in pairwise(cuts)]


def autograd_plan(
    name: PassName,
    why: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spans: Sequence[slice],
    *,
    copies: int,
) -> HeadPlan:
    """Estimate the cost of a loss that autograd differentiates chunk by chunk.

    Its inputs are `hidden` [..., D], `weight` [V, D] and `bias` [V] of the full vocabulary; `spans` are the chunks.
    `copies`: how many tensors of the size of a chunk's logits, in fp32 or wider, are alive at once; `logit_copies`
    returns those of the eager scores.
    """
    needs, vocab = Needs.of(hidden, weight, bias), vocab_group(weight)
    tokens, rows = spans[-1].stop if spans else 0, max((length_of([span]) for span in spans), default=0)
    weight_size = vocab.rows * weight.shape[1]
    gradients = needs.hidden * hidden.nbytes + needs.weight * weight_size * weight.itemsize
    if bias is not None:
        gradients += needs.bias * vocab.rows * bias.itemsize
    wide = max(4, hidden.itemsize)
    logits = rows * vocab.rows * copies * wide
    # The sums over chunks are fp32; the weight gradient of one chunk is alive at the same time.
    sums = (1 + (len(spans) > 1)) * needs.weight * weight_size * wide if name == "general" else 0
    # One chunk at once: all copies but the gradient of the logits are gone before the others are computed.
    at_once = max(logits, rows * vocab.rows * hidden.itemsize + gradients)
    products = 1 + needs.hidden + needs.weight
    return HeadPlan(
        name=name,
        why=why,
        groups=tuple((span,) for span in spans),
        retained=0,
        tokens=tokens,
        positions=hidden.numel() // max(1, hidden.shape[-1]),
        products=products,
        flops=products * 2 * tokens * weight_size,
        peak_bytes=at_once if name == "eager" else gradients + logits + sums,
        gradient_bytes=gradients,
        ranks=vocab.ranks,
        sent_bytes=vocab.is_split * tokens * (5 * wide + needs.hidden * hidden.shape[-1] * hidden.itemsize),
    )
