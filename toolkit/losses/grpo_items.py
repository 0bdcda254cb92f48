"""What the items of a policy loss must hold, said before any work. N: scored tokens of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.functional.conformance import check_scope, is_zero_without_advantage
from toolkit.functional.registry import PolicyLoss, policy_loss
from toolkit.losses.base import check_finite
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem


def options_of(cfg: BaseRLLossConfig) -> dict[str, Any]:
    """Return the options of the chosen policy loss."""
    return {key: value for key, value in cfg.policy_loss_cfg.items() if key != "loss_type"}


def policy_loss_of(cfg: BaseRLLossConfig) -> PolicyLoss:
    """Return the chosen policy loss."""
    return policy_loss(cfg.policy_loss_cfg["loss_type"])


def scope_of(cfg: BaseRLLossConfig) -> str:
    """Return what one token's loss depends on: the wider of the policy loss and of corrections in the forward."""
    scope = policy_loss_of(cfg).scope
    needs_sequences = any(own.needs_sequences for own in cfg.correction if own.needs_current)
    return "sequence" if scope == "token" and needs_sequences else scope


def check_policy_loss_of(cfg: BaseRLLossConfig) -> None:
    """Check once for each loss and its options that it keeps what it declares.

    Raises:
        ConfigError: it looks at more tokens than its scope says, or at more than the setting allows.
    """
    loss, options = policy_loss_of(cfg), options_of(cfg)
    check_scope(loss, options)
    is_local = loss.scope in ("token", "sequence")
    if cfg.drop_zero_advantage and not (is_local and is_zero_without_advantage(loss, options)):
        raise ConfigError(
            f"drop_zero_advantage=True would change policy loss {loss.name!r}: its tokens count even with advantage 0; "
            "set drop_zero_advantage=False (their products in backward are skipped anyway where their gradient is 0)"
        )


def scored_labels(kwargs: Any, cfg: BaseRLLossConfig) -> Tensor:
    """Return the labels, less tokens that `drop_zero_advantage` leaves out; none where a KL or bonus needs them.

    Args:
        kwargs: `GRPOLossKwargs` of whole rows, [B, T].
        cfg: of the loss.
    """
    labels = kwargs.shifted_labels
    has_other_terms = (cfg.use_kl_loss and cfg.kl_loss_coef != 0) or cfg.entropy_coef != 0
    if not cfg.drop_zero_advantage or has_other_terms:
        return labels
    is_idle = kwargs.advantages == 0
    if scope_of(cfg) == "sequence" and kwargs.sequence_ids is not None:
        # Only whole sequences: the others' statistics count every token.
        is_idle = is_idle | (labels == cfg.ignore_idx)
        flat = (kwargs.sequence_ids + 1).reshape(-1)
        is_idle = ~torch.isin(flat, flat[~is_idle.reshape(-1)]).reshape(labels.shape)
    return labels.masked_fill(is_idle, cfg.ignore_idx)


@dataclass(frozen=True)
class _Reader:
    """Who reads a field of the items, and what to do without it."""

    is_read: bool
    why: str
    instead: str


def _readers(cfg: BaseRLLossConfig) -> dict[str, _Reader]:
    loss, options = policy_loss_of(cfg), options_of(cfg)
    name = f"policy loss {loss.name!r}"
    uses_rollout = any("rollout" in own.between for own in cfg.correction)
    anchored = options.get("anchor") == "rollout" or "rollout_logprobs" in loss.needs
    anchored |= bool(options.get("use_rollout_weight"))
    kl_anchored = cfg.use_kl_loss and cfg.kl_gradient == "is_corrected" and cfg.kl_anchor == "rollout"
    return {
        "ref_logprobs": _Reader(
            cfg.needs_reference or "ref_logprobs" in loss.needs,
            "use_kl_loss=True compares the policy with a reference"
            if cfg.use_kl_loss
            else "teacher='reference' distils it"
            if cfg.needs_reference
            else f"{name} needs them",
            "give the reference's log-probabilities"
            + (" or set use_kl_loss=False (on the command line: kl=none)" if cfg.use_kl_loss else ""),
        ),
        "rollout_logprobs": _Reader(
            uses_rollout or anchored or kl_anchored,
            f"{name} divides by the sampler's probability"
            if anchored
            else "a correction or KL anchor compares with it",
            "give the log-probabilities that the sampler reported, or choose anchor='old' and no correction",
        ),
        "old_logprobs": _Reader(
            any(own.between == "old_rollout" for own in cfg.correction),
            "a correction compares them with the sampler's before the forward",
            "score the batch once before the step, or use anchor='rollout' instead of a correction",
        ),
        "teacher_logprobs": _Reader(
            "teacher_logprobs" in loss.needs and cfg.candidates != "teacher",
            f"{name} needs them",
            "give the teacher's log-probabilities",
        ),
    }


def check_item(item: RLLossContextInputItem, cfg: BaseRLLossConfig, where: str) -> None:
    """Check one item of a step.

    Args:
        item: [B, T] whole rows.
        cfg: of the loss.
        where: what messages call it.

    Raises:
        DataError: something that the loss reads is missing, or holds NaN or inf at a scored position.
    """
    if item.advantages is None:
        raise DataError(f"{where}.advantages is missing; a policy loss needs one advantage for each scored token")
    check_finite(f"{where}.advantages", item.advantages, item.shifted_labels, cfg.ignore_idx)
    for name, reader in _readers(cfg).items():
        values = getattr(item, name)
        if reader.is_read and values is None:
            raise DataError(f"{where}.{name} is missing, but {reader.why}; {reader.instead}")
        if reader.is_read or name == "old_logprobs":
            check_finite(f"{where}.{name}", values, item.shifted_labels, cfg.ignore_idx)
    check_finite(f"{where}.current_logprobs", item.current_logprobs, item.shifted_labels, cfg.ignore_idx)
    if item.rollout_spec is not None and not cfg.accept_mismatch and _readers(cfg)["rollout_logprobs"].is_read:
        reason = item.rollout_spec.mismatch(cfg.temperature)
        if reason is not None:
            raise DataError(
                f"{where}.rollout_logprobs cannot be compared with the policy's: {reason}. accept_mismatch=True goes on"
            )
    if item.group_ids is None and (cfg.aggregation.name == "prompt_mean" or policy_loss_of(cfg).scope == "group"):
        who = (
            f"policy loss {cfg.policy_loss_cfg['loss_type']!r}"
            if policy_loss_of(cfg).scope == "group"
            else "prompt_mean"
        )
        raise DataError(
            f"{where}.group_ids is missing, but {who} looks at all completions of a prompt together; give one integer "
            "for each sequence ([B, 1]), the same for completions of the same prompt"
        )
