"""The softmax of rows of logits, with statistics that are exact however far one logit leads.

Where a logit leads by more than 16 nats, fp32 rounds its probability to 1, the logarithm to 0, and 1 - p to 0. So the
largest logit z_top is left out of the sum of exponentials. With T the sum of exp(z_i - z_top) over the other columns

``log p = (z - z_top) - log(1 + T)`` and ``H = log(1 + T) + sum_i p_i (z_top - z_i)``.

All terms of each sum have the same sign, so nothing cancels. Where the vocabulary is split over ranks, z_top and T are
those of all ranks.

Legend: n tokens, V vocabulary (local columns where it is split).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from toolkit.head.vocabulary import LocalLabels, VocabGroup

FAR = 1e4
"""Nats between two logits at which exp(-FAR) is 0 in every dtype; a logit of -inf is taken to be as far."""
BUCKET = 64
"""Columns of which a CPU finds the largest value first, and then its place in the best bucket."""


@dataclass(frozen=True)
class LocalSums:
    """What the local columns tell of each row, [n] each."""

    top: Tensor
    """Column of the largest logit, int64."""
    largest: Tensor
    """The largest logit."""
    others: Tensor
    """Sum of exp(z - largest) over the other columns."""
    mean_gap: Tensor | None
    """Mean of largest - z under the local softmax; None unless entropies are requested."""
    sum: Tensor
    """Sum of the probabilities as `softmax` returns them: PyTorch's is off by 3e-5 if V is 150,000."""

    @classmethod
    def joined(cls, parts: Sequence[LocalSums]) -> LocalSums:
        """Return the sums of consecutive blocks of rows as one."""
        if len(parts) == 1:
            return parts[0]
        blocks: Any = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        joined: Any = (None if values[0] is None else torch.cat(values) for values in blocks)
        return cls(*joined)


@dataclass(frozen=True)
class RowStats:
    """Statistics of each row over the full vocabulary, [n] in fp32 or wider."""

    logprobs: Tensor
    """Log-probability of the label."""
    largest: Tensor
    """The largest logit, of all ranks."""
    log_sum: Tensor
    """log of the sum of exp(logits - largest)."""
    top: Tensor
    """Column of the largest local logit, int64."""
    behind: Tensor | None
    """How far the largest local logit is below that of all ranks, in nats; None: it is that one."""
    entropy: Tensor | None
    share: Tensor
    """What the softmax of the local columns is still to be multiplied by: their probability, over the sum of it."""

    @property
    def lse(self) -> Tensor:
        """Log of the sum of exp(logits), [n]."""
        return self.largest + self.log_sum

    @property
    def top_logprobs(self) -> Tensor:
        """Log-probability of the largest local logit, at least -FAR, [n]."""
        logprobs = -self.log_sum if self.behind is None else -self.behind - self.log_sum
        return logprobs.clamp(min=-FAR)

    def select(self, rows: Tensor | slice) -> RowStats:
        """Return the statistics of `rows`, [k] indices or a slice."""
        values: Any = (getattr(self, field.name) for field in fields(self))
        selected: Any = (value if value is None else value[rows] for value in values)
        return RowStats(*selected)


def softmax(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    gaps: Tensor | None = None,
    with_gap: bool = False,
) -> tuple[Tensor, LocalSums]:
    """Return the softmax of `logits` [n, V], and the sums of each row; sums over the others of a row are exact.

    `rows` [n] are the numbers from 0 to n - 1, if the caller has them; `out` [n, V] is where the softmax is written,
    possibly `logits` themselves; `gaps` [n, V] is scratch memory for the mean gap (`with_gap`).
    """
    largest, top = _largest(logits)
    if with_gap:
        gaps = torch.sub(largest.unsqueeze(1), logits, out=gaps).clamp_(max=FAR)  # 0 * inf would be NaN
    probs = torch.softmax(logits, -1, out=out)
    at = torch.arange(top.shape[0], device=top.device) if rows is None else rows, top
    prob = probs[at]
    others = probs.index_put_(at, torch.zeros_like(prob)).sum(1)
    total = others + prob
    mean_gap = gaps.mul_(probs).sum(1) / total if with_gap and gaps is not None else None
    return probs.index_put_(at, prob), LocalSums(top, largest, others / prob, mean_gap, total)


