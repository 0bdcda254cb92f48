"""Checkpoints: weights, optimizer, random states, controllers and step; what a crash leaves is complete.

All files are safetensors or JSON, so reading a checkpoint runs none of its code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from toolkit.distributed import all_gather_objects
from toolkit.errors import ConfigError, first_line
from toolkit.models.lora import has_adapters
from toolkit.training.disk import flush, flush_tree, replace_folder
from toolkit.training.export import export_model
from toolkit.training.full_state import (
    full_optimizer_state,
    load_full_optimizer_state,
    read_optimizer_state,
    save_optimizer_state,
    save_weights,
)
from toolkit.training.full_state import load_weights as read_weights
from toolkit.training.phase import Phase
from toolkit.training.random_state import random_states, restore_random_state
from toolkit.training.reference import load_reference as read_reference
from toolkit.training.reference import save_reference
from toolkit.training.saved import (
    BEST,
    PHASES,
    STATE,
    WRITING,
    damage,
    make_current,
    position,
    read_manifest,
    remove,
    write_manifest,
)
from toolkit.training.sharding import unwrapped
from toolkit.training.startup import check_room, identity
from toolkit.training.trainer import Trainer

WEIGHTS, REFERENCE, OPTIMIZER = "model.safetensors", "reference.safetensors", "optimizer.safetensors"
RANDOM = "random_states.json"
LOG = "metrics.jsonl"
MOMENTS = 2
"""Numbers that AdamW keeps for each trained weight."""


def save_checkpoint(
    output_dir: Path, trainer: Trainer, phase: Phase, record: dict[str, Any], *, is_last: bool = True
) -> None:
    """Write the checkpoint of a run and keep older ones as configured; the main process writes, the others wait.

    It goes to the folder ``checkpoint`` of `output_dir`; `record` holds further JSON values to restore at resume. The
    model goes to ``model``, if it is exported now: with the last checkpoint of this call of the command, or with each.
    """
    keep_last, fresh = trainer.config.training.keep_last, output_dir / WRITING
    if trainer.accelerator.is_main_process and damage(fresh) is None:  # a crash came before its rename
        make_current(output_dir, keep_last)
    _write(fresh, trainer, phase, record)
    if trainer.accelerator.is_main_process:
        make_current(output_dir, keep_last)
    trainer.accelerator.wait_for_everyone()
    export = trainer.config.training.export
    if export == "checkpoints" or (export == "end" and is_last):
        export_model(output_dir, trainer)


def save_best(output_dir: Path, trainer: Trainer, phase: Phase, record: dict[str, Any], value: float) -> bool:
    """Write ``checkpoint-best`` if `value`, which should be high, is above that of the one there; return whether it is.

    All processes call it with the same value. A best one of a later step is replaced: the run has gone back behind it.
    """
    best, fresh = output_dir / BEST, output_dir / f"{BEST}.writing"
    is_better = True
    if trainer.accelerator.is_main_process:
        earlier = best if damage(best) is None else best.with_name(f"{BEST}.old")  # a crash between two renames
        is_complete = damage(earlier) is None
        old = (read_manifest(earlier) or {}).get("value") if is_complete else None
        is_better = old is None or value > old or position(earlier) > (PHASES.index(phase.name), phase.next_step)
    if not all_gather_objects(is_better)[0]:
        return False
    _write(fresh, trainer, phase, record, value=value)
    if trainer.accelerator.is_main_process:
        replace_folder(fresh, best)
    trainer.accelerator.wait_for_everyone()
    return True


def _write(fresh: Path, trainer: Trainer, phase: Phase, record: dict[str, Any], **facts: Any) -> None:
    """Write a complete checkpoint to the folder `fresh`; if that fails, leave none."""
    is_main = trainer.accelerator.is_main_process
    try:
        if is_main:
            remove(fresh)
            fresh.mkdir(parents=True)
        # All processes: sharded weights are gathered for the main one, which writes.
        save_weights(trainer.policy, str(fresh / WEIGHTS), trained_only=_is_partial(trainer))
        if trainer.reference is not None:
            save_reference(trainer.reference, str(fresh / REFERENCE))
        optimizer_state, random = full_optimizer_state(trainer.policy, phase.optimizer), random_states()
        if is_main:
            trainer.tokenizer.save_pretrained(fresh / "tokenizer")
            save_optimizer_state(optimizer_state, str(fresh / OPTIMIZER))
            (fresh / RANDOM).write_text(json.dumps(random))
            (fresh / STATE).write_text(json.dumps(_state(trainer, phase) | record))
            flush_tree(fresh)
            if (fresh.parent / LOG).is_file():
                flush(fresh.parent / LOG)  # its lines up to here are never written again
            write_manifest(fresh, phase.name, phase.next_step, **facts)
            flush(fresh)
    except BaseException:
        if is_main:
            remove(fresh)
        raise


def _state(trainer: Trainer, phase: Phase) -> dict[str, Any]:
    """Return what is not a tensor: the position of the run, its counters and controllers, and its identity."""
    scaler = trainer.accelerator.scaler
    return {
        "phase": phase.name,
        "next_step": phase.next_step,
        "num_updates": phase.num_updates,
        **trainer.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "identity": identity(trainer.config),
    }


def check_room_for(output_dir: Path, trainer: Trainer) -> None:
    """Raise, before the first step, if the disk cannot take one checkpoint.

    Raises:
        ConfigError: it cannot.
    """
    parameters = list(unwrapped(trainer.policy).parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights, moments = (sum(p.numel() * p.element_size() for p in each) for each in (parameters, trained))
    if _is_partial(trainer):
        weights = moments
    copies = 1 if trainer.reference is None and not trainer.kl_penalty.needs_reference else 2
    check_room(output_dir, copies * weights + MOMENTS * moments, "a checkpoint")


def _is_partial(trainer: Trainer) -> bool:
    """Whether a checkpoint holds the adapters alone: the model that they are on is where it was loaded from."""
    return has_adapters(unwrapped(trainer.policy).lm)


def load_weights(folder: Path, trainer: Trainer) -> None:
    """Load the policy's weights.

    Raises:
        ConfigError: they belong to another model, or the file is damaged.
    """
    try:
        read_weights(trainer.policy, str(folder / WEIGHTS), trained_only=_is_partial(trainer))
    except (SafetensorError, OSError) as error:
        raise ConfigError(_damaged(folder / WEIGHTS, error)) from None
    except RuntimeError as error:
        raise ConfigError(
            f"training.resume: the weights in {folder} do not fit model={type(trainer.config.model).__name__} with "
            f"these settings ({first_line(error)}); resume with the settings of the first run"
        ) from None


def load_reference(folder: Path, trainer: Trainer) -> None:
    """Load the reference policy's weights, if the run has one.

    Raises:
        ConfigError: the checkpoint has none, and the current policy is not the reference of the earlier steps, or the
            file is damaged.
    """
    if trainer.reference is not None:
        if not (folder / REFERENCE).is_file():
            raise ConfigError(f"training.resume: {folder} holds no reference policy; resume with the earlier settings")
        try:
            read_reference(trainer.reference, str(folder / REFERENCE))
        except (SafetensorError, OSError) as error:
            raise ConfigError(_damaged(folder / REFERENCE, error)) from None


def load_phase(folder: Path, state: dict[str, Any], phase: Phase, trainer: Trainer) -> None:
    """Restore optimizer, schedule, random state and step of `phase`; settings of the optimizer stay those of this run.

    Raises:
        ConfigError: a file is damaged.
    """
    try:
        stored = read_optimizer_state(str(folder / OPTIMIZER))
        load_full_optimizer_state(trainer.policy, phase.optimizer, stored)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(_damaged(folder / OPTIMIZER, error)) from None
    if phase.optimizer.scaler is not None and state["scaler"] is not None:
        phase.optimizer.scaler.load_state_dict(state["scaler"])
    try:
        restore_random_state(json.loads((folder / RANDOM).read_text()), trainer.draws)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_damaged(folder / RANDOM, error)) from None
    phase.next_step, phase.num_updates = state["next_step"], state["num_updates"]


def _damaged(file: Path, error: BaseException) -> str:
    return (
        f"training.resume: {file} is damaged ({first_line(error)}); remove its folder to continue from an older "
        "checkpoint, or start a new run"
    )
