"""A run as it goes, before, during and after it; no browser, no widgets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.report.made import make_run
from toolkit.notebook.charts import Chart, Line, _draw
from toolkit.notebook.watch_model import QUIET, WatchModel


def add(folder: Path, *rows: dict) -> None:  # type: ignore[type-arg]
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_before_during_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = WatchModel(folder)
    assert model.refresh()
    assert not model.refresh()
    assert model.view().notes == (f"waiting for {folder}: the folder does not exist",)
    folder.mkdir()
    assert model.refresh()
    assert model.view().notes == (f"waiting for {folder / 'metrics.jsonl'}: the run has not made a step",)

    add(folder, {"phase": "main", "step": 0, "reward": 0.25, "clip_fraction_high": 0.1, "kl_old": 0.5})
    assert model.refresh()
    charts = {chart.title: chart for chart in model.view().charts}
    assert [*charts] == ["Reward", "KL", "Clipped tokens"]
    assert (charts["Reward"].lines[0].x, charts["Reward"].lines[0].y) == ([1], [0.25])
    (clipped,) = charts["Clipped tokens"].lines
    assert (clipped.label, clipped.y) == ("above the range (PPO: A > 0)", [10])
    assert model.status() == "run: 1 steps"
    assert not model.is_done

    add(folder, {"phase": "evaluation", "step": 1, "accuracy": 0.5}, {"phase": "main", "step": 1, "reward": None})
    assert model.refresh()
    reward, accuracy = model.view().charts[0].lines
    assert (accuracy.label, accuracy.x, accuracy.y) == ("held-out accuracy", [1], [0.5])
    assert reward.y == [0.25]

    (folder / "summary.json").write_text(json.dumps({"wall_seconds": 3.0, "interrupted": False}))
    assert model.refresh()
    assert model.is_done
    assert model.status() == "run: ended after 2 steps"


def test_evaluations_are_curves_of_their_own(tmp_path: Path) -> None:
    steps = [{"phase": "main", "step": step, "reward": 0.25 * step, "tokens_per_second": 90.0} for step in range(2)]
    held_out = {"phase": "evaluation", "step": 1, "reward": 0.75, "tokens_per_second": 7.0}
    add(tmp_path / "run", {"phase": "warmup", "step": 0, "reward": 9.0}, *steps, held_out)
    model = WatchModel(tmp_path / "run")
    model.refresh()
    rewards, speed = model.view().charts
    reward, heldout = rewards.lines
    assert (reward.label, reward.x, reward.y) == ("mean reward", [1, 2], [0.0, 0.25])
    assert (heldout.label, heldout.x, heldout.y) == ("held-out reward", [1], [0.75])
    assert speed.lines[0].y == [90.0, 90.0]

    add(tmp_path / "run", {"phase": "evaluation", "step": 2, "reward": 0.75, "accuracy": 0.5})
    model.refresh()
    assert [line.label for line in model.view().charts[0].lines] == ["mean reward", "held-out accuracy"]


def test_steps_on_the_axis_are_whole_numbers() -> None:
    axis = Figure().subplots()
    _draw(axis, Chart(title="", x_label="step", y_label="", lines=(Line(label="", x=[1, 2, 3], y=[0.0, 0.5, 1.0]),)))
    assert set(axis.get_xticks()) >= {1.0, 2.0, 3.0}
    assert all(tick.is_integer() for tick in axis.get_xticks())


def test_a_finished_run_is_told_about(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", rewards=[0.0] * 10, summary={"wall_seconds": 9.0}, steps=10,
                   row=lambda step: {"uniform_groups": 1.0, "grad_norm": "absent"})  # fmt: skip
    model = WatchModel(run)
    model.refresh()
    assert model.status() == "a: ended after 10 of 10 steps"
    assert any("equal in every group" in note for note in model.view().notes)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    add(tmp_path / "run", {"phase": "main", "step": 0, "reward": 0.25})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"phase": "main", "st')
    model = WatchModel(tmp_path / "run")
    with pytest.warns(UserWarning, match="the last line was cut"):
        model.refresh()
    assert len(model.view().charts) == 1


def test_a_broken_file_is_a_remark(tmp_path: Path) -> None:
    add(tmp_path / "run", {"phase": "main", "step": 0, "reward": 0.25})
    model = WatchModel(tmp_path / "run")
    model.refresh()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write("nonsense\n{}\n")
    assert model.refresh()
    assert model.view().notes[0].startswith("error: line 2 of ")
    assert len(model.view().charts) == 1  # what was known stays


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"metrics.jsonl": '{"schema": 9, "phase": "main", "step": 0}\n'}, "was written by a later version: schema 9"),
        ({"metrics.jsonl": 'nonsense\n{"phase": "main", "step": 0}\n'}, "line 1 of .* cannot be read"),
        ({"metrics.jsonl": "", "summary.json": "{"}, "summary.json cannot be read"),
        ({"metrics.jsonl": "", "summary.json": "[1]"}, "summary.json cannot be read: it is not a mapping"),
        ({"metrics.jsonl": "", "summary.json": '{"seed": 1}'}, "ended, but metrics.jsonl is empty"),
        ({"summary.json": '{"seed": 1}'}, "ended, but no metrics.jsonl"),
        ({"0/metrics.jsonl": "", "1/metrics.jsonl": ""}, "is not a run but holds several; watch one of 2, .*run/0'"),
        ({"multirun.yaml": ""}, "is not a run but holds several; watch one, such as '.*run/0'"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    model = WatchModel(tmp_path / "run")
    model.refresh()
    assert re.search(words, model.status())
    assert "waiting" not in model.status()
    assert model.view().notes[0] == model.status()


def test_a_silent_run_is_named(tmp_path: Path) -> None:
    add(tmp_path / "run", {"phase": "main", "step": 0, "reward": 0.25})
    path = tmp_path / "run/metrics.jsonl"
    then = path.stat().st_mtime - QUIET - 10
    os.utime(path, (then, then))
    model = WatchModel(tmp_path / "run")
    model.refresh()
    assert "no step for 13" in model.status()
