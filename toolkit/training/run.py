"""The main job from start to end: set up, warm-up, RL, evaluation, report."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from toolkit.distributed import check_world_size, rank, reduce_metrics
from toolkit.errors import ConfigError, LaunchError, ToolkitError, described, first_line
from toolkit.functional.scope_check import error_location, fields_declared, undeclared
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.samples import sample_fields
from toolkit.metrics import Max
from toolkit.training import checkpoint
from toolkit.training.agreement import agree
from toolkit.training.config import TrainingConfig
from toolkit.training.dry_run import DRY_RUN, show_dry_run
from toolkit.training.evaluation import Evaluation
from toolkit.training.export import check_export
from toolkit.training.failures import stop_together
from toolkit.training.phase import Phase
from toolkit.training.probe import check_gradient_scale
from toolkit.training.progress import PhaseProgress
from toolkit.training.report import Summary, write_report
from toolkit.training.run_config import RunConfig
from toolkit.training.sharding import Sharding, no_sync, prepare_probe
from toolkit.training.startup import check_environment
from toolkit.training.tracking import Tracker
from toolkit.training.trainer import Trainer

REPEATED_S = 5.0
"""Seconds in which the same signal again is the same request: launchers pass on what the process got itself."""


class StopFlag:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the loop reads between steps; a later one kills.

    The same signal within `REPEATED_S` seconds of the first one is the same request. A context manager that restores
    the earlier handlers. Only the main thread may set handlers.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._last: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_repeated = now - self._last.get(number, -math.inf) < REPEATED_S
        self._last.setdefault(number, now)
        if self.is_set and not is_repeated:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.is_set = True

    def agreed(self) -> bool:
        """Return whether any process received a signal; all must leave the loop after the same step."""
        return reduce_metrics({"stop": Max.of(torch.tensor([float(self.is_set)]))})["stop"].value() > 0


def run(config: RunConfig, cfg: DictConfig, *, started: float, output_dir: str) -> Summary:
    """Train as configured and return the summary; all processes call it together.

    Args:
        config: the checked configuration.
        cfg: the same as Hydra composed it, written next to the results.
        started: when the run began, imports included, as `time.time` gives it.
        output_dir: for the files; that of the main process counts.

    Raises:
        LaunchError: the number of processes is not the one asked for, their settings differ, the gradient of the
            start-up probe comes out changed, or another process failed.
        ConfigError: a checkpoint to resume from, a model or a tracker is missing.
    """
    resumed = check_environment(config)
    accelerator = make_accelerator(config.training, config.tracker.log_with, output_dir)
    with stop_together(config.training.timeout_s):
        folder = Path(agree(output_dir, cfg))
        check_world_size(accelerator.num_processes, config.training.num_processes)
        probe_accelerator(accelerator, config.loss, config.training.sharding)
        with StopFlag() as flag:
            summary = _job(config, cfg, accelerator, flag, resumed, started, folder)
        accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return summary


def _job(
    config: RunConfig,
    cfg: DictConfig,
    accelerator: Accelerator,
    flag: StopFlag,
    resumed: tuple[Path, dict[str, Any]] | None,
    started: float,
    output_dir: Path,
) -> Summary:
    """Set up, train, evaluate and report."""
    dry_run = config.training.dry_run
    console = Console(quiet=not accelerator.is_main_process, highlight=False, record=dry_run)
    if config.model.cpu_threads is not None:
        torch.set_num_threads(config.model.cpu_threads)
    rehearse(config.loss)
    set_seed(config.seed)  # after all checks: what they draw must not change a run
    task = config.task.build(config.seed)
    policy, tokenizer = config.model.build(task.alphabet)
    trainer = Trainer(config, accelerator, task, policy, tokenizer)
    check_export(trainer)
    if dry_run:
        show_dry_run(trainer, console)
        if accelerator.is_main_process:
            (output_dir / DRY_RUN).write_text(console.export_text())
            console.print(f"{DRY_RUN} in {output_dir}", soft_wrap=True)
        return Summary.of_dry_run(trainer, wall_seconds=time.time() - started, output_dir=output_dir)
    if accelerator.is_main_process:
        (output_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    tracker = Tracker(config.tracker, accelerator, output_dir, config.model_dump())
    total, trained = (sum(p.numel() for p in policy.parameters() if p.requires_grad or both) for both in (True, False))
    parameters = f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")
    console.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {parameters}; output: {output_dir}",
        soft_wrap=True,
    )
    loop = _Loop(trainer, tracker, console, flag, output_dir)
    before, is_done = _train(loop, resumed)
    after = trainer.evaluate() if is_done else Evaluation()
    tracker.close()
    seconds = time.time() - started
    trainer.rewarder.close()
    summary = Summary.of(trainer, before, after, wall_seconds=seconds, output_dir=output_dir, interrupted=not is_done)
    if accelerator.is_main_process:
        examples = task.heldout[: len(before.completions)]
        write_report(summary, tracker.rows, examples, before, after, console)
    return summary


@dataclass(frozen=True)
class _Loop:
    """What both phases use."""

    trainer: Trainer
    tracker: Tracker
    console: Console
    flag: StopFlag
    output_dir: Path


def _train(loop: _Loop, resumed: tuple[Path, dict[str, Any]] | None) -> tuple[Evaluation, bool]:
    """Run both phases, from the start or from a checkpoint; return the state before RL and whether both are done."""
    trainer, tracker, console = loop.trainer, loop.tracker, loop.console
    folder, state = resumed or (None, {"phase": "warmup"})
    if folder is not None:
        checkpoint.load_weights(folder, trainer)
        trainer.updater.num_skipped = state["num_skipped"]
        trainer.updater.num_overflows = state.get("num_overflows", 0)
        trainer.kl_penalty.restore(state["kl_control"])
        tracker.restore(folder.parent, state["phase"], state["next_step"])
        console.print(f"resumed from {folder}: {state['phase']} step {state['next_step']}", soft_wrap=True)
    if state["phase"] == "warmup":
        phase = trainer.warmup_phase()
        if folder is not None:
            checkpoint.load_phase(folder, state, phase, trainer)
        if not _run_phase(loop, phase, "warm-up", {}):
            return Evaluation(), False
        before = trainer.evaluate()
        if before.shown():
            console.print(f"held-out {before.shown(' before:')}")
    else:
        before = Evaluation(state["accuracy_before"], state["completions_before"], **state.get("measured_before", {}))
    phase = trainer.main_phase()
    if folder is not None and state["phase"] == "main":
        checkpoint.load_reference(folder, trainer)
        checkpoint.load_phase(folder, state, phase, trainer)
        if phase.next_step >= phase.num_steps:
            console.print(
                f"note: no step is left to run: the checkpoint is at step {phase.next_step} and training.steps="
                f"{phase.num_steps}; raise training.steps to train further",
                soft_wrap=True,
            )
    title = type(trainer.config.loss).__name__.removesuffix("LossConfig").lower()
    measured = {name: getattr(before, name) for name in ("reward", "reward_se", "nll")}
    record = {
        "accuracy_before": before.accuracy,
        "completions_before": before.completions,
        "measured_before": measured,
    }
    return before, _run_phase(loop, phase, title, record)


def _run_phase(loop: _Loop, phase: Phase, title: str, record: dict[str, Any]) -> bool:
    """Run the remaining steps of a phase; return False if Ctrl-C stopped it early."""
    trainer, output_dir, cfg = loop.trainer, loop.output_dir, loop.trainer.config.training
    with PhaseProgress(loop.console, title, phase.num_steps, phase.next_step, cfg.log_every) as progress:
        while phase.next_step < phase.num_steps:
            if loop.flag.agreed():
                checkpoint.save_checkpoint(output_dir, trainer, phase, record)
                return False
            step = phase.next_step
            metrics = trainer.run_step(phase)
            loop.tracker.log(phase.name, step, metrics)
            is_warm = trainer.is_warm(phase)
            progress.step(step, metrics, is_last=is_warm or phase.next_step == phase.num_steps)
            if is_warm:
                break
            if cfg.checkpoint_every and phase.next_step % cfg.checkpoint_every == 0:
                checkpoint.save_checkpoint(output_dir, trainer, phase, record, is_last=False)
    if phase.name == "main":
        checkpoint.save_checkpoint(output_dir, trainer, phase, record)
    return True


def rehearse(loss_cfg: BaseLossConfig) -> None:
    """Call a loss once on two made-up tokens, so bugs in your loss surface before the warm-up."""
    if isinstance(loss_cfg, CELossConfig):
        return
    policy = (loss_cfg.policy, loss_cfg.policy_options) if isinstance(loss_cfg, BaseRLLossConfig) else None
    name = f"policy loss {policy[0].name!r}" if policy else f"loss {type(loss_cfg).__name__}"
    try:
        _rehearse(loss_cfg)
    except Exception as error:  # the user's function or context may raise anything
        reason = undeclared(*policy) if policy else None
        if reason is None and isinstance(error, ToolkitError):
            raise
        location = error_location(error, policy[0]) if policy else ""
        reason = reason or f"it raised {described(error)}{location}"
        raise ConfigError(f"{name}: {reason}") from (None if policy else error)


def _rehearse(loss_cfg: BaseLossConfig) -> None:
    """Run forward and backward with the declared fields only: others that it reads may be missing later."""
    wanted = {"old_logprobs", "rollout_logprobs", "group_ids"}  # a custom loss: all that the trainer makes
    if isinstance(loss_cfg, BaseRLLossConfig):
        declared = fields_declared(loss_cfg.policy, loss_cfg.policy_options)
        wanted = {"old_logprobs", *loss_cfg.required_fields, *declared}
    if loss_cfg.needs_current(num_parts=2):  # the trainer computes them, too
        wanted.add("current_logprobs")
    logprobs = torch.full((1, 2), -1.0)
    draw = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = sample_fields(RLLossContextInputItem, logprobs, draw=draw, names=wanted - {"advantages"})
    if "group_ids" in fields:
        fields["group_ids"] += rank()  # they are numbered over all processes
    labels, advantages = torch.tensor([[0, 1]]), torch.tensor([1.0, -1.0])
    item = RLLossContextInputItem(shifted_labels=labels, advantages=advantages, **fields)
    hidden, weight = torch.zeros(1, 2, 2, requires_grad=True), torch.eye(2)
    context = loss_cfg.loss_ctx_cls
    batches_kwargs = context.build_batches_loss_kwargs([item], loss_cfg)
    context(loss_cfg, batches_kwargs[0]).forward(hidden, weight)[0].backward()


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
