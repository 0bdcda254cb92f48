"""GRPO and its relatives: a registered policy loss plus an optional KL term.

Legend: B rows, T positions of a row, N selected tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import ConfigError, DataError
from toolkit.functional.kl import k3, kl_estimate
from toolkit.functional.registry import policy_loss
from toolkit.functional.segments import NO_SEQUENCE
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.base import BaseLossContext, BaseLossKwargs, as_loss_dtype, check_finite, select_active
from toolkit.losses.calibration import calibrated_weights, checked_items, loss_metric, sequence_ids_of_batches
from toolkit.losses.config import GRPOLossConfig
from toolkit.losses.fields import PerToken
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import Max, Mean, Metric, Min, Sum


class GRPOLossKwargs(BaseLossKwargs):
    """Everything the loss of one micro-batch needs; all fields [1, T] or [B, T]."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    sequence_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None


class GRPOLossContext(BaseLossContext[RLLossContextInputItem]):
    """``loss = sum_t weight_t * (policy_loss_t + kl_loss_coef * kl_t)`` and weight_t = 1 / scored tokens."""

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
        """
        items = checked_items(data_batches, RLLossContextInputItem, loss_cfg, GRPOLossConfig)
        advantages = [_checked_advantages(item, loss_cfg, f"data_batches[{i}]") for i, item in enumerate(items)]
        scope = policy_loss(loss_cfg.policy_loss_cfg["loss_type"]).scope
        if sp_mesh is not None and scope != "token":
            raise ConfigError(
                f"policy loss {loss_cfg.policy_loss_cfg['loss_type']!r} uses statistics beyond one token "
                f"(scope={scope!r}), which sequence parallelism would cut apart; use it without sp_mesh"
            )
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
    def is_separable(self) -> bool:
        """Whether the chosen policy loss looks at one token at a time."""
        return policy_loss(self.loss_cfg.policy_loss_cfg["loss_type"]).scope == "token"

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: GRPOLossKwargs
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the weighted sum of the policy and KL terms, and the metrics of both."""
        cfg = self.loss_cfg
        hidden, labels = select_active(loss_kwargs, cfg.ignore_idx, hidden_states, loss_kwargs.shifted_labels)
        assert hidden is not None
        assert labels is not None
        logprobs, entropy = self.token_logprobs(
            hidden, head_weight, head_bias, labels, with_entropy=cfg.use_entropy_metric
        )
        terms, weights = self._terms(logprobs, loss_kwargs)
        options = {key: value for key, value in cfg.policy_loss_cfg.items() if key != "loss_type"}
        token_losses = policy_loss(cfg.policy_loss_cfg["loss_type"]).function(terms, **options)
        _check_token_losses(token_losses, logprobs, cfg.policy_loss_cfg["loss_type"])
        policy = (weights * token_losses).sum()
        metrics = {**terms.reported, **_metrics(terms), "policy_loss": loss_metric(policy, cfg.gradient_reduction)}
        loss = policy
        if cfg.use_kl_loss:
            assert cfg.kl_loss_type is not None
            assert terms.ref_logprobs is not None
            token_kl = kl_estimate(terms.logprobs, terms.ref_logprobs, cfg.kl_loss_type)
            loss = policy + cfg.kl_loss_coef * (weights * token_kl).sum()
            metrics["kl_ref"] = Mean.of(token_kl)
        if entropy is not None:
            metrics["entropy"] = Mean.of(entropy)
        return loss, {**metrics, "loss": loss_metric(loss, cfg.gradient_reduction)}

    def _terms(self, logprobs: Tensor, loss_kwargs: GRPOLossKwargs) -> tuple[PolicyTerms, Tensor]:
        """Select what the policy loss sees, in the dtype of the log-probabilities, and the weights beside it."""
        scope = policy_loss(self.loss_cfg.policy_loss_cfg["loss_type"]).scope
        weights, advantages, old, ref, rollout, ids = select_active(
            loss_kwargs,
            self.loss_cfg.ignore_idx,
            loss_kwargs.loss_weight,
            loss_kwargs.advantages,
            loss_kwargs.old_logprobs,
            loss_kwargs.ref_logprobs,
            loss_kwargs.rollout_logprobs,
            loss_kwargs.sequence_ids if scope != "token" else None,
        )
        if weights is None or advantages is None:
            raise DataError(
                "GRPOLossKwargs has no loss_weight; build it with GRPOLossContext.build_batches_loss_kwargs"
            )
        terms = PolicyTerms(
            logprobs=logprobs,
            old_logprobs=_constant(logprobs if old is None else old, logprobs),
            advantages=_constant(advantages, logprobs),
            ref_logprobs=None if ref is None else _constant(ref, logprobs),
            rollout_logprobs=None if rollout is None else _constant(rollout, logprobs),
            sequence_ids=ids,
            num_sequences=int(ids.max()) + 1 if ids is not None and len(ids) else 0,
        )
        return terms, as_loss_dtype(weights, logprobs)


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


def _check_token_losses(token_losses: Tensor, logprobs: Tensor, name: str) -> None:
    if not isinstance(token_losses, Tensor) or token_losses.shape != logprobs.shape:
        given = list(token_losses.shape) if isinstance(token_losses, Tensor) else type(token_losses).__name__
        raise DataError(
            f"policy loss {name!r} returned {given}; it must return one loss for each of the {len(logprobs)} selected "
            "tokens, without a mean or a sum (the calibrated weights do that)"
        )


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
