"""Exact and top-k divergences: hand-worked numbers, a float64 reference in loops, bounds, gradients."""

import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.kl import full_kl, top_k_kl
from toolkit.functional.names import KLDirection, KLTail


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_policies(rows: int = 6, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, rows, vocabulary, dtype=torch.float64, generator=generator)
    return left.log_softmax(-1), right.log_softmax(-1)


def divergence(p: list[float], q: list[float], direction: str) -> float:
    if direction == "forward":
        p, q = q, p
    if direction == "jensen_shannon":
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (divergence(p, mixture, "reverse") + divergence(q, mixture, "reverse")) / 2
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_full_kl_of_two_coins() -> None:
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert full_kl(logs(0.5, 0.5), logs(0.25, 0.75)).item() == pytest.approx(expected, rel=1e-12)


def test_top_k_of_one_candidate_by_hand() -> None:
    # One candidate at 1/2 and 1/4; the rest is 1/2 and 3/4.
    candidate, rest = 0.5 * math.log(2), 0.5 * math.log(2 / 3)
    p, q = logs(0.5), logs(0.25)
    assert top_k_kl(p, q, tail="drop").item() == pytest.approx(candidate, rel=1e-12)
    assert top_k_kl(p, q, tail="one_bucket").item() == pytest.approx(candidate + rest, rel=1e-12)
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert top_k_kl(p, q, direction="forward").item() == pytest.approx(forward, rel=1e-12)


@pytest.mark.parametrize(("direction", "tail"), list(product(get_args(KLDirection), get_args(KLTail))))
def test_against_loops(direction: str, tail: str) -> None:
    logprobs, ref = random_policies()
    found = top_k_kl(logprobs[:, :4], ref[:, :4], direction=direction, tail=tail)
    for row in range(len(logprobs)):
        p, q = ([math.exp(x) for x in side[row, :4].tolist()] for side in (logprobs, ref))
        if tail == "one_bucket":
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        assert found[row].item() == pytest.approx(divergence(p, q, direction), rel=1e-12)


@pytest.mark.parametrize(("direction", "tail"), list(product(get_args(KLDirection), get_args(KLTail))))
def test_all_candidates_are_the_full_divergence(direction: str, tail: str) -> None:
    logprobs, ref = random_policies()
    found = top_k_kl(logprobs, ref, direction=direction, tail=tail)
    for row in range(len(logprobs)):
        p, q = ([math.exp(x) for x in side[row].tolist()] for side in (logprobs, ref))
        assert found[row].item() == pytest.approx(divergence(p, q, direction), rel=1e-12)
    if direction == "reverse":
        torch.testing.assert_close(found, full_kl(logprobs, ref))


def test_one_bucket_bounds_the_full_kl_from_below_and_grows_with_the_candidates() -> None:
    logprobs, ref = random_policies(rows=200)
    found = torch.stack([top_k_kl(logprobs[:, :k], ref[:, :k]) for k in range(1, 8)])
    assert (found >= 0).all()
    assert (found.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(found[-1], full_kl(logprobs, ref))


def test_drop_may_be_negative() -> None:
    assert top_k_kl(logs(0.25), logs(0.5), tail="drop").item() == pytest.approx(-0.25 * math.log(2))


def test_full_kl_has_the_true_gradient() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[0.0, 0.5, -0.5]], dtype=torch.float64).log_softmax(-1)
    found = full_kl(logits.log_softmax(-1).unsqueeze(0), ref)
    found.sum().backward()
    assert found.item() == pytest.approx(0.270525, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.33404, -0.24421, -0.08984], abs=1e-5)


@pytest.mark.parametrize(("direction", "tail"), list(product(get_args(KLDirection), get_args(KLTail))))
def test_gradients_against_finite_differences(direction: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ref = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)

    def of_logits(x: Tensor) -> Tensor:
        return top_k_kl(x.log_softmax(-1)[:, :4], ref.log_softmax(-1)[:, :4], direction=direction, tail=tail)

    assert torch.autograd.gradcheck(of_logits, logits.requires_grad_())


@pytest.mark.parametrize("direction", get_args(KLDirection))
def test_tokens_that_cannot_come_add_nothing(direction: str) -> None:
    logits = torch.tensor([[0.3, -1.0, -math.inf, 0.7]], requires_grad=True)
    ref = torch.tensor([[0.1, 0.4, -math.inf, -0.2]]).log_softmax(-1)
    found = top_k_kl(logits.log_softmax(-1), ref, direction=direction)
    found.sum().backward()
    keep = [0, 1, 3]
    shorter = logits.detach()[:, keep].clone().requires_grad_()
    expected = top_k_kl(shorter.log_softmax(-1), ref[:, keep], direction=direction)
    expected.sum().backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad is not None
    assert shorter.grad is not None
    torch.testing.assert_close(logits.grad[:, keep], shorter.grad)
    assert logits.grad[0, 2] == 0
    torch.testing.assert_close(full_kl(logits.log_softmax(-1), ref), top_k_kl(logits.log_softmax(-1), ref, tail="drop"))


def test_candidates_with_all_the_mass_stay_finite_in_fp32() -> None:
    logits = torch.tensor([[40.0, 0.0, -40.0], [0.0, 0.1, 0.2]], requires_grad=True)
    found = top_k_kl(logits.log_softmax(-1), torch.zeros(2, 3).log_softmax(-1))
    found.sum().backward()
    assert found.tolist() == pytest.approx(
        [
            math.log(3),
            0.0034,
        ],
        abs=1e-4,
    )  # log 3 less an entropy of nearly 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_inputs_are_unchanged() -> None:
    logprobs, ref = random_policies()
    before = logprobs.clone(), ref.clone()
    for direction, tail in product(get_args(KLDirection), get_args(KLTail)):
        top_k_kl(logprobs, ref, direction=direction, tail=tail)
    assert torch.equal(logprobs, before[0])
    assert torch.equal(ref, before[1])


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"direction='revers' .*did you mean 'reverse'"):
        top_k_kl(logs(0.5), logs(0.5), direction="revers")
    with pytest.raises(ConfigError, match=r"tail='bucket' of the top-k KL is not known; choose 'drop' or 'one_bucket'"):
        top_k_kl(logs(0.5), logs(0.5), tail="bucket")
