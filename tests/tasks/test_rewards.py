"""Rewards: built in, of a user, in every form, and whatever they may do."""

from __future__ import annotations

import logging
import math
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit.tasks import builtin_rewards as built_in
from toolkit.tasks.base import Example
from toolkit.tasks.calls import MOST_IN_A_ROW, Failure, call
from toolkit.tasks.config import DatasetConfig, SpellBackwardConfig
from toolkit.tasks.rewards import load_rewards
from toolkit.tasks.scoring import RewardSet, Scores, Written

REWARDS = """
    import asyncio, math, sys, time
    import numpy as np

    def digits(prompt, completion, answer):
        return sum(a == b for a, b in zip(completion, answer)) / len(answer)
    def everything(completion, **columns): return float(columns["prompt"] == "1+1=" and columns["kind"] == "sum")
    def batched(prompts, completions, answer): return np.array([float(c == a) for c, a in zip(completions, answer)])
    async def waits(completion, answer):
        await asyncio.sleep(0.05)
        return float(completion == answer)
    async def together(completions, **_): return [len(c) for c in completions]
    def parts(completion): return {"digit": float(completion.isdigit()), "short": None if completion == "?" else 0.5}
    def of_digits(completion): return 1.0 if completion.isdigit() else None
    def tokens(completion, num_tokens, finished): return num_tokens + 10 * finished
    def raises(completion):
        if completion == "3": raise KeyError("answer is not there")
        return 1
    def hangs(completion):
        end = time.monotonic() + 6
        while completion == "3" and time.monotonic() < end:
            try: time.sleep(1)
            except Exception: pass
        return 1
    def exits(completion): return sys.exit(3)
    def not_a_number(completion): return math.nan
    def text(completion): return "0.5"
    def pair(completion): return np.zeros(2)
    def a_list(completion): return [1.0]
    def empty(completion): return {}
    def too_few(completions): return [1.0]
    def one_number(completions): return 1.0
    def numpy(completion): return np.float32(0.5)
    def true(completion): return True
    class Judge:
        def __call__(self, completion): return 0.25
    judge = Judge()
    """


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(textwrap.dedent(REWARDS))


def scores_of(*names: str, weights: list[float] | None = None, timeout_s: float = 20.0, num_workers: int = 0) -> Scores:
    """Return the scores of the completions "2" (right), "3" (wrong) and "?" (cut) of two prompts."""
    rewards = load_rewards([f"my.py:{name}" for name in names], columns=["answer", "kind"])
    together = RewardSet(
        rewards, weights, timeout_s=timeout_s, num_workers=num_workers, columns=["answer", "kind"], settings={}
    )
    example = Example("<s>1+1=", "2", None, "1+1=", {"answer": "2", "kind": "sum"})
    written = [Written(example, text, text != "?", len(text), "seed") for text in ("2", "3", "?")]
    try:
        return together.score(SpellBackwardConfig(num_heldout=10), written)  # type: ignore[arg-type]
    finally:
        together.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", [1, 0, 0]),
        ("everything", [1, 1, 1]),  # the prompt of the data, not as the model sees it
        ("batched", [1, 0, 0]),
        ("waits", [1, 0, 0]),
        ("together", [1, 1, 1]),
        ("parts", [1.5, 1.5, 0]),
        ("tokens", [11, 11, 1]),
        ("numpy", [0.5] * 3),
        ("true", [1] * 3),
        ("judge", [0.25] * 3),
    ],
)
def test_every_form_of_a_reward(name: str, expected: list[float]) -> None:
    scores = scores_of(name)
    assert scores.totals == expected
    assert not scores.failures


def test_weights_parts_and_what_does_not_apply_by_hand() -> None:
    scores = scores_of("digits", "of_digits", "parts", weights=[1.0, 0.2, 2.0])
    assert scores.totals == pytest.approx([1 + 0.2 + 2 * 1.5, 0 + 0.2 + 2 * 1.5, 0 + 2 * 0.0])
    assert scores.weights == {"digits": 1.0, "of_digits": 0.2, "parts/digit": 2.0, "parts/short": 2.0}
    assert scores.parts["of_digits"][:2] == [1, 1]
    assert math.isnan(scores.parts["of_digits"][2])
    assert scores.parts["parts/short"][:2] == [0.5, 0.5]
    assert math.isnan(scores.parts["parts/short"][2])


