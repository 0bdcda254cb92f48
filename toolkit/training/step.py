"""What an optimizer step needs before its losses, and how its metrics reach the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.losses.auxiliary import auxiliary_weights
from toolkit.losses.config.base import BaseLossConfig
from toolkit.metrics import Mean, Metric, Sum, fetch
from toolkit.models.policy import Policy
from toolkit.models.router import wants_router_loss
from toolkit.training.experience import IGNORED, Rows


def router_weights(policy: Policy, micro_batches: Sequence[Rows], gradient_reduction: Any) -> Sequence[Tensor | None]:
    """Return the weight of each micro-batch's router loss, 0-dim; None if the model has none. All ranks must call it.

    Args:
        policy: not wrapped.
        micro_batches: of this process; the trunk sees all but the last token, and those that score nothing count 0.
        gradient_reduction: how the back-end reduces gradients over ranks.
    """
    if not wants_router_loss(policy.head.lm):
        return [None] * len(micro_batches)
    counts = [rows.attention_mask[:, :-1].sum() * (rows.shifted_labels != IGNORED).any() for rows in micro_batches]
    return auxiliary_weights(counts, gradient_reduction=gradient_reduction)


def without_empty(loss_cfg: BaseLossConfig) -> BaseLossConfig:
    """Do not count empty sequences: every completion has a token, only the rows of a rank without work have none."""
    if "aggregation" not in type(loss_cfg).model_fields:
        return loss_cfg
    aggregation = loss_cfg.aggregation.model_copy(update={"count_empty": False})  # type: ignore[attr-defined]
    return loss_cfg.model_copy(update={"aggregation": aggregation})


def per_update(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Turn the summed losses of one update into means of one, to be averaged over the updates of a step."""
    return {
        name: Mean(metric.total, torch.ones_like(metric.total))
        if isinstance(metric, Sum) and name.endswith("loss")
        else metric
        for name, metric in metrics.items()
    }


def on_host(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Return the metrics with all their parts on the host, in one transfer."""
    parts = iter(fetch([part for metric in metrics.values() for part in metric.parts]))
    return {
        name: metric.of_parts(torch.tensor(next(parts), dtype=torch.float64) for _ in metric.parts)
        for name, metric in metrics.items()
    }
