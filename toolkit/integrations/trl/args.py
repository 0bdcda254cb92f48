"""The loss that TRL's own arguments describe, and the loss that a user asks for instead; TRL is not imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from toolkit.errors import ConfigError, listed, warn_once
from toolkit.integrations.chosen import Trainer, chosen_config, counterpart, from_overrides
from toolkit.integrations.window import check_accumulation
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.peers import words_of

TRL = Trainer(
    "TRL",
    project="trl",
    asked_in="loss=...",
    advantages="scale_rewards and num_generations in its config",
    kl_in_reward="beta of RLOOConfig, with ToolkitRLOOTrainer",
    cispo_cap=("epsilon_high",),
)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Values of ``loss_type`` with PPO's clipped ratio, of a token or of a sequence."""
OF_LOSS = (
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "entropy_coef"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "off_policy_mask_threshold"),
)
"""Arguments of GRPOConfig that describe the loss, so they are not read beside ``loss=...``."""
UNSUPPORTED = {"use_adaptive_entropy": False, "top_entropy_quantile": 1.0, "cast_lm_head_to_fp32": False}
"""Arguments that no loss here follows, with the value that switches them off."""


def loss_from(loss: Any, args: Any) -> BaseRLLossConfig:
    """Return the loss to train with.

    Args:
        loss: None for the one that `args` describe; overrides as on the command line, in one string or a list; or a
            config.
        args: TRL's ``GRPOConfig``.

    Raises:
        ConfigError: the loss does not exist, `args` set what it does not read, or TRL does not have what it needs.
    """
    check_args(args)
    if loss is None:
        return from_overrides(list(overrides_of(args)), args, TRL)
    cfg = chosen_config(loss, args, TRL)
    check_beside(cfg, args, loss)
    return cfg


def check_args(args: Any) -> None:
    """Raise `ConfigError` if TRL's `args` ask for something that no loss here does."""
    if args.use_liger_kernel:
        raise ConfigError(
            "use_liger_kernel=True replaces parts of the model that the loss reads; leave it out: the head here "
            "does not hold the logits either"
        )
    known = {word.name: word.answer for word in words_of("trl").words}
    for name, off in UNSUPPORTED.items():
        if getattr(args, name, off) != off:
            raise ConfigError(f"{name}={getattr(args, name)!r} of TRL has no counterpart: {known[name].no}")
    check_accumulation(args)


def check_beside(cfg: BaseRLLossConfig, args: Any, loss: Any) -> None:
    """Check a loss that the user chose, written as `loss`, against TRL's `args`.

    Raises:
        ConfigError: `args` describe another loss, which would have no effect; or the loss needs what TRL does not have.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in OF_LOSS:
        value = getattr(args, name, None)
        if name in defaults and value != defaults[name]:
            remedy = counterpart(TRL, name, value, cfg, loss)
            raise ConfigError(f"{name}={value!r} has no effect beside loss=...; {remedy}")
    if args.beta and not cfg.needs_reference:
        raise ConfigError(
            f"beta={args.beta} has no effect beside a loss without KL term; add to loss: kl=k3 "
            f"loss.kl_loss_coef={args.beta}"
        )
    if args.beta and args.beta != cfg.kl_loss_coef:
        raise ConfigError(
            f"beta={args.beta}, but the loss has kl_loss_coef={cfg.kl_loss_coef}; leave beta out, or add to loss: "
            f"loss.kl_loss_coef={args.beta}"
        )
    if cfg.not_in_training is not None:
        raise ConfigError(
            f"the loss reads {cfg.not_in_training}, which TRL's trainer does not compute; choose a KL estimated from "
            "the sampled token (kl=k3), or a policy loss without teacher"
        )
    if args.use_vllm and args.vllm_importance_sampling_correction and not cfg.correction:
        warn_once(
            "loss=... has no correction for vLLM's log-probabilities, so vllm_importance_sampling_correction=True only "
            "measures; add correction=tis to loss, or set vllm_importance_sampling_correction=False"
        )


def overrides_of(args: Any) -> Iterator[str]:
    """Yield the overrides for the loss that TRL's `args` describe, as on the command line.

    Raises:
        ConfigError: there is no such loss here.
    """
    name, level = args.loss_type, args.importance_sampling_level
    types = next(word for word in words_of("trl").words if word.name == "loss_type").values
    if name not in types:
        raise ConfigError(f"loss_type={name!r} is not a loss of TRL; choose {listed(types)}")
    if level == "sequence" and name not in CLIPPED:
        raise ConfigError(
            f"importance_sampling_level='sequence' beside loss_type={name!r} is not known here; choose the loss "
            "itself: loss='policy_loss=gspo aggregation=seq_mean_token_mean'"
        )
    yield from _base(name, types[name].ways[0], is_sequence=level == "sequence")
    if name == "dr_grpo":
        yield f"++loss.aggregation.length={args.max_completion_length}"
    yield from _options(args, name)
    if args.beta:
        yield "kl=k3_is_corrected" if args.use_bias_correction_kl else "kl=k3"
        yield f"loss.kl_loss_coef={args.beta}"
        yield from ("loss.kl_input_clamp=null", "loss.kl_output_clamp=null")
        if level == "sequence" and args.use_bias_correction_kl:
            yield "loss.kl_ratio_level=sequence"
    if args.entropy_coef:
        yield f"loss.entropy_coef={args.entropy_coef}"
        if name not in ("dapo", "cispo", "vespo", "bnpo"):
            warn_once(
                f"entropy_coef={args.entropy_coef}: TRL averages the entropy over tokens, here it has the mean of "
                f"loss_type={name!r}; the bonus has the same sign and another size"
            )
    yield from _corrections(args, name)


def _base(name: str, preset: str, *, is_sequence: bool) -> Iterator[str]:
    """Yield the preset of a ``loss_type``, with the ratio of a sequence and TRL's mean if that is what is wanted."""
    if name == "luspo" and not is_sequence:  # its preset is GSPO's ratio under a sum of tokens
        yield from ("loss=preset/trl/grpo", "loss.aggregation.name=seq_mean_token_sum")
    elif not is_sequence or name == "luspo":
        yield preset
    else:
        yield "loss=preset/trl/gspo"
        if name in ("dapo", "bnpo"):
            yield from ("loss.aggregation.name=token_mean", "loss.aggregation.count_empty=false")
        elif name == "dr_grpo":
            yield "loss.aggregation.name=constant"


