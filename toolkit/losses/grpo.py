"""GRPO and its relatives: a registered policy loss plus an optional KL term.

Legend: B rows, T positions of a row, N selected tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import ConfigError, DataError
from toolkit.functional.conformance import check_scope, check_token_losses, is_zero_without_advantage
from toolkit.functional.kl import k3, kl_estimate
from toolkit.functional.registry import PolicyLoss, policy_loss
from toolkit.functional.segments import NO_SEQUENCE
from toolkit.functional.terms import PolicyTerms
from toolkit.head import TokenScores
from toolkit.head.plan import Entropy, Scope
from toolkit.losses.base import BaseLossKwargs, as_loss_dtype, check_finite
from toolkit.losses.calibration import calibrated_weights, checked_items, loss_metric, sequence_ids_of_batches
from toolkit.losses.config import GRPOLossConfig
from toolkit.losses.fields import PerToken
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.scored import ScoredLossContext
from toolkit.metrics import Max, Mean, Metric, Min, Sum


class GRPOLossKwargs(BaseLossKwargs):
    """Everything the loss of one micro-batch needs; all fields [1, T] or [B, T]."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    sequence_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None


class GRPOLossContext(ScoredLossContext[RLLossContextInputItem]):
    """``loss = sum_t weight_t * (policy_loss_t + kl_loss_coef * kl_t - entropy_coef * H_t)``, weight_t = 1 / tokens."""

    loss_cfg: GRPOLossConfig
    loss_kwargs: GRPOLossKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[RLLossContextInputItem],
        loss_cfg: GRPOLossConfig,
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[GRPOLossKwargs]:
        """Check the items and fix the weight of every token of the step; see the base class for the arguments.

        Raises:
            DataError: advantages are missing, ref_logprobs are missing with ``use_kl_loss``, or a scored position
                holds NaN or inf.
            ConfigError: the policy loss looks at more tokens than it declares.
        """
        items = checked_items(data_batches, RLLossContextInputItem, loss_cfg, GRPOLossConfig)
        advantages = [_checked_advantages(item, loss_cfg, f"data_batches[{i}]") for i, item in enumerate(items)]
        _checked_policy_loss(loss_cfg, sp_mesh)
        labels = [item.shifted_labels for item in items]
        ids = sequence_ids_of_batches(labels, cu_seq_lens_list, sp_mesh, ignore_idx=loss_cfg.ignore_idx)
        weights = calibrated_weights(
            labels,
            ids,
            mode="token",
            ignore_idx=loss_cfg.ignore_idx,
            gradient_reduction=loss_cfg.gradient_reduction,
            sp_mesh=sp_mesh,
        )
        return [
            GRPOLossKwargs(
                shifted_labels=item.shifted_labels,
                loss_weight=weight,
                advantages=own_advantages,
                old_logprobs=item.old_logprobs,
                ref_logprobs=item.ref_logprobs,
                rollout_logprobs=item.rollout_logprobs,
                sequence_ids=own_ids,
            )
            for item, own_advantages, weight, own_ids in zip(items, advantages, weights, ids, strict=True)
        ]

    @property
    def scope(self) -> Scope:
        """What the chosen policy loss looks at."""
        return self._policy_loss.scope

    @property
    def entropy(self) -> Entropy:
        """With gradient for a bonus, without for the metric."""
        if self.loss_cfg.entropy_coef != 0:
            return True
        return "metric" if self.loss_cfg.use_entropy_metric else False

    def sequence_ids(self) -> Tensor | None:
        """Return the sequence of each position."""
        return self.loss_kwargs.sequence_ids

    def scored_labels(self) -> Tensor:
        """Return the labels, less tokens that `drop_zero_advantage` leaves out; none where a KL or bonus needs them."""
        labels, cfg = self.loss_kwargs.shifted_labels, self.loss_cfg
        has_other_terms = (cfg.use_kl_loss and cfg.kl_loss_coef != 0) or cfg.entropy_coef != 0
        if not cfg.drop_zero_advantage or has_other_terms:
            return labels
        is_idle = self.loss_kwargs.advantages == 0
        if self.scope == "sequence" and self.loss_kwargs.sequence_ids is not None:
            # Only whole sequences: the others' statistics count every token.
            is_idle = is_idle | (labels == cfg.ignore_idx)
            flat = (self.loss_kwargs.sequence_ids + 1).reshape(-1)
            is_idle = ~torch.isin(flat, flat[~is_idle.reshape(-1)]).reshape(labels.shape)
        return labels.masked_fill(is_idle, cfg.ignore_idx)

    @property
    def _policy_loss(self) -> PolicyLoss:
        return policy_loss(self.loss_cfg.policy_loss_cfg["loss_type"])

    def loss_from_scores(self, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> tuple[Tensor, dict[str, Metric]]:
        """Return the weighted sum of the policy, KL and entropy terms, and the metrics of all."""
        cfg = self.loss_cfg
        terms, weights = self._terms(scores.logprobs, loss_kwargs)
        token_losses = self._policy_loss.function(terms, **_options(cfg))
        check_token_losses(token_losses, scores.logprobs, self._policy_loss.name)
        policy = (weights * token_losses).sum()
        metrics = {**terms.reported, **_metrics(terms), "policy_loss": loss_metric(policy, cfg.gradient_reduction)}
        loss = policy
        if cfg.use_kl_loss:
            assert cfg.kl_loss_type is not None
            assert terms.ref_logprobs is not None
            token_kl = kl_estimate(terms.logprobs, terms.ref_logprobs, cfg.kl_loss_type)
            loss = loss + cfg.kl_loss_coef * (weights * token_kl).sum()
            metrics["kl_ref"] = Mean.of(token_kl)
        if scores.entropy is not None:
            metrics["entropy"] = Mean.of(scores.entropy)
            if cfg.entropy_coef != 0:
                loss = loss - cfg.entropy_coef * (weights * scores.entropy).sum()
        return loss, {**metrics, "loss": loss_metric(loss, cfg.gradient_reduction)}

    def _terms(self, logprobs: Tensor, loss_kwargs: GRPOLossKwargs) -> tuple[PolicyTerms, Tensor]:
        """Return what the policy loss sees, in the dtype of the log-probabilities, and the weights beside it."""
        if loss_kwargs.loss_weight is None:
            raise DataError(
                "GRPOLossKwargs has no loss_weight; build it with GRPOLossContext.build_batches_loss_kwargs"
            )
        old, ref, rollout = loss_kwargs.old_logprobs, loss_kwargs.ref_logprobs, loss_kwargs.rollout_logprobs
        ids = loss_kwargs.sequence_ids if self.scope != "token" else None
        terms = PolicyTerms(
            logprobs=logprobs,
            old_logprobs=_constant(logprobs if old is None else old, logprobs),
            advantages=_constant(loss_kwargs.advantages, logprobs),
            ref_logprobs=None if ref is None else _constant(ref, logprobs),
            rollout_logprobs=None if rollout is None else _constant(rollout, logprobs),
            sequence_ids=ids,
            num_sequences=int(ids.max()) + 1 if ids is not None and len(ids) else 0,
        )
        return terms, as_loss_dtype(loss_kwargs.loss_weight, logprobs)


def _options(cfg: GRPOLossConfig) -> dict[str, Any]:
    return {key: value for key, value in cfg.policy_loss_cfg.items() if key != "loss_type"}


def _checked_policy_loss(cfg: GRPOLossConfig, sp_mesh: DeviceMesh | None) -> None:
    """Check once for each loss and its options that it keeps what it declares.

    Raises:
        ConfigError: it looks at more tokens than its scope says, or at more than the setting allows.
    """
    loss = policy_loss(cfg.policy_loss_cfg["loss_type"])
    if sp_mesh is not None and loss.scope != "token":
        raise ConfigError(
            f"policy loss {loss.name!r} uses statistics beyond one token (scope={loss.scope!r}), which sequence "
            "parallelism would cut apart; use it without sp_mesh"
        )
    check_scope(loss, _options(cfg))
    if cfg.drop_zero_advantage and (loss.scope == "batch" or not is_zero_without_advantage(loss, _options(cfg))):
        raise ConfigError(
            f"drop_zero_advantage=True would change policy loss {loss.name!r}: its tokens count even with advantage 0; "
            "set drop_zero_advantage=False (their products in backward are skipped anyway where their gradient is 0)"
        )


def _constant(values: Tensor, like: Tensor) -> Tensor:
    """Cut `values` off from any graph: a live old_logprobs would cancel the policy's own gradient."""
    return values.detach().to(like.dtype)


def _checked_advantages(item: RLLossContextInputItem, loss_cfg: GRPOLossConfig, where: str) -> Tensor:
    """Check everything that a policy loss needs of an item and return its advantages."""
    if item.advantages is None:
        raise DataError(f"{where}.advantages is missing; a policy loss needs one advantage for each scored token")
    if loss_cfg.use_kl_loss and item.ref_logprobs is None:
        raise DataError(
            f"{where}.ref_logprobs is missing, but use_kl_loss=True compares the policy with a reference; give the "
            "reference's log-probabilities or set use_kl_loss=False (on the command line: kl=none)"
        )
    read = ("advantages", "old_logprobs", "ref_logprobs") if loss_cfg.use_kl_loss else ("advantages", "old_logprobs")
    for name in read:
        check_finite(f"{where}.{name}", getattr(item, name), item.shifted_labels, loss_cfg.ignore_idx)
    return item.advantages


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
        "log_ratio_clamped": Mean.of((terms.logprobs - terms.old_logprobs).abs() > terms.max_log_ratio),
        "kl_old": Mean.of(k3(terms.old_logprobs, terms.logprobs)),
        "active_tokens": Sum(mean_ratio.den),
    }
    if terms.rollout_logprobs is not None:
        known = terms.rollout_logprobs.isfinite()  # a sampler may not report every token
        metrics["rollout_mismatch"] = Mean.of((terms.old_logprobs - terms.rollout_logprobs)[known].abs())
    return metrics
