"""The main job from start to end: set up, warm-up, RL, evaluation, report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from toolkit.distributed import check_world_size
from toolkit.training import checkpoint
from toolkit.training.agreement import agree
from toolkit.training.devices import make_accelerator, probe_accelerator
from toolkit.training.disk import write_atomically
from toolkit.training.disk_errors import in_one_line
from toolkit.training.dry_run import DRY_RUN, show_dry_run
from toolkit.training.evaluation import Evaluation
from toolkit.training.export import check_export
from toolkit.training.failures import stop_together
from toolkit.training.heldout import Evaluations
from toolkit.training.phase import Phase
from toolkit.training.progress import PhaseProgress
from toolkit.training.rehearsal import rehearse
from toolkit.training.report import Summary, write_report
from toolkit.training.run_config import RunConfig
from toolkit.training.sample_log import SampleLog
from toolkit.training.sharding import unwrapped
from toolkit.training.startup import check_environment
from toolkit.training.stopping import StopFlag
from toolkit.training.tracking import Tracker
from toolkit.training.trainer import Trainer


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
        ToolkitError: the disk is full, or the gradient is never finite.
    """
    resumed = check_environment(config)
    accelerator = make_accelerator(config.training, config.tracker.log_with, output_dir)
    with stop_together(config.training.timeout_s):
        folder = Path(agree(output_dir, cfg))
        check_world_size(accelerator.num_processes, config.training.num_processes)
        probe_accelerator(accelerator, config.loss, config.training.sharding)
        with StopFlag() as flag, in_one_line(folder):
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
    console = Console(quiet=not accelerator.is_main_process, highlight=False, record=config.training.dry_run)
    trainer = _trainer(config, accelerator)
    if config.training.dry_run:
        show_dry_run(trainer, console)
        if accelerator.is_main_process:
            (output_dir / DRY_RUN).write_text(console.export_text())
            console.print(f"{DRY_RUN} in {output_dir}", soft_wrap=True)
        return Summary.of_dry_run(trainer, wall_seconds=time.time() - started, output_dir=output_dir)
    if accelerator.is_main_process:
        checkpoint.check_room_for(output_dir, trainer)
        write_atomically(output_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    tracker = Tracker(config.tracker, accelerator, output_dir, config.model_dump())
    samples = SampleLog(config.tracker, output_dir, trainer.tokenizer, is_main=accelerator.is_main_process)
    if resumed is not None:
        folder, state = resumed
        tracker.restore(folder.parent, state["phase"], state["next_step"])
        samples.restore(folder.parent, state["next_step"] if state["phase"] == "main" else 0)
    trainer.rollouts.samples = samples
    size = _num_parameters(unwrapped(trainer.policy))
    console.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {size}; output: {output_dir}", soft_wrap=True
    )
    with tracker:
        loop = _Loop(trainer, tracker, Evaluations(trainer, tracker, console), console, flag, output_dir)
        before, last = _train(loop, resumed)
    if last is not None:
        flag.agreed()  # the jobs of a multirun that come after it must not start
    after = last or Evaluation()
    seconds = time.time() - started
    trainer.rewarder.close()
    summary = Summary.of(
        trainer,
        before,
        after,
        wall_seconds=seconds,
        output_dir=output_dir,
        interrupted=last is None,
        signal_number=flag.signal,
    )
    if accelerator.is_main_process:
        examples = trainer.task.heldout[: len(before.completions)]
        write_report(summary, tracker.rows, examples, before, after, console)
    return summary


def _trainer(config: RunConfig, accelerator: Accelerator) -> Trainer:
    """Check what can be checked without the data, then build task, policy and trainer."""
    if config.model.cpu_threads is not None:
        torch.set_num_threads(config.model.cpu_threads)
    rehearse(config.loss)
    set_seed(config.seed)  # after all checks: what they draw must not change a run
    task = config.task.build(config.seed)
    policy, tokenizer = config.model.build(task.alphabet)
    trainer = Trainer(config, accelerator, task, policy, tokenizer)
    check_export(trainer)
    return trainer


def _num_parameters(policy: torch.nn.Module) -> str:
    """Return how many parameters a policy has, and how many of them are trained, in words."""
    total, trained = (sum(p.numel() for p in policy.parameters() if p.requires_grad or both) for both in (True, False))
    return f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")


@dataclass(frozen=True)
class _Loop:
    """What both phases use."""

    trainer: Trainer
    tracker: Tracker
    evaluations: Evaluations
    console: Console
    flag: StopFlag
    output_dir: Path


def _train(loop: _Loop, resumed: tuple[Path, dict[str, Any]] | None) -> tuple[Evaluation, Evaluation | None]:
    """Run both phases, from the start or from a checkpoint; return the evaluations before and after RL.

    The second is None if Ctrl-C stopped the run before its end.
    """
    trainer, console = loop.trainer, loop.console
    folder, state = resumed or (None, {"phase": "warmup"})
    if folder is not None:
        checkpoint.load_weights(folder, trainer)
        trainer.restore(state)
        console.print(f"resumed from {folder}: {state['phase']} step {state['next_step']}", soft_wrap=True)
    if state["phase"] == "warmup":
        phase = trainer.warmup_phase()
        if folder is not None:
            checkpoint.load_phase(folder, state, phase, trainer)
        if not _run_phase(loop, phase, "warm-up", {}):
            return Evaluation(), None
        before = loop.evaluations.at(0)
        loop.evaluations.say(before, " before:")
    else:
        before = Evaluation.restored(state["before"])
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
    record = {"before": before._asdict()}
    if not _run_phase(loop, phase, title, record):
        return before, None
    last = loop.evaluations.at(phase.next_step)
    _keep_best(loop, phase, record, last)
    return before, last


def _run_phase(loop: _Loop, phase: Phase, title: str, record: dict[str, Any]) -> bool:
    """Run the remaining steps of a phase; return False if a signal stopped it early."""
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
            _keep_best(loop, phase, record, loop.evaluations.after_step(phase))
            if cfg.checkpoint_every and phase.next_step % cfg.checkpoint_every == 0:
                checkpoint.save_checkpoint(output_dir, trainer, phase, record, is_last=False)
    if phase.name == "main":
        checkpoint.save_checkpoint(output_dir, trainer, phase, record)
    return True


def _keep_best(loop: _Loop, phase: Phase, record: dict[str, Any], evaluation: Evaluation | None) -> None:
    """Keep a checkpoint if this evaluation is the best of the run so far, and the run keeps that one."""
    if loop.trainer.config.training.keep_best and evaluation is not None and evaluation.objective is not None:
        checkpoint.save_best(loop.output_dir, loop.trainer, phase, record, evaluation.objective)
