"""Combinations of settings that run but are known to be wrong or misleading; no torch here.

Each check is a small generator of sentences: what is wrong, and what to write instead. Add new ones to `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.functional.kl_facts import KL_NAMES, kl_warning
from toolkit.functional.policy.registry import PolicyLoss
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.correction import CLAMPS, CorrectionConfig
from toolkit.losses.config.policy import BaseRLLossConfig

LONG_SEQUENCE_RANGE = 0.1
"""A clip range this wide almost never binds on a sequence's mean ratio (GSPO's paper: 3e-4)."""
SHORT_TOKEN_RANGE = 0.01
"""A clip range below this clips nearly every token's ratio after one update (PPO's paper: 0.2)."""

PERCENT = 10.0
"""A clip range this wide was probably meant in percent; the widest in use is CISPO's 5."""
SAME_AS_ANOTHER = {("gspo", "seq_mean_token_sum"): "luspo"}
"""(policy loss, an aggregation other than its paper's) -> the policy loss that this combination equals."""

PER_TOKEN = {
    "topr_sequence": "sums over the tokens of a sequence and takes the mean over sequences",
    "gspo_token": "takes the mean over the tokens of a sequence and then that over sequences",
}
"""Sequence-level losses with a separate gradient for each token, and how their papers average."""


@dataclass(frozen=True)
class Setting:
    """A loss config and what is known about the run."""

    cfg: BaseRLLossConfig
    loss: PolicyLoss
    options: Mapping[str, Any]
    """All options of the policy loss."""
    advantage: str | None = None
    """Name of the advantage estimator."""
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    longest: int | None = None
    """Largest number of tokens in a completion."""
    preset: str | None = None
    """The chosen preset, such as ``preset/trl/dapo``."""

    @property
    def name(self) -> str:
        """The name of the policy loss in messages."""
        return f"policy loss {self.loss.name!r}"

    @property
    def weights(self) -> list[CorrectionConfig]:
        """Corrections that multiply the loss."""
        return [correction for correction in self.cfg.correction if correction.action in CLAMPS]

    @property
    def rejections(self) -> list[CorrectionConfig]:
        """Corrections that drop tokens."""
        return [correction for correction in self.cfg.correction if correction.action not in CLAMPS]


def warnings_for(
    cfg: BaseLossConfig,
    *,
    advantage: str | None = None,
    advantage_options: Mapping[str, Any] | None = None,
    longest: int | None = None,
    preset: str | None = None,
) -> list[str]:
    """Return one sentence for each known problem of a config, with its remedy; only policy losses are checked.

    What is known about the run is as in `Setting`.
    """
    if not isinstance(cfg, BaseRLLossConfig):
        return []
    loss, options = cfg.policy, cfg.policy_options
    setting = Setting(cfg, loss, options, advantage, advantage_options or {}, longest, preset)
    return [message for check in CHECKS for message in check(setting)]


# -------------------------------------------------------------------- averaging


def _aggregation(s: Setting) -> Iterator[str]:
    """GSPO with token_mean, LUSPO or REAL without their papers' means, ..."""
    chosen, wanted = s.cfg.aggregation.name, s.loss.aggregation
    has_choice = "aggregation" in type(s.cfg).model_fields  # OREAL's is part of its definition
    if wanted is None or chosen == wanted or not has_choice or (s.loss.name, chosen) in SAME_AS_ANOTHER:
        return
    if s.loss.name in PER_TOKEN:
        why = f"its paper {PER_TOKEN[s.loss.name]}, so the paper's learning rate does not apply"
    elif s.loss.scope == "sequence" and chosen in ("token_mean", "token_sum", "seq_mean_token_sum", "constant"):
        why = "its loss is one value per sequence, which would count once for each token of the sequence"
    elif s.loss.scope == "group":
        why = "its loss is one value per group, which would count once for each token of the group"
    else:
        why = "its paper averages differently, so the paper's learning rate does not apply"
    yield f"{s.name} under aggregation {chosen!r}: {why}; use aggregation={wanted}"


def _constant(s: Setting) -> Iterator[str]:
    length = s.cfg.aggregation.length
    if s.cfg.aggregation.name != "constant" or length is None:
        return
    if s.longest is not None and length < s.longest:
        yield (
            f"aggregation 'constant' divides by length={length:g}, but a completion may have {s.longest} tokens "
            f"and would then count more than once; set loss.aggregation.length={s.longest}"
        )
    if s.advantage == "grpo" and s.advantage_options.get("std", "sample") != "none":
        yield (
            "aggregation 'constant' (Dr. GRPO) removes the length bias, but advantages divided by a standard deviation "
            "keep the difficulty bias; use advantage=dr_grpo"
        )


# -------------------------------------------------------------------- ratios and bounds


