"""metrics.jsonl and the trackers: one axis, kept over phases, a resume, Ctrl-C and errors; with the real packages."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("reasoning_gym")

from tests.training.test_evaluation import TINY
from tests.training.test_train import all_lines, environment, train
from toolkit import ConfigError
from toolkit.training.config import TrackerConfig
from toolkit.training.metrics_file import read_rows
from toolkit.training.tracking import Tracker

SETTINGS = [*TINY, "training.steps=4", "evaluation.every=2"]
EXPECTED = [("warmup", 0), ("warmup", 1), ("evaluation", 0), ("main", 0), ("main", 1), ("evaluation", 2),
            ("main", 2), ("main", 3), ("evaluation", 4)]  # fmt: skip
BLOCK, HEADER = 2**15, 7
"""Of a file of wandb, in bytes: records lie in blocks, each piece after crc, length and kind."""


# ---------------------------------------------------------------- the lines


@pytest.mark.parametrize("line", ['{"phase": "main", "st', "[]", '{"phase": "main", "step": "x"}', "5"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"phase": "warmup", "step": 0}}\n{line}\n{{"phase": "main", "step": 0}}\n')
    with pytest.raises(ConfigError, match=rf"training\.resume: line 2 of {re.escape(str(path))} cannot be read"):
        read_rows(path)


# ---------------------------------------------------------------- the trackers


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def offline(folder: Path, **extra: str) -> dict[str, str]:
    return {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1",
            "TRACKIO_DIR": str(folder / "trackio"), **extra}  # fmt: skip


def interrupted_after(run_dir: Path, line: str, *overrides: str, signal_: int = signal.SIGINT) -> None:
    """Run the command until it prints a line, and send a signal to all its processes, as Ctrl-C does."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "toolkit.train", *overrides, f"hydra.run.dir={run_dir}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=run_dir.parent,
        env=environment(**offline(run_dir.parent)),
    )  # fmt: skip
    assert process.stdout is not None
    for printed in process.stdout:
        if re.search(line, printed):
            os.killpg(process.pid, signal_)
            break
    _, errors = process.communicate(timeout=200)
    assert "Traceback" not in errors, errors


def of_wandb(run_dir: Path) -> list[list[tuple[int, dict[str, Any]]]]:
    """Return the steps with their values in each file that wandb wrote, in order, and check that each was closed."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        steps, is_closed = [], False
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            is_closed = is_closed or record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                steps.append((record.history.step.num, values))
        assert is_closed
        found.append(steps)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, in which wandb writes, after a header of 7 bytes."""
    assert data[:4] == b":W&B"
    place, record = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def of_tensorboard(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "rl-loss-toolkit"), size_guidance={"scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in steps.setdefault(event.step, {}), "a value is there twice"
            steps[event.step][tag] = event.value
    return sorted(steps.items())


def of_trackio(folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[dict[str, Any]]]:
    """Return the rows and the traces of the only run, read in another process: the folder is set at the import."""
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(run,) = S.get_run_records('rl-loss-toolkit')\n"
        "print(json.dumps([S.get_logs('rl-loss-toolkit', run_id=run['id']),"
        " S.get_traces('rl-loss-toolkit', run_id=run['id'])], default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(**offline(folder))
    )
    rows, traces = json.loads(done.stdout.splitlines()[-1])
    return [(row["step"], row) for row in rows], traces


