"""The general chunk path: any summed loss, any upstream gradient, fp32 sums."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.head.chunked import chunked_loss


def loss_of(labels: list[Tensor]):
    def piece_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, int]:
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits.flatten(0, -2), labels[index].flatten(), reduction="sum"), index

    return piece_loss


@pytest.mark.parametrize("lengths", [[7], [3, 4], [1] * 7, [2, 2, 2, 1]])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_equals_one_piece(lengths: list[int], upstream: float) -> None:
    hidden = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 7))
    loss, extras = chunked_loss(loss_of(list(labels.split(lengths, -1))), hidden, weight, bias, lengths)
    grads = torch.autograd.grad(upstream * loss, (hidden, weight, bias))
    expected = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten(), reduction="sum")
    expected_grads = torch.autograd.grad(upstream * expected, (hidden, weight, bias))
    assert extras == list(range(len(lengths)))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_weight_gradient_is_summed_in_fp32() -> None:
    # bf16 sums of 64 chunks lose about 1 %; with an fp32 sum each chunk is rounded once.
    hidden = torch.randn(1, 2048, 16).bfloat16().requires_grad_()
    weight = torch.randn(32, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 32, (1, 2048))
    lengths = [32] * 64
    loss, _ = chunked_loss(loss_of(list(labels.split(lengths, -1))), hidden, weight, None, lengths)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double()[0] @ exact.T, labels[0], reduction="sum").backward()
    assert exact.grad is not None
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3


def test_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    weight = torch.randn(5, 3)
    loss, _ = chunked_loss(loss_of(list(torch.randint(0, 5, (1, 4)).split(2, -1))), hidden, weight, None, [2, 2])
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [list(tensor.shape) for tensor in saved] == [[1, 4, 3]]
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_frozen_trunk_still_trains_the_head() -> None:
    hidden, weight = torch.randn(1, 4, 3), torch.randn(5, 3, requires_grad=True)
    loss, _ = chunked_loss(loss_of(list(torch.randint(0, 5, (1, 4)).split(2, -1))), hidden, weight, None, [2, 2])
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("is_frozen", [False, True])
def test_other_tensors_that_a_loss_depends_on_get_their_gradient(is_frozen: bool) -> None:
    # A learnable temperature (a leaf), and weights that were computed from another leaf before the chunks.
    hidden = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=not is_frozen)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=not is_frozen)
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    source = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (1, 7))

    def total(h: Tensor, w: Tensor, y: Tensor, token_weights: Tensor) -> Tensor:
        token_losses = F.cross_entropy((h @ w.T / temperature).flatten(0, -2), y.flatten(), reduction="none")
        return (token_losses * token_weights.flatten()).sum()

    lengths = [3, 3, 1]
    ys, others = labels.split(lengths, -1), source.exp().split(lengths, -1)
    loss, _ = chunked_loss(lambda h, w, b, i: (total(h, w, ys[i], others[i]), i), hidden, weight, None, lengths)
    leaves = [leaf for leaf in (hidden, weight, temperature, source) if leaf.requires_grad]
    ours = torch.autograd.grad(-2.0 * loss, leaves)
    theirs = torch.autograd.grad(-2.0 * total(hidden, weight, labels, source.exp()), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_without_grad() -> None:
    hidden, weight = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3)
    with torch.no_grad():
        loss, _ = chunked_loss(loss_of(list(torch.randint(0, 5, (1, 4)).split(2, -1))), hidden, weight, None, [2, 2])
    assert not loss.requires_grad


def test_backward_twice_with_retained_graph() -> None:
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    loss, _ = chunked_loss(
        loss_of(list(torch.randint(0, 5, (1, 4)).split(2, -1))), hidden, torch.randn(5, 3), None, [2, 2]
    )
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(first, second)
