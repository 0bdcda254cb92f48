"""Which pass is used, in which chunks, and what it will cost; decided before the first product.

Legend: T positions, N scored tokens, D hidden width, V vocabulary (local rows where it is split over ranks); a product:
2 N D V operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError, listed
from toolkit.head.cost import Course, Group, gradient_bytes, length_of, peak_bytes, products_of, sent_bytes
from toolkit.head.inputs import HeadInputs
from toolkit.head.options import Entropy, HeadOptions
from toolkit.head.vocabulary import vocab_group

Scope = Literal["token", "sequence", "batch"]
"""What one token's loss depends on: itself, its sequence, or all tokens."""
PassName = Literal["no-grad", "frozen", "one-pass", "two-pass", "general", "eager"]

CHUNK_BYTES = {"cpu": 128 * 2**20}
GPU_CHUNK_BYTES = 2**30
"""Memory for the logits of a chunk with ``chunk_size="auto"``: few chunks, because each one more reads and writes
the weight gradient."""
MIN_AUTO_CHUNK = 256
SCOPES = ("token", "sequence", "batch")


@dataclass(frozen=True)
class HeadPlan:
    """What a call will do and what it will cost; ``print(plan)`` describes it."""

    name: PassName
    why: str
    groups: tuple[Group, ...]
    """Chunks, as slices of the scored tokens, in groups that the loss sees together."""
    tokens: int
    """N."""
    positions: int
    """T."""
    retained: int
    """Chunks of a group, besides its last, whose probabilities stay in memory."""
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

    @property
    def chunks(self) -> list[slice]:
        """All chunks in order."""
        return [span for group in self.groups for span in group]

    @property
    def largest(self) -> int:
        """Tokens of the largest chunk."""
        return max((span.stop - span.start for span in self.chunks), default=0)

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