def _inverted(s: Setting) -> Iterator[str]:
    for low, high in (("weight_min", "weight_max"), ("cov_low", "cov_high")):
        floor, ceiling = s.options.get(low), s.options.get(high)
        if floor is not None and ceiling is not None and floor > ceiling:
            yield f"{low}={floor:g} is above {high}={ceiling:g} in {s.name}, so the range is empty; swap them"


def _absolute_cap(s: Setting) -> Iterator[str]:
    """The two meanings of an upper bound: TRL's epsilon_high is the ceiling itself, verl's is added to 1."""
    cap, high = s.options.get("weight_max"), s.options.get("cliprange_high")
    if cap is not None and cap < 1:
        has_range = "cliprange_high" in s.options
        remedy = "set cliprange_high for a ceiling of 1 + cliprange_high" if has_range else "use 1 or more"
        yield (
            f"weight_max={cap:g} in {s.name} is the ceiling itself and scales down every token, even on-policy ones; "
            f"{remedy}"
        )
    if cap is None and "weight_max" in s.options and high is not None and 1 <= high < PERCENT:
        yield (
            f"cliprange_high={high:g} in {s.name} sets the ceiling to {1 + high:g}; if {high:g} should be the ceiling "
            f"itself (as in TRL, Liger, ms-swift and Tinker), set weight_max={high:g}"
        )


def _percent(s: Setting) -> Iterator[str]:
    """A range given in percent: 28 for 0.28."""
    for name in ("cliprange_high", "cliprange_low"):
        bound = s.options.get(name)
        if bound is not None and bound >= PERCENT:
            yield (
                f"{name}={bound:g} of {s.name} lets the ratio rise to {1 + bound:g}, so it almost never clips; did you "
                f"mean {bound / 100:g}? (a range is a fraction, not percent)"
            )


def _dual_clip(s: Setting) -> Iterator[str]:
    bound, high, delta = (s.options.get(name) for name in ("clip_ratio_c", "cliprange_high", "delta"))
    if high is None:
        return
    if bound is not None and bound < 1 + high:
        yield (
            f"clip_ratio_c={bound:g} is inside the clip range of {s.name} (up to {1 + high:g}), so tokens with A < 0 "
            f"lose their gradient before the range ends; use a value above {1 + high:g} (usually 3), or null"
        )
    if delta is not None and delta < 1 + high:
        yield (
            f"delta={delta:g} is inside the clip range of {s.name} (up to {1 + high:g}), where it changes what "
            f"the clip means; use a value above {1 + high:g}, or null"
        )
    if bound is not None and delta is not None:
        yield (
            f"clip_ratio_c={bound:g} and delta={delta:g} of {s.name} both bound tokens with A < 0, and only the "
            "smaller has an effect; set one of them to null"
        )


def _size_of_range(s: Setting) -> Iterator[str]:
    """GSPO's range is a thousand times smaller than PPO's."""
    low, high = s.options.get("cliprange_low"), s.options.get("cliprange_high")
    if low is None or high is None or s.options.get("anchor") == "self":
        return
    if s.loss.name in ("gspo", "gspo_token", "luspo") and max(low, high) >= LONG_SEQUENCE_RANGE:
        yield (
            f"cliprange_low={low:g} and cliprange_high={high:g} of {s.name} bound the mean ratio of a sequence, which "
            "varies far less than a token's ratio, so they almost never bind; use values around 1e-3, as in its paper "
            "(the defaults)"
        )
    if s.loss.name in ("vanilla", "rollout_is", "cispo", "fipo", "aspo") and max(low, high) < SHORT_TOKEN_RANGE:
        yield (
            f"cliprange_low={low:g} and cliprange_high={high:g} of {s.name} bound the ratio of single tokens, nearly "
            "all of which leave such a range after one update; use values around 0.2, or policy_loss=gspo"
        )


def _self_anchor(s: Setting) -> Iterator[str]:
    ranges = [name for name in ("cliprange_low", "cliprange_high", "clip_ratio_c") if s.options.get(name) is not None]
    if s.options.get("anchor") == "self" and ranges:
        yield (
            f"anchor='self' makes every ratio of {s.name} 1, so {', '.join(ranges)} never bind: this is "
            "REINFORCE; use anchor='old', or policy_loss=reinforce"
        )


def _no_share(s: Setting) -> Iterator[str]:
    if s.options.get("clip_cov_ratio") == 0:
        yield f"clip_cov_ratio=0 of {s.name} still drops the gradient of one token per step; use policy_loss=vanilla"


# -------------------------------------------------------------------- corrections


def _product_weights(s: Setting) -> Iterator[str]:
    if any(weight.granularity == "sequence" and weight.reduction == "sum" for weight in s.weights):
        yield (
            "a correction weights sequences by the product of their ratios, which is near 0 or at its bound for "
            "long completions (0.98^300 = 0.002), so few of them train; use reduction='mean' or granularity='token'"
        )


