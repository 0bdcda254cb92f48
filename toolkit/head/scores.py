"""What the head says of each token, and the plain way to get it.

Legend: N tokens, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.head.logits import LogitTransform


@dataclass(frozen=True)
class TokenScores:
    """What the head says of each token; unpacks to log-probabilities and entropies."""

    logprobs: Tensor
    """[...] log-probability of the label in nats, fp32 or wider."""
    entropy: Tensor | None = None
    """[...] entropy of the distribution in nats, fp32 or wider; None unless asked for."""
    candidates: Tensor | None = None
    """[..., K] log-probabilities of other tokens, over the full vocabulary; -inf where there is no candidate. None
    unless asked for."""

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
    """Score [N] labels from [N, D] hidden states with the logits of all of them at once, under plain autograd.

    The reference that every pass is tested against, and what ``mode="eager"`` runs. It alone scores candidates:
    `candidate_ids` [N, K] int64, negative for none, or "all" for the whole vocabulary in order.
    """
    logits = F.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    all_logprobs = transform(logits).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A logit of -inf has probability 0 and adds nothing to the entropy; 0 * -inf would be NaN.
    entropy = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e4)).sum(-1) if with_entropy else None
    return TokenScores(logprobs, entropy, _candidates(all_logprobs, candidate_ids))


def _candidates(all_logprobs: Tensor, ids: Tensor | Literal["all"] | None) -> Tensor | None:
    if ids is None or isinstance(ids, str):
        return None if ids is None else all_logprobs
    return all_logprobs.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
