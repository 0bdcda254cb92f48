"""One gradient, whatever the layout: loss, gradients and every metric equal those of one process and one batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.layout_cases import (
    FULL,
    PART,
    RTOL,
    WORLDS,
    Case,
    fitting,
    full_cases,
    grpo,
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_sampled_layouts(world: int) -> None:
    assert not run(world, [case for case in sampled_cases() if case.layouts[0].processes == world])


@st.composite
def drawn_case(draw: st.DrawFn, world: int) -> Case:
    """Any loss under any aggregation in any layout, over ragged rows of which any may be empty."""
    loss, how = draw(st.sampled_from(pairs()))
    cfg = grpo(loss, how)
    layout, seed = draw(st.sampled_from(fitting(cfg, world))), draw(st.integers(0, 10**6))
    empty = tuple(sorted(draw(st.sets(st.integers(0, 5), max_size=5))))
    return Case(f"{loss}/{how} without rows {empty}", cfg, (layout,), seed, empty=empty)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn_case(1))
def test_drawn_layouts_of_one_process(case: Case) -> None:
    assert not layout_worker([case])


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_drawn_layouts(world: int) -> None:
    cases: list[Case] = []

    @settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(drawn_case(world))
    def collect(case: Case) -> None:
        cases.append(case)

    collect()  # all in one start of the processes, which takes seconds
    assert len({case.name for case in cases}) > 40
    assert not run(world, cases)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_all_layouts(world: int) -> None:
    assert not run(world, full_cases(world))
