"""A long run does not grow: no slope of the resident memory once it is under way.

``TOOLKIT_MEMORY_STEPS=300`` measures the last 200 of 300 steps, the usual 90 the last 60.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from tests.training.test_kills import SETTINGS
from toolkit import train as command
from toolkit.training import run

MOST = 2.0
"""KiB a step; one page is 4 KiB, so a page for every other step."""


def resident() -> int:
    """Return the resident memory of this process in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def slope(values: list[int]) -> float:
    """Return the slope of the least-squares line through values at 0, 1, 2 ..."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((x - middle) ** 2 for x in range(len(values)))
    return sum((x - middle) * (value - mean) for x, value in enumerate(values)) / spread


def test_the_slope() -> None:
    assert slope([3, 5, 7, 9]) == 2
    assert slope([4, 4, 4]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured on Linux")
def test_memory_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)
    steps, measured = int(os.environ.get("TOOLKIT_MEMORY_STEPS", "90")), []
    log = run.Tracker.log

    def watched(*args: Any) -> None:
        log(*args)
        if len(measured) % 10 == 0:
            gc.collect()  # what waits to be collected is no growth
        measured.append(resident())

    monkeypatch.setattr(run.Tracker, "log", watched)
    settings = [word for word in SETTINGS if not word.startswith("training.checkpoint_every")]
    words = [f"training.steps={steps}", "training.checkpoint_every=10", "warmup.steps=0"]
    command.train([*settings, *words, f"hydra.run.dir={tmp_path / 'run'}"])
    assert len(measured) == steps + 2  # and the held-out accuracy before and after
    last = measured[steps // 3 : -1]  # the accuracy after is not a step
    print(f"{slope(last):.2f} KiB a step over {len(last)} steps; from {measured[0]} to {measured[-1]} KiB")
    assert slope(last) < MOST
