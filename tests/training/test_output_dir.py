"""No run replaces another: folders that hold a run, two runs at once, and two that start in one second."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit
from tests.processes import run_module
from tests.training.test_train import environment
from toolkit import ConfigError
from toolkit.compose.tree import compose_run
from toolkit.training.config import TrainingConfig
from toolkit.training.output_dir import check_free, claim, new_dir, release
from toolkit.training.resume import check_named, continued

ENV = environment(PYTHONPATH=str(Path(toolkit.__file__).parents[1]))
PLAIN, REPLACING = TrainingConfig(), TrainingConfig(overwrite=True)


def a_run(folder: Path) -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    with pytest.raises(ConfigError) as caught:
        claim(str(folder), PLAIN)
    assert str(caught.value) == (
        f"hydra.run.dir={folder} holds an earlier run (checkpoint, metrics.jsonl); give another folder, continue that "
        f"run with training.resume={folder}, or replace it with training.overwrite=true"
    )
    with pytest.raises(ConfigError, match="holds an earlier run"):  # resuming another run into it
        check_free(str(folder), TrainingConfig(resume=str(tmp_path / "b")))
    for resumed in (folder, folder / "checkpoint", tmp_path / "b" / ".." / "a"):
        check_free(str(folder), TrainingConfig(resume=str(resumed)))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "metrics.jsonl", "notes.txt"]


def test_what_is_replaced_and_what_is_kept(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a")
    claim(str(folder), TrainingConfig(overwrite=True, resume=str(folder)))
    release(str(folder))
    assert (folder / "checkpoint").is_dir()  # what it resumes from
    claim(str(folder), REPLACING)
    release(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "notes.txt"]


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 of elsewhere\n")  # left behind: blocks nothing
    code = (
        "import sys, time; from toolkit.training.output_dir import claim; from toolkit.training.config import *\n"
        "claim(sys.argv[1], TrainingConfig()); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=ENV)
    assert holder.stdout is not None
    holder.stdout.readline()
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} of "):
            claim(str(tmp_path), REPLACING)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim(str(tmp_path), PLAIN)
    claim(str(tmp_path), PLAIN)  # its own
    release(str(tmp_path))


def test_two_that_start_in_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "day" / "12-00-00")
    assert [new_dir(path) for _ in range(3)] == [path, f"{path}-2", f"{path}-3"]
    assert compose_run([]).run_dir.is_dated
    assert compose_run(["hydra.run.dir=runs/${now:%H}/${seed}", "seed=3"]).run_dir.is_dated
    assert compose_run(["hydra.run.dir=runs/${seed}", "seed=3"]).run_dir == ("runs/3", False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nhydra: {run: {dir: own/x}}\n")
    assert compose_run(["experiment=mine"], config_dir=tmp_path).run_dir == ("own/x", False)


@pytest.mark.parametrize("wrong", ["hydra.run.dir=", "hydra.sweep.dir="])
def test_an_empty_name(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"dir is empty; name a folder"):
        compose_run([wrong])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ConfigError, match="cannot be created or written: "):
            claim(str(path), PLAIN)
        with pytest.raises(ConfigError, match="cannot be created or written: "):
            new_dir(str(path / "b"))


@pytest.mark.slow
def test_the_command_refuses_before_torch_and_touches_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "it's a=run")
    before = sorted(path.name for path in folder.rglob("*"))
    words = ["debug=smoke", 'hydra.run.dir="it\'s a=run"']
    code = (
        "import sys, toolkit.train as t\ntry: t.main()\nexcept SystemExit: sys.exit(5 if 'torch' in sys.modules else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: hydra.run.dir=it's a=run holds an earlier run (")
    assert done.stderr.count("\n") == 1
    done = run_module("toolkit.train", *words, "--cfg", "job", cwd=tmp_path, env=ENV)
    assert done.returncode == 0
    assert sorted(path.name for path in folder.rglob("*")) == before
    (tmp_path / "sweep" / "1").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / "summary.json").write_text("{}")
    done = run_module(*("toolkit.train", "-m", "seed=1,2", "hydra.sweep.dir=sweep"), cwd=tmp_path, env=ENV)
    assert done.stderr.startswith("error: hydra.run.dir=sweep/1 holds an earlier run (summary.json)")
    assert not (tmp_path / "sweep" / "0").exists()


@pytest.mark.parametrize(
    ("count", "saved", "changed"),
    [
        (None, "checkpoint", {}),
        ("0", "checkpoint", {}),
        ("1", "checkpoint", {"resume": "a"}),
        ("2", "checkpoint.old", {"resume": "a"}),
        ("1", "", {"overwrite": True}),
    ],
)
def test_a_restart_by_torchrun_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str | None, saved: str, changed: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    (tmp_path / "a" / saved).mkdir(parents=True)
    assert continued(PLAIN, "a") == PLAIN.model_copy(update=changed)


def test_auto_continues_what_is_there_and_removes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    auto, folder = TrainingConfig(resume="auto"), tmp_path / "a"
    assert continued(TrainingConfig(resume="b"), str(folder)) == TrainingConfig(resume="b")
    assert continued(auto, str(folder)) == REPLACING
    (folder / "checkpoint.writing").mkdir(parents=True)  # ended within its first checkpoint
    assert continued(auto, str(folder)) == REPLACING
    for name in ("checkpoint", "checkpoint-main-3"):  # complete or not: to say what is damaged is for later
        (folder / name).mkdir()
        assert continued(auto, str(folder)) == TrainingConfig(resume=str(folder))
        (folder / name).rmdir()
    (folder / "model").mkdir()  # somebody has removed the checkpoint and kept the model
    assert continued(auto, str(folder)) == PLAIN
    with pytest.raises(ConfigError, match=r"holds an earlier run \(checkpoint\.writing, model\)"):
        claim(str(folder), continued(auto, str(folder)))


def test_a_folder_that_is_new_each_time_cannot_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RESTART_COUNT", "MAX_RESTARTS"):
        monkeypatch.setenv(f"TORCHELASTIC_{variable}", "0")
    with pytest.raises(
        ConfigError, match=r"auto continues .* new one each time; name it, e\.g\. hydra\.run\.dir=runs/"
    ):
        check_named(TrainingConfig(resume="auto"))
    assert check_named(PLAIN) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "a restart by torchrun would start anew" in str(check_named(PLAIN))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "torchrun has started the run again, but" in str(check_named(PLAIN))


@pytest.mark.slow
def test_a_restarted_command_continues_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    command = ["toolkit.train", "debug=smoke", "warmup.steps=1", "hydra.run.dir=a", "training.checkpoint_every=1"]
    environments = [ENV, ENV | {"TORCHELASTIC_RESTART_COUNT": "1"}]
    for steps, environment_of_run in zip((1, 2), environments, strict=True):
        done = run_module(*command, f"training.steps={steps}", cwd=tmp_path, env=environment_of_run)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows if row.get("phase") == "main") == [0, 1]


@pytest.mark.slow
def test_two_commands_at_once_and_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    small = ["debug=smoke", "training.steps=1", "warmup.steps=1"]
    command = [sys.executable, "-m", "toolkit.train", *small]
    both = [
        subprocess.Popen([*command, "hydra.run.dir=a"], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert any("in use by process" in text or "holds an earlier run" in text for text in said)
    assert run_module("toolkit.train", *small, "hydra.run.dir=a", cwd=tmp_path, env=ENV).returncode == 1
    for extra in ("training.overwrite=true", "training.resume=a"):
        done = run_module("toolkit.train", *small, "hydra.run.dir=a", extra, cwd=tmp_path, env=ENV)
        assert done.returncode == 0, done.stderr
