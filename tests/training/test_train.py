"""The training command as a user runs it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_module

pytest.importorskip("reasoning_gym")

SMOKE = ["debug=smoke"]
KEYS = {"accuracy_before", "accuracy_after", "wall_seconds", "seed", "loss", "num_processes", "interrupted"}


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def train(
    run_dir: Path, *overrides: str, launcher: Sequence[str] | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    words = [*overrides, f"hydra.run.dir={run_dir}"]
    if launcher is None:
        return run_module("toolkit.train", *words, env=environment(**extra), cwd=run_dir.parent)
    return subprocess.run(
        [*launcher, "toolkit.train", *words],
        capture_output=True, text=True, timeout=300, env=environment(**extra), cwd=run_dir.parent, check=False,
    )  # fmt: skip


def all_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def lines(run_dir: Path) -> list[dict]:
    """The steps; `evaluations` are the other lines."""
    return [row for row in all_lines(run_dir) if row["phase"] != "evaluation"]


def evaluations(run_dir: Path) -> list[dict]:
    return [row for row in all_lines(run_dir) if row["phase"] == "evaluation"]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_smoke(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(run_dir, *SMOKE, "kl=k3", "mode=chunk", "loss.chunk_size=7", "seed=5")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # no cursor movements in a pipe
    assert "grpo    3/3" in done.stdout
    assert "held-out accuracy 0" in done.stdout
    assert summary(run_dir).keys() >= KEYS
    assert summary(run_dir)["seed"] == 5
    found = lines(run_dir)
    assert [row["phase"] for row in found] == ["warmup"] * 8 + ["main"] * 3
    assert {"reward", "kl_ref", "entropy", "clip_fraction", "grad_norm", "tokens_per_second"} <= found[-1].keys()
    assert [row["phase"] for row in all_lines(run_dir)] == ["warmup"] * 8 + ["evaluation"] + ["main"] * 3 + [
        "evaluation"
    ]
    assert [row["step"] for row in evaluations(run_dir)] == [0, 3]
    assert (run_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    config = (run_dir / "config.yaml").read_text()
    assert "chunk_size: 7" in config
    assert "${" not in config
    weights = {f"{name}.safetensors" for name in ("model", "reference", "optimizer")}
    assert weights | {"random_states.json", "state.json", "manifest.json", "tokenizer"} == {
        path.name for path in (run_dir / "checkpoint").iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["experiment=supervised", "experiment=dr_grpo", "experiment=grpo_kl"])
def test_presets_run(tmp_path: Path, preset: str) -> None:
    small = ["training.steps=4", "warmup.steps=4", "task.num_heldout=32", "rollout.prompts_per_step=8"]
    done = train(tmp_path / "run", preset, *small)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["accuracy_after"] is not None


@pytest.mark.slow
def test_interrupted_and_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = [
        "warmup.steps=30", "warmup.stop_accuracy=null", "task.num_heldout=32", "rollout.prompts_per_step=64",
        "training.steps=12", "training.log_every=1", "kl=k3",
    ]  # fmt: skip
    python = [sys.executable, "-m"]  # as the run that is cut: tests.preloaded never takes the way of small logits
    whole = train(tmp_path / "whole", *settings, launcher=python)
    assert whole.returncode == 0, whole.stderr
    for phase in ("warm-up", "grpo"):
        run_dir, resumed_dir = tmp_path / f"cut_{phase}", tmp_path / f"resumed_{phase}"
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "toolkit.train", *settings, f"hydra.run.dir={run_dir}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(rf"{phase} +3/", line):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert "interrupted; the checkpoint is saved" in rest
        command = shlex.split(rest.partition("Continue with: ")[2])
        assert command == ["toolkit-train", *settings, f"training.resume={run_dir}"]
        assert summary(run_dir)["interrupted"]
        assert (run_dir / "model/config.json").is_file()
        done = train(resumed_dir, *settings, f"training.resume={run_dir}", launcher=python)
        assert done.returncode == 0, done.stderr
        first, second = (load_file(path / "checkpoint/model.safetensors") for path in (tmp_path / "whole", resumed_dir))
        assert all(torch.equal(first[name], second[name]) for name in first)
        timed = ("seconds", "tokens_per_second")
        without_time = [
            [{k: v for k, v in row.items() if k not in timed} for row in lines(path)]
            for path in (tmp_path / "whole", resumed_dir)
        ]
        assert without_time[0] == without_time[1]
        assert summary(tmp_path / "whole")["accuracy_after"] == summary(resumed_dir)["accuracy_after"]


@pytest.mark.slow
def test_resuming_another_run_is_refused_and_a_replaced_one_starts_anew(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for extra in ([], ["training.overwrite=true"]):
        assert train(run_dir, *SMOKE, *extra).returncode == 0
        assert len(lines(run_dir)) == 11
    for other in ("seed=7", "loss=ce", "kl=k3", "model.num_heads=2", "task.word_length=5"):
        done = train(tmp_path / "other", *SMOKE, other, f"training.resume={run_dir}")
        assert done.returncode == 1
        assert "the earlier run had" in done.stderr
    # Going on in the same folder keeps the lines of the first run.
    done = train(run_dir, *SMOKE, "training.steps=5", f"training.resume={run_dir}")
    assert done.returncode == 0, done.stderr
    assert len(lines(run_dir)) == 13


@pytest.mark.slow
def test_accelerate_must_not_divide_the_loss(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *SMOKE, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.returncode == 1
    assert "would divide every loss by that" in done.stderr


@pytest.mark.slow
def test_a_slip_in_an_own_loss_shows_before_the_warm_up(tmp_path: Path) -> None:
    plugin = tmp_path / "slip.py"
    plugin.write_text(
        "from toolkit import register_policy_loss\n@register_policy_loss('slip')\n"
        "def slip(t):\n    return -t.ratios() * t.advantages\n"
    )
    done = train(tmp_path / "run", *SMOKE, f"plugins=[{plugin}]", "policy_loss=slip")
    assert done.returncode != 0
    assert "(slip.py:4): t.ratios is not a field of PolicyTerms (did you mean 'ratio'?)" in done.stderr
    assert "warm-up" not in done.stdout


@pytest.mark.slow
def test_another_temperature_is_scored_as_it_was_sampled(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *SMOKE, "rollout.temperature=0.5", "rollout.old_logprobs=recomputed")
    assert done.returncode == 0, done.stderr
    assert all(row["rollout_mismatch"] < 1e-4 for row in lines(tmp_path / "run") if row["phase"] == "main")


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *SMOKE, f"training.resume={tmp_path}")
    assert done.returncode == 1
    assert "holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


LAUNCHERS = {
    "torchrun": (("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"), {}),
    "accelerate": (
        ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"),
        {"ACCELERATE_USE_CPU": "1"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.dist
def test_a_launcher_that_starts_one_process_for_two_is_caught(tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")
    done = train(tmp_path / "run", *SMOKE, launcher=launcher)
    assert done.returncode != 0
    assert "asks for 2 processes, but 1 work together" in done.stderr


@pytest.mark.slow
def test_more_processes_expected_than_there_are(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *SMOKE, "training.num_processes=2")
    assert done.returncode == 1
    assert "training.num_processes asks for 2 processes, but 1 work together" in done.stderr


@pytest.mark.slow
def test_multirun(tmp_path: Path) -> None:
    start = time.time()
    command = [sys.executable, "-m", "toolkit.train", "-m", *SMOKE, "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    # The shell turns itself into its last command; its own time is none of the run's.
    done = subprocess.run(
        ["bash", "-c", f"sleep 5 && {shlex.join(command)}"],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [summary(tmp_path / job) for job in ("0", "1")]
    assert [one["seed"] for one in found] == [1, 2]
    assert f"comparison of 2 runs: {tmp_path / 'comparison.html'}" in done.stdout
    assert "samples that were kept" in (tmp_path / "comparison.html").read_text()
    assert sum(one["wall_seconds"] for one in found) < time.time() - start - 4


@pytest.mark.slow
def test_the_reward_teaches(tmp_path: Path) -> None:
    start = time.time()
    done = train(tmp_path / "run", "seed=7")
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert 0.2 <= found["accuracy_before"] <= 0.6
    assert found["accuracy_after"] >= 0.9
    assert found["wall_seconds"] == pytest.approx(time.time() - start, rel=0.25, abs=10)


@pytest.mark.slow
def test_partial_credit_teaches_words_longer_than_any_demonstration(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "experiment=longer_words", "seed=7")
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert found["accuracy_before"] <= 0.02
    # The letter that all words miss may come later than a run ends; those around it are learnt before.
    assert found["heldout_reward_after"] >= max(0.7, found["heldout_reward_before"] + 0.1)


@pytest.mark.slow
def test_coin_flips_do_not_teach(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "debug=coin_flip", "seed=7")
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert found["accuracy_after"] <= found["accuracy_before"]
