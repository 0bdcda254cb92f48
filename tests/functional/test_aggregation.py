"""Token weights of every mode, by hand."""

import pytest
import torch

from toolkit.functional.aggregation import token_weights


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token", [1, 0, 1, 1, 1, 1, 0]),
        ("sample", [1, 0, 0.25, 0.25, 0.25, 0.25, 0]),
        ("square", [1, 0, 0.5, 0.5, 0.5, 0.5, 0]),
    ],
)
def test_by_hand(mode: str, weights: list[float]) -> None:
    is_active = torch.tensor([[True, False, True, True, True, True, False]])
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, -1]])
    assert token_weights(is_active, ids, mode).tolist() == [weights]


def test_counts_above_what_low_precision_holds() -> None:
    # P34: 70,000 tokens overflow fp16 and round in bf16.
    n = 70_001
    weights = token_weights(torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.int64), "sample")
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-12)
