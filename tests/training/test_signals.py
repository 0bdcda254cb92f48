"""SIGTERM and Ctrl-C: a checkpoint, the model, the figure and the summary, and the exit code that shells expect."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from tests.processes import run_processes, start_module
from tests.training.test_kills import SETTINGS, ended, errors, started
from tests.training.test_output_dir import ENV
from tests.training.test_train import lines, summary
from toolkit.training import stopping
from toolkit.training.saved import newest
from toolkit.training.stopping import Killed, StopFlag

LONG = ["warmup.steps=2", "training.steps=400", "training.checkpoint_every=0", "training.keep_last=1"]
RESULTS = {"checkpoint", "model", "summary.json", "curves.png", "metrics.jsonl"}


def wait_for(log: Path, steps: int, processes: list[Any]) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "world", "receiver"),
    [(signal.SIGTERM, 1, 0), (signal.SIGINT, 1, 0), (signal.SIGTERM, 2, 1), (signal.SIGINT, 2, 0)],
)
def test_a_run_that_is_asked_to_stop(tmp_path: Path, number: signal.Signals, world: int, receiver: int) -> None:
    folder = tmp_path / "run"
    processes = started(folder, *LONG, world=world, settings=[word for word in SETTINGS if "training." not in word])
    wait_for(folder / "metrics.jsonl", 4, processes)
    for _ in range(2):  # a launcher passes on what the process got itself
        os.kill(processes[receiver].pid, number)
    assert ended(processes) == [128 + number] * world, errors(folder)
    assert "Traceback" not in errors(folder)
    assert {path.name for path in folder.iterdir()} >= RESULTS
    assert (summary(folder)["interrupted"], summary(folder)["stopped_by"]) == (True, number.name)
    found, _ = newest(folder)
    assert found is not None
    assert json.loads((found / "state.json").read_text())["next_step"] == lines(folder)[-1]["step"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a step", "at its end"])
def test_the_jobs_after_it_do_not_start(tmp_path: Path, moment: str) -> None:
    words = [word for word in SETTINGS if "training." not in word] + LONG
    if moment == "at its end":
        words = [word.replace("400", "1") for word in words]
        (tmp_path / "reward.py").write_text(  # the last completions are held-out ones, after the last step
            "import os, pathlib, signal\ncalls = []\ndef score(completion, answer):\n    calls.append(0)\n"
            "    if pathlib.Path('sweep/0/checkpoint').exists():\n        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return float(len(calls) % 2)\n"
        )
        words = [*words, "task.reward=reward.py:score"]
    streams = [tmp_path / "out", tmp_path / "err"]
    command = ["-m", *words, "seed=1,2", "hydra.sweep.dir=sweep"]
    process = start_module("toolkit.train", *command, streams=streams, cwd=tmp_path, env=ENV)
    if moment == "in a step":
        wait_for(tmp_path / "sweep/0/metrics.jsonl", 4, [process])
        os.kill(process.pid, signal.SIGTERM)
    assert ended([process]) == [143], streams[1].read_text()
    assert summary(tmp_path / "sweep/0")["interrupted"] is (moment == "in a step")
    assert summary(tmp_path / "sweep/0")["stopped_by"] == "SIGTERM"
    assert not (tmp_path / "sweep/1").exists()


def agreement(rank: int, world: int) -> None:
    for got, agreed in (({}, 0), ({1: signal.SIGTERM}, 15), ({0: signal.SIGINT, 1: signal.SIGTERM}, 15)):
        with StopFlag() as flag:
            if rank in got:
                signal.raise_signal(got[rank])
            assert flag.agreed() is (agreed > 0)
            assert flag.signal == agreed


@pytest.mark.dist
def test_whichever_process_gets_a_signal_all_agree_on_it() -> None:
    run_processes(2, agreement)


def test_a_signal_within_the_exchange_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = stopping.reduce_metrics

    def slow(metrics: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return reduce(metrics)

    with StopFlag() as flag:
        with monkeypatch.context() as patch:
            patch.setattr(stopping, "reduce_metrics", slow)
            assert not flag.agreed()
        assert flag.agreed()
        assert flag.signal == signal.SIGTERM


@pytest.mark.parametrize(("first", "second", "code"), [("SIGINT", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)])
def test_a_second_request_ends_the_run_at_once_with_its_code(first: str, second: str, code: int) -> None:
    with StopFlag():
        signal.raise_signal(signal.Signals[first])
        with pytest.raises(Killed) as caught:
            signal.raise_signal(signal.Signals[second])
    assert caught.value.code == code
