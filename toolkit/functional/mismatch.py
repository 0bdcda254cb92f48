"""Corrections for sampling from one policy and training another: importance weights, clamps and rejections.

The sampler's probabilities q differ from the trainer's p, by numerics or because the weights have changed since. Each
correction makes four choices: the unit (granularity), what is measured on it (statistic and reduction), what is done
with the result (action), and which tokens the loss is divided by (denominator). Corrections are multiplied.

Legend: N selected tokens, U units (tokens, turns or sequences), C corrections. All results are float64, without
gradient. With finite log-probabilities every result is finite, also where a product of ratios is e^-107.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.functional.kl import KL_VALUES
from toolkit.functional.names import MAX_LOG_RATIO
from toolkit.functional.segments import segment_mean, segment_sum

LARGEST_LOG = 500.0
"""Bound on |log ratio| in nats where the user sets none: sums and products of a few e^500 still fit float64."""
LARGEST_WEIGHT = 1e30
"""Bound on a product of weights: times a token's loss it still fits fp32."""
SMALLEST_MEAN = 1e-8
"""Weights with a smaller mean are not divided by it (as in verl)."""
CLAMPS = ("clamp", "clamp_upper")
ROUNDING = 16.0
"""How many resolutions of a log-probability, in nats, a log ratio may lie outside an inclusive bound: fp32 rounds two
log-probabilities of up to 16 nats by as much."""


class Correction(Protocol):
    """The fields of a correction; `CorrectionConfig` documents each of them and its choices."""

    granularity: Any
    statistic: Any
    reduction: Any
    action: Any
    lower: float | None
    upper: float | None
    denominator: Any
    normalize: bool
    advantages: Any
    between: Any
    max_log_ratio: float | None
    max_token_log_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class MismatchTerms:
    """The tensors that corrections read, selected tokens only; turns and sequences must be complete."""

    rollout_logprobs: Tensor
    """[N] log q, in nats, of the sampled tokens as the sampler reported them; finite."""
    old_logprobs: Tensor | None = None
    """[N] under the trainer's policy before the optimizer step."""
    current_logprobs: Tensor | None = None
    """[N] under the policy in training, known only in the forward."""
    advantages: Tensor | None = None
    """[N], for corrections that depend on their sign."""
    sequence_ids: Tensor | None = None
    """[N] int64, the sequence of each token."""
    num_sequences: int = 0
    turn_ids: Tensor | None = None
    """[N] int64, the turn of each token (`segments.turn_ids`)."""
    num_turns: int = 0

    def policies(self, between: str) -> tuple[Tensor, Tensor]:
        """Return log p and log q, [N] each, of "old_rollout", "current_rollout" or "current_old"."""
        first, second = between.split("_")
        return self._require(f"{first}_logprobs"), self._require(f"{second}_logprobs")

    def units(self, granularity: str) -> tuple[Tensor | None, int]:
        """Return the unit of each token, [N] int64, and how many units there are; (None, 0) for "token"."""
        if granularity == "token":
            return None, 0
        if granularity == "segment":
            return self._require("turn_ids"), self.num_turns
        return self._require("sequence_ids"), self.num_sequences

    def has_sign(self, advantages: str, between: str) -> Tensor | bool:
        """Return where the advantage has the sign that a correction asks for: [N] bool, or True for "any"."""
        if advantages == "any":
            return True
        values = self._require("advantages")
        if advantages == "widening":
            return values.sign() * torch.sub(*self.policies(between)).sign() > 0
        return values < 0 if advantages == "negative" else values > 0

    def _require(self, name: str) -> Tensor:
        values = getattr(self, name)
        if values is None:
            raise DataError(f"a correction needs {name}, but this batch has none; give one for each scored token")
        assert isinstance(values, Tensor)
        return values


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """The result of the corrections for each token, [N]."""

    weights: Tensor
    """float64 factor of the token's loss, 0 where rejected, at most `LARGEST_WEIGHT`."""
    is_kept: Tensor
    """bool, False where some correction rejected the token."""
    in_denominator: Tensor
    """bool, False where a correction with denominator "survivors" rejected the token."""
    is_hit: tuple[Tensor, ...]
    """For each correction, bool: whether it rejected the token or clamped its ratio."""


