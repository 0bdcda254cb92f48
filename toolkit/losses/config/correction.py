"""Config of the corrections for sampling from another policy than the one in training; no torch here.

`CorrectionConfig` is one correction, `corrections_from` reads the mapping of presets that Hydra composes
(``correction=[tis,geo_rs]``). What they compute is in `toolkit.functional.mismatch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Gt
from pydantic import model_validator

from toolkit.errors import ConfigError
from toolkit.schema import Config, located

CLAMPS = ("clamp", "clamp_upper")
NEVER_NEGATIVE = ("ratio", "k2", "k3", "tv", "ratio_tv")
DIFFERENCES = ("tv", "prob_diff")


class CorrectionConfig(Config):
    """One correction for the mismatch of two policies: what is measured on which unit, and what it does.

    Here d = log p - log q for a sampled token, with p the trainer's policy and q the sampler's (see `between`).
    """

    granularity: Literal["token", "segment", "sequence"] = "token"
    """The unit that is measured and corrected; a segment is a turn: a run of scored tokens inside a sequence."""
    statistic: Literal["ratio", "k1", "k2", "k3", "tv", "prob_diff", "ratio_tv"] = "ratio"
    """ratio e^d; k1 -d, k2 d^2/2, k3 e^d-1-d (estimates of KL(q || p), in nats); tv |p - q|; prob_diff p - q;
    ratio_tv |e^d - 1|, whose mean is twice the total variation of p and q (VACO, arXiv 2603.01365)."""
    reduction: Literal["sum", "mean", "max"] | None = None
    """How the tokens of a unit combine; for ratios: product, geometric mean or largest. None for tokens."""
    action: Literal["clamp_upper", "clamp", "mask", "veto"]
    """clamp_*: the clamped ratio multiplies the loss; mask: units outside the bounds count 0; veto: all sequences with
    such a unit count 0. mask and veto leave the rest unweighted: add a clamp for an importance weight."""
    lower: float | None = None
    """Inclusive lower bound of the statistic itself, not of its log; None: no bound."""
    upper: float | None = None
    """Inclusive upper bound; None: no bound, so clamp_upper is the plain importance weight."""
    denominator: Literal["original", "survivors"] | None = None
    """After a rejection, required for mask and veto. original: the token's policy term is 0, all else is unchanged.
    survivors: the token counts nowhere, as if masked: not in the denominator, the KL or entropy term, or a sequence's
    ratio (as in XTuner). With the current policy only if the items have `current_logprobs`."""
    normalize: bool = False
    """Divide the clamped ratios by their mean over the step: over tokens, turns or sequences, as `granularity` says.
    With the current policy only if the items have `current_logprobs`."""
    advantages: Literal["any", "negative", "positive", "widening"] = "any"
    """Reject only tokens whose advantage has this sign; widening: the sign of d, where the update would move p further
    from q."""
    between: Literal["old_rollout", "current_rollout", "current_old"] = "old_rollout"
    """p and q: old is the policy before the step, rollout the sampler's, current the one in training (without
    gradient), known only in the forward unless the items have `current_logprobs`."""
    max_log_ratio: Annotated[float, Gt(0)] | None = 20.0
    """Bound in nats on |d| and on the log of a unit's ratio, before exp; 20 as in XTuner and verl. None: 500."""
    max_token_log_ratio: Annotated[float, Gt(0)] | None = None
    """Bound in nats on each token's |d| before tokens combine, so one of them cannot decide alone."""

    @property
    def needs_current(self) -> bool:
        """Whether the statistic is known only in the forward."""
        return self.between != "old_rollout"

    @property
    def needs_sequences(self) -> bool:
        """Whether it looks at more than one token."""
        return self.granularity != "token" or self.action == "veto"

    @model_validator(mode="after")
    def _makes_sense(self) -> CorrectionConfig:
        for message in self._mistakes():
            raise ConfigError(message)
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.granularity == "token" and self.reduction is not None:
            yield f"reduction={self.reduction!r} has no effect on single tokens; leave it out or choose a granularity"
        if self.granularity != "token" and self.reduction is None:
            yield (
                f"granularity={self.granularity!r} needs reduction: 'sum' (of ratios: their product, unbiased but far "
                "from 1 on long texts), 'mean' (geometric mean) or 'max'"
            )
        yield from self._mistakes_of_clamps() if self.action in CLAMPS else self._mistakes_of_rejections()
        yield from self._mistakes_of_bounds()

    def _mistakes_of_clamps(self) -> Iterator[str]:
        if self.statistic != "ratio":
            yield (
                f"action={self.action!r} weights the loss by a ratio, but statistic={self.statistic!r}; "
                "use statistic='ratio', or action='mask' to reject by it"
            )
        if self.denominator is not None:
            yield f"denominator={self.denominator!r} has no effect with action={self.action!r}: nothing is rejected"
        if self.advantages != "any":
            yield f"advantages={self.advantages!r} restricts what is rejected; action={self.action!r} rejects nothing"
        if self.action == "clamp_upper" and self.lower is not None:
            yield f"lower={self.lower} has no effect with action='clamp_upper'; use action='clamp' for both bounds"

    def _mistakes_of_rejections(self) -> Iterator[str]:
        if self.normalize:
            yield f"normalize=True divides weights by their mean, but action={self.action!r} has no weights"
        if self.lower is None and self.upper is None:
            yield f"action={self.action!r} without lower and upper rejects nothing; give it a bound"
        if self.denominator is None:
            yield (
                f"action={self.action!r} needs denominator: 'original' divides the loss by all tokens as if nothing "
                "had been rejected (smaller gradients), 'survivors' by those that are left; both are in use and "
                "differ, so there is no default"
            )
        if self.action == "veto" and self.granularity == "sequence":
            yield "action='veto' of a statistic of whole sequences is action='mask'; write mask"

    def _mistakes_of_bounds(self) -> Iterator[str]:
        lower, upper = self.lower, self.upper
        if lower is not None and upper is not None and lower >= upper:
            yield f"lower={lower} must be less than upper={upper}"
        if self.statistic in NEVER_NEGATIVE:
            if lower is not None and lower < 0:
                yield f"lower={lower} has no effect: {self.statistic} is never negative (bounds are not logs)"
            if upper is not None and (upper < 0 or (upper == 0 and self.statistic == "ratio")):
                yield f"upper={upper} leaves nothing: {self.statistic} is never that small (bounds are not logs)"
        if self.statistic in DIFFERENCES and self.reduction != "sum":
            for name, bound in (("lower", lower), ("upper", upper)):
                if bound is not None and abs(bound) >= 1:
                    yield f"{name}={bound} never binds: probabilities differ by less than 1"


