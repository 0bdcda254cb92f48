"""Fixtures shared by all tests: seeds, small batches, one thread for each of the processes that run tests."""

from __future__ import annotations

import gc
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

# Before torch is loaded: two workers with two threads each would wait for each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

import toolkit.losses.scored
import toolkit.testing.processes
from toolkit import RLLossContextInputItem
from toolkit.functional.advantages.registry import ADVANTAGES
from toolkit.functional.policy.registry import POLICY_LOSSES

toolkit.testing.processes.START_METHOD = "forkserver"  # as in tests.processes
toolkit.losses.scored.SMALL_LOGITS = 0  # the batches of tests are small, and chunk mode is to take its own path
POLICY_LOSSES.names()  # imports the built-in ones
ADVANTAGES.names()


CASES = 4
"""Cases of one test that a run of everything takes; which ones, their names decide. The others run with -m slow."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers goes with it; the built-in ones are there before."""
    for registry in (POLICY_LOSSES, ADVANTAGES):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))


def slow_unless(is_fast: Callable[[int, Any], bool], values: Iterable[Any]) -> list[Any]:
    """Return the values of a parameter; those for which ``is_fast(index, value)`` does not hold run with -m slow."""
    return [
        value if is_fast(index, value) else pytest.param(value, marks=pytest.mark.slow)
        for index, value in enumerate(values)
    ]


def random_labels(shape: tuple[int, ...], vocabulary: int, ignored: float = 0.4) -> Tensor:
    labels = torch.randint(0, vocabulary, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, -100)


def random_item(
    shape: tuple[int, int] = (2, 13), vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> RLLossContextInputItem:
    """An item whose ratios are far enough from 1 that clipping binds on some tokens."""
    return RLLossContextInputItem(
        shifted_labels=random_labels(shape, vocabulary),
        advantages=torch.randn(shape, dtype=dtype),
        old_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        ref_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        rollout_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        teacher_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        group_ids=(torch.arange(shape[0]) // 2).unsqueeze(-1),
    )


def random_head(
    shape: tuple[int, int] = (2, 13), width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias, all leaves that ask for a gradient."""
    hidden = torch.randn(*shape, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    return hidden, weight, bias


def runs_everything(config: pytest.Config) -> bool:
    """Whether no file or test was named on the command line: one that was named runs with all its cases."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        return worker["runs_everything"]
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of pytest-xdist what only the first one knows."""
    node.workerinput["runs_everything"] = runs_everything(node.config)


def cases_left_out(names: Iterable[str]) -> set[str]:
    """Return which cases of tests a run of everything leaves to -m slow; ``file::test[case]`` are names."""
    cases = defaultdict(list)
    for name in names:
        cases[name.partition("[")[0]].append(name)
    return {
        name
        for several in cases.values()
        for name in sorted(several, key=lambda name: hashlib.sha1(name.encode()).digest())[CASES:]
    }


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what `cases_left_out` names."""
    if runs_everything(config):
        marked = ("slow", "every_case")
        left_out = cases_left_out(item.nodeid for item in items if not any(map(item.get_closest_marker, marked)))
        for item in items:
            if item.nodeid in left_out:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Spare the garbage collector the millions of objects of torch and Hydra that never go."""
    gc.collect()
    gc.freeze()
