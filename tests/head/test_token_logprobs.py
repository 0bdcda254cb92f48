"""Log-probabilities and entropies: numbers worked out by hand, edges, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.head import TokenScores, explain, fused_loss, token_logprobs

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def head_of(logits: list[list[float]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states [N, V] and weight [V, V] (the identity) whose logits are `logits`."""
    hidden = torch.tensor(logits, dtype=dtype)
    return hidden, torch.eye(hidden.shape[1], dtype=dtype)


def score(logits: list[float], label: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> float:
    hidden, weight = head_of([logits], dtype)
    return token_logprobs(hidden, weight, torch.tensor([label]), **options).item()


def sum_of(scores: TokenScores, positions: Tensor) -> tuple[Tensor, TokenScores]:
    """A loss for `fused_loss`: log-probabilities and, if there are any, entropies."""
    total = scores.logprobs.sum()
    return (total if scores.entropy is None else total + scores.entropy.sum()), scores


# What each pass needs to be chosen: whether weight and bias are trained, and the scope (None: token_logprobs).
PASSES = {
    "no-grad": ("", None),
    "frozen": ("h", None),
    "two-pass": ("hwb", None),
    "fused no-grad": ("", "token"),
    "fused frozen": ("h", "batch"),
    "one-pass": ("hwb", "token"),
    "fused two-pass": ("hwb", "batch"),
    "sequence": ("hwb", "sequence"),
}
ALL_PASSES = pytest.mark.parametrize(("trained", "scope"), PASSES.values(), ids=list(PASSES))


def run(
    trained: str, scope: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Sum all log-probabilities (and entropies) by one pass; return the sum and the gradients that were asked for."""
    hidden.requires_grad_("h" in trained)
    weight.requires_grad_("w" in trained)
    if bias is not None:
        bias.requires_grad_("b" in trained)
    if scope is None:
        scores = token_logprobs(hidden, weight, labels, bias, **options)
        loss = scores.sum() if isinstance(scores, Tensor) else scores.logprobs.sum() + scores.entropy.sum()
    else:
        ids = {"sequence_ids": torch.zeros_like(labels)} if scope == "sequence" else {}
        loss, _ = fused_loss(sum_of, hidden, weight, labels, bias, scope=scope, **ids, **options)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return loss, list(torch.autograd.grad(loss, leaves)) if leaves else []


class TestNumbersByHand:
    @DTYPES
    def test_a_head_of_zeros_is_uniform(self, dtype: torch.dtype) -> None:
        hidden, weight = torch.randn(3, 2, dtype=dtype), torch.zeros(4, 2, dtype=dtype)
        scores = token_logprobs(hidden, weight, torch.tensor([0, 3, 1]), entropy="metric")
        assert scores.logprobs.tolist() == pytest.approx([-math.log(4)] * 3, rel=1e-7)
        assert scores.entropy.tolist() == pytest.approx([math.log(4)] * 3, rel=1e-6)

    def test_two_entries(self) -> None:
        # z = [log 3, 0]: p = [3/4, 1/4].
        hidden, weight = head_of([[math.log(3), 0.0]] * 2)
        scores = token_logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
        assert scores.logprobs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)], rel=1e-14)
        assert scores.entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, rel=1e-14)

    def test_the_bias_counts(self) -> None:
        hidden, weight = head_of([[1.0, 2.0]])
        bias = torch.tensor([1.0, 0.0], dtype=torch.float64)  # z = [2, 2]
        assert token_logprobs(hidden, weight, torch.tensor([0]), bias).item() == pytest.approx(-math.log(2), rel=1e-14)

    @ALL_PASSES
    def test_the_bias_counts_in_the_entropy(self, trained: str, scope: Any) -> None:
        # z = [log 3, 0] from the bias alone: log p of the second is -log 4, H = log 4 - 3/4 log 3.
        hidden, weight = torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
        bias = torch.tensor([math.log(3), 0.0], dtype=torch.float64)
        for entropy in ("metric", True):
            value, _ = run(trained, scope, hidden, weight, torch.tensor([1]), bias, entropy=entropy)
            assert value.item() == pytest.approx(-0.75 * math.log(3), rel=1e-14)

    def test_softcap(self) -> None:
        # R16: 30 tanh(124 / 30) = 29.9846. Against a logit of 0, -log p of the other is log(1 + e^29.9846) = 29.9846.
        assert score([124.0, 0.0], 1, softcap=30.0) == pytest.approx(-29.9846, abs=5e-5)
        assert score([-124.0, 0.0], 0, softcap=30.0) == pytest.approx(-29.9846, abs=5e-5)

    def test_logit_scale(self) -> None:
        # 16 * 0.0625 = 1, so p = e / (e + 1).
        assert score([16.0, 0.0], logit_scale=0.0625) == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-14)
        # Granite's logits_scaling 16 and a negative scale, which turns the order round.
        assert score([16.0, 0.0], logit_scale=-0.0625) == pytest.approx(-math.log1p(math.exp(1)), rel=1e-14)

    def test_temperature(self) -> None:
        # z = [log 9, 0] / 2 = [log 3, 0]: p = 3/4. A 0-dimensional tensor is a number.
        for temperature in (2.0, 2, torch.tensor(2.0)):
            assert score([math.log(9), 0.0], temperature=temperature) == pytest.approx(math.log(3 / 4), rel=1e-7)

    def test_temperature_of_each_token(self) -> None:
        hidden, weight = head_of([[math.log(9), 0.0]] * 3)
        temperature = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
        labels = torch.tensor([0, 0, 0])
        for chunk in (1, 2, 3):
            logprobs = token_logprobs(hidden, weight, labels, temperature=temperature, chunk_size=chunk)
            assert logprobs.exp().tolist() == pytest.approx([3 / 4, 9 / 10, 81 / 82], rel=1e-12)

    def test_scale_then_softcap_then_temperature(self) -> None:
        # z = 8 -> scale 1/2: 4 -> softcap 2: 2 tanh 2 = 1.9280552 -> temperature 4: 0.4820138. The soft cap first
        # would give 2 tanh 4 / 2 / 4 = 0.2498, the temperature before the soft cap 2 tanh(1/2) = 0.9242.
        expected = -math.log1p(math.exp(-0.4820138))
        for temperature in (4.0, torch.full((1,), 4.0, dtype=torch.float64)):
            got = score([8.0, 0.0], logit_scale=0.5, softcap=2.0, temperature=temperature)
            assert got == pytest.approx(expected, abs=1e-7)

    def test_the_bias_is_scaled_and_capped_too(self) -> None:
        # (1 + 3) * 0.5 = 2, capped at 1: tanh 2 = 0.9640276.
        hidden, weight = head_of([[1.0, 0.0]])
        bias = torch.tensor([3.0, 0.0], dtype=torch.float64)
        got = token_logprobs(hidden, weight, torch.tensor([0]), bias, logit_scale=0.5, softcap=1.0)
        assert got.item() == pytest.approx(-math.log1p(math.exp(-0.9640276)), abs=1e-7)

    def test_masked_entries_leave_after_the_softcap(self) -> None:
        # Three lanes of -100 capped at 30 have the logsumexp -30 tanh(100 / 30) + log 3 = -28.825. An excluded lane
        # that went through the soft cap as -inf would come out as -30 and make it -28.556. What can be read is
        # log p = z - logsumexp, log(1/3) exactly.
        z = -30 * math.tanh(100 / 30)
        assert z + math.log(3) == pytest.approx(-28.825, abs=1e-3)
        three = [True, True, True, False]
        got = score([-100.0, -100.0, -100.0, 5.0], softcap=30.0, vocab_mask=torch.tensor(three))
        assert got == pytest.approx(-math.log(3), rel=1e-14)
        assert math.log(3 * math.exp(z) + math.exp(-30)) == pytest.approx(-28.556, abs=1e-3)
        # The logsumexp itself: the three beside a label of logit 0, so log p = -log(1 + e^-28.825) = -e^-28.825.
        bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        hidden, weight = head_of([[-100.0, -100.0, -100.0, 0.0, 50.0]])
        mask = torch.tensor([True, True, True, True, False])
        logprob = token_logprobs(hidden, weight, torch.tensor([3]), bias, softcap=30.0, vocab_mask=mask)
        assert logprob.item() == pytest.approx(-math.exp(-28.825), rel=2e-3, abs=0)
        (grad,) = torch.autograd.grad(logprob.sum(), bias)
        slope = 1 - math.tanh(100 / 30) ** 2
        assert grad[:3].tolist() == pytest.approx([-math.exp(z) * slope] * 3, rel=1e-6, abs=0)
        assert grad[4] == 0

    @ALL_PASSES
    def test_entropy_gradient(self, trained: str, scope: Any) -> None:
        # R17: z = [1, 0, -1]: p = [.66524, .24473, .09003], H = .83240, dH/dz_j = -p_j (log p_j + H), here
        # [-.28259, .14077, .14182]. The log-probability of entry 0 adds onehot - p.
        hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        bias = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
        value, grads = run(trained, scope, hidden, weight, torch.tensor([0]), bias, entropy=True, chunk_size=1)
        assert value.item() == pytest.approx(-0.40761 + 0.83240, abs=1e-5)
        by_hand = [-0.28259 + 1 - 0.66524, 0.14077 - 0.24473, 0.14182 - 0.09003]
        if trained == "hwb":
            hidden_grad, weight_grad, bias_grad = grads
            assert bias_grad.tolist() == pytest.approx(by_hand, abs=2e-5)
            assert weight_grad.flatten().tolist() == pytest.approx(by_hand, abs=2e-5)
            assert hidden_grad.item() == 0

    @pytest.mark.parametrize("scope", [None, "token", "batch"])
    @pytest.mark.parametrize("trained", ["h", "hw"])
    def test_entropy_gradient_alone_reaches_the_hidden_states(self, trained: str, scope: Any) -> None:
        # The same numbers through an identity head, in the passes of a frozen head too.
        hidden, weight = head_of([[1.0, 0.0, -1.0]] * 3)
        hidden.requires_grad_()
        weight.requires_grad_("w" in trained)
        labels = torch.tensor([0, 1, 2])
        if scope is None:
            loss = token_logprobs(hidden, weight, labels, entropy=True, chunk_size=2).entropy.sum()
        else:
            loss, _ = fused_loss(
                lambda s, _: (s.entropy.sum(), 0), hidden, weight, labels, scope=scope, entropy=True, chunk_size=2
            )
        assert loss.item() == pytest.approx(3 * 0.83240, abs=1e-4)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert grad.tolist() == [pytest.approx([-0.28259, 0.14077, 0.14182], abs=1e-5)] * 3


class TestExtremes:
    @DTYPES
    @pytest.mark.parametrize("softcap", [None, 1000.0])
    def test_a_probability_that_underflows_has_its_logarithm(self, dtype: torch.dtype, softcap: float | None) -> None:
        # e^-400 is 0 in fp32; 200 and -200 are exact in bf16. A soft cap of 1000 bends them to +-197.375.
        logits, z = [200.0, -200.0, 0.0], 200.0 if softcap is None else 1000 * math.tanh(0.2)
        rel = 1e-13 if dtype == torch.float64 else 1e-6
        assert score(logits, 1, dtype, softcap=softcap) == pytest.approx(-2 * z, rel=rel)
        assert score(logits, 0, dtype, softcap=softcap) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("logit", [60.0, 80.0, 87.0, 88.0, 95.0, 103.0, 104.0, 120.0])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_logarithms_around_the_limit_of_fp32(self, logit: float, entropy: bool) -> None:
        # Below 1e-38 fp32 has fewer and fewer bits, below 1e-45 none.
        hidden, weight = head_of([[logit, 0.0]], torch.float32)
        hidden.requires_grad_()
        scores = token_logprobs(hidden, weight, torch.tensor([1]), entropy=entropy)
        logprob = scores.logprobs if isinstance(scores, TokenScores) else scores
        assert logprob.item() == pytest.approx(-logit, rel=1e-6)
        (grad,) = torch.autograd.grad(logprob.sum(), hidden)
        assert grad.flatten().tolist() == pytest.approx([-1, 1], rel=1e-6)

    def test_gradient_of_an_underflowing_label_under_a_softcap(self) -> None:
        # d logp / dz_label = (1 - p) cap'(z); its p is 0, its slope is not.
        hidden, weight = head_of([[200.0, -200.0, 0.0]], torch.float32)
        hidden.requires_grad_()
        logprob = token_logprobs(hidden, weight, torch.tensor([1]), softcap=400.0)
        (grad,) = torch.autograd.grad(logprob.sum(), hidden)
        slope = 1 - math.tanh(0.5) ** 2
        assert grad.flatten().tolist() == pytest.approx([-slope, slope, 0], rel=1e-5, abs=1e-30)

    def test_almost_certain(self) -> None:
        # Two entries 27.63 apart: p = 1 - 1e-12. In float64 four digits of the logarithm are left.
        assert score([-math.log(1e-12), 0.0]) == pytest.approx(-1e-12, rel=1e-3, abs=0)

    @DTYPES
    def test_never_above_0(self, dtype: torch.dtype) -> None:
        # Sums of fp32 probabilities come out at 1 +- 1e-7; log p of a certain label must not become positive for it.
        hidden = (torch.randn(4000, 8) * torch.rand(4000, 1) * 6).to(dtype)
        weight = torch.randn(30, 8).to(dtype)
        best = (hidden.float() @ weight.float().T).argmax(1)
        scores = token_logprobs(hidden, weight, best, entropy="metric")
        assert scores.logprobs.max() <= 0
        assert scores.logprobs.max() > -1e-3
        assert scores.entropy.min() >= 0
        # With a frozen head the entropy comes from the products, whose roundings do not cancel.
        scores = token_logprobs(hidden.requires_grad_(), weight, best, entropy="metric")
        assert scores.logprobs.max() <= 0
        assert scores.entropy.min() >= 0

    @pytest.mark.parametrize(("trained", "scope"), [found for found in PASSES.values() if "w" in found[0]])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_gradient_of_an_almost_certain_label_in_bf16(self, trained: str, scope: Any, entropy: bool) -> None:
        # p = 1 - 3.4e-4: bf16 stores it as 1, and p - 1 would be 0.
        hidden, weight = torch.ones(1, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
        bias = torch.tensor([8.0, 0.0]).bfloat16()
        options = dict(entropy=True) if entropy else {}
        _, (_, weight_grad, bias_grad) = run(trained, scope, hidden, weight, torch.tensor([0]), bias, **options)
        q = 1 / (1 + math.exp(8))
        # With the entropy: dH/dz_0 = -p (log p + H), H = -p log p - q log q, is -8 p q.
        expected = q - (8 * q * (1 - q) if entropy else 0)
        assert weight_grad[0].item() == pytest.approx(expected, rel=4e-3)
        assert bias_grad[0].item() == pytest.approx(expected, rel=4e-3)

    @pytest.mark.parametrize("trained", ["h", "hw"])
    def test_hidden_gradient_of_an_almost_certain_label_in_bf16(self, trained: str) -> None:
        hidden, weight = head_of([[8.0, 0.0]], torch.bfloat16)
        _, grads = run(trained, None, hidden, weight, torch.tensor([0]))
        assert grads[0][0, 0].item() == pytest.approx(1 / (1 + math.exp(8)), rel=4e-3)


class TestGradcheck:
    @pytest.mark.parametrize("chunk", [1, 3])
    @pytest.mark.parametrize("temperature", [0.7, "token"])
    @pytest.mark.parametrize("trained", ["hwb", "h", "wb"])
    def test_both_outputs(self, chunk: int, temperature: Any, trained: str) -> None:
        labels = torch.tensor([2, 0, -100, 6, 1])
        if temperature == "token":
            temperature = torch.tensor([0.5, 2.0, 1.0, 1.3, 0.8], dtype=torch.float64)
        leaves = [
            tensor.requires_grad_(name in trained)
            for name, tensor in (
                ("h", torch.randn(5, 3, dtype=torch.float64)),
                ("w", torch.randn(7, 3, dtype=torch.float64)),
                ("b", torch.randn(7, dtype=torch.float64)),
            )
        ]

        def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(
                token_logprobs(
                    hidden,
                    weight,
                    labels,
                    bias,
                    chunk_size=chunk,
                    softcap=2.5,
                    logit_scale=1.4,
                    temperature=temperature,
                    entropy=True,
                )
            )

        assert torch.autograd.gradcheck(outputs, leaves, check_undefined_grad=True)

    @pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
    def test_a_fused_loss(self, scope: Any) -> None:
        labels, ids = torch.tensor([2, 0, -100, 6, 1]), torch.tensor([1, 0, 0, 1, 1])
        hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

        def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
            return (scores.logprobs.square() * (1 + positions)).sum() + scores.entropy.exp().sum(), None

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            options = dict(chunk_size=2, softcap=2.5, logit_scale=1.4, temperature=0.7, entropy=True)
            ids_of = {"sequence_ids": ids} if scope == "sequence" else {}
            return fused_loss(loss_fn, hidden, weight, labels, bias, scope=scope, **ids_of, **options)[0]

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


class TestShapesAndTypes:
    @pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 3, 2), (6, 1, 1)])
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    def test_results_have_the_shape_of_the_labels(self, shape: tuple[int, ...], entropy: Any) -> None:
        hidden, weight = torch.randn(6, 4), torch.randn(5, 4)
        labels = torch.tensor([0, -100, 2, 4, -100, 1])
        flat = token_logprobs(hidden, weight, labels, entropy=entropy)
        shaped = token_logprobs(hidden.reshape(*shape, 4), weight, labels.reshape(shape), entropy=entropy)
        if entropy is False:
            assert type(flat) is type(shaped) is Tensor
            flat, shaped = (flat,), (shaped,)
        else:
            assert isinstance(shaped, TokenScores)
            assert shaped.entropy is not None
        for one, other in zip(flat, shaped, strict=True):
            assert other.shape == shape
            assert torch.equal(one.reshape(shape), other)

    @pytest.mark.parametrize("entropy", ["metric", True])
    @pytest.mark.parametrize("trained", ["h", "hwb"])
    def test_only_entropy_true_has_a_gradient(self, entropy: Any, trained: str) -> None:
        hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad="w" in trained)
        scores = token_logprobs(hidden, weight, torch.tensor([0, -100, 2, 4, -100, 1]), entropy=entropy)
        assert scores.logprobs.requires_grad
        assert scores.entropy.requires_grad is (entropy is True)

    @pytest.mark.parametrize(
        ("dtype", "wide"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
        ids=str,
    )
    def test_results_are_fp32_or_wider(self, dtype: torch.dtype, wide: torch.dtype) -> None:
        hidden, weight = torch.randn(6, 4).to(dtype).requires_grad_(), torch.randn(5, 4).to(dtype)
        labels = torch.randint(0, 5, (6,))
        scores = token_logprobs(hidden, weight, labels, entropy=True)
        assert scores.logprobs.dtype == scores.entropy.dtype == wide
        assert fused_loss(sum_of, hidden, weight, labels)[0].dtype == wide

    @ALL_PASSES
    @pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "entropy": True}], ids=["plain", "all"])
    def test_inputs_are_not_changed(self, trained: str, scope: Any, options: dict[str, Any]) -> None:
        hidden, weight, bias = torch.randn(9, 4), torch.randn(5, 4), torch.randn(5)
        labels = torch.tensor([0, -100, 2, 4, -100, 1, 1, 2, 0])
        temperature, mask = torch.rand(9) + 0.5, torch.tensor([True] * 5)
        given = [hidden, weight, bias, labels, temperature, mask]
        copies = [tensor.clone() for tensor in given]
        more = dict(temperature=temperature, vocab_mask=mask, chunk_size=2, **options)
        run(trained, scope, hidden, weight, labels, bias, **more)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))
        assert all(tensor._version == 0 for tensor in given)

    def test_positions_that_a_fused_loss_is_given(self) -> None:
        hidden, weight = torch.randn(2, 4, 3), torch.randn(5, 3, requires_grad=True)
        labels = torch.tensor([[0, -100, 2, 4], [-100, 1, 1, -100]])
        ids = torch.tensor([[7, 0, 3, 3], [0, 3, 7, 0]])
        _, extras = fused_loss(lambda s, p: (s.logprobs.sum(), p.tolist()), hidden, weight, labels, chunk_size=2)
        assert extras == [[0], [2, 3], [5, 6]]
        _, extras = fused_loss(
            lambda s, p: (s.logprobs.sum(), p.tolist()),
            hidden,
            weight,
            labels,
            scope="sequence",
            sequence_ids=ids,
            chunk_size=2,
        )
        assert extras == [[2, 3, 5], [0, 6]]
        _, extras = fused_loss(
            lambda s, p: (s.logprobs.sum(), p.tolist()), hidden, weight, labels, scope="batch", chunk_size=2
        )
        assert extras == [[0, 2, 3, 5, 6]]

    def test_scores_of_a_group_belong_to_its_positions(self) -> None:
        hidden, weight = torch.randn(2, 4, 3), torch.randn(5, 3, requires_grad=True)
        labels = torch.tensor([[0, -100, 2, 4], [-100, 1, 1, -100]])
        ids = torch.tensor([[7, 0, 3, 3], [0, 3, 7, 0]])
        whole = token_logprobs(hidden, weight.detach(), labels).flatten()
        for scope in ("token", "sequence", "batch"):
            _, extras = fused_loss(
                lambda s, p: (s.logprobs.sum(), (s.logprobs.detach(), p)),
                hidden,
                weight,
                labels,
                scope=scope,
                chunk_size=2,
                **({"sequence_ids": ids} if scope == "sequence" else {}),
            )
            for logprobs, positions in extras:
                torch.testing.assert_close(logprobs, whole[positions])


class TestIgnoredPositions:
    @ALL_PASSES
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_may_hold_anything(self, trained: str, scope: Any, value: float, entropy: bool) -> None:
        hidden, weight, bias = torch.randn(7, 4), torch.randn(5, 4), torch.randn(5)
        labels = torch.tensor([-100, 0, -100, 2, 4, 1, -100])
        clean = run(trained, scope, hidden.clone(), weight, labels, bias, chunk_size=2, entropy=entropy)
        hidden[labels == -100] = value
        dirty = run(trained, scope, hidden.detach(), weight, labels, bias, chunk_size=2, entropy=entropy)
        assert torch.equal(clean[0], dirty[0])
        assert all(torch.equal(a, b) for a, b in zip(clean[1], dirty[1], strict=True))
        if "h" in trained:
            assert not dirty[1][0][labels == -100].any()

    def test_come_back_as_0(self) -> None:
        hidden, labels = torch.randn(2, 3, 4), torch.tensor([[-1, 0, -1], [2, -1, 1]])
        scores = token_logprobs(hidden, torch.randn(5, 4), labels, ignore_idx=-1, entropy="metric")
        assert ((scores.logprobs == 0) == (labels == -1)).all()
        assert ((scores.entropy == 0) == (labels == -1)).all()

    def test_a_label_of_the_vocabulary_may_mark_them(self) -> None:
        scores = token_logprobs(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 2, 0]), ignore_idx=0)
        assert (scores == 0).tolist() == [True, False, True]

    def test_temperatures_there_do_not_count(self) -> None:
        hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        labels = torch.tensor([1, -100, 3])
        temperature = torch.tensor([2.0, 0.0, 0.5])
        logprobs = token_logprobs(hidden, weight, labels, temperature=temperature)
        expected = (hidden.detach() @ weight.detach().T / torch.tensor([[2.0], [1.0], [0.5]])).log_softmax(-1)
        torch.testing.assert_close(logprobs.detach(), torch.tensor([expected[0, 1], 0, expected[2, 3]]))
        assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(logprobs.sum(), (hidden, weight)))


class TestSizes:
    @ALL_PASSES
    @pytest.mark.parametrize(
        ("tokens", "width", "vocabulary", "chunk"),
        [(1, 3, 5, 4), (1, 3, 5, 1), (3, 3, 5, 100), (4, 1, 1, 2), (1, 1, 1, 1), (7, 3, 13, 3), (5, 3, 2, "auto")],
    )
    def test_small_ones(self, trained: str, scope: Any, tokens: int, width: int, vocabulary: int, chunk: Any) -> None:
        hidden, weight = torch.randn(tokens, width).double(), torch.randn(vocabulary, width).double()
        labels = torch.randint(0, vocabulary, (tokens,))
        value, grads = run(trained, scope, hidden, weight, labels, chunk_size=chunk)
        expected = -torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
        leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
        if leaves:
            for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)

    @ALL_PASSES
    @pytest.mark.parametrize("shape", [(6,), (2, 3), (0,)])
    @pytest.mark.parametrize("entropy", [False, "metric", True])
    @DTYPES
    def test_no_scored_token(
        self, trained: str, scope: Any, shape: tuple[int, ...], entropy: Any, dtype: torch.dtype
    ) -> None:
        # R19: the graph stays whole, for in a distributed run every rank must take part in backward.
        hidden, weight, bias = torch.randn(*shape, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
        labels = torch.full(shape, -100)
        value, grads = run(trained, scope, hidden, weight, labels, bias, entropy=entropy, chunk_size=2)
        assert value.item() == 0
        assert value.requires_grad is bool(trained)
        assert len(grads) == len(trained)
        for grad, leaf in zip(grads, (hidden, weight, bias), strict=False):
            assert grad.shape == leaf.shape
            assert not grad.any()

    @pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
    @pytest.mark.parametrize("is_trained", [False, True])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_a_loss_is_asked_once_of_no_token(self, scope: Any, is_trained: bool, entropy: bool) -> None:
        # R19: its metrics (and collectives) must not be missing on the rank that has nothing to score.
        calls = []

        def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, str]:
            assert (scores.entropy is not None) is entropy
            calls.append((scores.logprobs.shape, positions.shape))
            return (scores.logprobs * 2).sum(), "extra"

        hidden, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=is_trained)
        labels = torch.full((3,), -100)
        ids = {"sequence_ids": torch.arange(3)} if scope == "sequence" else {}
        loss, extras = fused_loss(loss_fn, hidden, weight, labels, scope=scope, entropy=entropy, **ids)
        assert calls == [((0,), (0,))]
        assert extras == ["extra"]
        assert loss.item() == 0
        if is_trained:
            loss.backward()
            assert weight.grad is not None
            assert not weight.grad.any()

    @pytest.mark.parametrize("scope", [None, "token", "sequence", "batch"])
    def test_a_row_of_70_000_positions(self, scope: Any) -> None:
        # R32: more positions than 2^16.
        hidden, weight = torch.randn(1, 70_001, 2).double(), torch.randn(3, 2).double()
        labels = torch.randint(0, 3, (1, 70_001))
        value, (hidden_grad, weight_grad) = run("hw", scope, hidden, weight, labels, chunk_size=30_000)
        logits = torch.nn.functional.linear(hidden, weight)[0]
        expected = -torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        exact = torch.autograd.grad(expected, (hidden, weight))
        torch.testing.assert_close(hidden_grad, exact[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(weight_grad, exact[1], rtol=1e-10, atol=1e-10)


class TestInfinitiesAndNan:
    @ALL_PASSES
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_a_bias_of_minus_infinity_masks_an_entry(
        self, trained: str, scope: Any, dtype: torch.dtype, entropy: bool
    ) -> None:
        hidden, weight = torch.randn(5, 4).to(dtype), torch.randn(6, 4).to(dtype)
        bias = torch.tensor([0.3, -math.inf, 0.1, -0.2, 0.0, -math.inf]).to(dtype)
        labels = torch.tensor([0, 2, 3, 4, 0])
        value, grads = run(trained, scope, hidden, weight, labels, bias, chunk_size=2, entropy=entropy)
        assert value.isfinite()
        assert all(bool(grad.isfinite().all()) for grad in grads)
        # As if the vocabulary had four entries.
        keep = torch.tensor([0, 2, 3, 4])
        small = run(
            trained,
            scope,
            hidden.detach(),
            weight.detach()[keep],
            torch.tensor([0, 1, 2, 3, 0]),
            bias.detach()[keep],
            chunk_size=2,
            entropy=entropy,
        )
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(value, small[0], rtol=tolerance, atol=tolerance)
        for ours, other in zip(grads, small[1], strict=True):
            if ours.shape != other.shape:
                assert not ours[[1, 5]].any()
                ours = ours[keep]
            torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)

    @ALL_PASSES
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_nan_at_a_scored_token_is_not_hidden(
        self, trained: str, scope: Any, dtype: torch.dtype, entropy: bool, softcap: float | None
    ) -> None:
        hidden, weight = torch.randn(5, 4).to(dtype), torch.randn(6, 4).to(dtype)
        hidden[3, 1] = math.nan
        labels = torch.tensor([0, 2, -100, 4, 0])
        value, grads = run(trained, scope, hidden, weight, labels, chunk_size=2, entropy=entropy, softcap=softcap)
        assert value.isnan()
        if "h" in trained:
            assert grads[0][3].isnan().any()
            assert grads[0][[0, 1, 2, 4]].isfinite().all()
        if "w" in trained:
            assert grads[1].isnan().any()

    @ALL_PASSES
    def test_an_infinite_logit_is_not_hidden(self, trained: str, scope: Any) -> None:
        hidden, weight = torch.ones(2, 1), torch.tensor([[math.inf], [1.0], [0.0]])
        value, _ = run(trained, scope, hidden, weight, torch.tensor([1, 2]))
        assert not value.isfinite()


def valid() -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(2, 3, 4, requires_grad=True),
        head_weight=torch.randn(5, 4, requires_grad=True),
        labels=torch.tensor([[0, -100, 4], [2, 3, -100]]),
        head_bias=torch.randn(5),
    )


CALLS = {
    "token_logprobs": token_logprobs,
    "fused_loss": lambda **rest: fused_loss(sum_of, **rest),
    "explain": explain,
}
ALL_CALLS = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


class TestRefusals:
    def test_the_valid_call_is_valid(self) -> None:
        # Otherwise every refusal below could be one of something else.
        results = {name: call(**valid()) for name, call in CALLS.items()}
        assert results["token_logprobs"].isfinite().all()
        assert results["fused_loss"][0].isfinite()
        assert results["explain"].tokens > 0

    @ALL_CALLS
    @pytest.mark.parametrize("label", [5, 99, -1, -101])
    def test_labels_outside_the_vocabulary(self, call: Any, label: int) -> None:
        given = valid()
        given["labels"][1, 1] = label
        with pytest.raises(DataError, match=rf"labels\[1, 1\] = {label} lies outside the vocabulary of 5 \(0 \.\. 4\)"):
            call(**given)

    @ALL_CALLS
    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("hidden_states", torch.randn(2, 2, 4), r"hidden_states has shape \[2, 2, 4\].*\[2, 3\]"),
            ("hidden_states", torch.randn(3, 4), r"hidden_states has shape \[3, 4\]"),
            ("hidden_states", torch.ones(2, 3, 4, dtype=torch.int64), "floating-point"),
            ("hidden_states", torch.randn(2, 3, 4).double(), r"float64.*float32"),
            ("head_weight", torch.randn(5, 3), r"head_weight has shape \[5, 3\]; it must be \[V, 4\]"),
            ("head_weight", torch.randn(4), r"head_weight has shape \[4\]"),
            ("head_bias", torch.randn(4), r"head_bias has shape \[4\]; it must be \[5\]"),
            ("head_bias", torch.randn(5, 1), r"head_bias has shape \[5, 1\]"),
            ("labels", torch.zeros(2, 3), "labels has dtype torch.float32"),
            ("labels", torch.zeros(2, 3, dtype=torch.bool), "labels has dtype torch.bool"),
            ("temperature", torch.ones(3), r"temperature has shape \[3\].*\[2, 3\]"),
            ("temperature", torch.ones(2, 3, 1), r"temperature has shape \[2, 3, 1\]"),
            ("temperature", torch.ones(2, 3, requires_grad=True), "temperature.*detach"),
            ("temperature", torch.ones((), requires_grad=True), "temperature.*detach"),
            ("vocab_mask", torch.ones(4, dtype=torch.bool), r"vocab_mask is torch.bool \[4\]; it must be bool \[5\]"),
            ("vocab_mask", torch.ones(5), r"vocab_mask is torch.float32"),
            ("vocab_mask", torch.tensor([True, True, False, True, True]), "label 2 is excluded by vocab_mask"),
        ],
        ids=lambda value: None if isinstance(value, Tensor) else str(value).partition(" ")[0],
    )
    def test_tensors_that_do_not_fit(self, call: Any, name: str, value: Tensor, words: str) -> None:
        with pytest.raises(DataError, match=words):
            call(**valid() | {name: value})

    @ALL_CALLS
    @pytest.mark.parametrize(
        "wrong",
        [
            {"temperature": 0},
            {"temperature": 0.0},
            {"temperature": -1.0},
            {"temperature": math.nan},
            {"temperature": math.inf},
            {"temperature": torch.tensor(0.0)},
            {"softcap": -1.0},
            {"softcap": 0.0},
            {"softcap": math.inf},
            {"softcap": math.nan},
            {"logit_scale": 0.0},
            {"logit_scale": math.inf},
            {"chunk_size": 0},
            {"chunk_size": -4},
            {"chunk_size": "big"},
            {"chunk_size": True},
            {"chunk_size": 2.5},
            {"chunk_size": None},
            {"entropy": "yes"},
            {"entropy": None},
        ],
        ids=str,
    )
    def test_options_that_make_no_sense(self, call: Any, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            call(**valid() | wrong)

    @pytest.mark.parametrize("entropy", [1, 0])
    def test_an_entropy_of_1_means_true_or_is_refused(self, entropy: int) -> None:
        # 1 == True; a frozen head must not lose the entropy's gradient over it.
        given = valid()
        given["head_weight"] = given["head_weight"].detach()
        try:
            scores = token_logprobs(**given, entropy=entropy)
        except ConfigError:
            return
        expected = token_logprobs(**given, entropy=bool(entropy))
        assert type(scores) is type(expected)
        if entropy:
            ours, theirs = (
                torch.autograd.grad(found.entropy.sum(), given["hidden_states"])[0] for found in (scores, expected)
            )
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("call", [CALLS["fused_loss"], explain], ids=["fused_loss", "explain"])
    def test_scopes(self, call: Any) -> None:
        with pytest.raises(ConfigError, match="scope='sequence' needs sequence_ids"):
            call(**valid(), scope="sequence")
        with pytest.raises(DataError, match=r"sequence_ids has shape \[6\].*\[2, 3\]"):
            call(**valid(), scope="sequence", sequence_ids=torch.zeros(6, dtype=torch.int64))
        with pytest.raises(ConfigError, match="scope='word' is unknown"):
            call(**valid(), scope="word")

    @pytest.mark.parametrize("is_linear", [False, True])
    @pytest.mark.parametrize("scope", [None, "token", "batch"])
    @pytest.mark.parametrize("trained", ["h", "hwb"])
    def test_a_second_derivative(self, scope: Any, trained: str, is_linear: bool) -> None:
        # A gradient penalty beside other terms must not be dropped without a word. With a linear loss the upstream
        # gradient is a constant, and torch's once_differentiable then lets the gradient pass as one, too.
        hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad="w" in trained)
        labels = torch.tensor([0, 1, -100, 2, 3])
        if scope is None:
            loss = token_logprobs(hidden, weight, labels).sum()
        else:
            loss, _ = fused_loss(sum_of, hidden, weight, labels, scope=scope)
        loss = loss if is_linear else loss.square()
        with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice|second derivative"):
            _with_penalty(loss, hidden).backward()


def _with_penalty(loss: Tensor, hidden: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    return loss + grad.square().sum()
