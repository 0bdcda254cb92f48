"""Logits to probabilities to gradient, in place, a block of rows at a time.

A block fits the processor's cache, so its passes cost little compared to the products (0.9 ns an element against about
80 for three products of width 1024). Nothing as large as a chunk is ever allocated. ``logsumexp`` is not used: on a
CPU it takes 8x the time of an in-place softmax.

Where the vocabulary is split over ranks, a block holds the softmax over local columns; a row's local share of the
total probability, known after the ranks communicate, is multiplied in when its gradient is taken.

Legend: n tokens of a chunk, k some of them, V vocabulary (local columns where it is split).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from toolkit.head.logits import LogitTransform
from toolkit.head.softmax import FAR, LocalSums, RowStats, logs_of, nothing, row_stats, softmax
from toolkit.head.vocabulary import LocalLabels, VocabGroup

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Elements of a block of rows: 2 MB in fp32, a part of the cache."""
GPU_BLOCK_ELEMENTS = 2**25


class Kernel:
    """The passes over logits between the products; allocates its scratch memory once and reuses it."""

    def __init__(
        self, transform: LogitTransform, bias: Tensor | None, vocab: VocabGroup, *, wide: torch.dtype, rows: int
    ) -> None:
        """Make a kernel for chunks of at most `rows` tokens; a per-token temperature is passed with each chunk.

        `bias` [V] is added to the logits first; `wide` is the dtype of the arithmetic.
        """
        self._softcap, self._vocab_mask = transform.softcap, transform.vocab_mask
        self._bias = None if bias is None else bias.detach().to(wide)
        self._wide, self._vocab, self._rows = wide, vocab, rows
        self._vocabulary = max(1, vocab.rows)
        self._is_excluded = vocab.excludes(self._vocab_mask)
        self._scratch: dict[int, Tensor] = {}

    def probabilities_(
        self,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        *,
        with_entropy: bool,
        known: RowStats | None = None,
    ) -> RowStats:
        """Turn raw `logits` [n, V], without the bias, into probabilities in place; return statistics of each row.

        `targets` [n] are the labels, `transform` is that of these rows; `known` is what an earlier call returned for
        them where the vocabulary is split, so ranks need not communicate again.
        """
        before, after = transform.row_factors()
        with_entropy = with_entropy and known is None
        label_logits, parts = logits.new_empty(len(targets), dtype=self._wide), []
        for span, block in self._wide_blocks_(logits):
            if self._bias is not None:
                block.add_(self._bias)
            _scale_(block, before, span)
            if self._softcap is not None:
                block.div_(self._softcap).tanh_().mul_(self._softcap)
                _scale_(block, after, span)
            if self._vocab_mask is not None:
                block.masked_fill_(~self._vocab_mask, -torch.inf)
            label_logits[span] = self._vocab.labels(targets[span]).take(block)
            parts.append(self._softmax_(block, with_entropy))
        if known is not None:
            return known
        return row_stats(LocalSums.joined(parts), label_logits, self._vocab.labels(targets), self._vocab)

    def gradient_(
        self,
        probs: Tensor,
        targets: Tensor,
        stats: RowStats,
        transform: LogitTransform,
        logprob_grads: Tensor | None,
        entropy_grads: Tensor | None,
    ) -> Tensor | None:
        """Turn probabilities in place into the gradient of the raw logits, up to a factor for each row.

        Without softcap and entropy gradient that is ``p - onehot``, whatever the upstream gradient: it stays outside,
        so the chunk is not read again.

        `probs` [n, V] and `stats` are from `probabilities_`, with the same `targets` [n] and `transform`;
        `logprob_grads` [n] and `entropy_grads` [n] are the upstream gradients. Without the former it is -1.

        Returns:
            [n] factor of each row (a row's gradient is ``factor * probs[row]``), None for 1.
        """
        before, after = transform.row_factors()
        factor = before if self._softcap is None else before * after
        if self._softcap is None and entropy_grads is None:
            share = stats.share
            if self._vocab.is_split:  # the softmax over local columns becomes their part of the full one
                for span, block in self._wide_blocks_(probs):
                    block.mul_(share[span].unsqueeze(1))
                share = torch.ones_like(share)
            # p - 1 from log p, not from p as stored: bf16 has no number between 0.996 and 1.
            self._vocab.labels(targets).put_(probs, (stats.logprobs.expm1() / share).to(probs.dtype))
            return (share if logprob_grads is None else -logprob_grads * share) * factor
        size: Tensor | None = None
        if entropy_grads is None:
            size = None if logprob_grads is None else -logprob_grads
            logprob_grads = torch.full_like(stats.logprobs, -1.0)
        else:
            # Coefficients of a mean over many tokens are too small for fp16: the larger one of a row becomes 1.
            assert logprob_grads is not None
            size = logprob_grads.abs().maximum(entropy_grads.abs())
            size = size.where(size > 0, 1.0)
            logprob_grads, entropy_grads = logprob_grads / size, entropy_grads / size
        for span, block in self._wide_blocks_(probs):
            labels = self._vocab.labels(targets[span])
            self._gradient_block_(block, span, labels, stats, transform, logprob_grads, entropy_grads)
        return _row_factor(factor, size, stats.logprobs)

    def add_bias_gradient(self, total: Tensor, logit_grads: Tensor, factor: Tensor | None) -> None:
        """Add the column sums of `logit_grads` [n, V], each row times its `factor` [n] (None: 1), to `total` [V]."""
        for span, rows in self._blocks(logit_grads):
            block = self._widened(rows)
            total.add_(block.sum(0) if factor is None else torch.mv(block.t(), factor[span].to(block.dtype)))

    def _softmax_(self, block: Tensor, with_entropy: bool) -> LocalSums:
        """Take the softmax of a block over the local columns, in place."""
        if self._is_excluded:
            return nothing(block, with_gap=with_entropy)[1]
        gaps = self._like(block, 1) if with_entropy else None
        return softmax(block, out=block, gaps=gaps, with_gap=with_entropy)[1]

    def _gradient_block_(
        self,
        block: Tensor,
        span: slice,
        labels: LocalLabels,
        stats: RowStats,
        transform: LogitTransform,
        logprob_grads: Tensor,
        entropy_grads: Tensor | None,
    ) -> None:
        """``block = (g_l (onehot - p) - g_H p (log p + H)) * d softcap``, with p = block."""
        stats = stats.select(span)
        block.mul_(stats.share.unsqueeze(1))
        top_logprobs = stats.top_logprobs
        logs = logs_of(block, stats.top, top_logprobs, self._like(block, 1))
        labels.put_(logs, stats.logprobs.clamp(min=-FAR))
        slope = self._cap_slope(logs, span, stats, transform)
        upstream = logprob_grads[span]
        exact = -upstream * stats.logprobs.expm1()
        if entropy_grads is None:
            block.mul_(-upstream.unsqueeze(1))
        else:
            assert stats.entropy is not None
            weight = entropy_grads[span]
            # The probability as stored may be rounded to 1 in bf16.
            block.index_put_((labels.at[0], stats.top), top_logprobs.exp())
            block.mul_(logs.mul_(-weight.unsqueeze(1)).sub_((upstream + weight * stats.entropy).unsqueeze(1)))
            exact -= weight * stats.logprobs.exp() * (stats.logprobs.clamp(min=-FAR) + stats.entropy)
        labels.put_(block, exact)  # upstream - upstream * p would cancel
        if slope is not None:
            block.mul_(slope)

    def _cap_slope(self, logs: Tensor, span: slice, stats: RowStats, transform: LogitTransform) -> Tensor | None:
        """Return d softcap(z) / dz = 1 - (softcap(z) / softcap)^2, with the capped logit recovered from log p."""
        if self._softcap is None:
            return None
        _, after = transform.row_factors()
        back = 1 / (after[span].unsqueeze(1) if isinstance(after, Tensor) else after) / self._softcap
        capped = torch.add(logs, stats.lse.unsqueeze(1), out=self._like(logs, 2))
        return capped.mul_(back).square_().neg_().add_(1).clamp_min_(0)

    def _blocks(self, chunk: Tensor) -> Iterator[tuple[slice, Tensor]]:
        size = block_rows(chunk.shape[0], self._vocabulary, chunk.device.type)
        for start in range(0, max(1, chunk.shape[0]), size):
            yield slice(start, start + size), chunk[start : start + size]

    def _wide_blocks_(self, chunk: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks of `chunk` in fp32 or wider; what the caller makes of a block is written back."""
        for span, rows in self._blocks(chunk):
            block = self._widened(rows)
            yield span, block
            if rows is not block:
                rows.copy_(block)

    def _widened(self, rows: Tensor) -> Tensor:
        """Return `rows` themselves in fp32 and fp64, else a wide copy in scratch memory."""
        return rows if rows.dtype == self._wide else self._like(rows, 0).copy_(rows)

    def _like(self, rows: Tensor, index: int) -> Tensor:
        """Return scratch memory number `index` in the shape of `rows`."""
        if index not in self._scratch:
            most = block_rows(self._rows, self._vocabulary, rows.device.type)
            self._scratch[index] = rows.new_empty(most, self._vocabulary, dtype=self._wide)
        return self._scratch[index][: rows.shape[0]]


def block_rows(rows: int, vocabulary: int, device: str) -> int:
    """Return how many rows are processed at a time."""
    block = BLOCK_ELEMENTS.get(device, GPU_BLOCK_ELEMENTS) // vocabulary
    return max(1, min(rows, -(-max(1, block) // 8) * 8))  # a multiple of 8, for the threads


def _scale_(block: Tensor, factor: float | Tensor, span: slice) -> None:
    if isinstance(factor, Tensor):
        block.mul_(factor[span].to(block.dtype).unsqueeze(1))
    elif factor != 1:
        block.mul_(factor)


def _row_factor(factor: float | Tensor, upstream: Tensor | None, like: Tensor) -> Tensor | None:
    if upstream is not None:
        return upstream * factor
    if isinstance(factor, Tensor):
        return factor.to(like.dtype)
    return None if factor == 1 else torch.full_like(like, factor)
