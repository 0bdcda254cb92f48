"""Checks that run before any work, and before torch is loaded: trackers, folders, checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, LaunchError, warn_once
from toolkit.training.config import AUTO
from toolkit.training.disk import shown_size
from toolkit.training.reference_path import reference_config
from toolkit.training.resume_command import command_to_continue
from toolkit.training.run_config import RunConfig
from toolkit.training.saved import CHECKPOINT, PHASES, STATE, newest

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "which takes the optimizer step inside the last backward and binds one optimizer to the model, but this "
        "command decides afterwards whether to step and has one optimizer per phase",
    ),
    "ACCELERATE_USE_FSDP": ("its FSDP", "which would wrap the policy again, and on a CPU silently stays DDP"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "which brings its models and optimizers"),
}
"""Variable that a launcher sets for an engine -> its name, and why this command does not work with it."""
SAME_WHEN_RESUMED = ("seed", "task", "model", "loss", "advantage", "kl_control")
"""What a resumed run must share with the run that it continues: data, weights and objective."""
DATA = "data"
"""Key of the digest of a user's rows."""
REWARDS = "reward_files"
"""Key of the digests of the files that a user's rewards and environment are in."""
MAY_CHANGE = {"reward_timeout_s", "reward_workers", "max_reward_failures"}
"""Settings of the task that do not change what is learnt."""
NEEDED = ("phase", "next_step", "num_updates", "num_skipped", "kl_control", "identity")
"""What the state of a checkpoint holds at least."""
EXTRA = ("matplotlib", "reasoning_gym", "rich", "safetensors", "tokenizers", "transformers")
"""Packages of the extra [train]."""


def launched_rank() -> int:
    """Return the rank that a launcher gave to this process; 0 without one."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else 0


def check_environment(config: RunConfig) -> tuple[Path, dict[str, Any]] | None:
    """Stop a run that cannot work on this machine; return the checkpoint to resume from, as `read_state` does.

    Raises:
        ConfigError: a package is missing, the data or a reward is wrong, or there is no checkpoint of such a run.
        LaunchError: the launcher is set to use an engine that this command does not support, or variables of a launcher
            are set although none started this process.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the training command needs {', '.join(missing)}, which the losses alone do not: "
            'pip install "rl-loss-toolkit[train]"'
        )
    _check_launch_variables()
    for variable, (engine, why) in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise LaunchError(
                f"accelerate is set to use {engine}, {why}; use the plain launcher and, to shard the weights over "
                "processes, training.sharding=fsdp2: accelerate launch --config_file conf/launch/fsdp2_8_gpus.yaml -m "
                "toolkit.train training.sharding=fsdp2"
            )
    log_with = config.tracker.log_with
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ConfigError(f"tracker={log_with} needs the package {log_with!r}: pip install {log_with}")
    config.task.check_data(config.seed, with_completions=config.imitates)
    config.model.check()
    if config.training.reference_path is not None:
        reference_config(config.training.reference_path)
    resume = config.training.resume
    return None if resume in (None, AUTO) else read_state(resume, config)


def _check_launch_variables() -> None:
    """Raise if variables of a launcher are set, but not those by which processes find each other."""
    values = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if os.environ.get(name)}
    wrong = [f"{name}={value}" for name, value in values.items() if not value.isdigit() and value != "-1"]
    if wrong:
        raise LaunchError(f"the environment variable {wrong[0]} is not a number; unset {wrong[0].partition('=')[0]}")
    stand_alone = {"RANK": ("0",), "LOCAL_RANK": ("-1",), "WORLD_SIZE": ("0", "1")}
    leftover = [f"{name}={value}" for name, value in values.items() if value not in stand_alone[name]]
    torch = sys.modules.get("torch")  # a program that joined its processes itself has loaded it
    is_joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if leftover and not os.environ.get("MASTER_ADDR") and not is_joined:
        names = " ".join(name for name in values)
        raise LaunchError(
            f"{' and '.join(leftover)} in the environment, but no MASTER_ADDR: no launcher started this process; for "
            f"one process: unset {names}; for several: torchrun --nproc_per_node N -m toolkit.train"
        )


