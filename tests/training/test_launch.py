"""Launchers: the files in conf/launch, torchrun, accelerate launch, notebook_launcher; the function `train`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from tests.training.test_processes import close
from tests.training.test_train import LAUNCHERS, lines, summary, train
from toolkit import train as command
from toolkit.compose.build import build_config
from toolkit.compose.diagnosis import groups_in
from toolkit.compose.schemas import conf_dir
from toolkit.compose.tree import compose_config
from toolkit.errors import ConfigError, LaunchError
from toolkit.training.startup import check_environment

FILES = sorted(Path(conf_dir(), "launch").glob("*.yaml"))
SHORT = ["debug=smoke", "model.dtype=float64", "warmup.steps=2", "training.steps=1", "training.log_every=1"]


def commands_in(path: Path) -> list[list[str]]:
    comment = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    return [shlex.split(line) for line in comment if line.startswith("accelerate launch")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(path))  # refuses keys that it does not know
    (command,) = commands_in(path)
    words = [str(path) if word.startswith("conf/launch/") else word for word in command[2:]]
    parser = launch_command_parser()
    arguments = parser.parse_args(words)
    assert arguments.training_script in ("toolkit.train", "my_loop.py")
    merged, _, _ = _validate_launch_command(argparse.Namespace(**vars(arguments)))
    assert merged.num_processes == config.num_processes
    known = {action.dest for action in parser._actions}
    assert set(config.deepspeed_config) <= known
    assert merged.use_deepspeed == (config.distributed_type.value == "DEEPSPEED")
    assert not merged.use_fsdp
    assert merged.multi_gpu == (config.distributed_type.value == "MULTI_GPU")
    assert "ested: accelerate reads it" in path.read_text()
    overrides = arguments.training_script_args
    if arguments.training_script == "toolkit.train":
        built = build_config(compose_config(overrides))
        assert built.training.num_processes in (None, config.num_processes)


def test_launch_files_are_no_choice_of_a_run() -> None:
    assert len(FILES) == 6
    assert "launch" not in groups_in(conf_dir())
    with pytest.raises(ConfigError, match="launch is not a setting"):
        compose_config(["launch=one_gpu"])


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_engines_that_would_take_over_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(LaunchError, match=r"training\.sharding=fsdp2"):
        check_environment(build_config(compose_config([])))


@pytest.mark.slow
def test_train_is_a_function_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second run finds nothing that the first one left
        done = command.train([*SHORT, "seed=3", "hydra.run.dir=own/${seed}", "training.overwrite=true"])
    assert (done.seed, done.num_processes, done.output_dir) == (3, 1, "own/3")
    assert len(lines(tmp_path / "own/3")) == 3
    assert command.train([*SHORT, "training.steps=0"]).output_dir.startswith("outputs/2")
    with pytest.raises(ConfigError, match=r"train\(\['seed=1'\]\)"):
        command.train("seed=1")
    with pytest.raises(ConfigError, match="did you mean"):
        command.train(["sed=1"])


@pytest.mark.slow
@pytest.mark.dist
def test_notebook_launcher(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(
        "import accelerate\nfrom toolkit.train import train\n"
        f"alone = train({[*SHORT, 'hydra.run.dir=alone']})\n"  # a run before it must not be in its way
        f"accelerate.notebook_launcher(train, ({[*SHORT, 'hydra.run.dir=both']},), num_processes=2)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "cell.py"], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(conf_dir()).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "both")["num_processes"] == 2
    assert done.stdout.count("held-out accuracy before") == 2
    for ours, theirs in zip(lines(tmp_path / "both"), lines(tmp_path / "alone"), strict=True):
        close(numbers(ours), numbers(theirs), rel=1e-6, abs_=1e-12)


SAME = [
    "model.dtype=float64", "warmup.steps=6", "warmup.stop_accuracy=null", "training.steps=4", "task.num_heldout=33",
    "rollout.prompts_per_step=10", "rollout.group_size=4", "training.micro_batch_size=7", "task.reward=coin_flip",
    "kl=k3",
]  # fmt: skip


def numbers(row: dict) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in row.items() if name != "phase"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = train(run_dir, *SAME)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", list(LAUNCHERS))
@pytest.mark.parametrize("world", ["2", "4"])
def test_launched_processes_give_the_run_of_one(tmp_path: Path, alone: Path, name: str, world: str) -> None:
    launcher, extra = LAUNCHERS[name]
    words = [world if before in ("--nproc_per_node", "--num_processes") else word
             for before, word in zip(("", *launcher), launcher, strict=False)]  # fmt: skip
    run_dir = tmp_path / "run"
    done = train(run_dir, *SAME, launcher=(sys.executable, *words), **extra)
    assert done.returncode == 0, done.stderr
    assert summary(run_dir)["num_processes"] == int(world)
    assert done.stdout.count("held-out accuracy before") == 1  # the main process speaks
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # one output directory
    ours, theirs = lines(run_dir), lines(alone)
    assert [(row["phase"], row["step"]) for row in ours] == [(row["phase"], row["step"]) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        close(numbers(mine), numbers(other), rel=1e-6, abs_=1e-12)
    for name in ("accuracy_before", "accuracy_after", "skipped_updates"):
        assert summary(run_dir)[name] == summary(alone)[name]
    assert json.loads((run_dir / "checkpoint/state.json").read_text())["next_step"] == 4
