"""A step of a loss on a model over several processes, under accelerate, from a notebook.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from toolkit.distributed import rank, world_size
from toolkit.errors import DataError, a_type
from toolkit.losses.config.base import BaseLossConfig
from toolkit.metrics import Max
from toolkit.runner.batches import model_batch
from toolkit.runner.items import with_advantages
from toolkit.runner.models import is_model
from toolkit.runner.result import LossResult
from toolkit.runner.steps import run_step, runs_of
from toolkit.testing.processes import run_processes


def launch_step(
    loss_cfg: BaseLossConfig, batches: Any, model: Any, num_processes: Any, rewarded: tuple[Any, Any]
) -> LossResult:
    """Run a step over new processes; see `LossRunner.launch`."""
    if not is_model(model, None):
        raise DataError(f"model is {a_type(model)}; give a causal language model")
    if isinstance(num_processes, bool) or not isinstance(num_processes, int) or num_processes < 1:
        raise DataError(f"num_processes={num_processes!r} must be a whole number of at least 1")
    if isinstance(batches, Mapping) or not isinstance(batches, Sequence) or not batches:
        raise DataError(f"batches is {a_type(batches)}; give a list of mappings, one for each micro-batch")
    if len(batches) % num_processes:
        raise DataError(
            f"batches has {len(batches)} micro-batches for num_processes={num_processes}; all processes need as many"
        )
    fields = [model_batch(batch, torch.device("cpu")) for batch in batches]
    rows = with_advantages(
        [each.fields for each in fields], [each.num_positions for each in fields], loss_cfg, *rewarded, is_first=True
    )
    loss, metrics = run_processes(num_processes, _work, loss_cfg, model, [dict(each) for each in rows])
    return LossResult(loss, metrics, is_of_step=True)


def _work(loss_cfg: BaseLossConfig, model: nn.Module, batches: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Run this process's part of the step, and return the loss (0-dim) and the metrics of all."""
    from accelerate import Accelerator  # only here: it is slow to load

    # accelerate reads these to learn that there are several processes; they are joined already.
    names = {"RANK": rank(), "LOCAL_RANK": rank(), "WORLD_SIZE": world_size(), "LOCAL_WORLD_SIZE": world_size()}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    prepared = Accelerator(cpu=True).prepare(model)
    runs = runs_of(batches[rank() :: world_size()], None, prepared, is_first=False)
    result = run_step(runs, loss_cfg, (None, None), is_first=rank() == 0)
    squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    return result.loss, {**result.raw_metrics, "gradient_norm": Max(norm)}
