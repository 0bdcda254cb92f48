"""A check of the number of processes."""

from __future__ import annotations

import os

from toolkit.errors import LaunchError

STARTED_TOGETHER = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Environment variables in which torchrun, MPI and srun give the number of processes that they started."""


def check_world_size(obtained: int, expected: int | None = None) -> None:
    """Raise if fewer or more processes work together than were asked for.

    Without this check ``accelerate launch --cpu --num_processes 2`` trains in one process, and two processes that did
    not connect train two models, both without a warning (huggingface/accelerate#2741).

    Args:
        obtained: processes in the group, as accelerate sees them.
        expected: the number in the configuration; None checks only the launcher's.

    Raises:
        LaunchError: the numbers differ.
    """
    asked = [
        ("training.num_processes", expected),
        ("WORLD_SIZE", _as_int(os.environ.get("WORLD_SIZE"))),
        ("the launcher's --num_processes", _asked_by_launcher()),
    ]
    # Lower bounds: these count the processes of one machine or of one launcher, and there may be several.
    at_least = [(name, _as_int(os.environ.get(name))) for name in STARTED_TOGETHER]
    highest = [(name, _as_int(os.environ.get(name))) for name in ("RANK", "LOCAL_RANK")]
    at_least += [(f"{name}={number}", number + 1) for name, number in highest if number is not None]
    for source, number in asked + [(source, number) for source, number in at_least if (number or 0) > obtained]:
        if number is not None and number != obtained:
            raise LaunchError(
                f"{source} asks for {number} processes, but {obtained} work together; on a machine without GPUs use "
                "'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N -m toolkit.train' or "
                "'torchrun --nproc_per_node N -m toolkit.train'"
            )


def _as_int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _asked_by_launcher() -> int | None:
    """Read --num_processes from the command line of the parent, when that is ``accelerate launch``.

    Its CPU path starts one process and does not pass the number on; only the parent's command line shows it.
    """
    try:
        import psutil  # comes with accelerate

        arguments = psutil.Process().parent().cmdline()
    except Exception:  # no such process, no permission, no psutil: nothing to compare with
        return None
    start = next((index for index, argument in enumerate(arguments) if "accelerate" in argument), None)
    if start is None or not any("launch" in argument for argument in arguments[start : start + 2]):
        return None
    launcher_arguments = arguments[start + 1 :]
    for index, argument in enumerate(launcher_arguments):
        flag, _, value = argument.replace("-", "_").partition("=")
        if flag == "__num_processes":
            return _as_int(value or next(iter(launcher_arguments[index + 1 :]), None))
        if argument in ("-m", "--module") or argument.endswith(".py"):
            return None  # what follows belongs to the script
    return None
