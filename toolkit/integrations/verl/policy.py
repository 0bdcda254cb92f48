"""A policy loss with verl's signature.

Legend: B rows, T positions of a response, N positions that count.

Source: verl 0.9.1, ``verl/workers/utils/losses.py``, which calls a policy loss by keywords for each micro-batch, and
``agg_loss`` of ``verl/trainer/ppo/core_algos.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import warn_once
from toolkit.functional.scope_check import call_loss
from toolkit.functional.terms import PolicyTerms
from toolkit.integrations.policy import metrics_of, terms_of
from toolkit.integrations.verl.options import check_aggregation, loss_of

THEIR_NAMES = {"kl_old_k1": "actor/ppo_kl", "clip_fraction": "actor/pg_clipfrac"}
"""What verl calls our metrics."""


def compute_policy_loss(
    name: str | None,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of a micro-batch, 0-dim, aggregated by verl, and metrics.

    Args:
        name: of the policy loss; None: that of the environment variable.
        old_log_prob: [B, T] in nats.
        log_prob: [B, T] in nats, with gradient.
        advantages: [B, T].
        response_mask: [B, T], which positions count.
        loss_agg_mode: verl's aggregation.
        config: verl's ``ActorConfig``.
        rollout_is_weights: [B, T] factors of verl's rollout correction.

    Raises:
        ConfigError: the options are wrong, or verl does not pass what the loss reads.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    cfg, mask = loss_of(name, config), response_mask.bool()
    check_aggregation(cfg, loss_agg_mode)
    if cfg.scope_of_terms == "batch":
        warn_once(
            f"policy loss {cfg.policy.name!r} compares all tokens of the step, but verl passes one micro-batch; set "
            "actor.ppo_micro_batch_size_per_gpu to all rows of a mini-batch"
        )
    terms = terms_of(cfg, log_prob, mask, {"old_logprobs": old_log_prob, "advantages": advantages})
    values = call_loss(cfg.policy, terms, cfg.policy_options)
    losses = torch.zeros_like(log_prob).masked_scatter(mask, values.to(log_prob.dtype))
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    info = {} if config is None else config.global_batch_info
    loss = agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=loss_agg_mode, **info)
    return loss, reported(terms)


def reported(terms: PolicyTerms) -> dict[str, float]:
    """Return metrics under verl's names and ours; nothing for an empty micro-batch."""
    metrics = metrics_of(terms)
    theirs = {name: metrics[ours] for ours, name in THEIR_NAMES.items() if ours in metrics}
    return {**theirs, **{f"actor/toolkit/{name}": value for name, value in metrics.items()}}
