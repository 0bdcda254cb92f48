"""A policy loss as a trainer calls it: log-probabilities in, one loss for each token out; the trainer averages.

Legend: B rows, T positions of a row, N positions that count.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.compose.overrides import parse
from toolkit.compose.tree import load_loss
from toolkit.errors import ConfigError, DataError, a_type, warn_once
from toolkit.functional.scope_check import call_loss, check_token_losses
from toolkit.functional.segments import sequence_ids, turn_ids
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.kl_term import sampled_kl
from toolkit.losses.policy_metrics import policy_metrics
from toolkit.losses.step.item_checks import check_policy_loss
from toolkit.metrics import to_floats

DESCRIBED = {
    "rollout_logprobs": "the sampler's log-probabilities",
    "ref_logprobs": "the reference's log-probabilities",
    "teacher_logprobs": "a teacher's log-probabilities",
    "entropies": "entropies",
}
"""Fields of `PolicyTerms` that a policy loss may read, in words."""


@dataclass(frozen=True)
class Trainer:
    """What a trainer passes to a policy loss, and what it does around it."""

    name: str
    example: str
    """How a user chooses the loss there, for messages."""
    decides: tuple[tuple[str, str], ...]
    """Choices of the command line that the trainer makes, such as ``aggregation``, and what to do instead."""
    passes: frozenset[str] = frozenset()
    """Fields of `PolicyTerms` besides ``logprobs``, ``old_logprobs`` and ``advantages``."""
    aggregation: str | None = None
    """The mean that it takes, by our name; None: it has a setting for that."""
    scales_advantages: bool = False
    """Whether it averages by scaling the advantages; a loss must then be proportional to them."""


def loss_of(trainer: Trainer, loss: Any) -> BaseRLLossConfig:
    """Return the loss to train with.

    Args:
        trainer: that asks.
        loss: overrides as on the command line, in one string or a list; or a config.

    Raises:
        ConfigError: the loss does not exist, or asks for what the trainer does itself or does not pass.
    """
    if isinstance(loss, BaseRLLossConfig):
        return _checked(trainer, loss)
    if isinstance(loss, str):
        return _loss_of(trainer, tuple(shlex.split(loss)))
    if isinstance(loss, Sequence) and all(isinstance(each, str) for each in loss):
        return _loss_of(trainer, tuple(loss))
    raise ConfigError(f"loss is {a_type(loss)}; give overrides, such as {trainer.example}, or a GRPOLossConfig")


@functools.cache
def _loss_of(trainer: Trainer, overrides: tuple[str, ...]) -> BaseRLLossConfig:
    decides = dict(trainer.decides)
    for override in parse(list(overrides)):
        part = str(override.key_or_group).removeprefix("loss.").partition(".")[0]
        if part in decides:
            raise ConfigError(f"{override.input_line} has no effect in {trainer.name}; {decides[part]}")
    cfg = load_loss(list(overrides))
    if not isinstance(cfg, BaseRLLossConfig):
        raise ConfigError(
            f"{type(cfg).__name__} has no policy loss, which {trainer.name} asks for; write {trainer.example}"
        )
    return _checked(trainer, cfg)


def _checked(trainer: Trainer, cfg: BaseRLLossConfig) -> BaseRLLossConfig:
    """Return `cfg` if the trainer can run it.

    Raises:
        ConfigError: it cannot.
    """
    check_policy_loss(cfg)
    name, decides = cfg.policy.name, dict(trainer.decides)
    for problem in _problems(trainer, cfg):
        raise ConfigError(problem)
    wanted = cfg.policy.aggregation or cfg.aggregation.name
    if trainer.aggregation is not None and wanted != trainer.aggregation:
        warn_once(
            f"policy loss {name!r} is averaged by {wanted} as a rule, but {trainer.name} averages by "
            f"{trainer.aggregation}; {decides['aggregation']}"
        )
    return cfg


def _problems(trainer: Trainer, cfg: BaseRLLossConfig) -> Iterator[str]:
    """Yield what keeps a trainer from running a loss."""
    name, decides = cfg.policy.name, dict(trainer.decides)
    read = [*cfg.policy.fields_read(cfg.policy_options), *(["ref_logprobs"] if cfg.use_kl_loss else [])]
    for field in read:
        if field not in trainer.passes:
            yield f"policy loss {name!r} reads {field}, but {trainer.name} does not pass {DESCRIBED[field]}"
    if cfg.candidates is not None:
        yield f"the loss compares distributions, but {trainer.name} passes log-probabilities of sampled tokens alone"
    if cfg.scope_of_terms in ("group", "batch"):
        yield (
            f"policy loss {name!r} compares tokens of several sequences, but {trainer.name} splits them over "
            "micro-batches; choose a loss of tokens or of sequences (policy_loss=gspo)"
        )
    if cfg.correction:
        yield f"the loss has a correction, which has no effect in {trainer.name}; {decides['correction']}"
    if cfg.entropy_coef or cfg.positive_nll_coef:
        yield (
            f"the loss has an entropy bonus or a further term, which {trainer.name} does not ask for; set "
            "entropy_coef and positive_nll_coef to 0"
        )
    if trainer.scales_advantages and not is_proportional(cfg):
        yield (
            f"policy loss {name!r} has a part that does not grow with the advantage, but {trainer.name} averages by "
            "scaling the advantages; choose a loss that is proportional to them (vanilla, gspo, cispo, sapo)"
        )


def is_proportional(cfg: BaseRLLossConfig) -> bool:
    """Whether twice the advantages give twice the policy loss, tried on a few made-up tokens."""
    generator = torch.Generator().manual_seed(0)
    old = -1.5 + 0.5 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, 1, generator=generator, dtype=torch.float64).expand(4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    fields = dict.fromkeys(DESCRIBED, old - 0.1)
    once, twice = (
        token_losses(cfg, terms_of(cfg, new, mask, {**fields, "old_logprobs": old, "advantages": factor * advantages}))
        for factor in (1.0, 2.0)
    )
    return torch.allclose(2 * once, twice, rtol=1e-9, atol=1e-12)


def terms_of(
    cfg: BaseRLLossConfig,
    logprobs: Tensor,
    mask: Tensor,
    fields: Mapping[str, Tensor],
    *,
    runs_of: Tensor | None = None,
) -> PolicyTerms:
    """Return the positions that count, [N] each, as a policy loss takes them.

    Args:
        cfg: of the loss.
        logprobs: [B, T] or [T] with gradient; a row is a sequence.
        mask: [B, T] or [T] bool; which positions count.
        fields: of `PolicyTerms`, [B, T] or [T] each; old_logprobs and advantages are among them.
        runs_of: [B, T] or [T] bool: take each run of its positions as a sequence, in rows that hold several; None:
            a row is a sequence.
    """
    rows = sequence_ids(mask.shape, None, mask.device)
    turns = turn_ids(mask if runs_of is None else runs_of, rows)
    sequences = rows if runs_of is None else turns
    positions = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    turn_of, sequence_of = turns[mask], sequences[mask]
    taken: dict[str, Any] = {name: values[mask].detach().to(logprobs.dtype) for name, values in fields.items()}
    return PolicyTerms(
        logprobs=logprobs[mask],
        **taken,
        sequence_ids=sequence_of,
        num_sequences=int(sequence_of.max()) + 1 if len(sequence_of) else 0,
        turn_ids=turn_of,
        num_turns=int(turn_of.max()) + 1 if len(turn_of) else 0,
        positions=positions[mask],
        log_ratio_range=cfg.log_ratio_range,
    )


def warn_of_runs(cfg: BaseRLLossConfig, trainer: Trainer, remedy: str) -> None:
    """Warn once that a loss of sequences takes each run of scored tokens as one."""
    if cfg.scope_of_terms == "sequence":
        warn_once(
            f"policy loss {cfg.policy.name!r} looks at whole sequences, but {trainer.name} passes no boundaries of its "
            f"packed rows: each run of scored tokens is taken as a sequence, which a conversation of several turns is "
            f"not; {remedy}"
        )


def token_losses(cfg: BaseRLLossConfig, terms: PolicyTerms) -> Tensor:
    """Return the loss of each position that counts, [N], with the KL term if there is one."""
    values = call_loss(cfg.policy, terms, cfg.policy_options)
    check_token_losses(values, terms.logprobs, cfg.policy.name)
    return values + cfg.kl_loss_coef * sampled_kl(terms, cfg) if cfg.use_kl_loss else values


def reported_mask(
    cfg: BaseRLLossConfig, mask: Tensor, logprobs: Tensor, who: str, *, drops_missing: bool = False
) -> Tensor:
    """Return `mask` [B, T] or [T] without the positions where the sampler reported no log-probability.

    Args:
        cfg: of the loss.
        mask: [B, T] or [T] bool, which positions count.
        logprobs: [B, T] or [T], the sampler's.
        who: names `logprobs` in the message.
        drops_missing: whatever ``missing_rollout`` says.

    Raises:
        DataError: there are some, and the loss has ``missing_rollout="refuse"``.
    """
    known = logprobs.isfinite()
    if not drops_missing and cfg.missing_rollout == "refuse" and bool((mask & ~known).any()):
        raise DataError(
            f"{who} is NaN or infinite at {int((mask & ~known).sum())} positions that count; to "
            "skip them, add policy_loss.anchor=rollout loss.missing_rollout=reject (the trainer's divisor counts them)"
        )
    return mask & known


@torch.no_grad()
def metrics_of(terms: PolicyTerms) -> dict[str, float]:
    """Return what the loss reported and how far the policy has moved, as numbers; nothing for an empty micro-batch."""
    if not len(terms.logprobs):
        return {}
    metrics = to_floats({**policy_metrics(terms, None), **terms.reported})
    low, high = (metrics.get(f"clip_fraction_{side}") for side in ("low", "high"))
    if low is not None and high is not None:
        metrics["clip_fraction"] = low + high
    return metrics
