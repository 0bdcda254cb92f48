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
    cispo_cap=("epsilon", "epsilon_high"),
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

BY_PROMPT = "compares the completions of a prompt, and ms-swift's micro-batches do not say which belong together"


def check_args(args: Any, cfg: BaseRLLossConfig, loss: Any, template: Any = None) -> None:
    """Check ms-swift's arguments beside a loss.

    Args:
        args: its ``GRPOConfig``.
        cfg: the loss.
        loss: as the user wrote it.
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
            remedy = counterpart(MS_SWIFT, name, value, cfg, loss)
            if value == "real":
                remedy = f"leave it out; it has no counterpart in a run, because it {BY_PROMPT}"
            raise ConfigError(f"{name}={value!r} has no effect beside a loss of this toolkit; {remedy}")
    for name, (off, reason) in OFF.items():
        value = getattr(args, name, getattr(template, name, off))
        if value != off and value:
            raise ConfigError(f"{name}={value!r} is not supported with a loss of this toolkit: {reason}; leave it out")
    _check_fields(args, cfg)
    _check_kl(args, cfg)
    check_accumulation(args)


def _check_fields(args: Any, cfg: BaseRLLossConfig) -> None:
    """Raise if the loss reads what ms-swift does not compute."""
    if cfg.candidates == "ref":
        raise ConfigError(
            f"kl={cfg.kl_loss_type} compares whole distributions, and ms-swift gives a loss those of sampled tokens "
            "alone; choose kl=k3"
        )
    if cfg.not_in_training is not None:
        raise ConfigError(
            f"the loss reads a teacher ({cfg.not_in_training}), which ms-swift does not give to a loss; choose another "
            "policy loss"
        )
    if cfg.scope_of_terms == "group":
        raise ConfigError(f"policy_loss={cfg.policy.name} {BY_PROMPT}; choose another policy_loss")
    if cfg.aggregation.name == "prompt_mean":
        raise ConfigError(f"aggregation=prompt_mean {BY_PROMPT}; choose another aggregation, such as token_mean")
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
            raise ConfigError(
                "kl_in_reward=True subtracts the KL from the rewards (--advantage_estimator rloo and "
                "reinforce_plus_plus ask for it); leave out the KL term of the loss, or set --kl_in_reward false"
            )
        return
    if cfg.needs_reference != bool(args.beta):
        raise ConfigError(
            f"beta={args.beta:g}, and the loss has {'a' if cfg.needs_reference else 'no'} KL term; "
            + (
                f"set --beta {cfg.kl_loss_coef:g} (its loss.kl_loss_coef), or leave out the KL term"
                if cfg.needs_reference
                else f"set --beta 0, or add kl=k3 loss.kl_loss_coef={args.beta:g} to the loss"
            )
        )
    if cfg.use_kl_loss and args.beta != cfg.kl_loss_coef:
        raise ConfigError(
            f"beta={args.beta:g}, but the loss has kl_loss_coef={cfg.kl_loss_coef:g}; set --beta "
            f"{cfg.kl_loss_coef:g}, or loss.kl_loss_coef={args.beta:g} in the loss"
        )