def check_axis(steps: list[tuple[int, dict[str, Any]]], rows: list[dict[str, Any]], first: int = 0) -> None:
    """Every line of metrics.jsonl from `first` on is there once, at its number, with all its values."""
    assert [step for step, _ in steps] == list(range(first, len(rows)))
    for step, values in steps:
        row = rows[step]
        expected = {f"{row['phase']}/{name}": value for name, value in row.items() if name not in ("phase", "schema")}
        expected = {name: value for name, value in expected.items() if value is not None}
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.slow
def test_wandb_has_every_step_of_both_phases_also_after_ctrl_c(tmp_path: Path) -> None:
    needs("wandb")
    run_dir = tmp_path / "run"
    interrupted_after(run_dir, r"grpo +2/", *SETTINGS, "tracker=wandb")
    cut = all_lines(run_dir)
    (steps,) = of_wandb(run_dir)
    check_axis(steps, cut)
    done = train(run_dir, *SETTINGS, "tracker=wandb", f"training.resume={run_dir}", **offline(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "must be monotonically increasing" not in done.stdout + done.stderr
    rows = all_lines(run_dir)
    assert [(row["phase"], row["step"]) for row in rows] == EXPECTED
    _, second = of_wandb(run_dir)
    check_axis(second, rows, first=len(cut))
    names = [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]
    assert set(names) == {json.loads((run_dir / "tracker.json").read_text())["id"]}  # one run in the service


@pytest.mark.slow
def test_tensorboard_has_every_step_once_also_after_a_crash(tmp_path: Path) -> None:
    needs("tensorboard")
    run_dir, other = tmp_path / "run", tmp_path / "other"
    settings = [*SETTINGS, "tracker=tensorboard", "training.checkpoint_every=1"]
    interrupted_after(run_dir, r"grpo +3/", *settings, signal_=signal.SIGKILL)
    cut = all_lines(run_dir)
    check_axis(of_tensorboard(run_dir), cut)
    for target in (other, run_dir):  # in another folder, whose files begin with the earlier lines, and in the same one
        done = train(target, *settings, f"training.resume={run_dir}", **offline(tmp_path))
        assert done.returncode == 0, done.stderr
        rows = all_lines(target)
        assert [(row["phase"], row["step"]) for row in rows] == EXPECTED
        check_axis(of_tensorboard(target), rows)
    done = train(
        run_dir, *TINY, "training.steps=1", "tracker=tensorboard", "training.overwrite=true", **offline(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    check_axis(of_tensorboard(run_dir), all_lines(run_dir))  # nothing of the run that was replaced


@pytest.mark.slow
def test_trackio_goes_on_in_its_run_and_shows_completions(tmp_path: Path) -> None:
    needs("trackio")
    run_dir, other = tmp_path / "run", tmp_path / "other"
    settings = [*SETTINGS, "tracker=trackio"]
    interrupted_after(run_dir, r"grpo +2/", *settings, signal_=signal.SIGTERM)
    done = train(other, *settings, f"training.resume={run_dir}", **offline(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = all_lines(other)
    assert [(row["phase"], row["step"]) for row in rows] == EXPECTED
    steps, traces = of_trackio(tmp_path)
    check_axis(steps, rows)
    assert not (run_dir / "tracker.json").exists()  # the run is that of the other folder now
    assert len(traces) == 3 * 3  # three prompts of each evaluation
    assert {trace["step"] for trace in traces} == {
        index for index, row in enumerate(rows) if row["phase"] == "evaluation"
    }
    (question, answer) = traces[0]["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    assert question["content"].endswith("=")
    assert {"reward", "answer"} <= traces[0]["metadata"].keys()


@pytest.mark.slow
@pytest.mark.dist
def test_a_tracker_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    needs("tensorboard")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = train(tmp_path / "run", *SETTINGS, "tracker=tensorboard", launcher=launcher, **offline(tmp_path))
    assert done.returncode == 0, done.stderr
    check_axis(of_tensorboard(tmp_path / "run"), all_lines(tmp_path / "run"))
    assert len(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == 2  # steps and settings


@pytest.mark.slow
def test_an_error_ends_the_run_of_the_tracker(tmp_path: Path) -> None:
    needs("wandb")
    run_dir = tmp_path / "run"
    (tmp_path / "my.py").write_text(
        "calls = []\ndef fails(completion):\n    calls.append(0)\n    return 1 / (len(calls) < 20)\n"
    )
    done = train(run_dir, *SETTINGS, "tracker=wandb", "task.reward=my.py:fails", **offline(tmp_path))
    assert done.returncode == 1
    assert "reward 'fails' failed" in done.stderr
    (steps,) = of_wandb(run_dir)
    check_axis(steps, all_lines(run_dir))


def tracker_of(accelerator: Mock, folder: Path, name: str) -> Tracker:
    return Tracker(TrackerConfig(log_with=name), accelerator, folder, {"seed": 0})


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_the_axis_is_the_line(tmp_path: Path, name: str) -> None:
    """A stand-in for the packages, which have their tests above: what is sent, at which number, to which run."""
    earlier, later, fork = (tmp_path / each for each in ("earlier", "later", "fork"))
    sent: list[list[tuple[int, dict[str, Any]]]] = []

    def used(folder: Path, resumed_at: int | None, known: int = 0, of: Path = earlier) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        package = Mock(tracker=Mock(starting_step=known, _next_step=known), **{"log.side_effect": log})
        accelerator = Mock(is_main_process=True, trackers=[package])
        sent.append([])
        tracker = tracker_of(accelerator, folder, name)
        if resumed_at is not None:
            tracker.restore(of, "main", resumed_at)
        with tracker:
            if resumed_at is None:
                tracker.log("warmup", 0, {"nll": 2.0, "grad_norm": math.nan})
                tracker.log_evaluation(0, {"accuracy": 0.5, "seconds": 1.0})
            for step in range(resumed_at or 0, 3):
                tracker.log("main", step, {"reward": float(step)})
        package.finish.assert_called_once_with()
        return accelerator.init_trackers.call_args.kwargs["init_kwargs"][name]

    def log(values: dict[str, Any], step: int) -> None:
        sent[-1].append((step, values))

    first = used(earlier, None)
    assert sent[-1] == [
        (0, {"warmup/step": 0, "warmup/nll": 2.0}),
        (1, {"evaluation/step": 0, "evaluation/accuracy": 0.5, "evaluation/seconds": 1.0}),
        *((2 + step, {"main/step": step, "main/reward": float(step)}) for step in range(3)),
    ]
    whole = sent[-1]
    same = used(earlier, 1, known=0 if name == "tensorboard" else 5)  # its checkpoint is at step 1; it has 5 rows
    assert sent[-1] == ([] if name != "tensorboard" else whole[3:])
    if name == "tensorboard":
        assert (first["purge_step"], same["purge_step"]) == (0, 3)
        used(later, 1)
        assert sent[-1] == whole  # in files of its own
        return
    key = "id" if name == "wandb" else "name"
    moved = used(later, 1, known=4)  # the last row had not arrived
    assert first[key] == same[key] == moved[key]
    assert moved["resume"] == "allow"
    assert sent[-1] == whole[4:]
    forked = used(fork, 1)  # the run is that of `later` now
    assert forked[key] != first[key]
    assert sent[-1] == whole


def test_a_tracker_that_does_not_start_says_what_to_do(tmp_path: Path) -> None:
    accelerator = Mock(is_main_process=True, init_trackers=Mock(side_effect=RuntimeError("no API key\nmore")))
    tracker = tracker_of(accelerator, tmp_path, "wandb")
    with pytest.raises(
        ConfigError, match=r"tracker=wandb does not start: no API key; run wandb login, or set WANDB_MODE"
    ):
        tracker.__enter__()
