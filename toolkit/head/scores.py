"""The scores of each token, and the direct way to compute them.

Legend: N tokens, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.autograd import positional, refuses_second_derivative
from toolkit.head.logits import LogitTransform
from toolkit.head.options import Entropy
from toolkit.head.softmax import FAR, logs_of, nothing, row_stats, softmax
from toolkit.head.vocabulary import SumOverRanks, UsedByRanks, VocabGroup, local_part, replicated


@dataclass(frozen=True)
class TokenScores:
    """The scores of each token; unpacks to log-probabilities and entropies."""

    logprobs: Tensor
    """[...] log-probability of the label in nats, fp32 or wider."""
    entropy: Tensor | None = None
    """[...] entropy of the distribution in nats, fp32 or wider; None unless requested."""
    candidates: Tensor | None = None
    """[..., K] log-probabilities of other tokens, over the full vocabulary; -inf where there is no candidate. None
    unless requested."""

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.logprobs, self.entropy))


def eager_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    entropy: Entropy = False,
    candidate_ids: Tensor | Literal["all"] | None = None,
) -> TokenScores:
    """Score `labels` [N] with the logits of all of them at once; second derivatives and forward mode work, too.

    The logits come from `hidden` [N, D], `weight` [V, D] and `bias` [V]. This is the reference that every pass is
    tested against, and what ``mode="eager"`` runs. It alone scores candidates: `candidate_ids` [N, K] int64, negative
    for none, or "all" for the full vocabulary in order. The `entropy` has a gradient unless it is a "metric".

    A weight whose vocabulary is split over ranks (see `toolkit.head.vocabulary`) gives logits of the local columns; the
    ranks then exchange 4 + K numbers a token, 5 + K with entropy, and the gradient [N, D] of the hidden states.

    Raises:
        DataError: all candidates of a split vocabulary are requested.
        RuntimeError: on a second derivative with a split vocabulary.
    """
    hidden = replicated(hidden)
    weight, bias, vocab = local_part(weight, bias)
    if vocab.is_split:
        if isinstance(candidate_ids, str):
            raise DataError(
                f"the loss needs log-probabilities of all {vocab.vocabulary} tokens, but the head's vocabulary is "
                f"split over {vocab.ranks} ranks, which do not exchange logits; pass candidate_ids (the most likely "
                "ones)"
            )
        ids = labels.unsqueeze(-1) if candidate_ids is None else torch.cat([labels.unsqueeze(-1), candidate_ids], -1)
        vocab.check_same(ids, ids.shape[-1], hidden.requires_grad, bool(entropy))
        transform = replace(transform, vocab_mask=vocab.local_mask(transform.vocab_mask, weight.device))
        hidden = UsedByRanks.apply(hidden, vocab)
    is_excluded = vocab.excludes(transform.vocab_mask)
    logits = transform(wide_logits(hidden, _saveable(weight), bias if bias is None else _saveable(bias)))
    has_candidates = candidate_ids is not None
    rows = torch.arange(labels.shape[0], device=labels.device)
    scores = LogitScores.apply(logits, labels, rows, vocab, is_excluded, entropy, has_candidates)
    logprobs, entropies, log_sum, largest, *_ = scores
    if candidate_ids is None:
        return TokenScores(logprobs, entropies)
    if isinstance(candidate_ids, str):
        candidates = logits - largest.unsqueeze(1)
    else:
        columns = candidate_ids - vocab.start
        is_local = (columns >= 0) & (columns < vocab.rows)
        candidates = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)) - largest.unsqueeze(1)
        if vocab.is_split:
            candidates = SumOverRanks.apply(candidates.where(is_local, 0), vocab)
        candidates = candidates.masked_fill(candidate_ids < 0, -torch.inf)
    return TokenScores(logprobs, entropies, candidates - log_sum.unsqueeze(1))


def logit_copies(
    transform: LogitTransform,
    entropy: Entropy = False,
    candidate_ids: Tensor | Literal["all"] | None = None,
    *,
    has_gradient: bool = True,
) -> int:
    """Return how many fp32 tensors of the size of the logits `eager_scores` and its backward hold at most at once.

    `candidate_ids` are [N, K], as there. Two are the logits and their probabilities, later those and the gradient.
    """
    is_scaled, has_cap = transform.scale != 1, transform.softcap is not None
    num_after = (isinstance(transform.temperature, Tensor) or transform.temperature != 1) + (
        transform.vocab_mask is not None
    )
    # The caller's logits, an operation's input and its result; a soft cap keeps its tanh for backward.
    in_transform = min(3, 1 + is_scaled + num_after)
    if has_cap:
        in_transform = 4 if is_scaled or (has_gradient and num_after) else 3
    if not has_gradient:
        return max(in_transform, 2 + bool(entropy), 4 if isinstance(candidate_ids, str) else 0)
    copies = 2 + {False: 0, "metric": 1, True: 3}[entropy]
    if candidate_ids is not None:
        copies = max(4, copies + (not isinstance(candidate_ids, str) and entropy is True))
    return max(in_transform, copies + has_cap)


class LogitScores(torch.autograd.Function):
    """Scores from logits, exact as `toolkit.head.softmax` explains; keeps the probabilities, as log-softmax does.

    Its backward consists of differentiable operations on its own outputs, so it can be differentiated again.
    """

    @staticmethod
    @positional
    def forward(
        logits: Tensor,
        labels: Tensor,
        rows: Tensor,
        vocab: VocabGroup,
        is_excluded: bool,
        entropy: Entropy,
        has_candidates: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return log-probabilities, entropies and ``log sum exp(logits - largest)``, and what backward needs.

        Takes `logits` [N, V], `labels` [N] and `rows` [N], 0 to N - 1; `is_excluded`: no local column may be sampled.

        Returns:
            Log-probabilities, entropies, log sums and largest logits, [N] each; probabilities [N, V]; the column of the
            largest local logit and its log-probability, [N] each. None for entropies that are not asked for, for log
            sums and largest logits without candidates, and for the last two unless entropies have a gradient.
        """
        at, with_gap = vocab.labels(labels, rows), bool(entropy)
        if is_excluded:
            probs, sums = nothing(torch.empty_like(logits), with_gap=with_gap)
        else:
            probs, sums = softmax(logits, rows=rows, with_gap=with_gap)
        stats = row_stats(sums, at.take(logits), at, vocab)
        probs.mul_(stats.share.unsqueeze(1))
        of_candidates = (stats.log_sum, stats.largest.clone()) if has_candidates else (None, None)
        of_entropies = (stats.top, stats.top_logprobs) if entropy is True else (None, None)
        return stats.logprobs, stats.entropy, *of_candidates, probs, *of_entropies

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the outputs for the derivatives."""
        _, labels, rows, ctx.vocab, _, entropy, ctx.has_candidates = inputs
        logprobs, entropies, _, largest, probs, top, top_logprobs = output
        ctx.set_materialize_grads(False)
        fixed = (largest, top, entropies if entropy == "metric" else None)
        ctx.mark_non_differentiable(*[values for values in fixed if values is not None])
        saved = (labels, rows, logprobs, entropies if entropy is True else None, probs, top, top_logprobs)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient of the logits, given those of the outputs of `forward`."""
        compute = refuses_second_derivative(_logit_gradient) if ctx.vocab.is_split else _logit_gradient
        return (*compute(ctx, *grads), None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the derivatives of the outputs along a direction of the logits [N, V].

        Raises:
            RuntimeError: the vocabulary is split.
        """
        if ctx.vocab.is_split:
            raise RuntimeError("the head does not support forward-mode derivatives with a vocabulary split over ranks")
        labels, _, _, entropies, probs, top, top_logprobs = ctx.saved_tensors
        slope = tangents[0]
        mean = (probs * slope).sum(1)
        of_label = (probs * (slope.gather(1, labels.unsqueeze(1)) - slope)).sum(1)
        of_entropy = of_top = None
        if entropies is not None:
            of_entropy = -(probs * (logs_of(probs, top, top_logprobs) + entropies.unsqueeze(1)) * slope).sum(1)
            of_top = slope.gather(1, top.unsqueeze(1)).squeeze(1) - mean
        of_log_sum = mean if ctx.has_candidates else None
        return of_label, of_entropy, of_log_sum, None, probs * (slope - mean.unsqueeze(1)), None, of_top


def _logit_gradient(
    ctx: Any,
    of_logprobs: Tensor | None,
    of_entropies: Tensor | None,
    of_log_sum: Tensor | None,
    _largest: None,
    of_probs: Tensor | None,
    _top: None,
    of_top: Tensor | None,
) -> tuple[Tensor]:
    """Return the gradient [N, V] of the logits; those of probabilities and top are for second derivatives alone."""
    labels, rows, logprobs, entropies, probs, top, top_logprobs = ctx.saved_tensors
    at = ctx.vocab.labels(labels, rows)
    of_logprobs = torch.zeros_like(logprobs) if of_logprobs is None else of_logprobs
    of_column = -of_logprobs
    of_label = of_column * logprobs.expm1()  # 1 - p would cancel
    if of_log_sum is not None:
        of_column = of_column + of_log_sum
        of_label = of_label + of_log_sum * logprobs.exp()
    grads = probs * of_column.unsqueeze(1)
    if of_entropies is not None:
        logs = logs_of(probs, top, top_logprobs)
        grads = grads - probs * (logs + entropies.unsqueeze(1)) * of_entropies.unsqueeze(1)
        of_label = of_label - of_entropies * logprobs.exp() * (logprobs.clamp(min=-FAR) + entropies)
    grads = at.put_(grads, of_label)
    if of_probs is not None:
        grads = grads + probs * (of_probs - (of_probs * probs).sum(1, keepdim=True))
    if of_top is not None:
        grads = (grads - probs * of_top.unsqueeze(1)).index_put_((rows, top), of_top, accumulate=True)
    return (grads,)


def wide_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits [N, V] in fp32 or wider of `hidden` [N, D], `weight` [V, D] and `bias` [V] of any dtype."""
    is_same = bias is None or bias.dtype == hidden.dtype
    logits = F.linear(hidden, weight, bias if is_same else None)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return logits if is_same or bias is None else logits + bias.to(logits.dtype)


def _saveable(tensor: Tensor) -> Tensor:
    """Return `tensor` [...], or a copy if it was made in inference mode: autograd cannot save such a tensor."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
