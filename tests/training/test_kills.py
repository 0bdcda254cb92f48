"""Runs that are killed at random moments and continued: the end is that of a run that was not, bit for bit.

``TOOLKIT_KILLS=20 TOOLKIT_KILLS_2=10 pytest -m slow tests/training/test_kills.py`` kills more often than the usual 3
times, and 2 for two processes, of which a random one is killed; ``TOOLKIT_KILL_SEED`` chooses other moments.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.processes import free_port, start_module
from tests.training.test_launch import numbers
from tests.training.test_output_dir import ENV
from tests.training.test_processes import close
from tests.training.test_train import lines, summary

SETTINGS = [
    *("debug=smoke", "warmup.stop_accuracy=null", "task.num_heldout=4", "model.hidden_size=16", "model.num_layers=1"),
    *("rollout.prompts_per_step=2", "rollout.group_size=2", "warmup.batch_size=4", "training.minibatches=2"),
    *("kl=k2", "kl_control=adaptive", "kl_control.target=1e-3", "kl_control.horizon=10"),
    *("training.checkpoint_every=1", "training.keep_last=2", "training.export=checkpoints"),
]
TIMED = ("seconds", "tokens_per_second")
SOON = 15.0
"""Seconds from the death of a process to the end of the others."""
NOT_COMPARED = ("wall_seconds", "output_dir")


def killed(moments: random.Random, processes: list[Any], log: Path) -> bool:
    """Kill one of the processes at a random moment; return whether it was still running."""
    if moments.random() < 0.2:  # while it starts or ends
        deadline = time.monotonic() + moments.uniform(0.5, 6)
    else:  # within its steps and checkpoints, which begin when the log is written
        before, deadline = log.stat().st_mtime_ns if log.exists() else 0, time.monotonic() + 120
        while (log.stat().st_mtime_ns if log.exists() else 0) == before and time.monotonic() < deadline:
            if not any(process.is_alive() for process in processes):
                return False
            time.sleep(0.002)
        deadline = time.monotonic() + moments.uniform(0, 0.5)
    while time.monotonic() < deadline and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    chosen = moments.choice(processes)
    chosen.kill()
    chosen.join()
    for process in processes:  # one that still waits to meet the other is ended by a launcher
        process.join(SOON)
        process.kill()
    return chosen.exitcode == -signal.SIGKILL


def ended(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def started(folder: Path, *words: str, world: int = 1, settings: Sequence[str] = SETTINGS) -> list[Any]:
    """Start a run in `folder`, which continues what is there, in processes that a launcher would start."""
    streams = [[folder.parent / f"{folder.name}.{name}.{rank}" for name in ("out", "err")] for rank in range(world)]
    for each in streams:
        for stream in each:
            stream.unlink(missing_ok=True)
    environments = [dict(ENV)]
    if world > 1:
        joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        environments = [{**ENV, **joined, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    words = (*settings, *words, f"hydra.run.dir={folder}", "training.resume=auto")
    return [
        start_module("toolkit.train", *words, streams=each, cwd=folder.parent, env=env)
        for each, env in zip(streams, environments, strict=True)
    ]


def errors(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.parent.glob(f"{folder.name}.err.*")))


def same_end(folder: Path, whole: Path) -> None:
    rows = [[{k: v for k, v in row.items() if k not in TIMED} for row in lines(each)] for each in (folder, whole)]
    assert rows[0] == rows[1]
    ends = [{k: v for k, v in summary(each).items() if k not in NOT_COMPARED} for each in (folder, whole)]
    assert ends[0] == ends[1]
    for name in ("checkpoint/model", "checkpoint/reference", "checkpoint/optimizer", "model/model"):
        first, second = (load_file(each / f"{name}.safetensors") for each in (folder, whole))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    states = [(each / "checkpoint/random_states.json").read_bytes() for each in (folder, whole)]
    assert states[0] == states[1]
    kept = [sorted(path.name for path in each.glob("*") if path.name != "curves.png") for each in (folder, whole)]
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path, world: int) -> None:
    wanted = int(os.environ.get("TOOLKIT_KILLS", "3")) if world == 1 else int(os.environ.get("TOOLKIT_KILLS_2", "2"))
    moments = random.Random(os.environ.get("TOOLKIT_KILL_SEED", "0"))
    steps = [f"warmup.steps={2 + 2 * wanted}", f"training.steps={4 + 4 * wanted}"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert ended(started(whole, *steps, world=world)) == [0] * world, errors(whole)
    kills, done, where = 0, False, []
    while kills < wanted and not done:
        processes = started(folder, *steps, world=world)
        was_killed = killed(moments, processes, folder / "metrics.jsonl")
        kills += was_killed
        codes = ended(processes)
        done = not was_killed and codes == [0] * world
        assert was_killed or done, errors(folder)
        assert "Traceback" not in errors(folder)
        where.append(len(lines_so_far(folder)))
    print(f"killed {kills} times, with this many steps in the log each time: {where}")
    if not done:
        assert ended(started(folder, *steps, world=world)) == [0] * world, errors(folder)
    assert kills >= min(wanted, 2), where
    same_end(folder, whole)


def lines_so_far(folder: Path) -> list[str]:
    log = folder / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_continues_on_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    steps, exact = ["warmup.steps=2", "training.steps=5"], ["model.dtype=float64"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert ended(started(whole, *steps, *exact)) == [0], errors(whole)
    processes = started(folder, *steps, *exact, world=before)
    while len(lines_so_far(folder)) < 4:
        assert all(process.is_alive() for process in processes), errors(folder)
        time.sleep(0.002)
    processes[-1].kill()
    ended(processes)
    assert ended(started(folder, *steps, *exact, world=after)) == [0] * after, errors(folder)
    assert summary(folder)["num_processes"] == after
    for mine, other in zip(lines(folder), lines(whole), strict=True):
        close(numbers(mine), numbers(other), rel=1e-6, abs_=1e-12)
    first, second = (load_file(each / "checkpoint/model.safetensors") for each in (folder, whole))
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-9)
