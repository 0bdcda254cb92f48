"""A policy loss with SkyRL's signature, and its registration under our names.

Legend: B rows, T positions of a response.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError, warn_once
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.integrations.policy import Trainer, loss_of, metrics_of, terms_of, token_losses
from toolkit.integrations.versions import check_version

TESTED = "0.3.0"
"""The version of SkyRL whose signatures these are."""
LOSS = "TOOLKIT_SKYRL_LOSS"
SKYRL = Trainer(
    name="SkyRL",
    example="TOOLKIT_SKYRL_LOSS='policy_loss.delta=4'",
    decides=(
        ("aggregation", "set trainer.algorithm.loss_reduction"),
        ("kl", "set trainer.algorithm.use_kl_loss and kl_loss_coef"),
        ("correction", "set trainer.algorithm.off_policy_correction"),
        ("mode", "it computes log-probabilities before the loss is called"),
    ),
    passes=frozenset({"rollout_logprobs"}),
    scales_advantages=True,
)
OF_CORRECTION = (
    *("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low", "outlier_token_is_threshold_high"),
    *("token_mask_is_threshold_low", "token_mask_is_threshold_high"),
)
"""Fields of SkyRL's ``off_policy_correction`` that switch it on."""
REDUCTIONS = {
    "token_mean": "token_mean",
    "seq_mean_token_mean": "sequence_mean",
    "constant": "seq_mean_token_sum_norm",
    "prompt_mean": "prompt_mean",
}
"""SkyRL's names of aggregations."""


def register() -> None:
    """Register every policy loss with SkyRL as ``toolkit/<name>``.

    Raises:
        ConfigError: SkyRL is not installed, or has no registry of policy losses.
    """
    check_version("skyrl", TESTED)
    try:
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss
    except ImportError as error:
        raise ConfigError(f"this SkyRL has no registry of policy losses ({error}); install {TESTED}") from None
    known = {*PolicyLossRegistry.list_available()}
    for name in policy_loss_names():
        if f"toolkit/{name}" not in known:
            register_policy_loss(f"toolkit/{name}")(functools.partial(compute_policy_loss, name))


def compute_policy_loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the sum of the losses of a micro-batch, 0-dim, and metrics.

    Args:
        name: of the policy loss.
        log_probs: [B, T] in nats, with gradient.
        old_log_probs: [B, T] in nats.
        advantages: [B, T], scaled by SkyRL's reduction.
        config: SkyRL's ``AlgorithmConfig``.
        loss_mask: [B, T], which positions count; None: all.
        rollout_logprobs: [B, T] in nats, of the sampler.

    Raises:
        ConfigError: the options are wrong, SkyRL corrects for the sampler, or the loss is not proportional to the
            advantages.
    """
    cfg = loss_of(SKYRL, [f"policy_loss={name}", *options_of(name, config), *_further()])
    wanted = REDUCTIONS.get(cfg.policy.aggregation or "")
    reduction = getattr(config, "loss_reduction", None)
    if wanted is not None and reduction is not None and wanted != reduction:
        warn_once(
            f"policy loss {name!r} is defined with the mean {wanted}, but trainer.algorithm.loss_reduction="
            f"{reduction!r}; set trainer.algorithm.loss_reduction={wanted}"
        )
    correction = getattr(config, "off_policy_correction", None)
    for field in OF_CORRECTION:
        if getattr(correction, field, None) is not None:
            raise ConfigError(
                f"trainer.algorithm.off_policy_correction.{field}={getattr(correction, field)!r} is applied inside "
                f"SkyRL's losses, so it has no effect on toolkit/{name}; set it to null, or choose a loss with a ratio "
                "to the sampler (policy_loss.anchor=rollout)"
            )
    mask = torch.ones_like(log_probs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    fields = {"old_logprobs": old_log_probs, "advantages": advantages}
    if rollout_logprobs is not None:
        fields["rollout_logprobs"] = rollout_logprobs
    terms = terms_of(cfg, log_probs, mask, fields)
    loss = token_losses(cfg, terms).sum()
    return loss, {f"toolkit/{key}": value for key, value in metrics_of(terms).items()}


def _further() -> list[str]:
    overrides = shlex.split(os.environ.get(LOSS, ""))
    for override in overrides:
        if override.startswith(("policy_loss=", "loss=")):
            raise ConfigError(f"{LOSS}: {override} chooses a loss; set trainer.algorithm.policy_loss_type instead")
    return overrides


def options_of(name: str, config: Any) -> Iterator[str]:
    """Yield the options of a loss that SkyRL's `config` has, as overrides."""
    clips = getattr(config, "cispo", None) if name == "cispo" else config
    prefix = "cispo_eps_clip" if name == "cispo" else "eps_clip"
    sapo = getattr(config, "sapo", None)
    theirs = {
        "cliprange_low": getattr(clips, f"{prefix}_low", None),
        "cliprange_high": getattr(clips, f"{prefix}_high", None),
        "tau_pos": getattr(sapo, "tau_pos", None),
        "tau_neg": getattr(sapo, "tau_neg", None),
    }
    known = policy_loss(name).options({})
    if name == "vanilla":
        yield "policy_loss.clip_ratio_c=null"  # SkyRL's "regular" has no dual clip
    for option, value in theirs.items():
        if option in known and value is not None:
            yield f"policy_loss.{option}={value}"