def corrections_from(value: Any, where: str = "loss.correction") -> tuple[CorrectionConfig, ...]:
    """Return the corrections, in order, from every form that a config may hold them in.

    Args:
        value: None; a sequence of `CorrectionConfig` or of mappings of its fields; or, as Hydra composes presets, a
            mapping from a preset's name to one mapping, a list of them, or None (switched off).
        where: the name in error messages.

    Raises:
        ConfigError: an entry is not a correction, or a correction is invalid; the message says which.
    """
    return tuple(_corrections(value, where, is_named=isinstance(value, Mapping)))


def _corrections(value: Any, where: str, is_named: bool) -> Iterator[CorrectionConfig]:
    if value is None:
        return
    if isinstance(value, CorrectionConfig):
        yield value
    elif is_named:
        for name, preset in value.items():
            yield from _corrections(preset, f"{where}.{name}", is_named=False)
    elif isinstance(value, Mapping):
        yield _correction(value, where)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _corrections(item, f"{where}.{index}", is_named=False)
    else:
        raise ConfigError(
            f"{where}={value!r} is not a correction; give a mapping of its fields or a list of them, below a name: "
            "correction=dict(tis=dict(action='clamp_upper', upper=2.0)), on the command line correction=tis"
        )


def _correction(fields: Mapping[str, Any], where: str) -> CorrectionConfig:
    try:
        with located(where):
            return CorrectionConfig(**{str(name): value for name, value in fields.items()})
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None
