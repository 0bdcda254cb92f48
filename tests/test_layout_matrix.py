"""One gradient, whatever the layout: loss, gradients and every metric equal those of one process and one batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.layout_cases import (
    FULL,
    PART,
    RTOL,
    WORLDS,
    Case,
    full_cases,
    layout_worker,
    layouts,
    pairs,
    pairs_of,
    sampled_cases,
)
from toolkit.testing.processes import run_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(world: int, cases: list[Case]) -> list[str]:
    """Run the cases in as many processes; all of them in one start."""
    return layout_worker(cases) if world == 1 else run_processes(world, layout_worker, cases)


def test_sample_covers_every_pair_of_values() -> None:
    seen = set()
    for case in sampled_cases():
        if "/" in case.name and tuple(case.name.split("/")) in pairs():
            seen.update(pairs_of(case.name, case.layouts[0], case.dtype))
    choices = [(layout, dtype) for world in WORLDS for layout in layouts(world) for dtype in RTOL]
    first_loss, first_how = pairs()[0]
    named = {f"{loss}/{how}" for loss, how in pairs() if loss == first_loss or how == first_how}
    possible = {pair for name, choice in itertools.product(named, choices) for pair in pairs_of(name, *choice)}
    possible |= {(("loss", loss), ("aggregation", how)) for loss, how in pairs()}
    assert seen == possible


@pytest.mark.parametrize("world", WORLDS)
def test_slow_part_meets_every_layout(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss by itself with one and two processes, all losses together with four."""
    monkeypatch.delenv(FULL, raising=False)
    met: dict[str, set[Any]] = {}
    for case in full_cases(world):
        loss, _, how = case.name.partition("/")
        if (loss, how) in pairs() and case.dtype == torch.float64:
            met.setdefault(loss if world < 4 else "any", set()).update(case.layouts)
            assert len(case.layouts) == PART[world]
    assert {*met} == ({loss for loss, _ in pairs()} if world < 4 else {"any"})
    losses_without_chunks = {name for name, own in met.items() if {layout.mode for layout in own} == {"eager"}}
    for name, own in met.items():
        assert own == {
            layout for layout in layouts(world) if layout.mode == "eager" or name not in losses_without_chunks
        }


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_sampled_layouts(world: int) -> None:
    assert not run(world, [case for case in sampled_cases() if case.layouts[0].processes == world])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_all_layouts(world: int) -> None:
    assert not run(world, full_cases(world))
