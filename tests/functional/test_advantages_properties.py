"""What holds for every registered advantage estimator."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.rewards import RewardTerms

PER_TOKEN = ("token_rewards", "values", "logprobs", "sum_pi_squared")
ORDERED = ("rae",)
"""Estimators that depend on the order of the sequences of a group."""
UNEQUAL_FROM_EQUAL = (
    "length_shaped", "reinforce_pp", "reinforce_pp_baseline", "gdpo", "remax", "rae", "gae", "optimal_token_baseline",
    "tir_optimal_token_baseline",
)  # fmt: skip
"""Estimators that see more than the rewards of a group, so that equal rewards may differ in advantage."""
NAMES = advantage_names()


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> RewardTerms:
    """Return groups of 6, 3, 2 and 1 in any order, with holes in the mask and rewards of which some are 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(12, 6, generator=generator) < 0.7
    mask[:, 1] = True
    groups = torch.tensor([5, -2, 5, 9, 9, 5, 5, 100, 5, -2, 5, -2])
    is_zero = torch.tensor([False, True, True, False, False, True, True, False, True, False, False, False])
    return RewardTerms(
        rewards=noise(12).abs().masked_fill(is_zero, 0.0),
        group_ids=groups,
        lengths=mask.sum(-1),
        mask=mask,
        token_rewards=noise(12, 6),
        values=noise(12, 6),
        logprobs=-noise(12, 6).abs(),
        sum_pi_squared=noise(12, 6).sigmoid(),
        rewards_multi=noise(12, 3),
        reward_weights=torch.tensor([1.0, 0.5, 2.0], dtype=dtype),
        greedy_rewards=noise(12),
        baselines=(groups.to(dtype) / 50),
        input_lengths=torch.arange(12) + 3,
        num_turns=torch.arange(12) % 3 + 1,
    )


def selected(r: RewardTerms, index: Tensor) -> RewardTerms:
    rows = [f.name for f in fields(r) if f.name != "reward_weights"]
    return replace(r, **{name: getattr(r, name)[index] for name in rows})


def compute(name: str, r: RewardTerms) -> Tensor:
    return advantage(name).compute(r)


@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_masked_positions(name: str) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        r = batch(dtype=dtype)
        found = compute(name, r)
        assert found.dtype == expected
        assert found.shape == (r.rewards.shape if advantage(name).level == "sequence" else r.require("mask").shape)
        assert found.abs().sum() > 0
        if advantage(name).level == "token":
            assert (found[~r.require("mask")] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_permuting_sequences_permutes_advantages(name: str) -> None:
    r = batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    if name in ORDERED:  # keep the order within each group
        order = r.group_ids.argsort(stable=True)
    torch.testing.assert_close(compute(name, selected(r, order)), compute(name, r)[order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_group_numbers_mean_nothing(name: str) -> None:
    r = batch()
    torch.testing.assert_close(compute(name, replace(r, group_ids=-3 * r.group_ids + 1)), compute(name, r))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_may_hold_anything(name: str, garbage: float) -> None:
    r = batch()
    dirty = {f: getattr(r, f).where(r.require("mask"), garbage) for f in PER_TOKEN}
    assert torch.equal(compute(name, replace(r, **dirty)), compute(name, r))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_reward_concerns_nobody_else(name: str, bad: float) -> None:
    r = batch()
    rewards = r.rewards.clone()
    rewards[[0, 4]] = bad
    found = compute(name, replace(r, rewards=rewards))
    assert (found[[0, 4]] == 0).all()
    others = torch.tensor([1, 2, 3, 5, 6, 7, 8, 9, 10, 11])
    torch.testing.assert_close(found[others], compute(name, selected(r, others)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_at_a_scored_token_concerns_nobody_else(name: str) -> None:
    r = batch()
    for field in PER_TOKEN:
        values = getattr(r, field).clone()
        values[2, 1] = float("nan")
        found = compute(name, replace(r, **{field: values}))
        assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_always_finite(name: str) -> None:
    r = batch(dtype=torch.float32)
    extreme = torch.tensor([3e38, -3e38, 0.0, 1e-38, 1e-38, -3e38, float("nan"), 7.0, 3e38, -0.0, -3e38, 3e38])
    for rewards in (extreme, torch.zeros(12), torch.full((12,), float("nan")), torch.full((12,), 0.1)):
        assert compute(name, replace(r, rewards=rewards, token_rewards=None)).isfinite().all()
    empty = torch.zeros_like(r.require("mask"))
    assert compute(name, replace(r, mask=empty, lengths=empty.sum(-1))).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNEQUAL_FROM_EQUAL])
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    for value in (0.1, 1 / 3, -7.3, 1e20):
        for dtype in (torch.float32, torch.float64):
            r = replace(batch(dtype=dtype), rewards=torch.full((12,), value, dtype=dtype))
            assert (compute(name, r) == 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if advantage(name).within_group])
def test_a_group_of_one_gets_zero(name: str) -> None:
    r = batch()
    assert (compute(name, r)[7] == 0).all()
    alone = replace(r, group_ids=torch.arange(12))
    assert (compute(name, alone) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_unchanged(name: str) -> None:
    r = batch()
    before = copy.deepcopy(r)
    compute(name, r)
    for field in fields(r):
        assert torch.equal(getattr(r, field.name), getattr(before, field.name)), field.name


@pytest.mark.parametrize("name", NAMES)
def test_fp32_is_close_to_fp64(name: str) -> None:
    r = batch()
    narrow = replace(
        r, **{f: getattr(r, f).float() for f in ("rewards", *PER_TOKEN, "rewards_multi", "greedy_rewards")}
    )
    # The inputs themselves are rounded to 6e-8; the arithmetic behind them is float64 in both.
    torch.testing.assert_close(compute(name, narrow).double(), compute(name, r), rtol=2e-5, atol=2e-6)