def _options(args: Any, name: str) -> Iterator[str]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if name in CLIPPED:
        yield f"loss.policy_loss_cfg.cliprange_low={args.epsilon}"
        yield f"loss.policy_loss_cfg.cliprange_high={high}"
        if args.delta is not None:
            yield f"++loss.policy_loss_cfg.delta={args.delta}"
    elif name == "cispo":
        yield f"loss.policy_loss_cfg.weight_max={high}"
    elif name == "sapo":
        yield f"loss.policy_loss_cfg.tau_pos={args.sapo_temperature_pos}"
        yield f"loss.policy_loss_cfg.tau_neg={args.sapo_temperature_neg}"
    elif name == "vespo":
        for option in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            yield f"loss.policy_loss_cfg.{option}={getattr(args, f'vespo_{option}')}"


def _corrections(args: Any, name: str) -> Iterator[str]:
    """Yield the corrections of `args`; as in TRL what they reject stays in the denominator."""
    is_corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if is_corrected and name == "vespo":
        raise ConfigError(
            "TRL's vLLM correction inside vespo has no counterpart with these arguments; give "
            "loss='policy_loss=vespo policy_loss.use_rollout_weight=true'"
        )
    if is_corrected:
        unit, _, action = args.vllm_importance_sampling_mode.partition("_")
        lower, upper = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        parts = {"granularity": unit, "statistic": "ratio", "max_log_ratio": "null"}
        parts |= {"reduction": "sum"} if unit == "sequence" else {}
        if action == "mask":
            parts |= {"action": "mask", "denominator": "original"}
        else:
            parts |= {"action": "clamp_upper" if lower is None else "clamp"}
        parts |= {key: value for key, value in (("lower", lower), ("upper", upper)) if value is not None}
        yield f"+loss.correction.vllm={_mapping(parts)}"
        if action == "mask":  # what is kept is weighted, too
            weight = {key: parts[key] for key in parts if key not in ("denominator", "lower")}
            yield f"+loss.correction.vllm_weight={_mapping({**weight, 'action': 'clamp_upper'})}"
    if args.off_policy_mask_threshold is not None:
        between = "current_rollout" if args.use_vllm else "current_old"
        parts = {"granularity": "sequence", "statistic": "k1", "reduction": "mean", "action": "mask"}
        parts |= {"upper": args.off_policy_mask_threshold, "advantages": "negative", "between": between}
        yield f"+loss.correction.opsm={_mapping({**parts, 'denominator': 'original', 'max_log_ratio': 'null'})}"


def _mapping(parts: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in parts.items()) + "}"
