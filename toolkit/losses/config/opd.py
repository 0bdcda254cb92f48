"""The config of on-policy distillation; no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from toolkit.errors import ConfigError
from toolkit.functional.names import EXACT_KL, KLDirection, KLTail
from toolkit.functional.options import Anchor, Fraction, NotNegative
from toolkit.losses.config.aggregation import AggregationConfig, check_effect
from toolkit.losses.config.policy import Aggregated, BaseRLLossConfig
from toolkit.schema import FrozenDict


class OPDLossConfig(BaseRLLossConfig):
    """On-policy distillation: a teacher scores the policy's samples; this replaces rewards."""

    context = "toolkit.losses.opd:OPDLossContext"
    reads_advantages = False
    """A teacher replaces rewards; corrections see 0 if items have none."""
    positive_nll_coef: ClassVar[float] = 0.0

    variant: Literal["sampled", "top_k"] = "sampled"
    """sampled: policy loss ``opd`` on ``teacher_logprobs``; top_k: a divergence over the candidates of
    ``teacher_topk_ids`` and ``teacher_topk_logprobs`` (the whole vocabulary without ids)."""
    teacher: Literal["items", "reference"] = "items"
    """Who the teacher of ``sampled`` is: the ``teacher_logprobs`` of the items, or their ``ref_logprobs``."""
    aggregation: Aggregated = AggregationConfig()
    """How token losses become one number; by name, or with the settings of `AggregationConfig`."""
    anchor: Anchor = "old"
    """What the ratio of ``sampled`` divides by; rollout in prime-rl and Tinker."""
    threshold_low: Fraction | None = None
    """``sampled`` skips tokens whose probability fell by more; 0.2 in prime-rl, None: it skips none."""
    log_ratio_sq_coef: NotNegative = 0.0
    """Factor of (log r)^2 in ``sampled``, without a half; 1e-3 in prime-rl."""
    direction: KLDirection = "reverse"
    """Of ``top_k``: reverse is KL(policy || teacher), forward KL(teacher || policy)."""
    tail: KLTail = "one_bucket"
    """Probability outside the candidates of ``top_k``: one more outcome, or ignored (drop)."""

    @model_validator(mode="after")
    def _every_option_is_read(self) -> OPDLossConfig:
        readers = {
            "sampled": ("teacher", "anchor", "threshold_low", "log_ratio_sq_coef"),
            "top_k": ("direction", "tail"),
        }
        for variant, options in readers.items():
            for field in options:
                without = f"on variant {self.variant!r}; it is read by variant={variant!r}"
                check_effect(self, field, variant == self.variant, without)
        if self.variant == "top_k" and self.use_kl_loss and self.kl_loss_type in EXACT_KL:
            raise ConfigError(
                f"kl_loss_type={self.kl_loss_type!r} beside variant='top_k': only one of teacher and reference can "
                "have candidates; use a KL estimated from the sampled token (such as kl=k2)"
            )
        return self

    @property
    def policy_loss_cfg(self) -> Mapping[str, Any]:
        """The registered policy loss ``opd`` with these options."""
        options = {name: getattr(self, name) for name in ("anchor", "threshold_low", "log_ratio_sq_coef")}
        return FrozenDict({"loss_type": "opd", **options})

    @property
    def candidates(self) -> Literal["ref", "teacher"] | None:
        """The teacher's for variant ``top_k``."""
        return "teacher" if self.variant == "top_k" else super().candidates

    @property
    def needs_reference(self) -> bool:
        """Also if the reference is the teacher."""
        return super().needs_reference or self.teacher == "reference"

    @property
    def not_in_training(self) -> str | None:
        """None if the reference is the teacher."""
        return None if self.teacher == "reference" and self.candidates is None else super().not_in_training