def read_state(run_dir: str, config: RunConfig) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint folder of an earlier run and its state.

    Raises:
        ConfigError: there is none, it cannot be read, or it belongs to a run with other data, model or loss.
    """
    folder, lacking = newest(Path(run_dir))
    if folder is None and not lacking:
        raise ConfigError(
            f"training.resume={run_dir!r} holds no checkpoint; give the output directory of an earlier run, "
            f"which contains the folder {CHECKPOINT!r}"
        )
    if folder is None:
        raise ConfigError(
            f"training.resume={run_dir!r} holds no checkpoint that is complete: {'; '.join(lacking)}; restore the "
            "file, or start a new run"
        )
    if lacking:
        warn_once(f"training.resume={run_dir}: {'; '.join(lacking)}; the run continues from {folder}")
    try:
        state = json.loads((folder / STATE).read_text())
    except ValueError as error:  # of JSON or of the encoding
        raise ConfigError(f"training.resume: {folder / STATE} cannot be read: {error}") from None
    if not isinstance(state, dict) or not set(NEEDED) <= state.keys() or state["phase"] not in PHASES:
        raise ConfigError(f"training.resume: {folder / STATE} is not the state of a run; restore it")
    run = folder.parent if folder.name.startswith(CHECKPOINT) else folder
    _check_same(state["identity"], identity(config), run)
    return folder, state


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise if a disk has too little room.

    Args:
        folder: one that exists, on that disk.
        needed: bytes.
        what: that needs them, for the message.

    Raises:
        ConfigError: it has.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"hydra.run.dir={folder} has {shown_size(free)} free, and {what} needs {shown_size(needed)}; make room, or "
            "give a folder on another disk"
        )


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what a resumed run must share with the first one, as JSON values: settings, then contents of files."""
    parts: dict[str, Any] = {}
    for name in SAME_WHEN_RESUMED:
        part = getattr(config, name)
        is_config = not isinstance(part, int)
        fields = part.model_dump(mode="json", exclude=MAY_CHANGE) if is_config else {}
        parts[name] = {"class": type(part).__name__, **fields} if is_config else part
    return {**parts, DATA: config.task.data_digest(config.seed), REWARDS: config.task.reward_digests()}


def _check_same(earlier: dict[str, Any], current: dict[str, Any], run_dir: Path) -> None:
    """Raise if a run in `run_dir`, of which `earlier` is the identity, cannot be continued by one with `current`."""
    command = command_to_continue(run_dir)
    remedy = f"give its overrides again: {command}" if command else "resume with its settings"
    for name in SAME_WHEN_RESUMED:
        if earlier.get(name) != current[name]:
            raise ConfigError(
                f"training.resume: the earlier run had {_difference(name, earlier.get(name), current[name])}; "
                f"{remedy}, or start a new run"
            )
    if earlier.get(DATA, current[DATA]) != current[DATA]:
        raise ConfigError(
            "training.resume: the rows of task.path are not those of the earlier run; resume with the same data, "
            "or start a new run"
        )
    digests = earlier.get(REWARDS, current[REWARDS])  # checkpoints of versions before have none
    changed = next((file for file, digest in current[REWARDS].items() if digests.get(file, digest) != digest), None)
    if changed is not None:
        key = next(key for key in ("reward", "environment") if changed in str(current["task"][key]))
        raise ConfigError(
            f"training.resume: task.{key} is in {changed}, which has changed "
            "since the earlier run, so its rewards are others; restore the file, or start a new run"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return f"{name}.{key}={old.get(key)!r}, this one has {new.get(key)!r}"
    return f"{name}={old!r}, this one has {new!r}"
