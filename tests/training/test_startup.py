"""What is checked before any work: packages, variables that a launcher left behind, signals that come twice."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from tests.training.test_train import SMOKE, lines, train
from toolkit import ConfigError
from toolkit import train as command
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.errors import LaunchError
from toolkit.training import stopping
from toolkit.training.startup import EXTRA, check_environment, launched_rank

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    return build_config(compose_config([]))


def test_the_extra_is_named_before_a_folder_is_made(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(stopping.__file__).parents[2]
    listed = (root / "pyproject.toml").read_text().partition("\ntrain = [")[2].partition("]")[0]
    assert sorted(name.replace("_", "-") for name in EXTRA) == sorted(
        line.strip().strip('",').partition(">")[0] for line in listed.splitlines() if line.strip()
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("rich", "tokenizers") else find_spec(name, *rest),
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"needs rich, tokenizers, .*: pip install \"rl-loss-toolkit\[train\]\""):
        command.train(["hydra.run.dir=a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no MASTER_ADDR: no launcher started this process; "
                              "for one process: unset WORLD_SIZE; for several: torchrun"),
        ({"LOCAL_RANK": "1"}, "unset LOCAL_RANK;"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "unset RANK LOCAL_RANK;"),
        ({"RANK": "one"}, "the environment variable RANK=one is not a number; unset RANK"),
    ],
)  # fmt: skip
def test_variables_that_a_launcher_left_behind(
    config: Any, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as caught:
        check_environment(config)
    assert words in str(caught.value)
    assert launched_rank() == 0
    if variables.get("WORLD_SIZE") or variables.get("LOCAL_RANK"):
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as launchers do
        check_environment(config)


def test_variables_of_one_process_are_no_obstacle(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "-1")):
        monkeypatch.setenv(name, value)
    check_environment(config)


def test_the_command_with_such_a_variable(tmp_path: Path) -> None:
    done = train(tmp_path / "run", *SMOKE, WORLD_SIZE="2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: WORLD_SIZE=2 in the environment")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_same_signal_within_seconds_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with stopping.StopFlag() as flag:
        try:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                now[0] += 2.0
        except KeyboardInterrupt:
            pytest.fail("a repeated signal is another request")
        assert flag.is_set
        with pytest.raises(KeyboardInterrupt):  # 6 s after the first one
            signal.raise_signal(signal.SIGTERM)
    with stopping.StopFlag():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # another signal is another request
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_resumed_run_without_a_step_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)
    small = ["debug=smoke", "warmup.steps=1", "training.steps=2", "task.num_heldout=4"]
    command.train([*small, f"hydra.run.dir={tmp_path / 'a'}"])
    assert "no step is left" not in capsys.readouterr().out
    command.train([*small, "training.steps=1", f"training.resume={tmp_path / 'a'}", f"hydra.run.dir={tmp_path / 'b'}"])
    assert "no step is left to run: the checkpoint is at step 2 and training.steps=1" in capsys.readouterr().out
    assert len(lines(tmp_path / "b")) == 3


def test_a_horizon_that_nothing_reads() -> None:
    with pytest.raises(ConfigError, match=r"kl_control\.horizon=5 has no effect without a target"):
        build_config(compose_config(["kl_control.horizon=5", "kl=k2"]))
