"""Terms of the model itself: the mean over the tokens of the step, however it is cut (over ranks: test_field_notes)."""

from typing import Any

import pytest
import torch

from toolkit import ConfigError, DataError
from toolkit.losses import auxiliary_weights


def test_factors_by_hand() -> None:
    # Means 1 over 2 tokens and 3 over 6: 2.5 over all; the mean of the means would be 2, their sum 4.
    weights = auxiliary_weights([2, 6])
    assert [weight.tolist() for weight in weights] == [0.25, 0.75]
    assert float(weights[0] * 1.0 + weights[1] * 3.0) == 2.5
    assert [weight.tolist() for weight in auxiliary_weights([torch.tensor(2), torch.tensor([6])])] == [0.25, 0.75]


def test_nothing_attended_counts_nothing() -> None:
    assert [weight.tolist() for weight in auxiliary_weights([0, 4])] == [0.0, 1.0]
    assert [weight.tolist() for weight in auxiliary_weights([0, torch.tensor(0)])] == [0.0, 0.0]
    assert auxiliary_weights([]) == []


def test_counts_above_what_low_precision_holds() -> None:
    weights = auxiliary_weights([torch.tensor(2**24 + 1, dtype=torch.int32), 2**24 - 1])
    assert weights[0].dtype == torch.float64
    assert weights[0].item() == (2**24 + 1) / 2**25


@pytest.mark.parametrize("cut", [[6], [1, 5], [2, 2, 2], [5, 1, 0]])
def test_a_z_loss_has_one_gradient_whatever_the_cut(cut: list[int]) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(logits.logsumexp(-1).square().mean(), logits)
    terms = [part.logsumexp(-1).square().sum() / max(1, len(part)) for part in logits.split(cut)]
    total = sum(weight * term for weight, term in zip(auxiliary_weights(cut), terms, strict=True))
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    if len(cut) > 1:
        (added_up,) = torch.autograd.grad(
            sum(part.logsumexp(-1).square().sum() / max(1, len(part)) for part in logits.split(cut)), logits
        )
        assert not torch.allclose(added_up, expected)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"num_tokens": [1], "gradient_reduction": "avg"}, ConfigError, "gradient_reduction='avg' must be"),
        ({"num_tokens": [1, -1]}, DataError, r"num_tokens\[1\]=-1 must be one number"),
        ({"num_tokens": [torch.tensor(-1), 3]}, DataError, r"num_tokens\[0\]=tensor\(-1\) must be one number"),
        ({"num_tokens": [torch.tensor(float("nan"))]}, DataError, r"num_tokens\[0\]=tensor\(nan\) must be"),
        ({"num_tokens": [torch.ones(2)]}, DataError, r"num_tokens\[0\]=.* must be one number"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        auxiliary_weights(**arguments)
