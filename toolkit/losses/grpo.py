"""GRPO and its relatives: a registered policy loss plus optional terms.

Legend: B rows, T positions of a row, N selected tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import DataError
from toolkit.functional.conformance import check_token_losses
from toolkit.functional.kl import k1, k3, kl_estimate
from toolkit.functional.kl_exact import top_k_kl
from toolkit.functional.mismatch import LARGEST_WEIGHT
from toolkit.functional.terms import PolicyTerms
from toolkit.head import TokenScores
from toolkit.head.plan import Entropy, Scope
from toolkit.losses.base import as_loss_dtype
from toolkit.losses.calibration import check_config, checked_items, device_of, loss_metric
from toolkit.losses.candidates import check_vocabulary
from toolkit.losses.config import BaseRLLossConfig, GRPOLossConfig
from toolkit.losses.grpo_correction import late_correction
from toolkit.losses.grpo_items import options_of, policy_loss_of, scope_of, scored_labels
from toolkit.losses.grpo_kwargs import GRPOLossKwargs, build_grpo_kwargs
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.scored import ScoredLossContext
from toolkit.losses.whole import Whole, emptied, with_gradient_of
from toolkit.metrics import Max, Mean, Metric, Min, Sum

__all__ = ["GRPOLossContext", "GRPOLossKwargs"]


class GRPOLossContext(ScoredLossContext[RLLossContextInputItem]):
    """``loss = sum_t weight_t (importance_t policy_loss_t + kl_loss_coef kl_t - entropy_coef H_t)``, and so on.

    weight_t is the aggregation's, fixed for the whole step; importance_t that of the corrections, 1 without any.
    """

    cfg_type: ClassVar[type[BaseRLLossConfig]] = GRPOLossConfig
    loss_cfg: BaseRLLossConfig
    loss_kwargs: GRPOLossKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[RLLossContextInputItem],
        loss_cfg: BaseRLLossConfig,
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[GRPOLossKwargs]:
        """Check the items and fix the weight of every token of the step; see the base class for the arguments.

        Raises:
            DataError: something that the loss reads is missing (advantages, ref_logprobs with ``use_kl_loss``, ...), or
                a scored position of it holds NaN or inf.
            ConfigError: the policy loss looks at more tokens than it declares.
        """
        check_config(loss_cfg, cls.cfg_type)

        def checked() -> list[RLLossContextInputItem]:
            items = checked_items(data_batches, RLLossContextInputItem, loss_cfg, cls.cfg_type)
            return [cls.completed(item, loss_cfg) for item in items]

        return build_grpo_kwargs(checked, device_of(data_batches), loss_cfg, cu_seq_lens_list, sp_mesh)

    @classmethod
    def completed(cls, item: RLLossContextInputItem, loss_cfg: Any) -> RLLossContextInputItem:
        """Return an item with what this loss does not ask for filled in; as it is by default."""
        return item

    @property
    def scope(self) -> Scope:
        """What the chosen policy loss and its corrections look at; a micro-batch holds its groups whole."""
        if self.loss_kwargs.whole is not None:
            return "batch"
        scope = policy_loss_of(self.loss_cfg).scope if self.loss_kwargs.has_current else scope_of(self.loss_cfg)
        return "batch" if scope == "group" else scope  # type: ignore[return-value]

    @property
    def entropy(self) -> Entropy:
        """With gradient for a bonus, without for the metric."""
        if self.loss_cfg.entropy_coef != 0:
            return True
        is_read = self.loss_cfg.use_entropy_metric or "entropies" in policy_loss_of(self.loss_cfg).needs
        return "metric" if is_read else False

    def sequence_ids(self) -> Tensor | None:
        """Return the sequence of each position."""
        return self.loss_kwargs.sequence_ids

    def scored_labels(self) -> Tensor:
        """Return the labels, less tokens that `drop_zero_advantage` leaves out; none where a KL or bonus needs them."""
        own = self.loss_kwargs
        return own.shifted_labels if own.whole is not None else scored_labels(own, self.loss_cfg)

    def candidate_ids(self, loss_kwargs: GRPOLossKwargs) -> Tensor | Literal["all"] | None:
        """Return the candidates that an exact divergence compares."""
        if loss_kwargs.candidate_logprobs is None:
            return None
        return "all" if loss_kwargs.candidate_ids is None else loss_kwargs.candidate_ids

    def candidates(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[Tensor, Tensor]:
        """Return the candidates' log-probabilities [N, K] under the policy, with gradient, and under the other one.

        Raises:
            DataError: the head was not asked for them.
        """
        if scores.candidates is None or loss_kwargs.candidate_logprobs is None:
            raise DataError("this loss compares whole distributions, but the scores have no candidates")
        return scores.candidates, _constant(loss_kwargs.candidate_logprobs, scores.candidates)

    def forward(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return the loss of this micro-batch and its metrics; see `BaseLossContext.forward`."""
        loss, extra = super().forward(hidden_states, head_weight, head_bias)
        if extra is not None and not isinstance(extra, Mapping):
            return loss, extra  # a subclass's own
        return loss, {**(extra or {}), **(self.loss_kwargs.step_metrics or {})}

    def num_learning(self) -> Tensor:
        """Return the tokens with a weight in some term: those that a correction rejected have none in the policy's."""
        kwargs, cfg = self.loss_kwargs, self.loss_cfg
        if kwargs.policy_weight is None or cfg.use_kl_loss or cfg.entropy_coef != 0 or cfg.positive_nll_coef != 0:
            return super().num_learning()
        return ((kwargs.policy_weight != 0) & (kwargs.shifted_labels != cfg.ignore_idx)).sum()

    def loss_from_scores(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[Tensor, dict[str, Metric]]:
        """Return the weighted sum of the policy, KL and entropy terms, and the metrics of all."""
        cfg = self.loss_cfg
        terms, weights = self._terms(scores, loss_kwargs)
        other = loss_kwargs.other_weight
        other_weights = weights if other is None else as_loss_dtype(other, weights)
        policy, importance, measured = self._policy(terms, weights, scores, loss_kwargs)
        loss = policy
        metrics = {**measured, **_metrics(terms), "policy_loss": loss_metric(policy, cfg.gradient_reduction)}
        if cfg.use_kl_loss:
            token_kl = self._kl(terms, scores, loss_kwargs)
            loss = loss + cfg.kl_loss_coef * _weighted_sum(
                other_weights, token_kl, importance if cfg.correction_on_kl else None
            )
            metrics["kl_ref"] = Mean.of(token_kl)
        if loss_kwargs.nll_weight is not None:
            nll_weight = as_loss_dtype(loss_kwargs.nll_weight, scores.logprobs)
            nll = -(nll_weight * scores.logprobs).sum()
            loss = loss + cfg.positive_nll_coef * nll
            metrics["positive_nll_loss"] = loss_metric(nll, cfg.gradient_reduction)
        if scores.entropy is not None and self.entropy:
            metrics["entropy"] = Mean.of(scores.entropy)
            if cfg.entropy_coef != 0:
                loss = loss - cfg.entropy_coef * (other_weights * scores.entropy).sum()
        return loss, {**metrics, "loss": loss_metric(loss, cfg.gradient_reduction)}

    def policy_losses(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        """Return the policy loss of each token, [N], not yet weighted."""
        return policy_loss_of(self.loss_cfg).function(terms, **options_of(self.loss_cfg))

    def _kl(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        cfg = self.loss_cfg
        if cfg.candidates != "ref":
            return _sampled_kl(terms, cfg)
        tail = "drop" if loss_kwargs.candidate_ids is None else cfg.kl_tail
        return top_k_kl(*self.candidates(scores, loss_kwargs), direction=cfg.kl_direction, tail=tail)

    def _check(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
        super()._check(hidden_states, head_weight, head_bias)
        own = self.loss_kwargs
        found = None if own.num_scored is None else int((own.shifted_labels != self.loss_cfg.ignore_idx).sum())
        if found != own.num_scored:
            raise DataError(
                f"these kwargs hold {found} of the {own.num_scored} scored tokens of their micro-batch, but the loss "
                f"{self.loss_cfg.policy_loss_cfg['loss_type']!r} (or a correction) looks at whole sequences; give "
                "forward the kwargs as they were built (mode='chunk' keeps memory small)"
            )
        check_vocabulary(
            own.candidate_ids,
            own.candidate_logprobs,
            own.shifted_labels,
            head_weight.shape[0],
            self.loss_cfg.ignore_idx,
        )

    def _policy(
        self, terms: PolicyTerms, weights: Tensor, scores: TokenScores, loss_kwargs: GRPOLossKwargs
    ) -> tuple[Tensor, Tensor | None, dict[str, Metric]]:
        """Return the policy term of own tokens, their importance weights [N] (None: all are 1), and metrics."""
        whole: Whole | None = loss_kwargs.whole
        if whole is None:
            importance, measured = self._importance(terms, loss_kwargs)
            token_losses = self._token_losses(terms, scores, loss_kwargs)
            return _weighted_sum(weights, token_losses, importance), importance, {**terms.reported, **measured}
        assert loss_kwargs.place is not None
        place: Tensor = loss_kwargs.place
        needs_entropies = "entropies" in policy_loss_of(self.loss_cfg).needs
        seen = whole.scores(scores.logprobs, scores.entropy if needs_entropies else None, place)
        everyone, all_weights = self._terms(seen, whole.kwargs)
        importance, measured = self._importance(everyone, whole.kwargs, own=place)
        own = None if importance is None else importance[place]
        if policy_loss_of(self.loss_cfg).scope == "token":  # only a correction looks at the others
            token_losses = self._token_losses(terms, scores, loss_kwargs)
            return _weighted_sum(weights, token_losses, own), own, {**terms.reported, **measured}
        token_losses = self._token_losses(everyone, seen, whole.kwargs)
        reported = everyone.reported if whole.reports else emptied(everyone.reported)
        value = _weighted_sum(weights, token_losses.detach()[place], own)
        policy = with_gradient_of(value, _weighted_sum(all_weights, token_losses, importance))
        return policy, own, {**reported, **measured}

    def _token_losses(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        token_losses = self.policy_losses(terms, scores, loss_kwargs)
        check_token_losses(token_losses, scores.logprobs, policy_loss_of(self.loss_cfg).name)
        return token_losses

    def _importance(
        self, terms: PolicyTerms, loss_kwargs: GRPOLossKwargs, own: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Metric]]:
        """Return the importance weights [N] of all corrections, without gradient (None: all are 1), and metrics."""
        late: Tensor | None = None
        metrics: dict[str, Metric] = {}
        if not loss_kwargs.has_current:
            late, metrics = late_correction(terms, self.loss_cfg, own)
        found = [as_loss_dtype(each, terms.logprobs) for each in (loss_kwargs.policy_weight, late) if each is not None]
        return (None if not found else torch.stack(found).prod(0).clamp(max=LARGEST_WEIGHT)), metrics

    def _terms(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[PolicyTerms, Tensor]:
        """Return what the policy loss sees, in the dtype of the log-probabilities, and the weights beside it."""
        if loss_kwargs.loss_weight is None:
            raise DataError(
                "GRPOLossKwargs has no loss_weight; build it with GRPOLossContext.build_batches_loss_kwargs"
            )
        logprobs = scores.logprobs
        given: dict[str, Any] = {
            name: _constant(values, logprobs)
            for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "teacher_logprobs", "advantages")
            if (values := getattr(loss_kwargs, name)) is not None
        }
        given.setdefault("old_logprobs", logprobs.detach())
        if self.scope != "token":
            for what in ("sequence", "turn", "group"):
                ids = getattr(loss_kwargs, f"{what}_ids")
                if ids is not None:
                    given |= {f"{what}_ids": ids, f"num_{what}s": int(ids.max()) + 1 if len(ids) else 0}
            given["positions"] = loss_kwargs.positions
        entropies = None if scores.entropy is None else scores.entropy.detach()
        terms = PolicyTerms(
            logprobs=logprobs, entropies=entropies, log_ratio_range=self.loss_cfg.log_ratio_range, **given
        )
        return terms, as_loss_dtype(loss_kwargs.loss_weight, logprobs)


def _weighted_sum(weights: Tensor, token_values: Tensor, importance: Tensor | None) -> Tensor:
    if importance is None:
        return (weights * token_values).sum()
    # A rejected token is selected out: its value may be inf, and inf * 0 is NaN.
    return (weights * importance * token_values.where(importance != 0, 0.0)).sum()


def _sampled_kl(terms: PolicyTerms, cfg: BaseRLLossConfig) -> Tensor:
    assert cfg.kl_loss_type is not None
    return kl_estimate(
        terms.logprobs,
        terms.given("ref_logprobs"),
        cfg.kl_loss_type,
        gradient=cfg.kl_gradient,
        input_clamp=cfg.kl_input_clamp,
        output_clamp=cfg.kl_output_clamp,
        log_ratio=terms.log_ratio(cfg.kl_anchor) if cfg.kl_gradient == "is_corrected" else None,
    )


def _constant(values: Tensor, like: Tensor) -> Tensor:
    """Cut `values` off from any graph: a live old_logprobs would cancel the policy's own gradient."""
    return values.detach().to(like.dtype)


@torch.no_grad()
def _metrics(terms: PolicyTerms) -> dict[str, Metric]:
    """Ratio statistics between the policy now and before the step, and against the sampler if it reported."""
    log_ratio = terms.log_ratio()
    ratio = log_ratio.exp()
    mean_ratio = Mean.of(ratio)
    metrics: dict[str, Metric] = {
        "ratio": mean_ratio,
        "ratio_min": Min.of(ratio),
        "ratio_max": Max.of(ratio),
        "log_ratio_clamped": Mean.of((terms.logprobs - terms.old_logprobs) != log_ratio),
        "kl_old": Mean.of(k3(terms.old_logprobs, terms.logprobs)),
        "kl_old_k1": Mean.of(k1(terms.old_logprobs, terms.logprobs)),
        "active_tokens": Sum(mean_ratio.den),
        "non_finite_tokens": Sum((~terms.logprobs.isfinite()).sum().double()),
    }
    if terms.rollout_logprobs is not None:
        known = terms.rollout_logprobs.isfinite()  # a sampler may not report every token
        metrics["rollout_missing"] = Mean.of(~known)
        metrics["rollout_mismatch"] = Mean.of((terms.old_logprobs - terms.rollout_logprobs)[known].abs())
    return metrics