# ------------------------------------------------------------------------------------------------ statistics

TOKEN_STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1": lambda log_ratio, p, q: KL_VALUES["k1"](-log_ratio),
    "k2": lambda log_ratio, p, q: KL_VALUES["k2"](-log_ratio),
    "k3": lambda log_ratio, p, q: KL_VALUES["k3"](-log_ratio),
    "tv": lambda log_ratio, p, q: (p.exp() - q.exp()).abs(),
    "prob_diff": lambda log_ratio, p, q: p.exp() - q.exp(),
    "ratio_tv": lambda log_ratio, p, q: log_ratio.expm1().abs(),
}
"""Of (log p - log q, log p, log q), [N] each; "ratio" is not listed because it is reduced before exp."""


SENSITIVITY: dict[str, Callable[[float], float]] = {
    "ratio": lambda bound: bound,
    "k1": lambda bound: 1.0,
    "k2": lambda bound: math.sqrt(2 * bound),
    "k3": lambda bound: math.sqrt(2 * bound) + bound,
    "tv": lambda bound: 1.0,
    "prob_diff": lambda bound: 1.0,
    "ratio_tv": lambda bound: 1 + bound,
}
"""By how much each statistic changes at most, where it has the size of a bound, if d changes by one nat."""


@torch.no_grad()
def unit_statistic(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    ids: Tensor | None,
    num: int,
    *,
    statistic: str,
    reduction: str | None,
    max_log_ratio: float | None = MAX_LOG_RATIO,
    max_token_log_ratio: float | None = None,
) -> Tensor:
    """Measure how far two policies are apart on each unit: [N] float64, each token with the value of its unit.

    With d = log p - log q of a sampled token: ratio e^d, k1 -d, k2 d^2/2, k3 e^d - 1 - d (all three estimate
    KL(q || p) on samples of q), tv |p - q|, prob_diff p - q, ratio_tv |e^d - 1|. The ratio of a unit is reduced in log
    space: the product ("sum"), the geometric mean ("mean"), the largest ("max"). Others are reduced directly.

    Args:
        trainer_logprobs: [N] log p in nats.
        rollout_logprobs: [N] log q in nats.
        ids: [N] int64, the unit of each token; None: each token by itself.
        num: U.
        statistic: "ratio" or a name in `TOKEN_STATISTICS`.
        reduction: "sum", "mean" or "max"; not read where `ids` is None.
        max_log_ratio: bound in nats on |d| in k1, k2, k3, ratio_tv, and on the log of the reduced ratio, before exp;
            None: `LARGEST_LOG`.
        max_token_log_ratio: bound in nats on |d| of each token before anything else; None: no bound.

    Source: k1, k2, k3: Schulman 2020, "Approximating KL divergence". Product and geometric mean: Liu et al. 2025,
    "When speed kills stability". |p - q| is the total variation of "this token or another one".
    """
    p, q = trainer_logprobs.double(), rollout_logprobs.double()
    bound = LARGEST_LOG if max_log_ratio is None else max_log_ratio
    log_ratio = p - q
    if max_token_log_ratio is not None:
        log_ratio = log_ratio.clamp(-max_token_log_ratio, max_token_log_ratio)
    if statistic == "ratio":
        return _reduced(log_ratio, ids, num, reduction).clamp(-bound, bound).exp()
    values = TOKEN_STATISTICS[statistic](log_ratio.clamp(-bound, bound), p, q)
    return _reduced(values, ids, num, reduction)


def _reduced(values: Tensor, ids: Tensor | None, num: int, reduction: str | None) -> Tensor:
    if ids is None:
        return values
    if reduction == "max":
        lowest = values.new_full((num,), -torch.inf)
        return lowest.scatter_reduce(0, ids, values, "amax")[ids]
    return (segment_sum if reduction == "sum" else segment_mean)(values, ids, num)[ids]


def _statistic(correction: Correction, terms: MismatchTerms) -> Tensor:
    return unit_statistic(
        *terms.policies(correction.between),
        *terms.units(correction.granularity),
        statistic=correction.statistic,
        reduction=correction.reduction,
        max_log_ratio=correction.max_log_ratio,
        max_token_log_ratio=correction.max_token_log_ratio,
    )


