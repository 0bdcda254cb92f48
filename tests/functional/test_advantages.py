"""Group-relative advantages by hand, and their edges (R24)."""

import math

import pytest
import torch

from toolkit.functional.advantages import group_advantages


@pytest.mark.parametrize(("std", "value"), [("sample", 0.5 / math.sqrt(0.5)), ("population", 1.0), ("none", 0.5)])
def test_by_hand(std: str, value: float) -> None:
    found = group_advantages(torch.tensor([[0.0, 1.0]]), std=std, eps=1e-12)
    assert found.tolist()[0] == pytest.approx([-value, value])


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_singletons_equal_rewards_and_nan_give_zero(std: str) -> None:
    assert group_advantages(torch.tensor([[3.0]]), std=std).tolist() == [[0.0]]
    assert group_advantages(torch.full((1, 7), 0.1), std=std).tolist() == [[0.0] * 7]
    found = group_advantages(torch.tensor([[math.nan, 1.0, 0.0]]), std=std, eps=1e-12)
    without = group_advantages(torch.tensor([[1.0, 0.0]]), std=std, eps=1e-12)
    assert found.tolist()[0] == pytest.approx([0.0, *without.tolist()[0]])


def test_finite_for_anything() -> None:
    rewards = torch.tensor([[math.nan, math.nan], [math.inf, 1.0], [1e30, -1e30], [0.0, 0.0]])
    assert group_advantages(rewards).isfinite().all()
