"""Loops that are wrong on purpose, each in one place; importable, so that new processes find them."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.distributed import all_reduce_sum, rank, reduce_metrics, world_size
from toolkit.metrics import Mean, merge_metrics, metrics_in, to_floats
from toolkit.testing import Part
from toolkit.testing.evaluation import alone


def built(part: Part) -> list[Any]:
    context = part.loss_cfg.loss_ctx_cls
    kwargs = context.build_batches_loss_kwargs(part.items, part.loss_cfg, part.cu_seq_lens_list, part.sp_mesh)
    return [context(part.loss_cfg, own) for own in kwargs]


def forward_backward(part: Part, contexts: Sequence[Any], factor: float | Tensor = 1.0) -> tuple[Tensor, list[Any]]:
    total, extras = torch.zeros((), dtype=torch.float64), []
    for context, hidden in zip(contexts, part.hidden_states, strict=True):
        loss, extra = context.forward(hidden, part.head_weight, part.head_bias)
        (factor * loss).backward()
        total += loss.detach()
        extras.append(metrics_in(extra))
    return total, extras


def right(part: Part) -> Any:
    total, extras = forward_backward(part, built(part))
    part.reduce_gradients()
    return all_reduce_sum(total) / world_size(), reduce_metrics(merge_metrics(extras))


def factor_two(part: Part) -> Any:
    forward_backward(part, built(part), 2.0)
    part.reduce_gradients()
    return None, None


def mean_of_micro_batches(part: Part) -> Any:
    """Each micro-batch is normalised by what it holds, and the losses are averaged: the bug of P1."""
    context, contexts = part.loss_cfg.loss_ctx_cls, []
    for index, item in enumerate(part.items):
        bounds = None if part.cu_seq_lens_list is None else [part.cu_seq_lens_list[index]]
        (kwargs,) = context.build_batches_loss_kwargs([item], part.loss_cfg, bounds, part.sp_mesh)
        contexts.append(context(part.loss_cfg, kwargs))
    forward_backward(part, contexts, 1 / len(contexts))
    part.reduce_gradients()
    return None, None


def divided_again(part: Part) -> Any:
    """What accelerate does with gradient_accumulation_steps: a division that the weights hold already."""
    forward_backward(part, built(part), 1 / len(part.items))
    part.reduce_gradients()
    return None, None


def without_boundaries(part: Part) -> Any:
    context = part.loss_cfg.loss_ctx_cls
    kwargs = context.build_batches_loss_kwargs(part.items, part.loss_cfg, None, part.sp_mesh)
    forward_backward(part, [context(part.loss_cfg, own) for own in kwargs])
    return None, None


def forgets_a_micro_batch(part: Part) -> Any:
    contexts = built(part)
    for context, hidden in list(zip(contexts, part.hidden_states, strict=True))[-1:]:
        context.forward(hidden, part.head_weight, part.head_bias)[0].backward()
    part.reduce_gradients()
    return None, None


def mean_of_metrics(part: Part) -> Any:
    """Gradients are right; the metrics of micro-batches are averaged as numbers (P20)."""
    total, extras = forward_backward(part, built(part))
    part.reduce_gradients()
    numbers = [to_floats(own) for own in extras]
    shared = set.intersection(*(set(own) for own in numbers))
    return total, {name: sum(own[name] for own in numbers) / len(numbers) for name in shared}


def own_metric(part: Part) -> Any:
    """Reports something that only this loop knows, as a number a micro-batch has."""
    right(part)
    return None, {"tokens": float((part.items[-1].shifted_labels != part.loss_cfg.ignore_idx).sum())}


def no_gradient(part: Part) -> Any:
    return None, None


def loses_gradients(part: Part) -> Any:
    """A step that is right, after which the leaves are cleared."""
    right(part)
    for leaf in (part.head_weight, part.head_bias, *part.hidden_states):
        leaf.grad = None
    return None, None


def detached_head(part: Part) -> Any:
    right(part)
    part.head_weight.grad = torch.zeros_like(part.head_weight)
    return None, None


def says_nothing(part: Part) -> Any:
    right(part)


# -------------------------------------------------------------------- several processes


def adds_over_processes(part: Part) -> Any:
    forward_backward(part, built(part))
    for leaf in (part.head_weight, part.head_bias):
        if leaf is not None and world_size() > 1:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            dist.all_reduce(leaf.grad)
    return None, None


def divides_by_processes_again(part: Part) -> Any:
    forward_backward(part, built(part), 1 / world_size())
    part.reduce_gradients()
    return None, None


def shards_counted_twice(part: Part) -> Any:
    """The gradient is summed over the mesh although the weights are those of the whole sequence: the bug of P8."""
    forward_backward(part, built(part))
    part.reduce_gradients()
    if part.sp_mesh is not None:
        for leaf in (part.head_weight, part.head_bias, *part.hidden_states):
            if leaf is not None and leaf.grad is not None:
                leaf.grad *= part.sp_mesh.size()
    return None, None


def counts_alone(part: Part) -> Any:
    """Every process counts its own tokens, as if the others had as many (P2)."""
    with alone():
        contexts = built(part)
    forward_backward(part, contexts)
    part.reduce_gradients()
    return None, None


def metrics_of_one_process(part: Part) -> Any:
    total, extras = forward_backward(part, built(part))
    part.reduce_gradients()
    return all_reduce_sum(total) / world_size(), merge_metrics(extras)


def never_reduces(part: Part) -> Any:
    forward_backward(part, built(part))
    return None, None


def dies_on_one(part: Part) -> Any:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(part)


def raises_on_one(part: Part) -> Any:
    if rank() == 1:
        raise ValueError("no such luck")
    return right(part)


def waits_for_nobody(part: Part) -> Any:
    if rank() == 1:
        all_reduce_sum(torch.zeros(1))
    return right(part)


def adds_in_a_group(part: Part) -> Any:
    dist.get_world_size()  # raises where there is none
    return adds_over_processes(part)


def with_a_mean(part: Part) -> Any:
    right(part)
    labels = torch.cat([item.shifted_labels.reshape(-1) for item in part.items])
    return None, reduce_metrics({"scored": Mean.of((labels != part.loss_cfg.ignore_idx)[labels != -100])})
