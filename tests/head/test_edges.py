"""Losses that misbehave, memory that must be freed, numbers at the limits of a dtype, input that makes no sense."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.head import TokenScores, explain, fused_loss, token_logprobs
from toolkit.head.chunked import chunked_loss

TOKENS, WIDTH, VOCABULARY = 12, 3, 5


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,))


def keeps_scores() -> Callable[..., Any]:
    kept: list[Tensor] = []

    def loss(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        baseline = kept[-1] if kept else scores.logprobs.mean()
        kept.append(0.9 * baseline + 0.1 * scores.logprobs.mean())
        return (scores.logprobs - baseline).sum(), None

    return loss


def makes_a_leaf(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
    return scores.logprobs.sum() * torch.ones((), dtype=torch.float64, requires_grad=True), None


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_a_leaf_that_is_new_in_every_call_is_an_error_not_a_loop(chunk_size: int) -> None:
    with pytest.raises(DataError, match="a new one in every call"):
        fused_loss(makes_a_leaf, *head(), chunk_size=chunk_size)
    loss_fn = keeps_scores()
    with pytest.raises(DataError, match="the scores of another chunk"):  # noqa: PT012  (the second call, or the first)
        for _ in range(2):
            fused_loss(loss_fn, *head(), chunk_size=chunk_size)


def test_the_general_path_too() -> None:
    hidden, weight, _ = head()

    def loss_fn(h: Tensor, w: Tensor, b: Tensor | None, index: int) -> tuple[Tensor, None]:
        return (h @ w.T).sum() * torch.ones((), dtype=torch.float64, requires_grad=True), None

    with pytest.raises(DataError, match="a new one in every call"):
        chunked_loss(loss_fn, hidden, weight, None, [6, 6])


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_branch_that_is_not_differentiated_is_freed(is_trained: bool) -> None:
    # An op that saves its own output (exp) and stays undifferentiated lived for ever under a hook that kept it.
    seen: list[Any] = []

    def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        ratio = (scores.logprobs * 1.0).exp()
        seen.append(weakref.ref(ratio.untyped_storage()))
        return (scores.logprobs * ratio.detach()).sum(), None

    hidden, weight, labels = head()
    other = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    if not is_trained:
        hidden, weight = hidden.detach(), weight.detach()
    loss, _ = fused_loss(lambda s, p: ((loss_fn(s, p)[0] * other), None), hidden, weight, labels, chunk_size=4)
    loss.backward()
    del loss
    gc.collect()
    assert len(seen) >= 1
    assert all(reference() is None for reference in seen)


@pytest.mark.parametrize("chunk_size", [4096, 512])
def test_an_fp16_weight_gradient_does_not_overflow(chunk_size: int) -> None:
    # A mean over 4096 tokens of one label: the gradient is 20, the sum before the division 80,000.
    hidden = torch.full((4096, 4), 20.0, dtype=torch.float16)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.int64)
    loss, _ = fused_loss(lambda s, p: (-s.logprobs.sum() / 4096, None), hidden, weight, labels, chunk_size=chunk_size)
    loss.backward()
    assert weight.grad is not None
    expected = torch.full((8, 4), 20 / 8)
    expected[0] -= 20
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("budget_in_chunks", [1, 2])
def test_the_budget_counts_chunks_as_they_are(budget_in_chunks: int) -> None:
    # 12 tokens in chunks of at most 5 are three of 4: a chunk of 4 rows is what a retained one costs.
    hidden, weight, labels = head()
    budget = budget_in_chunks * 4 * VOCABULARY * 8
    plan = explain(hidden, weight, labels, scope="batch", chunk_size=5, retain_bytes=budget)
    assert (plan.largest, plan.retained) == (4, budget_in_chunks)
    assert plan.products == pytest.approx(3 + (2 - budget_in_chunks) / 3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"retain_bytes": -1}, ConfigError, "retain_bytes=-1"),
        ({"retain_bytes": "x"}, ConfigError, "retain_bytes='x'"),
        ({"chunk_bytes": -1}, ConfigError, "chunk_bytes=-1"),
        ({"chunk_bytes": 100, "chunk_size": 4}, ConfigError, "goes with chunk_size='auto'"),
        ({"temperature": torch.full((TOKENS,), -1.0)}, DataError, "must be above 0"),
        ({"temperature": torch.full((TOKENS,), torch.nan)}, DataError, "must be above 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        token_logprobs(*head(), **options)


def test_a_temperature_at_an_ignored_position_may_be_anything() -> None:
    hidden, weight, labels = head()
    labels[3] = -100
    temperature = torch.ones(TOKENS)
    temperature[3] = torch.nan
    torch.testing.assert_close(
        token_logprobs(hidden, weight, labels, temperature=temperature), token_logprobs(hidden, weight, labels)
    )


def test_integers_of_numpy_and_small_label_types() -> None:
    hidden, weight, labels = head()
    expected = token_logprobs(hidden, weight, labels)
    for own in (labels.int(), labels.to(torch.uint8)):
        assert torch.equal(token_logprobs(hidden, weight, own, chunk_size=np.int64(12)), expected)
    with pytest.raises(DataError, match="156 lies outside the vocabulary"):
        token_logprobs(hidden, weight, torch.full((TOKENS,), 156, dtype=torch.uint8))


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(
    ("returned", "words"),
    [(1.0, "returned float"), ((1.0, None), "a loss of float"), ((torch.ones(3), None), r"a loss of \[3\]")],
)
def test_what_a_loss_fn_returns_is_checked(returned: Any, words: str, is_trained: bool) -> None:
    hidden, weight, labels = head()
    if not is_trained:
        hidden, weight = hidden.detach(), weight.detach()
    with pytest.raises(DataError, match=words):
        fused_loss(lambda scores, positions: returned, hidden, weight, labels)


def test_what_the_caller_changes_afterwards_does_not_change_the_gradient() -> None:
    hidden, weight, labels = head()
    # As wide as the arithmetic: where the dtype is changed, the head has a copy in any case.
    temperature, mask = torch.ones(TOKENS, dtype=torch.float64), torch.ones(VOCABULARY, dtype=torch.bool)
    expected = torch.autograd.grad(token_logprobs(hidden, weight, labels).sum(), hidden)[0]
    total = token_logprobs(hidden, weight, labels, temperature=temperature, vocab_mask=mask).sum()
    temperature.fill_(9.0)
    mask.fill_(False)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], expected)

    def changes_its_positions(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        positions.zero_()
        return scores.logprobs.sum(), None

    loss, _ = fused_loss(changes_its_positions, hidden, weight, labels, chunk_size=4)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, labels = head()
    total = token_logprobs(hidden, weight, labels, chunk_size=4).sum()
    (only_hidden,) = torch.autograd.grad(total, hidden)
    both = torch.autograd.grad(token_logprobs(hidden, weight, labels, chunk_size=4).sum(), (hidden, weight))
    assert torch.equal(only_hidden, both[0])


def test_the_weight_may_come_from_anywhere() -> None:
    # R15: a tied head gets the sum of both gradients; a low-rank update of a frozen head gets its own.
    ids = torch.randint(0, VOCABULARY, (TOKENS,))
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    tied = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(token_logprobs(tied[ids].tanh(), tied, labels, chunk_size=5).sum(), tied)[0]
    logprobs = (tied[ids].tanh() @ tied.T).log_softmax(-1)
    expected = torch.autograd.grad(logprobs.gather(1, labels.unsqueeze(1)).sum(), tied)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)

    hidden, frozen = (
        torch.randn(TOKENS, WIDTH, dtype=torch.float64),
        torch.randn(VOCABULARY, WIDTH, dtype=torch.float64),
    )
    low, up = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, WIDTH), (VOCABULARY, 2)))
    loss, _ = fused_loss(lambda s, p: (s.logprobs.sum(), None), hidden, frozen + up @ low, labels, chunk_size=5)
    found = torch.autograd.grad(loss, (low, up))
    logprobs = (hidden @ (frozen + up @ low).T).log_softmax(-1)
    wanted = torch.autograd.grad(logprobs.gather(1, labels.unsqueeze(1)).sum(), (low, up))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