def test_a_completion_to_which_no_reward_applies_is_unknown() -> None:
    totals = scores_of("of_digits").totals
    assert totals[:2] == [1, 1]
    assert math.isnan(totals[2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "it raised KeyError: 'answer is not there'"),
        ("exits", "it raised SystemExit: 3"),
        ("not_a_number", "it returned nan; return a finite number, or None"),
        ("text", "it returned the text '0.5'; return a number"),
        ("pair", "it returned a ndarray of several numbers; return one"),
        ("a_list", "it returned a list; return a number, a dict of numbers, or None"),
        ("empty", "it returned an empty dict"),
        ("too_few", "it returned 1 rewards for 3 completions"),
        ("one_number", "it returned a float; a batched reward returns a list"),
    ],
)
def test_what_a_reward_does_wrong_scores_0_and_is_said(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scores = scores_of(name)
    assert scores.totals == ([1, 0, 1] if name == "raises" else [0, 0, 0])
    assert scores.num_failed == (1 if name == "raises" else 3)
    assert reason in scores.failures[0][1].reason
    (record,) = caplog.records  # the first failure, and no other
    said = record.getMessage()
    assert reason in said
    assert ("my.py" in said and "calls.py" not in said) or name not in ("raises", "exits")


def test_a_reward_that_hangs_is_interrupted() -> None:
    started = time.monotonic()
    scores = scores_of("hangs", timeout_s=0.2)
    assert time.monotonic() - started < 5
    assert scores.totals == [1, 0, 1]
    assert scores.failures[0][1] == Failure("it ran longer than task.reward_timeout_s=0.2", costs_time=True)


def test_a_reward_that_hangs_is_left_behind_in_another_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(time.sleep, {}, 0.2)))  # raises TypeError
    thread.start()
    thread.join()
    assert "TypeError" in results[0].reason
    stop = threading.Event()
    thread = threading.Thread(target=lambda: results.append(call(stop.wait, {}, 0.2)))
    thread.start()
    thread.join()
    stop.set()
    assert results[1].costs_time


def test_a_reward_that_always_hangs_is_not_called_for_every_completion() -> None:
    calls: list[str] = []

    def hangs(completion: str) -> float:
        calls.append(completion)
        time.sleep(5)
        return 1.0

    (reward,) = load_rewards(["my.py:digits"], columns=["answer"])
    reward = type(reward)("hangs", "hangs", hangs, accepts=frozenset({"completion"}))
    example = Example("a", "b")
    written = [Written(example, str(index), True, 1, "") for index in range(40)]
    scores = RewardSet([reward], None, timeout_s=0.02, num_workers=0).score(None, written)  # type: ignore[arg-type]
    assert len(calls) == MOST_IN_A_ROW
    assert scores.num_failed == 40


@pytest.mark.slow
def test_worker_processes_give_the_same_and_survive_crashes_and_hangs() -> None:
    assert scores_of("digits", num_workers=2).totals == [1, 0, 0]
    assert scores_of("batched", num_workers=1).totals == [1, 0, 0]
    crashed = scores_of("exits", num_workers=1)
    assert [failure.reason for _, failure in crashed.failures] == ["it ended its worker process with exit code 3"] * 3
    hung = scores_of("hangs", num_workers=1, timeout_s=1.0)
    assert hung.totals == [1, 0, 1]
    assert hung.failures[0][1].costs_time


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("4", "4", 1), (" 4\n", 4, 1), ("44", "4", 0),
        ("so it is 1,234.", "1234", 1), ("1/2", "0.5", 1), ("-3 or 3", "3", 1), ("3 or -3", "3", 0),
        ("1e3", "1000", 1), ("none", "3", 0), ("0.1", 0.1, 1), (".5", "1/2", 1), ("1/0", "1", 0), ("2.50$", "2.5", 1),
    ],
)  # fmt: skip
def test_exact_match_and_numbers_by_hand(completion: str, answer: Any, expected: float) -> None:
    reward = built_in.exact_match if completion.strip() in ("4", "44") else built_in.numeric
    assert reward(completion, answer) == expected


def test_patterns_and_lengths_by_hand() -> None:
    assert built_in.regex("a 12 b", r"\d+") == 1
    assert built_in.regex("a", r"\d+") == 0
    assert built_in.regex("x\n#### 12 \n", r"#### (\S+)", answer=12) == 1
    assert built_in.regex("#### 11", r"#### (\S+)", answer=12) == 0
    assert built_in.format(" <t>a\nb</t>c\n", "<t>.*</t>.*") == 1
    assert built_in.format("a <t></t>", "<t>.*</t>.*") == 0
    assert [built_in.length(n, 10) for n in (1, 10, 15, 20, 40)] == [1, 1, 0.5, 0, 0]


