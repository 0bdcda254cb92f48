"""Checks of the items of a policy loss, before anything runs. N: scored tokens of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.functional.purity_check import check_purity
from toolkit.functional.scope_check import check_gradient, check_scope, is_zero_without_advantage
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem


def check_policy_loss(cfg: BaseRLLossConfig) -> None:
    """Check once for each loss and its options that it does what it declares.

    Raises:
        ConfigError: it is not a function of its tensors, looks at more tokens than its scope says, or at more than the
            setting allows.
    """
    cfg.of_policy(_check_policy_loss)


def _check_policy_loss(cfg: BaseRLLossConfig) -> None:
    loss, options = cfg.policy, cfg.policy_options
    check_purity(loss, options)
    check_gradient(loss, options)
    check_scope(loss, options)
    is_local = loss.scope in ("token", "sequence")
    if cfg.drop_zero_advantage and not (is_local and is_zero_without_advantage(loss, options)):
        raise ConfigError(
            f"drop_zero_advantage=True would change policy loss {loss.name!r}: its tokens count even with advantage 0; "
            "set drop_zero_advantage=False (their products in backward are skipped anyway where their gradient is 0)"
        )


def scored_labels(kwargs: Any, cfg: BaseRLLossConfig) -> Tensor:
    """Return the labels [B, T], ignored where `drop_zero_advantage` skips a token: never if other terms need them all.

    `kwargs` are `GRPOLossKwargs` of whole rows.
    """
    labels = kwargs.shifted_labels
    has_other_terms = (cfg.use_kl_loss and cfg.kl_loss_coef != 0) or cfg.entropy_coef != 0
    if not cfg.drop_zero_advantage or has_other_terms:
        return labels
    is_idle = kwargs.advantages == 0
    if cfg.scope == "sequence" and kwargs.sequence_ids is not None:
        # Skip only whole sequences, because the statistics of the others count every token.
        is_idle = is_idle | (labels == cfg.ignore_idx)
        flat = (kwargs.sequence_ids + 1).reshape(-1)
        is_idle = ~torch.isin(flat, flat[~is_idle.reshape(-1)]).reshape(labels.shape)
    return labels.masked_fill(is_idle, cfg.ignore_idx)


def finite_fields(cfg: BaseRLLossConfig) -> set[str]:
    """Return the fields that must be finite wherever a token is scored: those that the loss reads."""
    return cfg.of_policy(_finite_fields)


def _finite_fields(cfg: BaseRLLossConfig) -> set[str]:
    may_lack = {"rollout_logprobs"} if cfg.missing_rollout == "reject" else set()
    return {"advantages", "old_logprobs", "current_logprobs", *cfg.required_fields} - may_lack


CHECKED_LATER = ("current_logprobs", "ref_topk_logprobs", "teacher_topk_logprobs")
"""Fields that are checked later, with more detail: after all ranks have counted, or with their ids."""


def check_item(item: RLLossContextInputItem, cfg: BaseRLLossConfig, where: str) -> None:
    """Check one item of a step, over whole rows; `where` is its name in messages.

    Raises:
        DataError: a field that the loss reads is missing, or is not comparable with what the loss computes.
    """
    required = cfg.required_fields
    for name, requirement in required.items():
        if name not in CHECKED_LATER and getattr(item, name) is None:
            raise DataError(f"{where}.{name} is missing, but {requirement.why}; {requirement.remedy}")
    if item.rollout_spec is not None and not cfg.accept_mismatch and "rollout_logprobs" in required:
        reason = item.rollout_spec.mismatch(cfg.temperature)
        if reason is not None:
            raise DataError(
                f"{where}.rollout_logprobs cannot be compared with the policy's: {reason}. accept_mismatch=True goes on"
            )
