"""A ``compute_loss_func`` for Hugging Face's Trainer: a loss from the logits that the model returned.

Legend: B rows, T positions of a row, V vocabulary, N scored tokens.

Source: transformers 5.23, ``trainer.py``: the function gets the number of labels of the optimizer step, over all ranks
if ``average_tokens_across_devices`` (the default), and the Trainer multiplies its result by the number of processes,
whose gradients are averaged. It must not divide by the number of micro-batches.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ConfigError, DataError, a_type
from toolkit.head import TokenScores
from toolkit.integrations.transformers import TESTED
from toolkit.integrations.versions import check_version
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.context import BaseLossContext
from toolkit.losses.scored import ScoredLossContext
from toolkit.runner import LossRunner

ComputeLoss = Callable[..., Tensor]


def config_of(loss: Any) -> BaseLossConfig:
    """Return the config of a loss: overrides as on the command line, in one string or a list; or the config itself.

    Raises:
        ConfigError: the loss does not exist.
    """
    if isinstance(loss, BaseLossConfig):
        return loss
    if isinstance(loss, str):
        return LossRunner.from_overrides(shlex.split(loss)).loss_cfg
    if isinstance(loss, Sequence) and all(isinstance(each, str) for each in loss):
        return LossRunner.from_overrides(list(loss)).loss_cfg
    raise ConfigError(f"loss is {a_type(loss)}; give overrides, loss='loss=ce', or a config such as CELossConfig()")


def make_compute_loss_func(loss: Any = "loss=ce") -> ComputeLoss:
    """Return a function for ``Trainer(compute_loss_func=...)``: a mean over the labels of the optimizer step.

    Args:
        loss: overrides as on the command line, in one string or a list, such as ``"loss=ce"``; or a config.

    Raises:
        ConfigError: the loss reads more than labels, or has another mean than ``token_mean``; `ToolkitTrainer` has all.
    """
    check_version("transformers", TESTED)
    cfg = config_of(loss)
    _check(cfg)

    def compute_loss_func(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """Return the share of a micro-batch in the loss of the optimizer step, 0-dim.

        Args:
            outputs: of the model, with ``logits`` [B, T, V].
            labels: [B, T], not shifted, -100 (`ignore_idx`) where nothing is scored.
            num_items_in_batch: number of labels of the step; None: of this micro-batch.

        Raises:
            ConfigError: the model runs in DataParallel.
            DataError: there are no labels.
        """
        if labels is None:
            raise DataError("the batch has no labels; add labels [B, T], -100 where nothing is scored")
        return _loss_of(cfg, outputs["logits"] if isinstance(outputs, dict) else outputs[0], labels, num_items_in_batch)

    return compute_loss_func


def _loss_of(cfg: BaseLossConfig, logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    if isinstance(count, Tensor) and count.numel() > 1:
        raise ConfigError("num_items_in_batch has several values, as in DataParallel; start the processes by torchrun")
    shifted = F.pad(labels[..., 1:], (0, 1), value=cfg.ignore_idx).to(logits.device)
    positions = (shifted.reshape(-1) != cfg.ignore_idx).nonzero().squeeze(-1)
    if count is None:
        count = max(len(positions), 1)
    number = torch.as_tensor(count, dtype=torch.float64, device=logits.device).reshape(())
    weight = (1 / number.clamp(min=1)).expand(shifted.shape)
    kwargs = cfg.loss_ctx_cls.kwargs_cls(shifted_labels=shifted, loss_weight=weight)
    context, taken = cfg.loss_ctx_cls(cfg, kwargs), kwargs.take(positions)
    chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, positions)
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if cfg.temperature != 1:
        wide = wide / cfg.temperature
    if not isinstance(context, ScoredLossContext):
        return context.summed(context.losses_from_logits(wide, taken), taken)[0]
    logprobs = wide.log_softmax(-1)
    entropy = None
    if context.entropy:
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
        entropy = entropy.detach() if context.entropy == "metric" else entropy
    scores = TokenScores(logprobs.gather(-1, taken.shifted_labels.unsqueeze(-1)).squeeze(-1), entropy)
    return context.loss_from_scores(scores, taken)[0]


def _check(cfg: BaseLossConfig) -> None:
    """Raise `ConfigError` if the loss cannot be computed from logits, labels and their number."""
    instead = "use toolkit.integrations.transformers.ToolkitTrainer(..., loss=...)"
    cls = cfg.loss_ctx_cls
    missing = [n for n, f in cls.kwargs_cls.model_fields.items() if f.is_required() and n != "shifted_labels"]
    if missing:
        raise ConfigError(f"the loss reads {missing[0]}, but compute_loss_func gets labels alone; {instead}")
    for term in cfg.checked_terms:
        if term.average.name != "token_mean" or term.token_filter is not None:
            chosen = " over chosen tokens" * (term.token_filter is not None)
            raise ConfigError(
                f"the loss averages by {term.average.name}{chosen}, but "
                f"compute_loss_func is given the number of labels alone; choose a mean over tokens, or {instead}"
            )
    if (cfg.logit_scale, cfg.softcap) != (1.0, None):
        raise ConfigError("logit_scale and softcap are applied by the model already; leave them out of loss")
    overrides = cls.losses_from_logits is not BaseLossContext.losses_from_logits
    is_scored = issubclass(cls, ScoredLossContext) and cls.candidate_ids is ScoredLossContext.candidate_ids
    if not (is_scored or overrides):
        raise ConfigError(f"{cls.__name__} computes its loss from hidden states; {instead}")
