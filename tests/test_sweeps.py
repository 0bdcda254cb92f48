"""Sweeps by Hydra's plugins: joblib, optuna and submitit run the command, which returns its result; [sweep] only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toolkit.compose import sweepers
from toolkit.compose.tree import check_command_line
from toolkit.errors import ConfigError

pytest.importorskip("reasoning_gym")

SMALL = ("debug=smoke", "warmup.steps=1", "warmup.stop_accuracy=null", "training.steps=2", "task.num_heldout=4")


def swept(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep into `folder` and return what it printed."""
    words = [sys.executable, "-m", "toolkit.train", "-m", *SMALL, *overrides, f"hydra.sweep.dir={folder}"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def accuracies(folder: Path) -> list[float]:
    return [json.loads(path.read_text())["accuracy_after"] for path in sorted(folder.glob("*/summary.json"))]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = swept(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1")
    assert len(accuracies(tmp_path)) == 2
    assert f"comparison of 2 runs: {tmp_path / 'comparison.html'}" in done.stdout.replace("\n", " ")


@pytest.mark.slow
def test_optuna_gets_the_result_of_every_trial(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    trials = os.environ.get("TOOLKIT_TRIALS", "3")
    drawn = "optimizer.lr=tag(log,interval(1e-4,1e-2))"
    search = ("hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.direction=maximize")
    done = swept(tmp_path, *search, drawn)
    found = accuracies(tmp_path)
    assert len(found) == int(trials)
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(found)
    assert "optimizer.lr" in best["best_params"]
    assert f"comparison of {trials} runs" in done.stdout


@pytest.mark.slow
def test_submitit_submits_to_its_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    swept(tmp_path, "hydra/launcher=submitit_local", "seed=3")
    assert len(accuracies(tmp_path)) == 1
    assert json.loads((tmp_path / "0/summary.json").read_text())["seed"] == 3
    assert list((tmp_path / ".submitit").glob("*/*_result.pkl"))


@pytest.mark.parametrize("choice", ["hydra/launcher=joblib", "hydra/sweeper=optuna", "hydra/launcher=submitit_slurm"])
def test_a_plugin_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setattr(sweepers, "_is_there", lambda plugin: False)
    with pytest.raises(ConfigError, match=rf'{choice} is a plugin of Hydra: pip install "rl-loss-toolkit\[sweep\]"'):
        check_command_line([choice, "seed=0,1"], multirun=True)


def test_a_plugin_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"hydra/launcher=jobli is not a choice \(did you mean 'joblib'\?\)"):
        check_command_line(["hydra/launcher=jobli", "seed=0,1"], multirun=True)
