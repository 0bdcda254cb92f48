"""The scores of each token, and the direct way to compute them.

Legend: N tokens, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.logits import LogitTransform
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
    with_entropy: bool = False,
    candidate_ids: Tensor | Literal["all"] | None = None,
) -> TokenScores:
    """Score `labels` [N] with the logits of all of them at once, under plain autograd.

    The logits come from `hidden` [N, D], `weight` [V, D] and `bias` [V]. This is the reference that every pass is
    tested against, and what ``mode="eager"`` runs. It alone scores candidates: `candidate_ids` [N, K] int64, negative
    for none, or "all" for the full vocabulary in order.

    A weight whose vocabulary is split over ranks (see `toolkit.head.vocabulary`) gives logits of the local columns; the
    ranks then exchange 3 + K numbers a token, and the gradient [N, D] of the hidden states.

    Raises:
        DataError: all candidates of a split vocabulary are requested.
    """
    hidden = replicated(hidden)
    weight, bias, vocab = local_part(weight, bias)
    if vocab.is_split:
        return _split_scores(hidden, weight, labels, bias, vocab, transform, with_entropy, candidate_ids)
    all_logprobs = transform(_wide(F.linear(hidden, weight, bias))).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A logit of -inf has probability 0 and adds nothing to the entropy; 0 * -inf would be NaN.
    entropy = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e4)).sum(-1) if with_entropy else None
    return TokenScores(logprobs, entropy, _candidates(all_logprobs, candidate_ids))


def _split_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    vocab: VocabGroup,
    transform: LogitTransform,
    with_entropy: bool,
    candidate_ids: Tensor | Literal["all"] | None,
) -> TokenScores:
    """Score with the local columns of the logits; ``log p = z - log sum_r exp(z_r)`` with one sum over the ranks."""
    if isinstance(candidate_ids, str):
        raise DataError(
            f"the loss needs log-probabilities of all {vocab.vocabulary} tokens, but the head's vocabulary is split "
            f"over {vocab.ranks} ranks, which do not exchange logits; pass candidate_ids (the most likely ones)"
        )
    ids = labels.unsqueeze(-1)
    if candidate_ids is not None:
        ids = torch.cat([ids, candidate_ids], dim=-1)  # the label is the first candidate
    vocab.check_same(ids, ids.shape[-1], hidden.requires_grad, with_entropy)
    local_transform = replace(transform, vocab_mask=vocab.local_mask(transform.vocab_mask, weight.device))
    logits = local_transform(_wide(F.linear(UsedByRanks.apply(hidden, vocab), weight, bias)))
    logits = logits - vocab.max_(logits.detach().amax(-1)).unsqueeze(-1)
    exps = logits.exp()
    columns = ids - vocab.start
    is_local = (columns >= 0) & (columns < vocab.rows)
    id_logits = logits.gather(-1, columns.clamp(0, logits.shape[-1] - 1)).where(is_local, 0)
    parts = [exps.sum(-1, keepdim=True), id_logits]
    if with_entropy:
        parts.append((exps * logits.clamp(min=-1e4)).sum(-1, keepdim=True))
    sums = SumOverRanks.apply(torch.cat(parts, dim=-1), vocab)
    log_sum = sums[:, :1].log()
    entropy = log_sum.squeeze(-1) - sums[:, -1] / sums[:, 0] if with_entropy else None
    logprobs = sums[:, 1 : 1 + ids.shape[-1]] - log_sum
    return TokenScores(
        logprobs[:, 0],
        entropy,
        None if candidate_ids is None else logprobs[:, 1:].masked_fill(candidate_ids < 0, -torch.inf),
    )


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _candidates(all_logprobs: Tensor, ids: Tensor | Literal["all"] | None) -> Tensor | None:
    if ids is None or isinstance(ids, str):
        return None if ids is None else all_logprobs
    return all_logprobs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
