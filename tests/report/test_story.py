"""What is said of a run that learnt, and of runs that were cut, taught nothing, or diverged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.made import curve, make_run
from toolkit.report.runs import read_run
from toolkit.report.story import remarks

ENDED = {
    "accuracy_before": 0.3,
    "accuracy_after": 0.9,
    "heldout_reward_se_before": 0.03,
    "heldout_reward_se_after": 0.04,
}


def said(folder: Path) -> list[str]:
    return [f"{remark.tone}: {remark.text}" for remark in remarks(read_run(folder))]


def test_a_run_that_learnt(tmp_path: Path) -> None:
    # Standard errors 0.03 and 0.04 make 0.05; the gain of 0.6 is 12 of them.
    folder = make_run(tmp_path / "a", rewards=curve(0.9, 0), summary=ENDED)
    assert said(folder) == ["good: The held-out accuracy went from 0.300 to 0.900, 12.0 standard errors."]
    small = make_run(tmp_path / "b", rewards=curve(0.9, 0), summary={**ENDED, "accuracy_after": 0.35})
    assert said(small) == [
        "good: The held-out accuracy went from 0.300 to 0.350, 1.0 standard errors: that may be chance."
    ]
    sure = {**ENDED, "accuracy_before": 0.0, "heldout_reward_se_before": 0.0, "heldout_reward_se_after": 0.004}
    far = make_run(tmp_path / "c", rewards=curve(0.9, 0), summary=sure)
    assert said(far) == ["good: The held-out accuracy went from 0.000 to 0.900, more than 20 standard errors."]


@pytest.mark.parametrize(
    ("before", "after", "tone"), [(0.3, 0.4, "good"), (0.3, 0.3, "note"), (0.3, 0.25, "note"), (0.3, 0.1, "bad")]
)
def test_only_a_gain_is_good(tmp_path: Path, before: float, after: float, tone: str) -> None:
    summary = {**ENDED, "accuracy_before": before, "accuracy_after": after}
    folder = make_run(tmp_path / "a", rewards=curve(0.9, 0), summary=summary)
    first = said(folder)[0]
    assert first.startswith(f"{tone}: The held-out accuracy went from {before:.3f} to {after:.3f}")
    assert ("the policy got worse; a smaller optimizer.lr" in first) == (tone == "bad")


def test_a_run_that_was_cut_or_still_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rewards=curve(0.9, 0)[:17])
    assert said(folder)[0].startswith("bad: It has not come to its end: 17 of 40 steps are there.")
    stopped = make_run(tmp_path / "b", rewards=curve(0.9, 0)[:17], summary={"interrupted": True})
    assert said(stopped)[0].startswith("bad: It was interrupted after 17 of 40 steps: training.resume=")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"uniform_groups": 1.0, "grad_norm": "absent"}, "the rewards were equal in every group"),
        ({"uniform_groups": None, "reward": None, "grad_norm": "absent"}, "no reward applied to any completion"),
        ({"uniform_groups": 0.5, "grad_norm": None}, "every update was skipped"),
    ],
)
def test_nothing_was_learnt(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    folder = make_run(tmp_path / "a", rewards=[0.5] * 40, row=lambda step: row, summary=ENDED)
    (only,) = said(folder)
    assert only.startswith("bad: Nothing was learnt")
    assert words in only


def test_a_run_that_diverged(tmp_path: Path) -> None:
    rewards = [*curve(0.9, 0, steps=20), *[0.15 + 0.01 * (step % 2) for step in range(20)]]
    (only,) = said(make_run(tmp_path / "a", rewards=rewards, summary=ENDED))
    assert only.startswith("bad: It diverged: the mean reward rose from 0.")
    assert "optimizer.lr" in only
    broken = make_run(
        tmp_path / "b",
        rewards=curve(0.9, 0),
        summary=ENDED,
        row=lambda step: {"loss": None, "grad_norm": None} if step >= 30 else {},
    )
    assert "at step 31 loss and gradient are not finite" in said(broken)[0]


def test_noise_is_no_divergence(tmp_path: Path) -> None:
    rewards = [0.5 + 0.05 * (-1) ** step for step in range(40)]
    assert not any("diverged" in text for text in said(make_run(tmp_path / "a", rewards=rewards, summary=ENDED)))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"uniform_groups": 0.9}, "equal in 90% of the groups"),
        ({"entropy": 0.001}, "hardly explores"),
        ({"clip_fraction": 0.5}, "50% of the tokens were clipped"),
        ({"truncated": 0.75}, "75% of the completions were cut off: raise rollout.max_new_tokens"),
    ],
)
def test_curves_that_stand_out(tmp_path: Path, row: dict[str, float], words: str) -> None:
    folder = make_run(tmp_path / "a", rewards=curve(0.9, 0), row=lambda step: row, summary=ENDED)
    first, second = said(folder)
    assert first.startswith("good: ")
    assert second.startswith("note: ")
    assert words in second


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.99, "nearly all prompts are solved, so it may stop earlier"),
        (0.01, "hardly any prompt is solved; easier prompts, a partial reward"),
        (0.5, "too easy or are too hard"),
    ],
)
def test_why_groups_are_uniform(tmp_path: Path, accuracy: float, words: str) -> None:
    summary = ENDED | {"accuracy_before": 0.01, "accuracy_after": accuracy}
    rewards, row = [0.5 + 0.05 * (-1) ** step for step in range(40)], {"uniform_groups": 0.9}
    folder = make_run(tmp_path / "a", rewards=rewards, row=lambda step: row, summary=summary)
    assert [text for text in said(folder) if words in text]