def _kept_denominator(s: Setting) -> Iterator[str]:
    counting_all = [rejection for rejection in s.rejections if rejection.denominator == "original"]
    if s.cfg.aggregation.name == "token_mean" and counting_all:
        is_late = any(rejection.needs_current for rejection in counting_all)
        remedy = (
            "watch the kept fraction (here survivors cannot be counted before the forward)"
            if is_late
            else "use denominator='survivors' to keep the scale"
        )
        yield (
            "a correction rejects tokens with denominator='original' under token_mean: the more it rejects, the "
            f"smaller the gradient; {remedy}"
        )


def _corrected_twice(s: Setting) -> Iterator[str]:
    to_rollout = [weight for weight in s.weights if weight.between != "current_old"]
    if s.options.get("anchor") == "rollout" and to_rollout:
        yield (
            f"{s.name} divides by the sampler's probability (anchor='rollout') and a correction also weights by a "
            "ratio to the sampler, so the mismatch is corrected twice; use anchor='old', or correction=none"
        )
    if s.options.get("use_rollout_weight") and to_rollout:
        yield (
            f"use_rollout_weight=True puts old / rollout into the weight of {s.name}, and a correction multiplies by "
            "it again; set use_rollout_weight=False, or correction=none"
        )


def _correction_on_kl(s: Setting) -> Iterator[str]:
    if s.cfg.correction_on_kl and s.cfg.correction and s.cfg.use_kl_loss:
        yield (
            "correction_on_kl=True multiplies the KL term by importance weights (of other projects, only ms-swift does "
            "so), so rejected tokens are no longer held to the reference; use correction_on_kl=False"
        )


# -------------------------------------------------------------------- KL and entropy


def _kl(s: Setting) -> Iterator[str]:
    if not s.cfg.use_kl_loss or s.cfg.kl_loss_type is None:
        return
    if s.cfg.kl_loss_coef == 0:
        yield (
            "kl_loss_coef=0: the KL term needs a reference and is computed and reported, but does not affect training; "
            "set a coefficient above 0, or kl=none"
        )
    elif s.cfg.kl_loss_type in KL_NAMES:
        message = kl_warning(s.cfg.kl_loss_type, s.cfg.kl_gradient)
        if message is not None:
            yield message


def kl_of_trl(cfg: BaseRLLossConfig, preset: str | None) -> dict[str, Any] | None:
    """Return the KL settings that are TRL's with ``beta`` > 0, if `preset` is one of TRL's and a KL term is on."""
    if not (cfg.use_kl_loss and preset and preset.startswith("preset/trl/")):
        return None
    level = {"kl_ratio_level": "sequence"} if cfg.policy.name == "gspo" else {}
    return {"kl_loss_type": "k3", "kl_gradient": "is_corrected", **level}


def _kl_of_preset(s: Setting) -> Iterator[str]:
    """TRL's KL is multiplied by the ratio, unless use_bias_correction_kl is switched off."""
    theirs = kl_of_trl(s.cfg, s.preset)
    if theirs is not None and any(getattr(s.cfg, name) != value for name, value in theirs.items()):
        level = "".join(f" loss.{name}={value}" for name, value in theirs.items() if name == "kl_ratio_level")
        yield (
            "the KL term is not TRL's, which multiplies k3 by the ratio (use_bias_correction_kl=True is its default); "
            f"use kl=k3_is_corrected{level}"
        )


def _negative_entropy(s: Setting) -> Iterator[str]:
    if s.cfg.entropy_coef < 0:
        yield (
            f"entropy_coef={s.cfg.entropy_coef:g} lowers the entropy, which makes the policy narrower; use a value "
            "above 0 to keep it broad"
        )


CHECKS: tuple[Callable[[Setting], Iterator[str]], ...] = (
    _aggregation,
    _constant,
    _inverted,
    _absolute_cap,
    _percent,
    _dual_clip,
    _size_of_range,
    _self_anchor,
    _no_share,
    _product_weights,
    _kept_denominator,
    _corrected_twice,
    _correction_on_kl,
    _kl,
    _kl_of_preset,
    _negative_entropy,
)
"""In the order in which their sentences are printed."""
OF_VALUES = (_inverted, _absolute_cap, _percent)
"""Those of a single value that was probably mistyped."""


def mistyped_values(cfg: BaseLossConfig) -> list[str]:
    """Return one sentence for each option of the policy loss that was probably mistyped."""
    if not isinstance(cfg, BaseRLLossConfig):
        return []
    return [message for check in OF_VALUES for message in check(Setting(cfg, cfg.policy, cfg.policy_options))]
