"""The configs of losses built on a policy loss: GRPO, and the base of OREAL and distillation; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from toolkit.errors import ConfigError, warn_once
from toolkit.functional.kl_facts import kl_warning
from toolkit.functional.names import EXACT_KL, MAX_LOG_RATIO, KLDirection, KLGradient, KLRatioLevel, KLTail, KLTerm
from toolkit.functional.options import NotNegative
from toolkit.functional.policy.registry import PolicyLoss, Scope, policy_loss, policy_loss_names
from toolkit.losses.config.aggregation import PER_COMPONENT, AggregationConfig, aggregation_from, check_effect
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.correction import corrections_from
from toolkit.losses.config.required_fields import Requirement, required_fields
from toolkit.losses.config.term import LossTerm
from toolkit.schema import FrozenDict, answer

KLClamp = Annotated[float, Field(gt=0)] | Literal["auto"] | None


def _checked_policy_loss(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if "loss_type" not in settings:
        raise ConfigError("policy_loss_cfg has no loss_type; name a policy loss, e.g. dict(loss_type='vanilla')")
    loss = policy_loss(settings["loss_type"])
    options = loss.options({key: value for key, value in settings.items() if key != "loss_type"})
    return FrozenDict({"loss_type": loss.name, **options})


def _not_a_name(settings: Any) -> Any:
    if isinstance(settings, str):
        raise ConfigError(f"policy_loss_cfg={settings!r} is a name; write policy_loss_cfg=dict(loss_type={settings!r})")
    return settings


PolicyLossOptions = Annotated[Mapping[str, Any], BeforeValidator(_not_a_name), AfterValidator(_checked_policy_loss)]
Answer = TypeVar("Answer")
Aggregated = Annotated[AggregationConfig, BeforeValidator(aggregation_from)]


def is_positive(item: Any) -> Any:
    """Return which tokens of an item have an advantage above 0, bool [B, T]."""
    return item.advantages > 0


def is_not_positive(item: Any) -> Any:
    """Return which tokens of an item have an advantage of 0 or less, bool [B, T]."""
    return ~(item.advantages > 0)


class BaseRLLossConfig(BaseLossConfig):
    """The base of all losses built on a policy loss; a subclass chooses the loss and how tokens are averaged."""

    if TYPE_CHECKING:
        # Fields of a subclass, or properties computed from its fields.
        @property
        def policy_loss_cfg(self) -> Mapping[str, Any]:
            """``loss_type``, the name of a registered policy loss, and the options of that loss."""

        @property
        def aggregation(self) -> AggregationConfig:
            """How token losses become one number."""

        @property
        def positive_nll_coef(self) -> float:
            """Factor of the mean of -log pi over the tokens with A > 0."""

    reads_advantages: ClassVar[bool] = True
    """Whether items must have advantages."""

    log_ratio_range: tuple[float | None, float | None] = (-MAX_LOG_RATIO, MAX_LOG_RATIO)
    """Bounds in nats of every log ratio before exp, 20 as in XTuner and verl; no gradient outside; null: no bound."""
    correction: Annotated[Any, BeforeValidator(corrections_from)] = Field(default_factory=dict)
    """Corrections of the mismatch between sampler and trainer, each a `CorrectionConfig`; applied one after another."""
    missing_rollout: Literal["refuse", "reject"] = "refuse"
    """A scored token whose ``rollout_logprobs`` the sampler gave as NaN or -inf: an error, or rejected as by a
    correction (in the denominator unless one has ``denominator="survivors"``). ``rollout_missing`` counts them."""
    correction_on_kl: bool = False
    """Whether their weights multiply the KL term, too, as only ms-swift does."""
    use_kl_loss: bool = False
    """Add ``kl_loss_coef`` x KL(policy || reference); the items then need ``ref_logprobs`` (for ``top_k`` and ``full``
    ``ref_topk_logprobs``)."""
    kl_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    """Coefficient of the KL term; 0.001 as in XTuner."""
    kl_aggregation: Aggregated | None = None
    """How the KL term becomes one number; null: as the policy loss (under ``per_component`` a mean over all tokens)."""
    kl_loss_type: KLTerm | None = None
    """An estimate from the sampled token, or exact over candidates (top_k) or the whole vocabulary (full); kl = k1,
    mse = k2 and low_var_kl = k3."""
    kl_gradient: KLGradient = "as_is"
    """The gradient: of the value, of k2 (straight_through), or with the score function's added (*_corrected)."""
    kl_anchor: Literal["old", "rollout"] = "old"
    """What the ratio of ``kl_gradient="is_corrected"`` divides by."""
    kl_ratio_level: KLRatioLevel = "token"
    """Whose ratio that is: the token's, or the geometric mean of its sequence's (TRL and Liger beside GSPO)."""
    kl_input_clamp: KLClamp = "auto"
    """Bound on |log pi - log pi_ref| in nats, no gradient outside; auto: 20 for k3 (XTuner, verl), none for others."""
    kl_output_clamp: KLClamp = "auto"
    """Bound on the estimate's magnitude in nats; auto: 10 for k3 (XTuner, verl), none for others."""
    kl_direction: KLDirection = "reverse"
    """Of an exact KL: reverse is KL(policy || reference), forward KL(reference || policy)."""
    kl_tail: KLTail = "one_bucket"
    """Probability outside the candidates of ``top_k``: one more outcome, or ignored (drop)."""
    use_entropy_metric: bool = False
    """Report the policy's mean entropy; about 3 % more time in the head."""
    entropy_coef: float = 0.0
    """Subtract ``entropy_coef`` x mean entropy from the loss; above 0 it keeps the policy broad."""
    drop_zero_advantage: bool = False
    """Skip tokens with advantage 0 in the forward, too; the metrics then lack them."""
    accept_mismatch: bool = False
    """Compare with the sampler's log-probabilities even if `LogprobSpec` says that they do not match."""

    @field_validator("log_ratio_range")
    @classmethod
    def _range_holds_zero(cls, bounds: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
        low, high = bounds
        if (low is not None and low > 0) or (high is not None and high < 0):
            raise ValueError("a log ratio of 0 (an unchanged policy) must lie inside; e.g. [-20, 20]")
        return bounds

    @model_validator(mode="after")
    def _kl_makes_sense(self) -> BaseRLLossConfig:
        if self.kl_loss_type is not None and not self.use_kl_loss:
            warn_once(f"kl_loss_type={self.kl_loss_type!r} has no effect with use_kl_loss=False")
        if not self.use_kl_loss and self.kl_loss_coef != type(self).model_fields["kl_loss_coef"].default:
            warn_once(f"kl_loss_coef={self.kl_loss_coef} has no effect with use_kl_loss=False")
        has_other_terms = (self.use_kl_loss and self.kl_loss_coef != 0) or self.entropy_coef != 0
        if self.drop_zero_advantage and has_other_terms:
            warn_once("drop_zero_advantage=True has no effect beside a KL term or entropy bonus: they need every token")
        if self.use_kl_loss and self.kl_loss_type is None:
            raise ConfigError(
                "use_kl_loss=True needs kl_loss_type, one of 'k1', 'k2', 'k3' or 'abs' (on the command line: kl=k3)"
            )
        if self.use_kl_loss and self.kl_loss_type not in (None, *EXACT_KL) and self.kl_loss_coef > 0:
            warn_once(kl_warning(self.kl_loss_type, self.kl_gradient))
        return self

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> BaseRLLossConfig:
        is_exact = self.use_kl_loss and self.kl_loss_type in EXACT_KL
        reader = "a KL estimated from the sampled token (such as kl=k3)" if is_exact else "use_kl_loss=True"
        sampled = (reader, self.use_kl_loss and not is_exact)
        corrected = ("kl_gradient='is_corrected'", sampled[1] and self.kl_gradient == "is_corrected")
        readers = {
            "kl_gradient": sampled,
            "kl_input_clamp": sampled,
            "kl_output_clamp": sampled,
            "kl_anchor": corrected,
            "kl_ratio_level": corrected,
            "kl_direction": ("an exact KL (kl=top_k or kl=full)", is_exact),
            "kl_aggregation": ("use_kl_loss=True", self.use_kl_loss),
            "kl_tail": ("kl=top_k", is_exact and self.kl_loss_type == "top_k"),
            "correction_on_kl": ("use_kl_loss=True and a correction", self.use_kl_loss and bool(self.correction)),
            "missing_rollout": ("a reader of rollout_logprobs: a correction, or anchor='rollout'", self._reads_rollout),
        }
        for field, (reader, is_read) in readers.items():
            check_effect(self, field, is_read, f"without {reader}")
        return self

    @model_validator(mode="after")
    def _exact_kl_is_not_cut(self) -> BaseRLLossConfig:
        if self.mode == "chunk" and self.candidates is not None and self.scope != "token":
            of_terms = "a correction" if self.scope_of_terms == "token" else "kl_ratio_level='sequence'"
            who = of_terms if self.policy.scope == "token" else f"policy loss {self.policy.name!r}"
            raise ConfigError(
                f"{who} looks at more than one token, so its chunks cannot be differentiated one by one, as "
                f"log-probabilities of {'a teacher' if self.candidates == 'teacher' else 'a reference'}'s candidates "
                "require in mode='chunk'; choose mode='eager', or a KL estimated from the sampled token (such as kl=k3)"
            )
        return self

    @field_validator("kl_aggregation")
    @classmethod
    def _kl_is_one_mean(cls, aggregation: AggregationConfig | None) -> AggregationConfig | None:
        if aggregation is not None and aggregation.name == PER_COMPONENT:
            raise ValueError("a KL term has one mean over all tokens, whatever their advantage; e.g. token_mean")
        return aggregation

    @classmethod
    def by_name(cls, value: Any) -> str:
        """Return the arguments to write, for a message, instead of a `value` without a name."""
        if "policy_loss_cfg" in cls.model_fields and isinstance(value, str) and value in policy_loss_names():
            return f"policy_loss_cfg=dict(loss_type={value!r})"
        return super().by_name(value)

    @answer
    def terms(self) -> tuple[LossTerm, ...]:
        """The policy loss, and KL, negative log-likelihood of good tokens and entropy if they are on.

        Under ``per_component`` the policy loss is two terms with the same values.
        """
        aggregation = self.aggregation
        if aggregation.name == PER_COMPONENT:
            beside = AggregationConfig()
            positive, negative = aggregation.positive_weight, aggregation.negative_weight
            terms = [
                LossTerm(name="policy_positive", coef=positive, token_filter=is_positive, use_correction=True),
                LossTerm(name="policy_negative", coef=negative, token_filter=is_not_positive, use_correction=True),
            ]
        else:
            beside = aggregation
            terms = [LossTerm(name="policy", aggregation=aggregation, use_correction=True)]
        if self.use_kl_loss:
            of_kl = beside if self.kl_aggregation is None else self.kl_aggregation
            terms.append(
                LossTerm(name="kl", coef=self.kl_loss_coef, aggregation=of_kl, use_correction=self.correction_on_kl)
            )
        if self.positive_nll_coef:
            terms.append(LossTerm(name="positive_nll", coef=self.positive_nll_coef, token_filter=is_positive))
        if self.entropy_coef:
            terms.append(LossTerm(name="entropy", coef=-self.entropy_coef, aggregation=beside))
        return tuple(terms)

    @answer
    def policy_terms(self) -> tuple[LossTerm, ...]:
        """The terms that are the policy loss: one, or two under ``per_component``."""
        return tuple(term for term in self.checked_terms if term.name.startswith("policy"))

    @property
    def policy(self) -> PolicyLoss:
        """The chosen policy loss."""
        return policy_loss(self.policy_loss_cfg["loss_type"])

    @answer
    def policy_options(self) -> dict[str, Any]:
        """Its options."""
        return FrozenDict({name: value for name, value in self.policy_loss_cfg.items() if name != "loss_type"})

    @property
    def scope(self) -> Scope:
        """What one token's loss depends on: `scope_of_terms`, or more with corrections in the forward."""
        scope = self.scope_of_terms
        return "sequence" if scope == "token" and self._has_wide_correction else scope

    @property
    def scope_of_terms(self) -> Scope:
        """What the values of one token depend on: the wider of the policy loss and of the KL term."""
        scope = self.policy.scope
        return "sequence" if scope == "token" and self.is_kl_wide else scope

    @property
    def is_kl_wide(self) -> bool:
        """Whether the KL term of a token depends on its whole sequence."""
        return self.use_kl_loss and self.kl_ratio_level == "sequence"

    @answer
    def _has_wide_correction(self) -> bool:
        return any(each.needs_sequences for each in self.correction if each.needs_current)

    @property
    def required_fields(self) -> dict[str, Requirement]:
        """The fields that every item needs beside labels, by name: what reads them, and what to do without."""
        return self.of_policy(required_fields)

    def of_policy(self, function: Callable[[Any], Answer]) -> Answer:
        """Return ``function(self)``, computed once, and again if another policy loss was registered under this name."""
        answers, policy = self._answers_of_policy, self.policy
        if answers.get("policy") is not policy:
            answers.clear()
            answers["policy"] = policy
        if function not in answers:
            answers[function] = function(self)
        return answers[function]

    @answer
    def _answers_of_policy(self) -> dict[Any, Any]:
        return {}

    @answer
    def step_settings(self) -> dict[str, Any]:
        """Also the policy loss, the corrections, and what decides which other tokens the kwargs know."""
        chosen = {"correction": tuple(self.correction), "kl_ratio_level": self.kl_ratio_level}
        return {**super().step_settings, "loss_type": self.policy.name, **chosen}

    def needs_current(self, num_parts: int) -> bool:
        """True if the policy loss looks at groups or batches that are split, or if `needs_current_first`."""
        return self.needs_current_first or (num_parts > 1 and self.scope in ("group", "batch"))

    @property
    def _reads_rollout(self) -> bool:
        return "rollout_logprobs" in self.required_fields

    @property
    def needs_current_first(self) -> bool:
        """Whether corrections must know the current policy before the step: its survivors, or a mean of weights."""
        return any(
            each.needs_current and (each.denominator == "survivors" or each.normalize) for each in self.correction
        )

    @property
    def candidates(self) -> Literal["ref", "teacher"] | None:
        """Whose candidate tokens the policy is scored at, beside the sampled ones; None: only the sampled ones."""
        return "ref" if self.use_kl_loss and self.kl_loss_type in EXACT_KL else None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the log-probabilities of a reference policy at the sampled tokens."""
        return self.use_kl_loss and self.kl_loss_type not in EXACT_KL

    @property
    def not_in_training(self) -> str | None:
        """The field that items need and the training command does not provide; None: it provides all."""
        if self.candidates is not None:
            return f"{self.candidates}_topk_logprobs"
        return "teacher_logprobs" if "teacher_logprobs" in self.policy.needs else None


class GRPOLossConfig(BaseRLLossConfig):
    """A policy loss weighted by advantages, plus optional terms; their averaging is set separately."""

    policy_loss_cfg: PolicyLossOptions = Field(default_factory=lambda: {"loss_type": "vanilla"})
    """``loss_type``, the name of a registered policy loss, and the options of that loss."""
    aggregation: Aggregated = AggregationConfig()
    """How token losses become one number; by name, or with the settings of `AggregationConfig`."""
    positive_nll_coef: NotNegative = 0.0
    """Add this times the mean of -log pi over the tokens with A > 0 (VAPO, arXiv 2504.05118, section 4.4)."""

    context = "toolkit.losses.grpo:GRPOLossContext"
