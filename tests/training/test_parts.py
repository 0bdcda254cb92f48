"""Schedules, tasks and heads: the small parts of the training command."""

from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from toolkit import ConfigError
from toolkit.models.config import PretrainedConfig, TinyLlamaConfig
from toolkit.tasks.base import Example
from toolkit.tasks.config import SpellBackwardConfig
from toolkit.training.config import SchedulerConfig
from toolkit.training.metrics_file import why_nothing_was_learnt
from toolkit.training.phase import learning_rate_schedule
from toolkit.training.report import Summary, draw_curves


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SchedulerConfig(), [2.0, 1.5, 1.0, 0.5]),
        (SchedulerConfig(final_ratio=0.5), [2.0, 1.75, 1.5, 1.25]),
        (SchedulerConfig(shape="constant"), [2.0] * 4),
        (SchedulerConfig(shape="constant", warmup_updates=4), [0.5, 1.0, 1.5, 2.0]),
        (SchedulerConfig(shape="cosine"), [2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5]),
    ],
)
def test_learning_rates_by_hand(config: SchedulerConfig, expected: list[float]) -> None:
    schedule = learning_rate_schedule(config, 2.0, 4)
    assert [schedule(update) for update in range(4)] == pytest.approx(expected)


def test_curves_of_a_short_run_mark_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    rows = [{"phase": "main", "step": step, "reward": 0.5, "lr": 0.1, "kl_old": 0.0} for step in range(3)]
    measured: dict[str, Any] = dict.fromkeys((field.name for field in fields(Summary)), 0.5)
    draw_curves(Summary(**measured), rows, Path("curves.png"))
    ticks = [tick for axes in figures[0].axes for tick in axes.get_xticks()]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


def test_curves_of_a_run_without_values_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    measured: dict[str, Any] = dict.fromkeys((field.name for field in fields(Summary)), None)
    draw_curves(Summary(**measured), [{"phase": "main", "step": 0, "reward": None, "lr": 0.1}], Path("curves.png"))
    assert "no step has measured anything" in figures[0].texts[0].get_text()


def test_a_run_that_has_learnt_nothing_says_why() -> None:
    equal = {"phase": "main", "step": 0, "reward": 1.0, "uniform_groups": 1.0}
    warmup = {"phase": "warmup", "step": 0, "grad_norm": 1.0}
    assert "the rewards were equal in every group" in (why_nothing_was_learnt([warmup, equal]) or "")
    assert "no reward applied to any completion" in (why_nothing_was_learnt([{**equal, "reward": None}]) or "")
    for row in ({**equal, "grad_norm": 0.5}, {"phase": "main", "step": 0}, {**equal, "uniform_groups": 0.9}):
        assert why_nothing_was_learnt([equal, row]) is None  # an update; supervised learning; another reason
    assert why_nothing_was_learnt([warmup]) is None


def test_task_keeps_held_out_words_apart() -> None:
    task = SpellBackwardConfig(num_heldout=100).build(seed=3)
    held = {example.prompt for example in task.heldout}
    assert len(held) == 100
    assert not held & {example.prompt for example in task.train}
    demonstrated = task.demonstrate(2000, Random(0))
    assert not held & {example.prompt for example in demonstrated}
    assert all(example.answer == example.prompt[-2::-1] for example in (*task.heldout, *task.train, *demonstrated))
    assert task.demonstrate(5, Random(1)) == task.demonstrate(5, Random(1))
    assert task.draw(5, Random(1)) == task.draw(5, Random(1))
    assert [e.prompt for e in SpellBackwardConfig(num_heldout=100).build(seed=3).heldout] == [
        e.prompt for e in task.heldout
    ]


def test_reward_is_exact_match_with_an_end() -> None:
    task = SpellBackwardConfig(num_heldout=10).build(seed=0)
    example = task.heldout[0]
    assert task.reward(example, example.answer, finished=True) == 1.0
    assert task.reward(example, example.answer, finished=False) == 0.0
    assert task.reward(example, example.answer[:-1], finished=True) == 0.0
    assert task.reward(example, "", finished=True) == 0.0


def test_a_verifier_that_crashes_gives_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SpellBackwardConfig(num_heldout=10).build(seed=0)
    monkeypatch.setattr(type(task), "score", lambda self, example, completion: 1 / 0)
    assert task.reward(task.heldout[0], "x", finished=True) == 0.0


def test_too_many_held_out_words() -> None:
    with pytest.raises(ConfigError, match="leaves no words for RL"):
        SpellBackwardConfig(num_heldout=10**6).build(seed=0)


def test_letters_in_their_place_are_worth_a_part() -> None:
    task = SpellBackwardConfig(num_heldout=10, word_length=5, partial_credit=True).build(seed=0)
    example = Example("abcde=", "edcba", {})
    found = {word: task.score(example, word) for word in ("edcba", "edcb", "edcbaa", "", "abcde", "dcba")}
    assert found == {"edcba": 1.0, "edcb": 0.8, "edcbaa": 5 / 6, "": 0.0, "abcde": 0.2, "dcba": 0.0}


def test_demonstrations_may_be_shorter_than_the_words() -> None:
    task = SpellBackwardConfig(num_heldout=10, word_length=5, demonstrated_length=4).build(seed=0)
    assert {len(example.answer) for example in task.demonstrate(20, Random(0))} == {4}
    assert {len(example.answer) for example in task.draw(20, Random(0))} == {5}


def test_pretrained_round_trip(tmp_path) -> None:
    policy, tokenizer = TinyLlamaConfig(hidden_size=16, intermediate_size=16, num_heads=2).build("abc=")
    policy.lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = PretrainedConfig(path=str(tmp_path)).build("")
    assert again("ab=")["input_ids"] == tokenizer("ab=")["input_ids"]
    ids = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, mask), policy(ids, mask))


@pytest.mark.parametrize(
    ("config", "words"),
    [({"path": "/nowhere"}, "does not exist"), ({"path": "x", "dtype": "f"}, "choose 'float32'")],
)
def test_pretrained_mistakes(config: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PretrainedConfig(**config).build("")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        TinyLlamaConfig(hidden_size=10, num_heads=3).build("a")
