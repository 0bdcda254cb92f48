"""Made-up tokens with a loss over them. Legend: N tokens, D hidden width, V vocabulary, B rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from toolkit.bench.config import BenchConfig
from toolkit.head import TokenScores, token_logprobs
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.samples import sample_fields
from toolkit.losses.step.builder import item_class
from toolkit.schema import Config

C = TypeVar("C", bound=Config)
Step = Callable[[], Tensor | None]
"""One forward and backward; the loss, if there is one."""
NEAR = 0.15
"""Spread of log pi - log pi_old, in nats: about a tenth of the tokens are clipped at 0.2."""


def changed(config: C, **changes: Any) -> C:
    """Return a config with some fields changed; unlike in `model_copy` the new values are checked."""
    return type(config)(**{**config.model_dump(), **changes})


def context_of(loss_cfg: BaseLossConfig, item: LossContextInputItem) -> Any:
    """Return a fresh context of a loss for a step of one item."""
    (kwargs,) = loss_cfg.loss_ctx_cls.build_batches_loss_kwargs([item], loss_cfg)
    return loss_cfg.loss_ctx_cls(loss_cfg, kwargs)


@dataclass(frozen=True)
class Problem:
    """Tensors and a loss; every variant computes the same from it."""

    config: BenchConfig
    loss_cfg: BaseLossConfig
    hidden: Tensor
    """[N, D], a leaf with gradient."""
    weight: Tensor
    """[V, D], a leaf with gradient unless the head is frozen."""
    labels: Tensor
    """[N], -100 at prompts."""
    item: LossContextInputItem
    """The same labels as rows [B, T], with advantages and so on."""

    def context(self, **changes: Any) -> Any:
        """Return a fresh context of the loss, with some fields of its config changed."""
        return context_of(changed(self.loss_cfg, **changes), self.item)

    def with_our_loss(self, logprobs: Callable[[], Tensor]) -> Step:
        """Return forward and backward of the loss, given a function for the log-probabilities of the scored tokens."""
        context = self.context()
        kwargs = context.loss_kwargs.take(self.scored)

        def step() -> Tensor:
            loss, _ = context.loss_from_scores(TokenScores(logprobs(), None), kwargs)
            loss.backward()
            return loss

        return step

    @property
    def rows(self) -> Tensor:
        """Hidden states as rows, [B, T, D]."""
        return self.hidden.view(*self.item.shifted_labels.shape, -1)

    @property
    def scored(self) -> Tensor:
        """[n] int64, positions of the scored tokens."""
        return (self.labels != -100).nonzero().squeeze(1)

    def clear(self) -> None:
        """Delete the gradients."""
        self.hidden.grad = self.weight.grad = None


def make_problem(config: BenchConfig, loss_cfg: BaseLossConfig) -> Problem:
    """Make the tensors of a configuration; the same seed gives the same numbers in every dtype."""
    tokens, width, vocabulary = config.shape
    device, dtype = device_of(config), getattr(torch, config.dtype)
    generator = torch.Generator().manual_seed(config.seed)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = torch.empty(vocabulary, width, dtype=dtype, device=device)
    for start in range(0, vocabulary, 8192):  # in slices, because an fp32 copy of a large bf16 head would be the peak
        rows = weight[start : start + 8192]
        rows.copy_(torch.randn(rows.shape, generator=generator) * width**-0.5)
    count = tokens // config.sequence_length
    labels = torch.randint(0, vocabulary, (count, config.sequence_length), generator=generator)
    labels[:, : round(config.ignored * config.sequence_length)] = -100
    advantages = torch.randn(count, 1, generator=generator)
    advantages[: round(config.zero_advantage * count)] = 0
    labels = labels.to(device)
    item_cls, fields = item_class(loss_cfg.loss_ctx_cls), dict[str, Tensor]()
    if "advantages" in item_cls.model_fields:
        states = hidden.view(*labels.shape, -1)
        with torch.no_grad():
            logprobs = token_logprobs(states, weight, labels, softcap=config.softcap, chunk_bytes=2**25).float().cpu()
        names = ("old_logprobs", "ref_logprobs")
        fields = sample_fields(item_cls, logprobs, draw=generator, names=names, spread=NEAR)
        fields["advantages"] = advantages
    item: LossContextInputItem = item_cls(shifted_labels=labels.cpu(), **fields).to(device)
    return Problem(
        config,
        loss_cfg,
        hidden.requires_grad_(),
        weight.requires_grad_(not config.frozen_head),
        labels.reshape(-1),
        item,
    )


def device_of(config: BenchConfig) -> torch.device:
    """Return the device to measure on."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