# ------------------------------------------------------------------------------------------------ corrections


@torch.no_grad()
def corrected(
    corrections: Sequence[Correction], terms: MismatchTerms, normalizer_sums: Tensor | None = None
) -> Corrected:
    """Apply corrections to each token: multiply the weights of those that clamp, reject what others reject.

    The order makes no difference: each correction measures all tokens, including those that another one rejects.

    Args:
        corrections: C objects such as `CorrectionConfig`.
        terms: the tensors of one micro-batch.
        normalizer_sums: [C, 2] `normalizer_parts`, summed over the micro-batches and ranks of the step; needed only
            where a correction normalises.

    Raises:
        DataError: `terms` or `normalizer_sums` lack what a correction needs.
    """
    weights = torch.ones_like(terms.rollout_logprobs, dtype=torch.float64)
    is_kept = torch.ones_like(weights, dtype=torch.bool)
    in_denominator, hits = is_kept, []
    for index, correction in enumerate(corrections):
        value = _statistic(correction, terms)
        if correction.action in CLAMPS:
            factor = _clamped(value, correction)
            is_hit = factor != value
            if correction.normalize:
                factor = factor / _normalizer(normalizer_sums, index)
            weights = (weights * factor).clamp(max=LARGEST_WEIGHT)
        else:
            is_hit = _is_outside(value, correction, terms)
            if correction.action == "veto":
                is_hit = _reduced(is_hit.double(), *terms.units("sequence"), "max") > 0
            is_hit = is_hit & terms.has_sign(correction.advantages, correction.between)
            is_kept = is_kept & ~is_hit
            if correction.denominator == "survivors":
                in_denominator = in_denominator & ~is_hit
        hits.append(is_hit)
    weights = weights.where(is_kept, 0.0)
    return Corrected(weights=weights, is_kept=is_kept, in_denominator=in_denominator, is_hit=tuple(hits))


@torch.no_grad()
def normalizer_parts(corrections: Sequence[Correction], terms: MismatchTerms) -> Tensor:
    """Return the sums and counts of a step's mean weights, [C, 2] float64; add them up over micro-batches and ranks.

    These are the sum of the units' clamped ratios and the number of units, by the granularity of the correction (a
    sequence counts once, however long); zeros for a correction that does not normalise.
    """
    parts = torch.zeros(len(corrections), 2, dtype=torch.float64, device=terms.rollout_logprobs.device)
    for index, correction in enumerate(corrections):
        if correction.normalize:
            ratio = _clamped(_statistic(correction, terms), correction)
            ids, num = terms.units(correction.granularity)
            share = torch.ones_like(ratio)
            if ids is not None:
                share = share / segment_sum(share, ids, num)[ids]
            parts[index, 0], parts[index, 1] = (ratio * share).sum(), share.sum()
    return parts


def _is_outside(value: Tensor, correction: Correction, terms: MismatchTerms) -> Tensor:
    """Return which values [N] break a bound by more than what rounding the log-probabilities makes of them."""
    dtypes = {each.dtype for each in terms.policies(correction.between)}
    nats = ROUNDING * torch.finfo(torch.float64 if dtypes == {torch.float64} else torch.float32).eps
    is_inside = torch.ones_like(value, dtype=torch.bool)
    for sign, bound in ((-1, correction.lower), (1, correction.upper)):
        if bound is not None:
            is_inside = is_inside & (sign * (value - bound) <= nats * SENSITIVITY[correction.statistic](abs(bound)))
    return ~is_inside


def _clamped(ratio: Tensor, correction: Correction) -> Tensor:
    bounds = correction.lower, correction.upper
    return ratio if bounds == (None, None) else ratio.clamp(*bounds)


def _normalizer(sums: Tensor | None, index: int) -> Tensor:
    if sums is None:
        raise DataError(
            "a correction with normalize=True divides by the mean weight of the whole step: pass normalizer_sums, "
            "the sum of normalizer_parts(...) over its micro-batches and ranks"
        )
    mean = sums[index, 0] / sums[index, 1].clamp(min=1)
    return mean.where(mean > SMALLEST_MEAN, torch.ones_like(mean))
