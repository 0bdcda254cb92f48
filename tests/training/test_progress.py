"""The lines of a piped run: what they say of the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from toolkit.training import progress
from toolkit.training.progress import PhaseProgress


@pytest.mark.parametrize(
    ("seconds_a_step", "expected"), [(0.5, ""), (30.0, "  left 48 min"), (300.0, "  left 8 h 0 min")]
)
def test_a_line_says_how_long_the_phase_still_takes(
    monkeypatch: pytest.MonkeyPatch, seconds_a_step: float, expected: str
) -> None:
    file, now = io.StringIO(), [0.0]
    shown = PhaseProgress(Console(file=file), "grpo", 100, 0, 1)
    monkeypatch.setattr(shown._bar, "get_time", lambda: now[0])
    for step in range(4):
        now[0] += seconds_a_step
        shown.step(step, {"reward": 0.5}, is_last=False)
    assert file.getvalue().splitlines()[-1] == f"grpo    4/100  reward 0.500{expected}"
    assert progress.PERIOD >= 300