def nothing(probs: Tensor, *, with_gap: bool) -> tuple[Tensor, LocalSums]:
    """Return what `softmax` does, in `probs` [n, V], for the logits of a rank whose columns are all excluded."""
    zero = probs.zero_()[:, 0].clone()
    return probs, LocalSums(zero.long(), zero - torch.inf, zero, zero if with_gap else None, zero + 1)


def row_stats(sums: LocalSums, logits: Tensor, labels: LocalLabels, vocab: VocabGroup) -> RowStats:
    """Return the statistics of full rows from those of local columns; 4 or 5 numbers a token are sent.

    `logits` [n] are those of the labels. With e_r the sum of exponentials of rank r, d_r how far its largest logit is
    below that of all, and G_r its mean gap: the probability of its columns is e_r / (1 + T), and
    ``H = log(1 + T) + sum_r e_r (G_r + d_r) / (1 + T)``. One rank has d = 0 and e = 1 + T.
    """
    if not vocab.is_split:
        log_sum = sums.others.log1p()
        return RowStats(
            logprobs=logits - sums.largest - log_sum,
            largest=sums.largest,
            log_sum=log_sum,
            top=sums.top,
            behind=None,
            entropy=None if sums.mean_gap is None else log_sum + sums.mean_gap,
            share=sums.sum.reciprocal(),
        )
    top = vocab.max_(sums.largest.clone())
    behind = top - sums.largest
    scale = (-behind).exp()
    total = scale * (1 + sums.others)
    label = logits - top
    parts = [
        scale * sums.others + scale.where(behind > 0, 0),
        (behind == 0).to(scale.dtype),  # ranks with the same largest logit: all but one of them count as others
        label if labels.is_local is None else label.where(labels.is_local, 0),
    ]
    if sums.mean_gap is not None:
        parts.append((total * (sums.mean_gap + behind)).where(total != 0, 0))  # 0 * inf on a rank without columns
    over_ranks = vocab.sum_(torch.stack(parts))
    others = over_ranks[0] + (over_ranks[1] - 1)
    log_sum = others.log1p()
    return RowStats(
        logprobs=over_ranks[2] - log_sum,
        largest=top,
        log_sum=log_sum,
        top=sums.top,
        behind=behind,
        entropy=None if sums.mean_gap is None else log_sum + over_ranks[3] / (1 + others),
        share=total / (1 + others) / sums.sum,
    )


def logs_of(probs: Tensor, top: Tensor, top_logprobs: Tensor, out: Tensor | None = None) -> Tensor:
    """Return log p of `probs` [n, V], in `out` [n, V], with `top_logprobs` [n] at columns `top` [n].

    p = 0 gives a finite number.
    """
    logs = torch.clamp(probs, min=torch.finfo(probs.dtype).tiny, out=out).log_()
    return logs.index_put_((torch.arange(len(top), device=top.device), top), top_logprobs)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each row and its column, [n] each; ``max(1)`` takes 20x the time of ``amax`` on a CPU."""
    columns = logits.shape[1]
    if logits.device.type != "cpu" or columns < 2 * BUCKET:
        values, top = logits.max(1)
        return values, top
    in_buckets = logits[:, : columns - columns % BUCKET].unflatten(1, (-1, BUCKET)).amax(2)
    in_buckets = torch.cat([in_buckets, logits[:, -BUCKET:].amax(1, keepdim=True)], 1)
    first = (in_buckets.argmax(1, keepdim=True) * BUCKET).clamp(max=columns - BUCKET)
    bucket = logits.gather(1, first + torch.arange(BUCKET, device=logits.device))
    values, inside = bucket.max(1)
    return values, first.squeeze(1) + inside
