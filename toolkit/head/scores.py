"""What the head says of each token, and the plain way to get it. Legend: N tokens, D hidden width, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.head.logits import LogitTransform


class TokenScores(NamedTuple):
    """What the head says of each token."""

    logprobs: Tensor
    """[...] log-probability of the label in nats, fp32 or wider."""
    entropy: Tensor | None
    """[...] entropy of the distribution in nats, fp32 or wider; None unless asked for."""


def eager_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    with_entropy: bool = False,
) -> TokenScores:
    """Score [N] labels from [N, D] hidden states with the logits of all of them at once, under plain autograd.

    The reference that every pass is tested against, and what ``mode="eager"`` runs.
    """
    logits = F.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    all_logprobs = transform(logits).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A logit of -inf has probability 0 and adds nothing to the entropy; 0 * -inf would be NaN.
    entropy = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e4)).sum(-1) if with_entropy else None
    return TokenScores(logprobs, entropy)