def test_names_of_rewards_in_metrics(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.py", "b/a.py", "c.py"):
        Path(name).write_text("def score(completion): return 1.0\ndef other(completion): return 1.0\n")
    specs = ["a.py:score", "b/a.py:score", "c.py:score", "c.py:other", "exact_match"]
    loaded = load_rewards(specs, columns=["answer"])
    assert [reward.name for reward in loaded] == ["a.py:score", "b.a.py:score", "c.score", "other", "exact_match"]


def test_columns_of_the_data_replace_settings_and_a_missing_one_is_none() -> None:
    Path("d.jsonl").write_text('{"prompt": "a", "pattern": "x"}\n{"prompt": "b", "level": 2}\n{"prompt": "c"}\n')
    Path("r.py").write_text("def score(completion, level): return -1.0 if level is None else float(level)\n")
    config = DatasetConfig(path="d.jsonl", reward=("regex", "r.py:score"), pattern="y", heldout=0)
    task = config.build(0)
    written = [Written(example, "x", True, 1, "") for example in sorted(task.train, key=lambda e: e.prompt)]
    parts = config.build_rewards(0).score(task, written).parts
    assert parts == {"regex": [1, 0, 0], "score": [-1, 2, -1]}


def test_math_verify_in_a_worker() -> None:
    pytest.importorskip("math_verify")
    (reward,) = load_rewards(["math_verify"], columns=["answer"])
    together = RewardSet([reward], None, timeout_s=60, num_workers=0, columns=["answer"])
    example = Example("a", "\\frac{1}{2}", None, "a", {"answer": "\\frac{1}{2}"})
    written = [Written(example, text, True, 1, "") for text in ("\\boxed{0.5}", "it is $1/2$", "2", "")]
    scores = together.score(None, written)  # type: ignore[arg-type]
    together.close()
    assert (scores.totals, scores.failures) == ([1, 1, 0, 0], [])


def test_a_batched_reward_gets_settings_once_and_columns_as_lists() -> None:
    Path("d.jsonl").write_text('{"prompt": "a", "level": 1}\n{"prompt": "b"}\n')
    Path("r.py").write_text(
        "def score(prompts, completions, level, pattern, num_tokens, finished):\n"
        "    assert (prompts, completions, level) == (['a', 'b'], ['x', 'y'], [1, None])\n"
        "    assert (pattern, num_tokens, finished) == ('p', [3, 4], [True, False])\n"
        "    return [1.0, None]\n"
    )
    config = DatasetConfig(path="d.jsonl", reward="r.py:score", pattern="p", heldout=0)
    task = config.build(0)
    examples = sorted(task.train, key=lambda e: e.prompt)
    written = [Written(examples[0], "x", True, 3, ""), Written(examples[1], "y", False, 4, "")]
    scores = config.build_rewards(0).score(task, written)
    assert scores.failures == []
    assert scores.totals[0] == 1
    assert math.isnan(scores.totals[1])


def test_a_column_replaces_a_setting_of_a_batched_reward() -> None:
    Path("d.jsonl").write_text('{"prompt": "a", "pattern": "q"}\n{"prompt": "b"}\n')
    Path("r.py").write_text("def score(completions, pattern): return [{'q': 1, 'p': 2}[each] for each in pattern]\n")
    config = DatasetConfig(path="d.jsonl", reward="r.py:score", pattern="p", heldout=0)
    task = config.build(0)
    examples = sorted(task.train, key=lambda e: e.prompt)
    scores = config.build_rewards(0).score(task, [Written(example, "x", True, 1, "") for example in examples])
    assert (scores.totals, scores.failures) == ([1, 2], [])


def test_built_in_rewards_do_not_apply_without_an_answer() -> None:
    assert (built_in.exact_match("None", None), built_in.numeric("1", None)) == (None, None)
    assert built_in.math_verify("1", None) is None
    assert (built_in.exact_match(" 1", "1"), built_in.numeric("x 1", 1)) == (1.0, 1.0)


def test_that_no_reward_applies_to_anything_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    Path("my.py").write_text("def nothing(completion): return None\n")
    with caplog.at_level(logging.WARNING):
        assert all(map(math.isnan, scores_of("nothing").totals))
    assert [record.getMessage() for record in caplog.records] == [
        "no reward applies to any of 3 completions: all returned None; did you forget return?"
    ]
