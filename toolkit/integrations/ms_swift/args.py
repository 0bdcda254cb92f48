"""What ms-swift's arguments may say beside a loss of this toolkit; ms-swift is not imported here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from toolkit.errors import ConfigError
from toolkit.integrations.chosen import Trainer, counterpart
from toolkit.integrations.window import check_accumulation
from toolkit.losses.config.policy import BaseRLLossConfig

MS_SWIFT = Trainer(
    "ms-swift",
    project="ms_swift",
    asked_in="register(...)",
    advantages="--advantage_estimator and --scale_rewards",
    kl_in_reward="--kl_in_reward true and --beta",
)
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


def check_args(args: Any, cfg: BaseRLLossConfig, template: Any = None) -> None:
    """Check ms-swift's arguments beside a loss.

    Args:
        args: its ``GRPOConfig``.
        cfg: the loss.
        template: its template, which has some of the arguments; None: not made yet.

    Raises:
        ConfigError: they describe another loss, or ask for what no loss here does; or the loss reads what ms-swift
            does not compute.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in OF_LOSS:
        value = getattr(args, name, None)
        plain = "grpo" if name == "loss_type" else defaults.get(name)
        if name in defaults and value != plain:
            raise ConfigError(
                f"{name}={value!r} has no effect beside a loss of this toolkit; {counterpart(MS_SWIFT, name, value)}"
            )
    for name, (off, reason) in OFF.items():
        value = getattr(args, name, getattr(template, name, off))
        if value != off and value:
            raise ConfigError(f"{name}={value!r} is not supported with a loss of this toolkit: {reason}; leave it out")
    _check_fields(args, cfg)
    _check_kl(args, cfg)
    check_accumulation(args)


def _check_fields(args: Any, cfg: BaseRLLossConfig) -> None:
    """Raise if the loss reads what ms-swift does not compute."""
    if cfg.not_in_training is not None:
        raise ConfigError(
            f"the loss reads {cfg.not_in_training}, which ms-swift does not give to a loss; choose a KL of sampled "
            "tokens (kl=k3), or a policy loss without a teacher"
        )
    by_prompt = {
        f"policy_loss={cfg.policy.name}": cfg.scope_of_terms == "group",
        "aggregation=prompt_mean": cfg.aggregation.name == "prompt_mean",
    }
    for setting, is_chosen in by_prompt.items():
        if is_chosen:
            raise ConfigError(
                f"{setting} compares the completions of a prompt, and ms-swift's micro-batches do not say which belong "
                "together; choose another one, such as policy_loss=vanilla aggregation=seq_mean_token_mean"
            )
    sampler = cfg.required_fields.get("rollout_logprobs")
    if sampler is not None and not args.use_vllm:
        raise ConfigError(
            f"rollout_logprobs, the sampler's log-probabilities: {sampler.why}, but ms-swift has them from vLLM alone; "
            "set --use_vllm true, or leave out what needs them"
        )


def _check_kl(args: Any, cfg: BaseRLLossConfig) -> None:
    """Raise if the KL term of the loss is not that of ``beta``, which makes ms-swift load a reference."""
    if args.kl_in_reward:
        if cfg.use_kl_loss:
            raise ConfigError("kl_in_reward=True subtracts the KL from the rewards; leave out the KL term of the loss")
        return
    if cfg.needs_reference != bool(args.beta):
        raise ConfigError(
            f"beta={args.beta:g}, and the loss has {'a' if cfg.needs_reference else 'no'} KL term; "
            + (f"set --beta {cfg.kl_loss_coef:g}" if cfg.needs_reference else "set --beta 0, or add kl=k3 to the loss")
        )
    if cfg.use_kl_loss and args.beta != cfg.kl_loss_coef:
        raise ConfigError(
            f"beta={args.beta:g}, but the loss has kl_loss_coef={cfg.kl_loss_coef:g}; set --beta "
            f"{cfg.kl_loss_coef:g}, or loss.kl_loss_coef={args.beta:g} in the loss"
        )
