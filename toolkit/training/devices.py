"""The accelerator of a run, and the check that gradients pass through it unscaled."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from toolkit.errors import ConfigError, LaunchError, first_line
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.training.config import TrainingConfig
from toolkit.training.probe import check_gradient_scale
from toolkit.training.sharding import Sharding, no_sync, prepare_probe


def make_accelerator(config: TrainingConfig, log_with: str | None, project_dir: str) -> Accelerator:
    """Return the accelerator of this process; the toolkit accumulates gradients, so accelerate divides none."""
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    precision = _mixed_precision(config, on_cpu=on_cpu)
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s))
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            log_with=log_with,
            project_dir=project_dir,
            kwargs_handlers=[waiting],
        )
    except torch.distributed.DistError as error:
        raise LaunchError(
            f"the processes did not find each other within training.timeout_s={config.timeout_s} s: {first_line(error)}"
        ) from None
    if accelerator.gradient_accumulation_steps != 1:  # set by the launcher or its environment variable
        raise LaunchError(
            f"accelerate is set to accumulate gradients over {accelerator.gradient_accumulation_steps} steps and would "
            "divide every loss by that; leave it at 1 and set training.micro_batch_size, which does not change the "
            "loss"
        )
    return accelerator


def _mixed_precision(config: TrainingConfig, *, on_cpu: bool) -> str | None:
    """Return the setting for accelerate, which with fp16 and without a GPU would silently train in fp32."""
    wanted, launched = config.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted is not None and launched not in (None, wanted):
        raise LaunchError(
            f"accelerate was launched with mixed_precision={launched}, but training.mixed_precision={wanted}; remove "
            "one of them"
        )
    if on_cpu and "fp16" in (wanted, launched):
        raise ConfigError("training.mixed_precision=fp16 needs a GPU; choose bf16 or no on a CPU")
    return wanted


def probe_accelerator(accelerator: Accelerator, loss_cfg: BaseLossConfig, sharding: Sharding = "none") -> None:
    """Send a known gradient through accelerator and sharding as the loop does; see `check_gradient_scale`."""
    check_gradient_scale(
        accelerator.backward,
        lambda module: prepare_probe(module, accelerator, sharding),
        no_sync=no_sync,
        scaler=accelerator.scaler,
        loss_cfg=CELossConfig(gradient_reduction=loss_cfg.gradient_reduction),
        device=accelerator.device,
    )
    accelerator.free_memory()  # it would keep the probe's module among its models
