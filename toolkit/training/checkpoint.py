"""Checkpoints: weights (safetensors), optimizer, random state and step; a crash while writing keeps a complete one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import ConfigError, first_line
from toolkit.models.lora import has_adapters
from toolkit.training.export import export_model
from toolkit.training.full_state import full_optimizer_state, load_full_optimizer_state, save_weights
from toolkit.training.full_state import load_weights as read_weights
from toolkit.training.output_dir import replace_folder
from toolkit.training.phase import Phase
from toolkit.training.reference import load_reference as read_reference
from toolkit.training.reference import save_reference
from toolkit.training.sharding import unwrapped
from toolkit.training.startup import CHECKPOINT, identity
from toolkit.training.trainer import Trainer


def save_checkpoint(
    output_dir: Path, trainer: Trainer, phase: Phase, record: dict[str, Any], *, is_last: bool = True
) -> None:
    """Write the checkpoint of a run, replacing an older one; the main process writes, the others wait.

    It goes to the folder ``checkpoint`` of `output_dir`; `record` holds further JSON values to restore at resume. The
    model goes to ``model``, if it is exported now: with the last checkpoint of this call of the command, or with each.
    """
    fresh, final = output_dir / f"{CHECKPOINT}.writing", output_dir / CHECKPOINT
    if trainer.accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    # All processes: sharded weights are gathered for the main one, which writes.
    save_weights(trainer.policy, str(fresh / "model.safetensors"), trained_only=_is_partial(trainer))
    if trainer.reference is not None:
        save_reference(trainer.reference, str(fresh / "reference.safetensors"))
    optimizer_state = full_optimizer_state(trainer.policy, phase.optimizer)
    if trainer.accelerator.is_main_process:
        trainer.tokenizer.save_pretrained(fresh / "tokenizer")
        torch.save(
            {
                "optimizer": optimizer_state,
                "scaler": trainer.accelerator.scaler.state_dict() if trainer.accelerator.scaler is not None else None,
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            fresh / "state.pt",
        )
        state = {
            "phase": phase.name,
            "next_step": phase.next_step,
            "num_updates": phase.num_updates,
            **trainer.state(),
            "identity": identity(trainer.config),
            "python_rng": random.getstate(),
            **record,
        }
        (fresh / "state.json").write_text(json.dumps(state))
        replace_folder(fresh, final)
    trainer.accelerator.wait_for_everyone()
    export = trainer.config.training.export
    if export == "checkpoints" or (export == "end" and is_last):
        export_model(output_dir, trainer)


def _is_partial(trainer: Trainer) -> bool:
    """Whether a checkpoint holds the adapters alone: the model that they are on is where it was loaded from."""
    return has_adapters(unwrapped(trainer.policy).lm)


def load_weights(folder: Path, trainer: Trainer) -> None:
    """Load the policy's weights.

    Raises:
        ConfigError: they belong to another model.
    """
    try:
        read_weights(trainer.policy, str(folder / "model.safetensors"), trained_only=_is_partial(trainer))
    except RuntimeError as error:
        raise ConfigError(
            f"training.resume: the weights in {folder} do not fit model={type(trainer.config.model).__name__} with "
            f"these settings ({first_line(error)}); resume with the settings of the first run"
        ) from None


def load_reference(folder: Path, trainer: Trainer) -> None:
    """Load the reference policy's weights, if the run has one.

    Raises:
        ConfigError: the checkpoint has none, and the current policy is not the reference of the earlier steps.
    """
    if trainer.reference is not None:
        if not (folder / "reference.safetensors").is_file():
            raise ConfigError(f"training.resume: {folder} holds no reference policy; resume with the earlier settings")
        read_reference(trainer.reference, str(folder / "reference.safetensors"))


def load_phase(folder: Path, state: dict[str, Any], phase: Phase, trainer: Trainer) -> None:
    """Restore optimizer, schedule, random state and step of `phase`."""
    stored = torch.load(folder / "state.pt", weights_only=True)
    load_full_optimizer_state(trainer.policy, phase.optimizer, stored["optimizer"])
    if phase.optimizer.scaler is not None and stored.get("scaler") is not None:
        phase.optimizer.scaler.load_state_dict(stored["scaler"])
    torch.set_rng_state(stored["torch_rng"])
    if stored["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(stored["cuda_rng"][: torch.cuda.device_count()])
    version, internal, gauss = state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    phase.next_step, phase.num_updates = state["next_step"], state["num_updates"]
