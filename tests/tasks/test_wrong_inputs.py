"""Wrong data, rewards and settings: one clear line each, before torch is loaded. The rows are in `wrong_inputs`."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.tasks.wrong_inputs import DATA, FILES, GOOD, OTHERS, REWARDS
from toolkit.compose.tree import check_command_line
from toolkit.errors import ConfigError
from toolkit.schema import located
from toolkit.tasks.config import DatasetConfig
from toolkit.training.startup import check_environment


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(textwrap.dedent(text))


def check(overrides: Sequence[str]) -> None:
    """Check what the training command checks before it loads torch; the task alone if all overrides are about it."""
    pairs = [override.partition("=")[::2] for override in overrides if override != "task=jsonl"]
    if "task.path" in dict(pairs) and all(key.startswith("task.") for key, _ in pairs):  # a tenth of the time
        fields = {key.removeprefix("task."): yaml.safe_load(value) for key, value in pairs}
        with located("task"):
            config = DatasetConfig(**fields)
        config.check_data(0, with_completions=False)
        return
    for config in check_command_line(overrides).configs:
        check_environment(config)


def answer(overrides: Sequence[str]) -> str:
    """Return what it says."""
    with pytest.raises(ConfigError) as caught:
        check(overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("data", "overrides", "sentence"), DATA)
def test_data(data: str, overrides: Sequence[str], sentence: str) -> None:
    Path("data.jsonl").write_text(data)
    task = [] if any(override.startswith("task=") for override in overrides) else ["task=jsonl"]
    said = answer([*task, "task.path=data.jsonl", *overrides])
    assert re.search(sentence, said), said


@pytest.mark.parametrize(("reward", "sentence"), REWARDS)
def test_rewards(reward: str, sentence: str) -> None:
    Path("data.jsonl").write_text(GOOD)
    spec, *more = reward.split(" ")
    said = answer(["task=jsonl", "task.path=data.jsonl", f"task.reward={spec}", *more])
    assert re.search(sentence, said), said


@pytest.mark.parametrize(("command", "sentence"), OTHERS)
def test_other_tasks(command: str, sentence: str) -> None:
    said = answer(shlex.split(command))
    assert re.search(sentence, said), said


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = ("pyarrow", "datasets", "math_verify")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    Path("data.parquet").write_bytes(b"PAR1")
    Path("data.jsonl").write_text(GOOD)
    for overrides, sentence in (
        (
            ["task.path=data.parquet", "task.reward=numeric"],
            r"needs the package 'pyarrow': pip install \"rl-loss-toolkit\[",
        ),
        (
            ["task.path=owner/name", "task.reward=numeric"],
            r"as the name of a repository it needs the package 'datasets'",
        ),
        (["task.path=data.jsonl", "task.reward=math_verify"], r"pip install \"rl-loss-toolkit\[math\]\""),
    ):
        said = answer(["task=jsonl", *overrides])
        assert re.search(sentence, said), said


def test_a_line_that_is_not_utf8_is_named() -> None:
    Path("data.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    said = answer(["task=jsonl", "task.path=data.jsonl", "task.reward=numeric"])
    assert "data.jsonl, line 21: byte 0xff is not UTF-8; fix the data, or leave such rows out" in said


def test_a_file_in_utf16_is_named() -> None:
    Path("data.jsonl").write_bytes(GOOD.encode("utf-16"))
    said = answer(["task=jsonl", "task.path=data.jsonl", "task.reward=numeric"])
    assert said == "data.jsonl: it is UTF-16; save it as UTF-8"


def test_what_is_missing_in_rows_is_said(recwarn: pytest.WarningsRecorder) -> None:
    Path("data.jsonl").write_text(GOOD + '\n{"prompt": "a", "finished": 1}\n')
    Path("clash.py").write_text("def score(completion, finished): return 1.0\n")
    Path("one.jsonl").write_text(GOOD.splitlines()[0])
    for path, reward, said in (
        (
            "data.jsonl",
            "exact_match",
            "1 of 21 rows have no 'answer', which task.reward=exact_match takes: it does not",
        ),
        ("data.jsonl", "reward.py:score", "takes: it gets None; the first is data.jsonl, line 21"),
        ("data.jsonl", "clash.py:score", "gets the completion's 'finished', not the column; rename the column"),
        (
            "one.jsonl",
            "numeric",
            "nothing is held out, so nothing is measured: all rows have the same prompt (task.heldout_path",
        ),
    ):
        recwarn.clear()
        DatasetConfig(path=path, reward=reward).check_data(0, with_completions=False)
        assert said in str([str(warning.message) for warning in recwarn]), recwarn.list
    recwarn.clear()
    DatasetConfig(path="data.jsonl", reward="length", target_length=1).check_data(0, with_completions=False)
    assert not recwarn.list


def test_several_bad_rows_are_counted_and_can_be_skipped(recwarn: pytest.WarningsRecorder) -> None:
    Path("data.jsonl").write_text(GOOD + '\n{"answer": "1"}\nnothing\n{"prompt": ""}\n')
    overrides = ["task=jsonl", "task.path=data.jsonl", "task.reward=numeric"]
    assert "(and 2 more bad rows)" in answer(overrides)
    config = DatasetConfig(path="data.jsonl", reward="numeric", on_bad_row="skip")
    config.check_data(0, with_completions=False)
    (said,) = [str(warning.message) for warning in recwarn if "skipped" in str(warning.message)]
    assert said.startswith("skipped 3 bad rows: data.jsonl, line 22: it is not JSON")
    task = config.build(0)
    assert len(task.train) + len(task.heldout) == 20
