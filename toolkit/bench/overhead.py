"""Overhead of a call: a loss written by hand, and the same loss through this package.

Legend: B rows, T positions of a row, N = B T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.bench.problem import Problem, Step, changed
from toolkit.errors import ConfigError
from toolkit.losses.config.policy import GRPOLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.runner import LossRunner

BY_HAND = "by hand"
"""The variant that the others are compared with."""


def by_hand(problem: Problem) -> Step:
    """Return one forward and backward of PPO's clipped loss, averaged over the scored tokens, in a dozen lines.

    Raises:
        ConfigError: another loss is configured.
    """
    plain = GRPOLossConfig(mode=problem.loss_cfg.mode, chunk_size=problem.loss_cfg.chunk_size)
    if problem.loss_cfg.model_dump(exclude={"use_entropy_metric"}) != plain.model_dump(exclude={"use_entropy_metric"}):
        raise ConfigError(
            "bench=overhead compares with PPO's clipped loss written by hand; leave loss, policy_loss, kl and "
            "aggregation as they are"
        )
    item, options = problem.item, plain.policy_options
    assert isinstance(item, RLLossContextInputItem)
    labels, advantages, old_logprobs = problem.labels, item.advantages, item.old_logprobs
    assert advantages is not None
    assert old_logprobs is not None
    advantages, old_logprobs = advantages.reshape(-1), old_logprobs.reshape(-1)
    low, high, cap = 1 - options["cliprange_low"], 1 + options["cliprange_high"], options["clip_ratio_c"]

    def step() -> Tensor:
        mask = labels != -100
        logits = F.linear(problem.hidden, problem.weight).float()
        logprobs = -F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        ratio = (logprobs - old_logprobs).exp()
        losses = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
        losses = torch.where(advantages < 0, torch.minimum(losses, -cap * advantages), losses)
        loss = (losses * mask).sum() / mask.sum()
        loss.backward()
        return loss

    return step


def by_context(problem: Problem, mode: str) -> Step:
    """Return the same through `build_batches_loss_kwargs` and a context."""
    cfg = changed(problem.loss_cfg, mode=mode)

    def step() -> Tensor:
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([problem.item], cfg)
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(problem.rows, problem.weight)
        loss.backward()
        return loss

    return step


def by_runner(problem: Problem, mode: str) -> Step:
    """Return the same through `LossRunner`."""
    runner, fields = LossRunner(changed(problem.loss_cfg, mode=mode)), dict(problem.item.tensors())
    fields.pop("ref_logprobs", None)

    def step() -> Tensor:
        loss = runner(problem.rows, problem.weight, **fields).loss  # type: ignore[arg-type]
        loss.backward()
        return loss

    return step


BUILDERS: dict[str, Callable[[Problem], Step]] = {
    BY_HAND: by_hand,
    "contexts, mode=eager": partial(by_context, mode="eager"),
    "contexts, mode=chunk": partial(by_context, mode="chunk"),
    "LossRunner, mode=eager": partial(by_runner, mode="eager"),
    "LossRunner, mode=chunk": partial(by_runner, mode="chunk"),
}
"""By name; the others are compared with the first."""
