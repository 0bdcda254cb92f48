"""Run one layout of a step and collect what every layout must agree on.

Legend: B rows, T positions of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from toolkit.distributed import all_reduce_sum, gradient_divisor, rank, reduce_metrics, world_size
from toolkit.distributed.sequence import Order, SequenceMesh, SPMesh
from toolkit.errors import ConfigError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.samples import Batch
from toolkit.metrics import Metric, merge_metrics, metrics_in, to_floats
from toolkit.testing.layout import NOWHERE, Layout, Part, part_of

Loop = Callable[[Part], tuple[Any, Mapping[str, Any] | None]]
"""``loop(part) -> (loss, metrics)``: the loss of the whole step as the loop would log it (None: it logs none), and its
metrics, mergeable ones or numbers, also of the whole step. Gradients stay on the leaves of the part."""
HIDDEN, HEAD, BIAS = "gradient of the hidden states", "gradient of the head", "gradient of the head's bias"
REFERENCE = Layout()
"""The layout that all others are compared with: one process, one batch, padded, eager."""
CHUNK = 3
"""Tokens of a chunk in mode "chunk": shorter than a sequence, and not a divisor of the usual lengths."""


@dataclass(frozen=True)
class Result:
    """The result of one layout."""

    loss: Tensor | None
    """0-dim float64."""
    gradients: dict[str, Tensor]
    """Of the whole step: hidden states [B, T, D], head [V, D], bias [V]."""
    metrics: dict[str, float]


def toolkit_loop(part: Part) -> tuple[Tensor, dict[str, Metric]]:
    """Run the documented loop: one count for the step, a backward for each micro-batch, one reduction.

    Return the loss of the step, 0-dim, and its metrics. To test your loop, copy this one and change what differs.
    """
    cfg, context = part.loss_cfg, part.loss_cfg.loss_ctx_cls
    batches = context.build_batches_loss_kwargs(part.items, cfg, part.cu_seq_lens_list, part.sp_mesh)
    total, parts = torch.zeros((), dtype=torch.float64, device=part.head_weight.device), []
    for kwargs, hidden in zip(batches, part.hidden_states, strict=True):
        loss, extra = context(cfg, kwargs).forward(hidden, part.head_weight, part.head_bias)
        loss.backward()
        total = total + loss.detach()
        parts.append(metrics_in(extra))
    part.reduce_gradients()
    factor = gradient_divisor() if cfg.gradient_reduction == "mean" else 1
    return all_reduce_sum(total) / factor, reduce_metrics(merge_metrics(parts))


def mesh_of(shards: int, order: Order = "contiguous") -> SPMesh | None:
    """Return the mesh of the processes that share a sequence with this one; None: there are no others."""
    if shards == 1:
        return None
    mesh = _mesh_in(dist.group.WORLD, shards)
    return mesh if order == "contiguous" else SequenceMesh(mesh.get_group(), order)


@functools.cache
def _mesh_in(group: Any, shards: int) -> DeviceMesh:
    """Make a mesh once in a process group, by all processes together, because meshes are never destroyed."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shape = (world_size() // shards, shards)
    return init_device_mesh(device, shape, mesh_dim_names=("data", "sequence"))["sequence"]


def in_mode(cfg: BaseLossConfig, mode: str) -> BaseLossConfig:
    """Return the config in a mode; chunks are small enough to cut every sequence.

    Raises:
        ConfigError: the loss cannot be computed in this mode.
    """
    settings = {name: getattr(cfg, name) for name in type(cfg).model_fields if name in cfg.model_fields_set}
    size = min(cfg.chunk_size, CHUNK) if isinstance(cfg.chunk_size, int) else CHUNK
    return type(cfg)(**{**settings, "mode": mode, "chunk_size": size})


def evaluate(batch: Batch, cfg: BaseLossConfig, layout: Layout, loop: Loop, *, sp_mesh: SPMesh | None = None) -> Result:
    """Run `loop` on the step in this layout and return its result; all processes must call it together.

    `sp_mesh`: the processes that share a sequence; None: neighbours do.

    Raises:
        ConfigError: the loop did not return a loss and metrics.
    """
    mode_cfg = in_mode(cfg, layout.mode)
    sp_mesh = mesh_of(layout.sequence_parallel, layout.order) if sp_mesh is None else sp_mesh
    part = part_of(batch, mode_cfg, layout, rank() // layout.sequence_parallel, sp_mesh)
    returned = loop(part)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ConfigError(f"the loop returned {type(returned).__name__}; return (loss, metrics), either may be None")
    loss, metrics = returned
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(f"the loop returned metrics of type {type(metrics).__name__}; return a dict by name, or None")
    gradients = {HIDDEN: hidden_gradient(batch, part), HEAD: _of(part.head_weight)}
    if part.head_bias is not None:
        gradients[BIAS] = _of(part.head_bias)
    loss_value = None if loss is None else torch.tensor(_number("loss", loss), dtype=torch.float64)
    return Result(loss_value, gradients, _numbers(metrics or {}))


def reference(batch: Batch, cfg: BaseLossConfig, layout: Layout = REFERENCE) -> Result:
    """Return the result of the step in one process and one batch, as if there were no process group."""
    with alone():
        return evaluate(batch, cfg, layout, toolkit_loop)


def with_current(batch: Batch, cfg: BaseLossConfig) -> Batch:
    """Return the batch with the current policy's log-probabilities if the loss needs them and it has none."""
    is_missing = hasattr(batch.item, "current_logprobs") and batch.item.current_logprobs is None
    return batch.with_current_logprobs(cfg) if is_missing and cfg.needs_current(num_parts=2) else batch


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hide the process group: `torch.distributed.is_initialized` returns False."""
    kept = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = kept


def _of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def hidden_gradient(batch: Batch, part: Part) -> Tensor:
    """Return the gradient [B, T, D] of every position of the step, float64; reduced over processes like a trunk's."""
    width = batch.hidden_states.shape[-1]
    full_gradient = torch.zeros(batch.hidden_states.shape, dtype=torch.float64, device=batch.hidden_states.device)
    rows = full_gradient.reshape(-1, width)
    for leaf, index in zip(part.hidden_states, part.flat_indices, strict=True):
        is_real = (index != NOWHERE).reshape(-1)
        rows.index_add_(0, index.reshape(-1)[is_real], _of(leaf).double().reshape(-1, width)[is_real])
    total = all_reduce_sum(full_gradient)
    return total / gradient_divisor() if part.loss_cfg.gradient_reduction == "mean" else total


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    mergeable = {name: value for name, value in metrics.items() if isinstance(value, Metric)}
    plain = {name: _number(f"metric {name!r}", value) for name, value in metrics.items() if name not in mergeable}
    return {**to_floats(mergeable), **plain}


def _number(what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
        raise ConfigError(
            f"the {what} that the loop returned is of type {type(value).__name__}{shape}; return one number for the "
            "whole step, or one of toolkit.metrics (Mean, Sum, Max, Min)"
        ) from None
