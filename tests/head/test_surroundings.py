"""The head inside what training loops put around it: torch.compile, checkpoints, threads, other leaves, libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.head import TokenScores, explain, fused_loss, products, token_logprobs

SCOPES = pytest.mark.parametrize("scope", [None, "token", "batch"])


class Model(nn.Module):
    """A trunk, a head, and a loss by `token_logprobs` (scope None) or `fused_loss`."""

    def __init__(self, scope: Any, *, is_frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 11)
        self.head.requires_grad_(not is_frozen)
        self.scope, self.options = scope, {"chunk_size": 3, "entropy": True, **options}

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = self.trunk(inputs).tanh()
        if self.scope is None:
            scores = token_logprobs(hidden, self.head.weight, labels, self.head.bias, **self.options)
            return self.loss(scores, labels)[0] * 2
        loss, _ = fused_loss(
            self.loss, hidden, self.head.weight, labels, self.head.bias, scope=self.scope, **self.options
        )
        return loss * 2

    @staticmethod
    def loss(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        assert scores.entropy is not None
        return -scores.logprobs.square().sum() - scores.entropy.square().sum(), None


def batch() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 2] = labels[1, 4] = -100
    return torch.randn(2, 5, 4), labels


def step(model: nn.Module, function: Any, *args: Any) -> list[Tensor]:
    """Loss and the gradients of all parameters."""
    model.zero_grad()
    loss = function(*args)
    loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *grads]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert float((one.double() - other.double()).norm() / other.double().norm()) <= tolerance


@SCOPES
@pytest.mark.parametrize("is_frozen", [False, True])
def test_compiled_modules(scope: Any, is_frozen: bool) -> None:
    # The head is a graph break: what comes before and after is compiled.
    model, args = Model(scope, is_frozen=is_frozen), batch()
    plain = step(model, model, *args)
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(step(model, compiled, *args), plain, 1e-6)
    frames = counters["frames"]["total"]
    assert_close(step(model, compiled, *args), plain, 1e-6)
    assert counters["frames"]["total"] == frames, "compiled again"
    assert len(plain) == (3 if is_frozen else 5)


@SCOPES
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("retain_bytes", [0, 10**6])
def test_activation_checkpoints(scope: Any, is_frozen: bool, use_reentrant: bool, retain_bytes: int) -> None:
    model, (inputs, labels) = Model(scope, is_frozen=is_frozen, retain_bytes=retain_bytes), batch()
    inputs.requires_grad_()  # what a reentrant checkpoint needs
    plain = step(model, model, inputs, labels)
    grad, inputs.grad = inputs.grad, None
    again = step(model, lambda *args: checkpoint(model, *args, use_reentrant=use_reentrant), inputs, labels)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    assert torch.equal(inputs.grad, grad)


def test_a_checkpoint_does_not_pack_the_small_graph_of_a_loss() -> None:
    # Hooks of a checkpoint see what the head saves for backward, and nothing of the loss inside.
    packed = []
    model, args = Model("token"), batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t, lambda t: t):
        loss = model(*args)
    loss.backward()
    assert (3,) not in packed
    assert (11, 6) in packed


@SCOPES
@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
def test_without_gradients(scope: Any, guard: Any) -> None:
    model, args = Model(scope), batch()
    expected = model(*args)
    with guard():
        loss = model(*args)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


@SCOPES
def test_no_grad_is_planned_as_such(scope: Any) -> None:
    model, (inputs, labels) = Model(scope), batch()
    with torch.no_grad():
        hidden = model.trunk(inputs)
        assert explain(hidden, model.head.weight, labels, scope=scope).name == "no-grad"
    assert explain(hidden, model.head.weight, labels, scope=scope).name != "no-grad"


# 160 tokens in chunks of 80, D 40, V 6000: 19 million multiplications a chunk, more than products.SMALL, and more
# than one slab of the vocabulary for oneDNN, the last of them a short one.
def large(scope: Any, *, is_frozen: bool) -> list[Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(160, 40, requires_grad=True)
    weight = (torch.randn(6000, 40) / 6).requires_grad_(not is_frozen)
    bias = torch.randn(6000).requires_grad_(not is_frozen)
    labels, factors = torch.randint(0, 6000, (160,)), torch.randn(160)

    def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert scores.entropy is not None
        own = factors[positions]
        return (own * scores.logprobs).sum() + (own * scores.entropy).sum(), scores.logprobs.detach()

    if scope is None:
        scores = token_logprobs(hidden, weight, labels, bias, chunk_size=80, entropy=True)
        loss, logprobs = loss_fn(scores, torch.arange(160))
    else:
        loss, parts = fused_loss(loss_fn, hidden, weight, labels, bias, scope=scope, chunk_size=80, entropy=True)
        logprobs = torch.cat(parts)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    return [logprobs, *torch.autograd.grad(loss, leaves)]


@SCOPES
@pytest.mark.parametrize("is_frozen", [False, True])
def test_thread_counts_agree(scope: Any, is_frozen: bool) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = large(scope, is_frozen=is_frozen)
        torch.set_num_threads(2)
        two = large(scope, is_frozen=is_frozen)
    finally:
        torch.set_num_threads(threads)
    assert_close(two, one, 1e-6)


@SCOPES
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("small", [0, 2**24])
def test_onednn_and_blas_agree(scope: Any, is_frozen: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this build")
    calls = []
    original = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args[1].shape) or original(*args))
    monkeypatch.setattr(products, "onednn_wins", lambda: False)
    blas = large(scope, is_frozen=is_frozen)
    assert not calls
    monkeypatch.setattr(products, "onednn_wins", lambda: True)
    monkeypatch.setattr(products, "SMALL", small)
    onednn = large(scope, is_frozen=is_frozen)
    # Logits by slabs of weight [V, D], input gradients by slabs of its transpose; the last slab is a short one.
    slab, last = products.SLAB, 6000 % products.SLAB
    assert {(slab, 40), (last, 40), (40, slab), (40, last)} == set(map(tuple, calls))
    assert_close(onednn, blas, 2e-6)


def test_low_precision_slabs_of_the_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slabs of 16384 entries are for large vocabularies; slabs of 7 must give the same.
    def grads(slab: int) -> list[Tensor]:
        monkeypatch.setattr(products, "LOW_PRECISION_SLAB", slab)
        torch.manual_seed(0)
        hidden = torch.randn(60, 5).bfloat16().requires_grad_()
        weight = torch.randn(20, 5).bfloat16().requires_grad_()
        logprobs = token_logprobs(hidden, weight, torch.randint(0, 20, (60,)), chunk_size=9)
        return list(torch.autograd.grad(logprobs.sum(), (hidden, weight)))

    assert_close(grads(7), grads(16384), 1e-3)


LEAVES = pytest.mark.parametrize("trained", ["hidden and head", "hidden", "head", "neither"])


@LEAVES
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_other_leaves_of_a_fused_loss(trained: str, scope: Any, chunk_size: int) -> None:
    # A learnable coefficient (a leaf), and weights that were computed from another leaf before the head ran.
    hidden = torch.randn(9, 3, dtype=torch.float64, requires_grad="hidden" in trained)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad="head" in trained)
    coefficient = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    source = torch.randn(9, dtype=torch.float64, requires_grad=True)
    labels, ids = torch.randint(0, 5, (9,)), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1])

    def run(is_fused: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = source.exp()

        def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
            return ((scores.logprobs * coefficient).exp() * weights[positions]).sum(), None

        if is_fused:
            of_scope = {"sequence_ids": ids} if scope == "sequence" else {}
            loss, _ = fused_loss(loss_fn, hidden, weight, labels, scope=scope, chunk_size=chunk_size, **of_scope)
        else:
            logits = hidden @ weight.T
            logprobs = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            loss, _ = loss_fn(TokenScores(logprobs, None), torch.arange(9))
        leaves = [leaf for leaf in (hidden, weight, coefficient, source) if leaf.requires_grad]
        return loss, torch.autograd.grad(-2.0 * loss, leaves)

    (loss, ours), (expected, theirs) = run(True), run(False)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_loss_may_use_the_weight_itself() -> None:
    # A penalty on the head: the weight is then both an input and another leaf.
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (7,))

    def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        return scores.logprobs.sum() + len(positions) * weight.square().sum(), None

    loss, _ = fused_loss(loss_fn, hidden, weight, labels, chunk_size=2)
    expected = -torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected = expected + 7 * weight.square().sum()
    torch.testing.assert_close(loss, expected)
    pairs = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@LEAVES
def test_a_loss_that_does_not_look_at_the_scores(trained: str) -> None:
    hidden = torch.randn(4, 3, requires_grad="hidden" in trained)
    weight = torch.randn(5, 3, requires_grad="head" in trained)
    loss, extras = fused_loss(lambda s, p: (torch.tensor(2.5), len(p)), hidden, weight, torch.arange(4), chunk_size=2)
    assert loss.item() == 5
    assert extras == [2, 2]
    if trained != "neither":
        leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
        assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_gradients_accumulate_over_micro_batches() -> None:
    # One head, two calls, one backward: what a gradient buffer of one call keeps must not reach the other.
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hiddens = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    labels = torch.randint(0, 5, (4,))
    losses = [fused_loss(lambda s, p: (s.logprobs.square().sum(), None), h, weight, labels)[0] for h in hiddens]
    (3 * losses[0] + losses[1]).backward()
    expected = weight.detach().clone().requires_grad_()
    total = [
        torch.nn.functional.cross_entropy(h.detach() @ expected.T, labels, reduction="none").square().sum()
        for h in hiddens
    ]
    (3 * total[0] + total[1]).backward()
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("scope", ["token", "batch"])
def test_a_loss_is_computed_without_autocast(scope: Any, is_trained: bool) -> None:
    # Scores are fp32; a product inside the loss must not be rounded to bf16, in training or evaluation.
    seen = []

    def loss_fn(scores: TokenScores, positions: Tensor) -> tuple[Tensor, None]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return scores.logprobs.sum(), None

    hidden, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=is_trained)
    with torch.autocast("cpu", torch.bfloat16):
        fused_loss(loss_fn, hidden, weight, torch.arange(4), scope=scope, chunk_size=2)
    assert not any(seen)
