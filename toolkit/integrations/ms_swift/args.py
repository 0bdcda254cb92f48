"""What ms-swift's arguments may say beside a loss of this toolkit; ms-swift is not imported here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from toolkit.errors import ConfigError
from toolkit.integrations.window import check_accumulation
from toolkit.losses.config.policy import BaseRLLossConfig

OF_LOSS = (
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "tau_pos", "tau_neg", "real_tau"),
    *("fipo_decay_rate", "fipo_clip_range", "fipo_clip_high_only", "fipo_safety_threshold", "top_entropy_quantile"),
    *("rollout_importance_sampling_mode", "off_policy_sequence_mask_delta", "sdar_loss_coef"),
)
"""Arguments of GRPOConfig that describe the loss, so they are not read beside one of ours."""
OFF: dict[str, tuple[Any, str]] = {
    "use_liger_kernel": (False, "it replaces parts of the model that the loss reads; the head here holds no logits"),
    "log_entropy": (False, "the entropy is logged without it"),
    "padding_free": (False, "the loss takes rows with padding"),
    "sequence_parallel_size": (1, "the loss takes whole rows"),
    "multi_turn_scheduler": (None, "it changes the number of rows of a micro-batch"),
    "chord_sft_dataset": ([], "the loss has no second batch"),
}
"""Arguments that a loss here cannot follow, the value that switches them off, and why."""


def check_args(args: Any, cfg: BaseRLLossConfig, template: Any) -> None:
    """Check ms-swift's arguments beside a loss.

    Args:
        args: its ``GRPOConfig``.
        cfg: the loss.
        template: its template, which also has some of the arguments.

    Raises:
        ConfigError: they describe another loss, or ask for what no loss here does; or the loss reads what ms-swift
            does not compute.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in OF_LOSS:
        value = getattr(args, name, None)
        plain = "grpo" if name == "loss_type" else defaults.get(name)
        if name in defaults and value != plain:
            raise ConfigError(f"{name}={value!r} has no effect beside a loss of this toolkit; say it in register(...)")
    for name, (off, reason) in OFF.items():
        value = getattr(args, name, getattr(template, name, off))
        if value != off and value:
            raise ConfigError(f"{name}={value!r} is not supported with a loss of this toolkit: {reason}; leave it out")
    if cfg.use_kl_loss and args.kl_in_reward:
        raise ConfigError("kl_in_reward=True subtracts the KL from the rewards; leave out the KL term of the loss")
    if cfg.needs_reference != bool(args.beta) and not args.kl_in_reward:
        raise ConfigError(
            f"beta={args.beta:g}, and the loss has {'a' if cfg.needs_reference else 'no'} KL term; "
            + (f"set --beta {cfg.kl_loss_coef:g}" if cfg.needs_reference else "set --beta 0, or add kl=k3 to the loss")
        )
    if cfg.use_kl_loss and args.beta != cfg.kl_loss_coef:
        raise ConfigError(f"beta={args.beta:g}, but the loss has kl_loss_coef={cfg.kl_loss_coef:g}; make them the same")
    if cfg.not_in_training is not None:
        raise ConfigError(f"the loss reads {cfg.not_in_training}, which is not computed here; choose another loss")
    if cfg.scope_of_terms == "group" or cfg.aggregation.name == "prompt_mean":
        raise ConfigError("the loss compares completions of a prompt, and does not learn here which belong together")
    check_accumulation(args)