@dataclass(frozen=True)
class Needs:
    """Which inputs require a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias

    @classmethod
    def of(cls, inputs: HeadInputs) -> Needs:
        """Look at `requires_grad` and the grad mode."""
        return cls.of_tensors(inputs.hidden, inputs.weight, inputs.bias)

    @classmethod
    def of_tensors(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
        """Look at `requires_grad` of `hidden` [..., D], `weight` [V, D] and `bias` [V], and at the grad mode."""
        is_on = torch.is_grad_enabled()
        return cls(
            is_on and hidden.requires_grad,
            is_on and weight.requires_grad,
            is_on and bias is not None and bias.requires_grad,
        )


def make_plan(
    inputs: HeadInputs,
    needs: Needs,
    options: HeadOptions,
    *,
    scope: Scope | None,
    sequence_ids: Tensor | None,
) -> HeadPlan:
    """Choose the pass and its chunks.

    Args:
        inputs: of the call.
        needs: which of them require a gradient.
        options: of the call; sizes of chunks and entropies are read here.
        scope: of the loss that is computed with the head; None if the caller takes log-probabilities and differentiates
            later.
        sequence_ids: [N] sequence of each scored token, not decreasing; for scope "sequence".
    """
    tokens, entropy = len(inputs.positions), options.entropy
    size, merged = _chunk_size(inputs, needs, tokens, options)
    groups = tuple(_groups(tokens, size, scope or "token", sequence_ids))
    name, why = _choose(needs, scope, entropy, fits=all(len(group) == 1 for group in groups))
    if merged:
        why += "; all tokens in one chunk, because a second one would need an fp32 weight gradient as large"
    largest = max(span.stop - span.start for group in groups for span in group)
    chunk_cost = max(1, largest) * inputs.vocab.most_rows * inputs.compute_dtype.itemsize
    retained = options.retain_bytes // chunk_cost if name == "two-pass" else 0
    gradients, is_free = (needs.hidden, needs.weight, needs.bias), has_free_entropy(inputs, name, entropy)
    course = Course(
        name=name,
        groups=groups,
        retained=retained,
        is_fused=scope is not None,
        with_entropy=bool(entropy) and not is_free,
        has_free_entropy=is_free,
        entropy_has_grad=entropy is True,
        needs=gradients,
    )
    products = products_of(course, tokens)
    return HeadPlan(
        name=name,
        why=why,
        groups=groups,
        tokens=tokens,
        positions=inputs.hidden.shape[0],
        retained=retained,
        products=products,
        flops=round(products * 2 * tokens * inputs.weight.numel()),
        peak_bytes=peak_bytes(inputs, course),
        gradient_bytes=gradient_bytes(inputs, gradients),
        ranks=inputs.vocab.ranks,
        sent_bytes=sent_bytes(inputs, course),
    )


def has_free_entropy(inputs: HeadInputs, name: PassName, entropy: Entropy) -> bool:
    """Whether ``H = -log p - <x, y>`` can be used: y = d(-log p)/dx of every row is known before the loss needs H.

    Only in the frozen pass, because others skip rows without a coefficient in that product. Not with a soft cap
    (the logits are not linear in x), in low precision (y is rounded: errors of 0.04 nats) or with a bias (its part
    would be missing).
    """
    is_linear = inputs.transform.softcap is None and inputs.bias is None
    return entropy == "metric" and name == "frozen" and is_linear and inputs.compute_dtype.itemsize > 2


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
    return "one-pass", f"{reasons[scope or 'token']}, so a chunk's gradient is taken while its logits are in memory"


def _chunk_size(inputs: HeadInputs, needs: Needs, tokens: int, options: HeadOptions) -> tuple[int, bool]:
    """Return the tokens of a chunk, and whether all were merged into one."""
    width, dtype = inputs.weight.shape[1], inputs.compute_dtype
    if options.chunk_size == "auto":
        size = auto_chunk(inputs.vocab.most_rows, dtype, inputs.hidden.device, options.chunk_bytes)
    else:
        size = int(options.chunk_size)
    # With several chunks a low-precision weight gradient is summed in fp32: 4 V D bytes, as many as 2 D more rows of
    # logits take.
    is_low = inputs.compute_dtype.itemsize == 2 and inputs.weight.dtype == inputs.compute_dtype
    if needs.weight and is_low and inputs.compute_dtype != torch.float16 and size < tokens <= size + 2 * width:
        return tokens, True
    return size, False


def auto_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """Return how many rows of logits fit `chunk_bytes`, or the device's budget (then at least `MIN_AUTO_CHUNK`)."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (vocabulary * dtype.itemsize))
    budget = CHUNK_BYTES.get(device.type, GPU_CHUNK_BYTES)
    return max(MIN_AUTO_CHUNK, budget // (vocabulary * dtype.itemsize))


def _groups(tokens: int, size: int, scope: Scope, ids: Tensor | None) -> Iterator[Group]:
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r} is unknown; choose {listed(SCOPES)}")
    if tokens == 0:
        yield (slice(0, 0),)  # the loss is called even then, for its metrics
        return
    if scope == "token":
        yield from ((span,) for span in equal_chunks(0, tokens, size))
        return
    if scope == "batch":
        yield tuple(equal_chunks(0, tokens, size))
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
) -> HeadPlan:
    """Estimate the cost of a loss that autograd differentiates chunk by chunk: logits, log-softmax, gather.

    Its inputs are `hidden` [..., D], `weight` [V, D] and `bias` [V] of the full vocabulary; `spans` are the chunks.

    Log-softmax, its gradient and that of the gather are alive at once: three times the logits of a chunk, in fp32 or
    wider.
    """
    needs, vocab = Needs.of_tensors(hidden, weight, bias), vocab_group(weight)
    tokens, rows = spans[-1].stop if spans else 0, max((span.stop - span.start for span in spans), default=0)
    weight_size = vocab.rows * weight.shape[1]
    sizes = (
        (hidden, needs.hidden, hidden.numel()),
        (weight, needs.weight, weight_size),
        (bias, needs.bias, vocab.rows),
    )
    gradients = sum(
        size * tensor.dtype.itemsize for tensor, is_needed, size in sizes if tensor is not None and is_needed
    )
    wide = max(4, hidden.dtype.itemsize)
    logits = rows * vocab.rows * (3 * wide + (hidden.dtype.itemsize if hidden.dtype.itemsize == 2 else 0))
    # The sums over chunks are fp32; the weight gradient of one chunk is alive at the same time.
    sums = (1 + (len(spans) > 1)) * needs.weight * weight_size * wide if name == "general" else 0
    products = 1 + needs.hidden + needs.weight
    return HeadPlan(
        name=name,
        why=why,
        groups=tuple((span,) for span in spans),
        tokens=tokens,
        positions=hidden.numel() // max(1, hidden.shape[-1]),
        retained=0,
        products=products,
        flops=products * 2 * tokens * weight_size,
        peak_bytes=gradients + (logits if needs else logits * 2 // 3) + sums,
        gradient_bytes=gradients,
        ranks=vocab.ranks,
        sent_bytes=vocab.is_split * tokens * (4 * wide + needs.hidden * hidden.shape[-1] * hidden.dtype.itemsize),
    )
