"""Aggregations by hand: the weight of every token, and what the sum is divided by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.functional.aggregation import Share, share

MASK = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
"""Three sequences: of one scored token, of four, and one without any."""


def of(mask: list[list[int]], aggregation: str, **options: Any) -> Share:
    is_active = torch.tensor(mask, dtype=torch.bool)
    rows = torch.arange(len(mask)).unsqueeze(-1).expand(is_active.shape)
    return share(is_active, rows, aggregation, **options)


def total(shares: list[Share], losses: list[list[float]]) -> float:
    """The loss of a step: its micro-batches' weights over the sum of their counts."""
    count = sum((own.count for own in shares), torch.zeros((), dtype=torch.float64))
    weights = [own.weights if own.is_sum else own.divided(count) for own in shares]
    return sum(float((w * torch.tensor([row])).sum()) for w, row in zip(weights, losses, strict=True))


# ------------------------------------------------------------------------------------------------ each by hand


@pytest.mark.parametrize(
    ("aggregation", "options", "short", "long", "denominator"),
    [
        ("token_mean", {}, 1.0, 1.0, 5),
        ("seq_mean_token_mean", {}, 1.0, 0.25, 2),
        ("seq_mean_token_mean", {"count_empty": True}, 1.0, 0.25, 3),
        ("seq_mean_token_sum", {}, 1.0, 1.0, 2),
        ("seq_mean_token_sum", {"count_empty": True}, 1.0, 1.0, 3),
        ("constant", {"length": 8.0}, 0.125, 0.125, 2),
        ("constant", {"length": 8.0, "count_empty": True}, 0.125, 0.125, 3),
        ("square", {}, 1.0, 0.5, 3),  # 1 / sqrt(1), 4 of 1 / sqrt(4); the denominator is their sum
    ],
)
def test_by_hand(aggregation: str, options: dict[str, Any], short: float, long: float, denominator: float) -> None:
    own = of(MASK, aggregation, **options)
    assert own.weights.tolist() == [[short, 0, 0, 0], [long] * 4, [0] * 4]
    assert own.count.item() == denominator
    divided = own.divided(own.count)
    assert divided[0, 0].item() == pytest.approx(short / denominator)
    assert divided[1, 3].item() == pytest.approx(long / denominator)
    assert not own.is_sum


def test_token_sum_is_not_divided() -> None:
    own = of(MASK, "token_sum")
    assert own.weights.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert own.is_sum
    assert total([own], [[2.0] * 4]) == 10.0


def test_prompt_mean() -> None:
    # One prompt has the first sequence and a third of 3 tokens (4 in all), another the second sequence (2 tokens).
    mask = [[1, 0, 0], [0, 1, 1], [1, 1, 1]]
    tokens = torch.tensor([[4.0], [2.0], [4.0]]).expand(3, 3)
    own = of(mask, "prompt_mean", prompt_tokens=tokens, num_prompts=2)
    assert own.weights.tolist() == [[0.25, 0, 0], [0, 0.5, 0.5], [0.25, 0.25, 0.25]]
    assert own.count.item() == 2
    assert own.divided(own.count).sum(-1).tolist() == [0.125, 0.5, 0.375]
    # A third prompt without a scored token, if the caller counts it, takes its share away from the others.
    with_empty = of(mask, "prompt_mean", prompt_tokens=tokens, num_prompts=3)
    assert with_empty.divided(with_empty.count).sum().item() == pytest.approx(2 / 3)


def test_a_prompt_without_a_token_divides_by_nothing() -> None:
    own = of([[0, 0]], "prompt_mean", prompt_tokens=torch.zeros(1, 2), num_prompts=1)
    assert own.divided(own.count).tolist() == [[0, 0]]


@pytest.mark.parametrize("aggregation", ["token_mean", "token_sum", "seq_mean_token_mean", "constant", "square"])
def test_nothing_scored_is_exactly_zero(aggregation: str) -> None:
    own = of([[0, 0], [0, 0]], aggregation, **({"length": 4.0} if aggregation == "constant" else {}))
    weights = own.weights if own.is_sum else own.divided(own.count)
    assert weights.tolist() == [[0, 0], [0, 0]]


# ------------------------------------------------------------------------------------------------ packed rows


def packed(aggregation: str, **options: Any) -> tuple[Tensor, float]:
    """Three sequences in one row: one scored token of two, four of four, none of one; and a position of no sequence."""
    is_active = torch.tensor([[True, False, True, True, True, True, False, False]])
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2, -1]])
    own = share(is_active, ids, aggregation, **options)
    return own.weights, own.count.item()


@pytest.mark.parametrize(
    ("aggregation", "options", "weights", "denominator"),
    [
        ("token_mean", {}, [1, 0, 1, 1, 1, 1, 0, 0], 5),
        ("seq_mean_token_mean", {}, [1, 0, 0.25, 0.25, 0.25, 0.25, 0, 0], 2),
        ("seq_mean_token_mean", {"count_empty": True}, [1, 0, 0.25, 0.25, 0.25, 0.25, 0, 0], 3),
        ("square", {}, [1, 0, 0.5, 0.5, 0.5, 0.5, 0, 0], 3),
    ],
)
def test_packed(aggregation: str, options: dict[str, Any], weights: list[float], denominator: float) -> None:
    found, count = packed(aggregation, **options)
    assert found.tolist() == [weights]
    assert count == denominator


# ------------------------------------------------------------------------------------------------ from the field


@pytest.mark.parametrize("sizes", [[8], [2, 6], [1] * 8, [3, 5]])
def test_r1_the_mean_is_over_the_step_not_over_micro_batches(sizes: list[int]) -> None:
    losses, start, parts = [1.0, 1.0, *[3.0] * 6], 0, []
    for size in sizes:
        parts.append(losses[start : start + size])
        start += size
    shares = [of([[1] * size], "token_mean") for size in sizes]
    assert total(shares, parts) == pytest.approx(2.5)  # the mean of the means of {2, 6} is 2.0


def test_r11_a_masked_response_adds_no_token() -> None:
    own = of([[1, 1, 1, 1], [0, 0, 0, 0]], "token_mean")
    assert own.count.item() == 4
    assert own.divided(own.count)[0].tolist() == [0.25] * 4  # 0.2 if the empty one counted as a token


def test_r34_weights_of_10_and_1000_tokens() -> None:
    mask = torch.zeros(2, 1000, dtype=torch.bool)
    mask[0, :10], mask[1] = True, True
    rows = torch.arange(2).unsqueeze(-1).expand(mask.shape)
    for aggregation, expected in (("token_mean", [10 / 1010, 1000 / 1010]), ("seq_mean_token_mean", [0.5, 0.5])):
        own = share(mask, rows, aggregation)
        assert own.divided(own.count).sum(-1).tolist() == pytest.approx(expected, rel=1e-12)
    assert [round(10 / 1010, 4), round(1000 / 1010, 4)] == [0.0099, 0.9901]


def test_counts_above_what_low_precision_holds() -> None:
    # 70,001 tokens overflow fp16 and round in bf16.
    n = 70_001
    own = share(torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.int64), "seq_mean_token_mean")
    assert own.weights.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert of([[1] * n], "token_mean").count.item() == n
