"""A policy loss and its gradient over the ratio, for a token with A > 0 and one with A < 0. No widgets here.

P: points of the curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.policy.registry import PolicyLoss
from toolkit.functional.terms import PolicyTerms
from toolkit.notebook.charts import Band

NUM_POINTS = 161
"""Points of a curve before points are added where the gradient jumps."""
ADDED, ROUNDS = 12, 3
"""Points between two neighbours that a jump separates, and how often: an edge is found to a step / 2197."""
JUMP = 0.15
"""Share of the gradient's range that counts as a jump between neighbours."""
TINY = 1e-12
"""A gradient below this share of the largest is 0: a clamp gives exactly 0, a difference of sums may not."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One token under the other policies. A gap is log pi_old minus the other log-probability, in nats."""

    old_probability: float = 0.05
    """Probability of the token under the policy before the step, in (0, 1)."""
    advantage: float = 1.0
    """Magnitude of the advantage."""
    rollout_gap: float = 0.0
    """To the policy as the sampler reported it; 0: sampler and trainer agree."""
    ref_gap: float = 0.0
    """To the reference policy."""
    teacher_gap: float = -0.5
    """To the teacher; negative: the teacher likes the token more."""
    entropy: float = 1.0
    """Entropy of the policy at the token, in nats."""

    def __post_init__(self) -> None:
        if not 0 < self.old_probability < 1:
            raise ConfigError(f"old_probability={self.old_probability} must lie between 0 and 1")
        if not self.advantage > 0:
            raise ConfigError(f"advantage={self.advantage} is a magnitude and must be above 0")


@dataclass(frozen=True, kw_only=True)
class SideCurve:
    """A loss over the ratio for one sign of the advantage."""

    advantage: float
    losses: list[float | None]
    """[P] the token's loss, not yet weighted; None where it is not finite."""
    gradients: list[float | None]
    """[P] its derivative with respect to the token's log-probability."""
    bands: tuple[Band, ...]
    """Where the gradient is 0 (strong), and where a metric of the loss counts the token and it still learns."""


@dataclass(frozen=True, kw_only=True)
class RatioCurves:
    """Both signs of the advantage over the same ratios."""

    ratios: list[float]
    """[P] pi_theta / pi_old, increasing."""
    positive: SideCurve
    negative: SideCurve
    note: str = ""
    """What stands for the other tokens that the loss looks at; empty for a loss of scope "token"."""


def ratio_curves(
    loss: PolicyLoss,
    options: Mapping[str, Any],
    situation: Situation | None = None,
    *,
    widest: float = 10.0,
    log_ratio_range: tuple[float | None, float | None] = (-20.0, 20.0),
) -> RatioCurves:
    """Return the curves of a policy loss.

    Args:
        loss: a registered policy loss.
        options: all its options, as `PolicyLoss.options` returns them.
        situation: see `Situation`; None: the defaults.
        widest: the ratio goes from 1 / widest to widest, or to where the token's probability is 1.
        log_ratio_range: as in the config of the loss.

    Raises:
        ConfigError: `widest` is not above 1.
    """
    if not widest > 1:
        raise ConfigError(f"widest={widest} must be above 1: the ratio goes from 1 / widest to widest")
    chosen = situation or Situation()
    ends = -math.log(widest), min(math.log(widest), -math.log(chosen.old_probability) - 1e-6)
    log_ratios = torch.linspace(*ends, NUM_POINTS, dtype=torch.float64)
    log_ratios = torch.cat([log_ratios, torch.zeros(1, dtype=torch.float64)]).unique()
    values = _evaluated(loss, options, chosen, log_ratios, log_ratio_range)
    for _ in range(0 if loss.scope == "batch" else ROUNDS):
        wider = _refined(log_ratios, *values[1:])
        if len(wider) == len(log_ratios):
            break
        log_ratios = wider
        values = _evaluated(loss, options, chosen, log_ratios, log_ratio_range)
    ratios = log_ratios.exp()
    sides = [_side(ratios, index, sign * chosen.advantage, *values) for index, sign in enumerate((1, -1))]
    return RatioCurves(ratios=ratios.tolist(), positive=sides[0], negative=sides[1], note=_NOTES[loss.scope])


_NOTES = {
    "token": "",
    "sequence": "This loss looks at the whole completion: the curve is that of a completion whose tokens all have this "
    "ratio.",
    "group": "This loss compares the completions of a prompt: the other one has ratio 1 and the opposite advantage.",
    "batch": "This loss looks at all tokens of a step: the points of both curves are the step.",
}


