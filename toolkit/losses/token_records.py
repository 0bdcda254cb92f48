"""What a policy loss does to each token: its weight, its gradient coefficient, and what keeps it from learning.

Legend: B rows, T positions of a row, N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError, a_type
from toolkit.functional.ratios import bounded
from toolkit.head import TokenScores
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.kwargs import GRPOLossKwargs
from toolkit.losses.step.weights import ranks_in
from toolkit.losses.summation import weighted, weights_of

Status = Literal["learns", "unscored", "no_weight", "rejected", "no_advantage", "clipped_high", "clipped_low", "flat"]
STATUSES: dict[Status, str] = {
    "learns": "the policy loss has a gradient here",
    "unscored": "no token of the loss: prompt, padding or an observation",
    "no_weight": "its weight is 0, so nothing of the policy loss reaches it",
    "rejected": "a correction gave it the importance 0",
    "no_advantage": "its advantage is 0",
    "clipped_high": "the policy loss has no gradient here, and the ratio to the old policy is above 1",
    "clipped_low": "the policy loss has no gradient here, and the ratio to the old policy is below 1",
    "flat": "the policy loss has no gradient here, although the ratio is 1 and the advantage is not 0",
}
"""What a token is to the policy loss, and what that means; a record has the place in this table."""
CODES: dict[Status, int] = {name: index for index, name in enumerate(STATUSES)}


@dataclass(frozen=True)
class TokenRecords:
    """What the loss does to the tokens of a micro-batch, as its kwargs hold them; 0 where nothing is scored."""

    weight: Tensor
    """[B, T] of the token in the policy loss, over all micro-batches and ranks of the optimizer step."""
    coefficient: Tensor | None
    """[B, T] how much a step raises the token's log-probability (negative: lowers it), over its weight: minus the
    derivative of the loss by it. With ``policy_loss=vanilla`` and nothing clipped it is advantage times ratio. A KL
    term counts, an entropy bonus does not. None: the loss reads candidates besides the sampled tokens."""
    ratio: Tensor
    """[B, T] to the old policy."""
    status: Tensor
    """[B, T] int64, places in `STATUSES`."""


def token_records(context: GRPOLossContext, scores: TokenScores) -> TokenRecords:
    """Return what a policy loss makes of each token of a micro-batch, at the policy that `scores` are of.

    Args:
        context: of the micro-batch; for a loss of sequences or groups with the kwargs of whole ones, as for `forward`.
        scores: log-probabilities [B, T] of the labels, and entropies [B, T] if the loss reads them; without gradient.

    Raises:
        ConfigError: the loss has no policy loss.
    """
    if not isinstance(context, GRPOLossContext):
        raise ConfigError(f"records of tokens are made for policy losses, but this is {a_type(context)}")
    labels = context.loss_kwargs.shifted_labels
    positions = (labels.reshape(-1) != context.loss_cfg.ignore_idx).nonzero().squeeze(-1)
    taken = context.loss_kwargs.take(positions)
    flat = [None if each is None else each.detach().reshape(-1)[positions] for each in scores]
    assert flat[0] is not None
    records = _of_scored(context, TokenScores(flat[0], flat[1]), taken)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(labels.numel()).index_put((positions,), values).reshape(labels.shape)

    status = placed(records.status)
    status = status.where(labels != context.loss_cfg.ignore_idx, CODES["unscored"])
    coefficient = None if records.coefficient is None else placed(records.coefficient)
    return TokenRecords(placed(records.weight), coefficient, placed(records.ratio), status)


def _of_scored(context: GRPOLossContext, scores: TokenScores, taken: GRPOLossKwargs) -> TokenRecords:
    """Return the records of N scored tokens, [N] each."""
    logprobs = scores.logprobs
    weight = _policy_weight(context, taken).to(logprobs.dtype)
    old = logprobs if taken.old_logprobs is None else taken.old_logprobs.to(logprobs.dtype)
    ratio = bounded(logprobs - old, *context.loss_cfg.log_ratio_range).exp()
    if context.candidate_ids(taken) is not None or not len(logprobs):
        return TokenRecords(weight, None, ratio, torch.full_like(logprobs, CODES["learns"], dtype=torch.int64))
    of_policy, of_loss, importance = _derivatives(context, scores, taken)
    assert taken.advantages is not None
    rules: list[tuple[Status, Any]] = [  # the first that holds
        ("no_weight", weight == 0),
        ("rejected", torch.zeros_like(ratio, dtype=torch.bool) if importance is None else importance == 0),
        ("learns", of_policy != 0),
        ("no_advantage", taken.advantages == 0),
        ("clipped_high", ratio > 1),
        ("clipped_low", ratio < 1),
        ("flat", torch.ones_like(ratio, dtype=torch.bool)),
    ]
    status = torch.zeros_like(ratio, dtype=torch.int64)
    for name, holds in reversed(rules):
        status = status.masked_fill(holds, CODES[name])
    full = weight * ranks_in(context.loss_cfg.gradient_reduction)
    coefficient = (-of_loss / full).where(full != 0, 0.0)
    return TokenRecords(weight, coefficient, ratio, status)


def _policy_weight(context: GRPOLossContext, taken: GRPOLossKwargs) -> Tensor:
    """Return the weight of N tokens in the policy loss, [N]; it may be two terms, such as of good and of bad tokens."""
    terms = {term.name for term in context.policy_terms}
    weights = [term.coef * weight for term, weight in weights_of(context.terms, taken) if term.name in terms]
    return torch.stack(weights).sum(0) / ranks_in(context.loss_cfg.gradient_reduction)


def _derivatives(
    context: GRPOLossContext, scores: TokenScores, taken: GRPOLossKwargs
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the derivatives of the policy loss and of the whole loss by each log-probability, and the importance."""
    with torch.enable_grad():
        leaf = scores.logprobs.clone().requires_grad_()
        sums, importance = context.sums_of(TokenScores(leaf, scores.entropy), taken)
        totals = [weighted(context.policy_terms, sums), weighted(context.terms, sums)]
    of_policy, of_loss = (
        torch.autograd.grad(each, leaf, retain_graph=True)[0] if each.requires_grad else torch.zeros_like(leaf)
        for each in totals
    )
    return of_policy, of_loss, importance
