"""Log-probabilities, entropies and gradients where one token leads by up to 80 nats, in every pass.

Where the lead exceeds 16 nats, fp32 rounds the probability to 1; a logarithm of it would be 0, and so would 1 - p.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.head.peaked import Exact, Peaked, probed, worst
from tests.head.test_token_logprobs import PASSES, head_of
from toolkit.head import TokenScores, fused_loss, token_logprobs
from toolkit.head.logits import LogitTransform
from toolkit.head.scores import eager_scores
from toolkit.head.softmax import softmax

BOUND = 1e-5
"""What fp32 may be off by: exp by 20 units of 6e-8, and logits of 80 nats by half a unit of 7.6e-6."""
BF16 = 2.0**-7
"""Probabilities, and in the end the gradient, are rounded to bf16, by up to 2^-9 each; of an entropy also log p is."""
VOCABULARIES = pytest.mark.parametrize("vocabulary", [2, 1000, 151_936])
EVERY_PASS = pytest.mark.parametrize(
    ("trained", "scope"), [*PASSES.values(), ("hw", "eager"), ("", "eager")], ids=[*PASSES, "eager", "eager no-grad"]
)


def scores_and_gradients(
    data: Peaked, trained: str, scope: Any, upstream: tuple[float, float], entropy: Any, **options: Any
) -> tuple[TokenScores, list[Tensor]]:
    """Scores of one pass, and the gradient of ``a * logprobs.sum() + b * entropy.sum()`` for `upstream` (a, b)."""
    hidden, weight = data.hidden.clone(), data.weight.clone()
    hidden.requires_grad_("h" in trained), weight.requires_grad_("w" in trained)
    bias = options.pop("bias", None)

    def total(scores: TokenScores) -> Tensor:
        loss = upstream[0] * scores.logprobs.sum()
        return loss + upstream[1] * scores.entropy.sum() if entropy is True else loss

    if scope == "eager":
        transform = LogitTransform(softcap=options.get("softcap"), temperature=options.get("temperature", 1.0))
        scores = eager_scores(hidden, weight, data.labels, bias, transform, entropy=entropy)
        loss = total(scores)
    elif scope is None:
        result = token_logprobs(hidden, weight, data.labels, bias, entropy=entropy, chunk_size=4, **options)
        scores = TokenScores(result) if isinstance(result, Tensor) else result
        loss = total(scores)
    else:
        ids = {"sequence_ids": torch.arange(len(hidden)) // 3} if scope == "sequence" else {}
        options |= {"entropy": entropy, "chunk_size": 4, "scope": scope, **ids}
        loss, parts = fused_loss(lambda s, _: (total(s), s), hidden, weight, data.labels, bias, **options)
        entropies = torch.cat([part.entropy for part in parts]) if entropy else None
        scores = TokenScores(torch.cat([part.logprobs for part in parts]), entropies)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return scores, list(torch.autograd.grad(loss, leaves)) if leaves else []


def check(
    data: Peaked, logits: Tensor, trained: str, scope: Any, bound: float, slopes: Any = 1, **options: Any
) -> None:
    """Compare scores and gradients with those of the transformed `logits` [n, V], in float64; `slopes`: their own."""
    exact = Exact.of(logits, data.labels)
    for upstream, entropy in (((1.0, 0.0), False), ((-0.7, 0.0), "metric"), ((1.0, 0.5), True), ((0.0, 1.0), True)):
        scores, grads = scores_and_gradients(data, trained, scope, upstream, entropy, **options)
        assert worst(scores.logprobs, exact.logprobs) <= BOUND, (upstream, entropy)
        if entropy:
            assert worst(scores.entropy, exact.entropy) <= BOUND, (upstream, entropy)
        a, b = upstream
        expected = (a * exact.logprob_grads + b * exact.entropy_grads) * slopes
        sizes = (abs(a) * exact.logprob_grads.abs() + b * exact.entropy_sizes) * slopes
        if grads:
            assert worst(*probed(grads[0], data, expected, sizes)) <= bound, (upstream, entropy)
        if len(grads) == 2:  # hidden states are unit vectors: a column of the weight has the gradient of a row
            assert worst(grads[1].t()[: len(expected)], expected, sizes) <= bound, (upstream, entropy)


@EVERY_PASS
@VOCABULARIES
def test_every_pass_is_exact(trained: str, scope: Any, vocabulary: int) -> None:
    data = Peaked.draw(vocabulary)
    check(data, data.logits, trained, scope, BOUND)


@EVERY_PASS
def test_in_bf16(trained: str, scope: Any) -> None:
    data = Peaked.draw(1000, torch.bfloat16)
    check(data, data.logits, trained, scope, BF16)


@EVERY_PASS
def test_with_a_temperature_and_a_bias(trained: str, scope: Any) -> None:
    data = Peaked.draw(1000)
    bias = torch.arange(1000).remainder(7) / 8
    check(data, (data.logits + bias) / 0.5, trained, scope, BOUND, slopes=2, temperature=0.5, bias=bias)


@EVERY_PASS
def test_with_a_softcap(trained: str, scope: Any) -> None:
    data, cap = Peaked.draw(1000), 100.0
    bent = (data.logits / cap).tanh()
    check(data, cap * bent, trained, scope, BOUND, slopes=1 - bent.square(), softcap=cap)


def test_by_hand() -> None:
    # 999 entries 24 nats below: 1 - p = 999 e^-24 = 3.7713e-8, H = (1 - p) (24 + 1) to first order.
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.zeros(1000, 1)
    weight[3] = 24
    scores = token_logprobs(hidden, weight, torch.tensor([3]), entropy=True)
    assert scores.logprobs.item() == pytest.approx(-3.7713e-8, rel=1e-4, abs=0)
    assert scores.entropy.item() == pytest.approx(25 * 3.7713e-8, rel=1e-4, abs=0)
    (grad,) = torch.autograd.grad(scores.logprobs.sum(), hidden)
    assert grad.item() == pytest.approx(24 * 3.7713e-8, rel=1e-4, abs=0)  # 9.05e-7


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 191, 192, 200, 1000])
def test_the_largest_is_found_in_every_column(columns: int) -> None:
    logits = torch.zeros(columns, columns).fill_diagonal_(30.0)
    probs, sums = softmax(logits, with_gap=True)
    assert sums.top.tolist() == list(range(columns))
    assert sums.largest.tolist() == [30.0] * columns
    rest = (columns - 1) * math.exp(-30)
    torch.testing.assert_close(sums.others, torch.full((columns,), rest), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.mean_gap, torch.full((columns,), 30 * rest), rtol=1e-5, atol=0)
    torch.testing.assert_close(probs, logits.softmax(-1))


def test_two_that_are_equal() -> None:
    hidden, weight = head_of([[40.0, 40.0, 0.0]], torch.float32)
    scores = token_logprobs(hidden, weight, torch.tensor([1]), entropy=True)
    assert scores.logprobs.item() == pytest.approx(-math.log(2), rel=1e-6)
    assert scores.entropy.item() == pytest.approx(math.log(2), rel=1e-6)


class TestEagerDerivatives:
    """Eager scores are plain autograd to a caller: they can be differentiated again, and in forward mode."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        self.weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def outputs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        labels, ids = torch.tensor([0, 4, 2]), torch.tensor([[1, -1], [4, 0], [-1, -1]])
        transform = LogitTransform(softcap=3.0, vocab_mask=torch.tensor([True, True, True, False, True]))
        scores = eager_scores(hidden, weight, labels, None, transform, entropy=True, candidate_ids=ids)
        return scores.logprobs, scores.entropy, scores.candidates.masked_fill(ids < 0, 0)

    def test_first(self) -> None:
        assert torch.autograd.gradcheck(self.outputs, (self.hidden, self.weight), check_forward_ad=True)

    def test_second(self) -> None:
        assert torch.autograd.gradgradcheck(self.outputs, (self.hidden, self.weight))

    def test_the_entropy_as_a_metric_has_none(self) -> None:
        labels, transform = torch.tensor([0, 4, 2]), LogitTransform()
        scores = eager_scores(self.hidden, self.weight, labels, None, transform, entropy="metric")
        assert scores.logprobs.requires_grad
        assert not scores.entropy.requires_grad

    def test_candidates_are_log_probabilities(self) -> None:
        labels, transform = torch.tensor([0, 4, 2]), LogitTransform()
        exact = torch.nn.functional.linear(self.hidden, self.weight).log_softmax(-1)
        ids = torch.tensor([[1, 3], [4, -1], [0, 2]])
        every, some = (
            eager_scores(self.hidden, self.weight, labels, None, transform, candidate_ids=which).candidates
            for which in ("all", ids)
        )
        torch.testing.assert_close(every, exact)
        expected = exact.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
        torch.testing.assert_close(some, expected)
        weights = torch.randn(3, 5, dtype=torch.float64)
        ours, theirs = (
            torch.autograd.grad((weights * x).sum(), self.hidden, retain_graph=True) for x in (every, exact)
        )
        torch.testing.assert_close(ours, theirs)
