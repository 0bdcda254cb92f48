"""A policy loss with rLLM's signature, ``loss(ctx) -> (scalar, metrics)``, and its registration.

Legend: B rows, T positions of a row. rLLM calls a loss with [B, T] on verl, and with one sequence [T] elsewhere.

Source: rLLM, ``rllm/trainer/algorithms/loss.py`` of its staging branch, 2026: ``LossContext``, ``register_loss``.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.integrations.policy import Trainer, loss_of, metrics_of, terms_of, token_losses
from toolkit.losses.config.policy import BaseRLLossConfig

RLLM = Trainer(
    name="rLLM",
    example="loss_params.overrides='policy_loss.delta=4 kl=k3'",
    decides=(
        ("aggregation", "set algorithm.loss_agg_mode"),
        ("correction", "set algorithm.rollout_correction"),
        ("mode", "it computes log-probabilities before the loss is called"),
    ),
    passes=frozenset({"rollout_logprobs", "ref_logprobs"}),
)
MODES = {
    "token_mean": "token-mean",
    "token_sum": "token-sum",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
}
"""rLLM's names of aggregations."""
OF_EVERY_LOSS = ("eps_clip", "eps_clip_high", "kl_beta", "overrides")
"""Entries of ``ctx.params`` that are not options of one of our losses."""


def register() -> None:
    """Register every policy loss with rLLM as ``toolkit/<name>``, with the mean that its paper asks for.

    Raises:
        ConfigError: rLLM has no registry of losses.
    """
    try:
        from rllm.trainer.algorithms.loss import register_loss
    except ImportError as error:
        raise ConfigError(f"this rLLM has no registry of losses ({error}); install rLLM v1") from None
    for name in policy_loss_names():
        mode = MODES.get(policy_loss(name).aggregation or "")
        register_loss(f"toolkit/{name}", agg_mode=mode)(functools.partial(compute_loss, name))


def compute_loss(name: str, ctx: Any) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch or of one sequence, 0-dim, aggregated by rLLM, and metrics.

    Args:
        name: of the policy loss.
        ctx: rLLM's ``LossContext``.

    Raises:
        ConfigError: the options are wrong, or rLLM does not pass what the loss reads.
        DataError: the loss reads log-probabilities that this run does not have.
    """
    cfg = _config(name, tuple(overrides_of(name, ctx.params)))
    mask = ctx.action_mask.bool()
    fields = {"old_logprobs": ctx.logp_old, "advantages": ctx.advantages}
    for field, values in (("ref_logprobs", ctx.logp_ref), ("rollout_logprobs", ctx.logp_rollout)):
        if values is not None:
            fields[field] = values
    if cfg.use_kl_loss and ctx.logp_ref is None:
        raise DataError("the loss has a KL term, but rLLM passes no logp_ref; start it with a reference policy")
    terms = terms_of(cfg, ctx.logp_curr, mask, fields)
    values = token_losses(cfg, terms).to(ctx.logp_curr.dtype)
    losses = torch.zeros_like(ctx.logp_curr).masked_scatter(mask, values)
    mode = MODES.get(cfg.policy.aggregation or "")
    loss = ctx.aggregate(losses, ctx.action_mask) if mode is None else ctx.aggregate(losses, ctx.action_mask, mode=mode)
    return loss, {f"toolkit/{key}": value for key, value in metrics_of(terms).items()}


def _config(name: str, overrides: tuple[str, ...]) -> BaseRLLossConfig:
    chosen = [each for each in overrides if each.startswith(("policy_loss=", "loss="))]
    if chosen:
        raise ConfigError(f"loss_params.overrides: {chosen[0]} chooses a loss; set algorithm.loss_fn instead")
    return loss_of(RLLM, [f"policy_loss={name}", *overrides])


def overrides_of(name: str, params: Mapping[str, Any]) -> Iterator[str]:
    """Yield the overrides for rLLM's parameters of a loss: its clip range, options by name, and ``overrides``.

    Raises:
        ConfigError: a parameter is not an option of this loss.
    """
    known = policy_loss(name).options({})
    low, high = params.get("eps_clip"), params.get("eps_clip_high")
    for option, value in (("cliprange_low", low), ("cliprange_high", low if high is None else high)):
        if option in known and value is not None and option not in params:
            yield f"policy_loss.{option}={value}"
    for option, value in params.items():
        if option in OF_EVERY_LOSS:
            continue
        if option not in known:
            raise ConfigError(
                f"loss_params.{option}={value!r} is not an option of policy loss {name!r}; it has: "
                f"{', '.join(known) or 'none'}"
            )
        yield f"policy_loss.{option}={'null' if value is None else value}"
    yield from shlex.split(params.get("overrides") or "")