def _evaluated(
    loss: PolicyLoss,
    options: Mapping[str, Any],
    situation: Situation,
    log_ratios: Tensor,
    log_ratio_range: tuple[float | None, float | None],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return losses [2, P], gradients [2, P] and what the loss reported of each token, [2, P], by metric."""
    terms = _terms(loss, situation, log_ratios, log_ratio_range)
    losses = loss.function(terms, **options)
    slopes: tuple[Tensor | None, ...] = (None,)
    if losses.requires_grad:
        slopes = torch.autograd.grad(losses.sum(), terms.logprobs, allow_unused=True)
    gradients = torch.zeros_like(terms.logprobs) if slopes[0] is None else slopes[0]
    count = 2 * len(log_ratios)
    reports = {name: each[:count].reshape(2, -1) for name, each in terms.means().items()}
    return losses.detach()[:count].reshape(2, -1), gradients[:count].reshape(2, -1), reports


def _terms(
    loss: PolicyLoss, situation: Situation, log_ratios: Tensor, log_ratio_range: tuple[float | None, float | None]
) -> PolicyTerms:
    """Return the tokens of both curves, each a sequence; under scope "group" each with another one at ratio 1."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(log_ratios))
    shifts = log_ratios.repeat(2)
    groups = torch.arange(len(shifts))
    if loss.scope == "group":
        signs, shifts, groups = torch.cat([signs, -signs]), torch.cat([shifts, 0 * shifts]), groups.repeat(2)
    elif loss.scope == "batch":
        groups = torch.zeros_like(groups)
    old = torch.full_like(shifts, math.log(situation.old_probability))
    ids = torch.arange(len(shifts))
    return PolicyTerms(
        logprobs=(old + shifts).requires_grad_(),
        old_logprobs=old,
        advantages=signs * situation.advantage,
        ref_logprobs=old - situation.ref_gap,
        rollout_logprobs=old - situation.rollout_gap,
        teacher_logprobs=(old - situation.teacher_gap).clamp(max=0.0),
        entropies=torch.full_like(old, situation.entropy),
        sequence_ids=ids,
        num_sequences=len(ids),
        turn_ids=ids,
        num_turns=len(ids),
        group_ids=groups,
        num_groups=int(groups.max()) + 1,
        positions=ids,
        log_ratio_range=log_ratio_range,
    )


def _refined(log_ratios: Tensor, gradients: Tensor, reports: Mapping[str, Tensor]) -> Tensor:
    """Return `log_ratios` [P] with more points where gradients [2, P] jump or a metric begins to count the token."""
    finite = gradients.nan_to_num(0.0, 0.0, 0.0)
    spread = (finite.amax(1) - finite.amin(1)).clamp(min=TINY)
    is_zero = finite.abs() <= TINY * finite.abs().amax()
    jumps = (finite.diff(dim=1).abs() > JUMP * spread[:, None]) | (is_zero[:, 1:] != is_zero[:, :-1])
    for values in filter(_is_count, reports.values()):
        jumps |= values[:, 1:] != values[:, :-1]
    at = jumps.any(0).nonzero()[:, 0]
    shares = torch.arange(1, ADDED + 1, dtype=torch.float64) / (ADDED + 1)
    between = log_ratios[at, None] + (log_ratios[at + 1] - log_ratios[at])[:, None] * shares
    return torch.cat([log_ratios, between.reshape(-1)]).unique()


def _side(
    ratios: Tensor, index: int, advantage: float, losses: Tensor, gradients: Tensor, reports: Mapping[str, Tensor]
) -> SideCurve:
    largest = gradients.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    is_zero = gradients[index].abs() <= TINY * largest.clamp(min=TINY)
    counted = {name: values[index] > 0 for name, values in reports.items() if _is_count(values)}
    bands = [_band(ratios, run, counted, is_strong=True) for run in _runs(is_zero)]
    soft: dict[tuple[int, int], dict[str, Tensor]] = {}  # metrics that count the same tokens share a band
    for name, is_counted in counted.items():
        for run in _runs(is_counted & ~is_zero):
            soft.setdefault(run, {})[name] = is_counted
    bands += [_band(ratios, run, names, is_strong=False) for run, names in soft.items()]
    return SideCurve(
        advantage=advantage, losses=_finite(losses[index]), gradients=_finite(gradients[index]), bands=tuple(bands)
    )


def _is_count(values: Tensor) -> bool:
    """Whether a metric counts tokens: its value is 0 or 1 for each."""
    return bool(((values == 0) | (values == 1)).all())


def _runs(chosen: Tensor) -> list[tuple[int, int]]:
    """Return first and last index of each run of True in `chosen` [P]."""
    padded = torch.cat([chosen.new_zeros(1), chosen, chosen.new_zeros(1)]).int().diff()
    return list(zip((padded == 1).nonzero()[:, 0].tolist(), ((padded == -1).nonzero()[:, 0] - 1).tolist(), strict=True))


def _band(ratios: Tensor, run: tuple[int, int], counted: Mapping[str, Tensor], *, is_strong: bool) -> Band:
    first, last = run
    names = [name for name, values in counted.items() if bool(values[first : last + 1].double().mean() > 0.5)]
    label = "no gradient" if is_strong else "still learns"
    return Band(
        low=float(ratios[first]),
        high=float(ratios[last]),
        label=f"{label} (metric {', '.join(names)})" if names else label,
        is_strong=is_strong,
    )


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def band_words(bands: Sequence[Band]) -> str:
    """Return bands as a sentence, for people who cannot see the shading."""
    if not bands:
        return "the gradient is never 0"
    return "; ".join(f"{band.label} for ratios {band.low:.4g} to {band.high:.4g}" for band in bands)
