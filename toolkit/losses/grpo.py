"""GRPO and related losses: a registered policy loss plus optional terms.

Legend: B rows, T positions of a row, N selected tokens, S sequences, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.functional.kl import top_k_kl
from toolkit.functional.mismatch import LARGEST_WEIGHT
from toolkit.functional.policy.registry import Need
from toolkit.functional.scope_check import call_loss, check_token_losses
from toolkit.functional.terms import PolicyTerms
from toolkit.head import TokenScores
from toolkit.head.options import Entropy
from toolkit.head.plan import Scope
from toolkit.losses.config.policy import BaseRLLossConfig, GRPOLossConfig
from toolkit.losses.config.term import LossTerm
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.kl_term import sampled_kl
from toolkit.losses.kwargs import GRPOLossKwargs
from toolkit.losses.policy_metrics import all_metrics
from toolkit.losses.scored import ScoredLossContext
from toolkit.losses.step import policy_step
from toolkit.losses.step.candidates import check_vocabulary
from toolkit.losses.step.corrections import late_correction, missing_rollout
from toolkit.losses.step.global_view import GlobalView, emptied, with_gradient_of
from toolkit.losses.step.item_checks import check_policy_loss, finite_fields, scored_labels
from toolkit.losses.step.step import Extra, Step, StepRow
from toolkit.losses.step.weights import loss_metric
from toolkit.losses.summation import as_loss_dtype, term_sums, total, weighted
from toolkit.metrics import Metric, Metrics, deferred, without_graph
from toolkit.schema import FrozenDict

__all__ = ["GRPOLossContext", "GRPOLossKwargs"]

_NEEDED = [name for name in get_args(Need) if name in GRPOLossKwargs.model_fields]
FIELDS_OF_TERMS = ("advantages", "old_logprobs", *_NEEDED)
"""Fields of the kwargs that `PolicyTerms` has under the same names."""


class GRPOLossContext(ScoredLossContext[RLLossContextInputItem]):
    """``loss = sum_t weight_t (importance_t policy_loss_t + kl_loss_coef kl_t - entropy_coef H_t)``, and so on.

    weight_t comes from the term's aggregation and is fixed for the step; importance_t comes from the corrections, 1
    without any.
    """

    item_cls, kwargs_cls = RLLossContextInputItem, GRPOLossKwargs
    cfg_cls: ClassVar[type[BaseRLLossConfig]] = GRPOLossConfig
    loss_cfg: BaseRLLossConfig
    loss_kwargs: GRPOLossKwargs

    # ------------------------------------------------------------------ before the first forward of a step

    @classmethod
    def check_loss(cls, loss_cfg: BaseRLLossConfig) -> None:
        """Raise `ConfigError` if the policy loss looks at more tokens than it declares."""
        check_policy_loss(loss_cfg)

    @classmethod
    def finite_fields(cls, loss_cfg: BaseRLLossConfig) -> Collection[str]:
        """Return advantages, and the log-probabilities that the loss reads."""
        return finite_fields(loss_cfg)

    @classmethod
    def counted_besides(cls, loss_cfg: BaseRLLossConfig) -> dict[str, int | None]:
        """Return what `prepare` counts."""
        return policy_step.counted_besides(loss_cfg)

    @classmethod
    def prepare(cls, step: Step) -> Extra:
        """Check the items, apply the corrections that are known already, and count.

        Raises:
            DataError: something that the loss reads is missing (advantages, ref_logprobs with ``use_kl_loss``, ...), or
                a scored position of it holds NaN or inf.
        """
        return policy_step.prepare(step)

    @classmethod
    def check_totals(cls, step: Step) -> None:
        """Raise `DataError` where a loss of several tokens cannot see them together."""
        policy_step.check_totals(step)

    @classmethod
    def fields_of(cls, row: StepRow) -> dict[str, Any]:
        """Return the fields of the kwargs: the item's by name, corrections, and what a wider scope reads."""
        return {**super().fields_of(row), **policy_step.fields_of(row)}

    @classmethod
    def reads_sequences(cls, loss_cfg: BaseRLLossConfig) -> bool:
        """Whether the policy loss or a correction looks at more than single tokens."""
        return loss_cfg.scope != "token"

    @classmethod
    def of_this_rank(cls, batches: list[Any], step: Step) -> list[Any]:
        """Return this rank's kwargs, with the other tokens that their loss looks at and with their candidates."""
        local = super().of_this_rank(policy_step.with_wider_views(batches, step), step)
        return policy_step.with_local_candidates(local, step)

    # ------------------------------------------------------------------ the loss

    @cached_property
    def scope(self) -> Scope:
        """What the policy loss and its corrections look at; "batch" for groups, which are complete in a micro-batch."""
        if self.loss_kwargs.global_view is not None:
            return "batch"
        scope = self.loss_cfg.scope_of_terms if self.loss_kwargs.has_current else self.loss_cfg.scope
        return "batch" if scope == "group" else scope

    @cached_property
    def entropy(self) -> Entropy:
        """With gradient for a bonus, without for the metric."""
        if self.loss_cfg.entropy_coef != 0:
            return True
        is_read = self.loss_cfg.use_entropy_metric or "entropies" in self.loss_cfg.policy.needs
        return "metric" if is_read else False

    def sequence_ids(self) -> Tensor | None:
        """Return the sequence of each position, [B, T]."""
        return self.loss_kwargs.sequence_ids

    def scored_labels(self) -> Tensor:
        """Return the labels [B, T] without the tokens that `drop_zero_advantage` skips; a KL or bonus keeps them."""
        loss_kwargs = self.loss_kwargs
        has_view = loss_kwargs.global_view is not None
        return loss_kwargs.shifted_labels if has_view else scored_labels(loss_kwargs, self.loss_cfg)

    def candidate_ids(self, loss_kwargs: GRPOLossKwargs) -> Tensor | Literal["all"] | None:
        """Return the candidates that an exact divergence compares, [N, K] where `loss_kwargs` are of N tokens."""
        if loss_kwargs.candidate_logprobs is None:
            return None
        return "all" if loss_kwargs.candidate_ids is None else loss_kwargs.candidate_ids

    def candidates(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[Tensor, Tensor]:
        """Return the candidates' log-probabilities [N, K] under the policy, with gradient, and under the other one.

        Raises:
            DataError: the scores have no candidates.
        """
        if scores.candidates is None or loss_kwargs.candidate_logprobs is None:
            raise DataError("this loss compares whole distributions, but the scores have no candidates")
        return scores.candidates, _constant(loss_kwargs.candidate_logprobs, scores.candidates)

    def forward(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return the loss of this micro-batch, 0-dim, and its metrics; see `BaseLossContext.forward`.

        `hidden_states` are [B, T, D], `head_weight` is [V, D], `head_bias` [V].
        """
        loss, extra = super().forward(hidden_states, head_weight, head_bias)
        of_step = self.loss_kwargs.step_metrics
        if of_step is None or (extra is not None and not isinstance(extra, Mapping)):
            return loss, extra
        return loss, deferred(lambda: {**(extra or {}), **of_step}, loss)

    def loss_from_scores(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[Tensor, Metrics]:
        """Return the sum of the terms, 0-dim, and the metrics of all."""
        terms, wide, values, sums = self._summed(scores, loss_kwargs)
        reduction = self.loss_cfg.gradient_reduction
        loss, reported = total(self.terms, sums, reduction)
        policy = weighted(self.policy_terms, sums)
        measure = all_metrics(
            terms.without_graph(),
            {**reported, "policy_loss": reported["loss"] if policy is loss else loss_metric(policy, reduction)},
            wide.metrics,
            kl=values.get("kl"),
            entropy=scores.entropy if self.entropy else None,
            loss_kwargs=loss_kwargs,
        )
        return loss, deferred(measure, scores.logprobs)

    def sums_of(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the weighted sum of every term, 0-dim, without its coefficient, and the importance [N] or None."""
        _, wide, _, sums = self._summed(scores, loss_kwargs)
        return sums, wide.importance

    def token_losses(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> dict[str, Tensor]:
        """Return the values of every term [N], unreduced and not corrected, computed from these tokens alone."""
        return self._values(self._terms(scores, loss_kwargs), scores, loss_kwargs)

    def policy_losses(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        """Return the policy loss of each token, [N], not yet weighted."""
        return call_loss(self.loss_cfg.policy, terms, self.loss_cfg.policy_options)

    def _kl(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        cfg = self.loss_cfg
        if cfg.candidates != "ref":
            return sampled_kl(terms, cfg)
        tail = "drop" if loss_kwargs.candidate_ids is None else cfg.kl_tail
        return top_k_kl(*self.candidates(scores, loss_kwargs), direction=cfg.kl_direction, tail=tail)

    def _check(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
        super()._check(hidden_states, head_weight, head_bias)
        loss_kwargs, labels, ignore_idx = self.loss_kwargs, self.loss_kwargs.shifted_labels, self.loss_cfg.ignore_idx
        expected = loss_kwargs.num_scored
        num_scored = None if expected is None else int((labels != ignore_idx).sum())
        if num_scored != expected:
            raise DataError(
                f"these kwargs hold {num_scored} of the {expected} scored tokens of their micro-batch, but the loss "
                f"{self.loss_cfg.policy.name!r} (or a correction, or the KL term) looks at whole sequences; pass "
                "forward the kwargs as they were built (mode='chunk' keeps memory small)"
            )
        check_vocabulary(
            loss_kwargs.candidate_ids, loss_kwargs.candidate_logprobs, labels, head_weight.shape[0], ignore_idx
        )

    @property
    def policy_terms(self) -> tuple[LossTerm, ...]:
        """The terms that are the policy loss: one, or two under ``per_component``."""
        return self.loss_cfg.policy_terms

    def _of_policy_terms(self, losses: Tensor) -> dict[str, Tensor]:
        return {term.name: losses for term in self.policy_terms}

    def _summed(
        self, scores: TokenScores, loss_kwargs: GRPOLossKwargs
    ) -> tuple[PolicyTerms, _Wide, dict[str, Tensor], dict[str, Tensor]]:
        """Return what the policy loss saw and what it gave: the values of every term, [N], and their sums, 0-dim."""
        terms = self._terms(scores, loss_kwargs)
        if loss_kwargs.global_view is None:
            wide = _Wide(*self._importance(terms, loss_kwargs), {}, {})
        else:
            wide = self._wide(scores, loss_kwargs)
        values = self._values(terms, scores, loss_kwargs, wide.values)
        sums = term_sums(self.terms, values, loss_kwargs, wide.importance, owner=type(self).__name__)
        sums |= {name: with_gradient_of(sums[name], source) for name, source in wide.sums.items()}
        return terms, wide, values, sums

    def _values(
        self,
        terms: PolicyTerms,
        scores: TokenScores,
        loss_kwargs: GRPOLossKwargs,
        known: Mapping[str, Tensor] = FrozenDict(),
    ) -> dict[str, Tensor]:
        """Return the values of every term [N]; `known`: those that are known, by the name of the term."""
        values = dict(known)
        if self.policy_terms[0].name not in values:
            values |= self._of_policy_terms(self._token_losses(terms, scores, loss_kwargs))
        if self.loss_cfg.use_kl_loss and "kl" not in values:
            values["kl"] = self._kl(terms, scores, loss_kwargs)
        if self.loss_cfg.positive_nll_coef:
            values["positive_nll"] = -scores.logprobs
        if self.loss_cfg.entropy_coef:
            assert scores.entropy is not None  # `entropy` asks for it
            values["entropy"] = scores.entropy
        return values

    def _wide(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> _Wide:
        """Look at all tokens that the policy loss or a correction looks at, those of others as constants."""
        view: GlobalView = loss_kwargs.global_view
        assert loss_kwargs.view_index is not None
        view_index: Tensor = loss_kwargs.view_index
        loss = self.loss_cfg.policy
        all_scores = view.scores(scores.logprobs, scores.entropy if "entropies" in loss.needs else None, view_index)
        all_terms = self._terms(all_scores, view.kwargs)
        importance, measured = self._importance(all_terms, view.kwargs, view_index)
        local_importance = None if importance is None else importance[view_index]
        values: dict[str, Tensor] = {}
        if loss.scope != "token":
            values |= self._of_policy_terms(self._token_losses(all_terms, all_scores, view.kwargs))
        if self.loss_cfg.is_kl_wide:
            values["kl"] = self._kl(all_terms, all_scores, view.kwargs)
        sums = term_sums(self.terms, values, view.kwargs, importance, owner=type(self).__name__, partly=True)
        reported = all_terms.reports() if view.reports else emptied(all_terms.reports())
        local_values = {name: value.detach()[view_index] for name, value in values.items()}
        return _Wide(local_importance, {**reported, **measured}, sums, local_values)

    def _token_losses(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        token_losses = self.policy_losses(terms, scores, loss_kwargs)
        check_token_losses(token_losses, scores.logprobs, self.loss_cfg.policy.name)
        return token_losses

    def _importance(
        self, terms: PolicyTerms, loss_kwargs: GRPOLossKwargs, view_index: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Metric]]:
        """Return the importance weights [N] of all corrections, without gradient (None: all are 1), and metrics."""
        late: Tensor | None = None
        metrics: dict[str, Metric] = {}
        if not loss_kwargs.has_current:
            is_missing = missing_rollout(loss_kwargs.rollout_logprobs, self.loss_cfg)
            late, metrics = late_correction(terms, self.loss_cfg, view_index, is_missing)
        factors = [as_loss_dtype(each, terms.logprobs) for each in (loss_kwargs.importance, late) if each is not None]
        return (None if not factors else torch.stack(factors).prod(0).clamp(max=LARGEST_WEIGHT)), metrics

    def _terms(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> PolicyTerms:
        """Return what the policy loss sees, in the dtype of the log-probabilities."""
        logprobs = scores.logprobs
        fields: dict[str, Any] = {
            name: _constant(values, logprobs)
            for name in FIELDS_OF_TERMS
            if (values := getattr(loss_kwargs, name)) is not None
        }
        if "old_logprobs" not in fields:
            fields["old_logprobs"] = logprobs.detach()
        is_missing = missing_rollout(loss_kwargs.rollout_logprobs, self.loss_cfg)
        if is_missing is not None:  # rejected; pi_old stands in, so every ratio is finite
            fields["rollout_logprobs"] = fields["old_logprobs"].where(is_missing, fields["rollout_logprobs"])
        if self.scope != "token":
            for unit in ("sequence", "turn", "group"):
                ids = getattr(loss_kwargs, f"{unit}_ids")
                if ids is not None:
                    fields |= {f"{unit}_ids": ids, f"num_{unit}s": int(ids.max()) + 1 if len(ids) else 0}
            fields["positions"] = loss_kwargs.positions
        entropies = None if scores.entropy is None else scores.entropy.detach()
        return PolicyTerms(
            logprobs=logprobs, entropies=entropies, log_ratio_range=self.loss_cfg.log_ratio_range, **fields
        )


@dataclass(frozen=True)
class _Wide:
    """Results over all tokens that the loss or a correction looks at; local tokens are those of this micro-batch."""

    importance: Tensor | None
    """[n] of local tokens."""
    metrics: dict[str, Metric]
    sums: dict[str, Tensor]
    """Of the terms that look at other tokens, over all tokens, with the gradient of local ones."""
    values: dict[str, Tensor]
    """[n] of local tokens in these terms, without gradient."""


def _constant(values: Tensor, like: Tensor) -> Tensor:
    """Detach `values` from any graph: a live old_logprobs would cancel the gradient of the policy."""
    return without_graph(values).to(like.dtype)
