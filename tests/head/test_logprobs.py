"""Log-probabilities and entropies of the head: values, gradients, chunks."""

import math

import pytest
import torch

from toolkit.head.logprobs import token_logprobs


def test_uniform_head_by_hand() -> None:
    scores = token_logprobs(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3]), with_entropy=True)
    assert scores.logprobs.tolist() == pytest.approx([-math.log(4)] * 3)
    assert scores.entropy is not None
    assert scores.entropy.tolist() == pytest.approx([math.log(4)] * 3)


def test_entropy_gradient_by_hand() -> None:
    # R17: z = [1, 0, -1] has dH/dz = [-0.28259, 0.14077, 0.14182].
    bias = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    hidden, weight = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    entropy = token_logprobs(hidden, weight, torch.tensor([0]), bias, with_entropy=True).entropy
    assert entropy is not None
    entropy.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == pytest.approx([-0.28259, 0.14077, 0.14182], abs=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradcheck_in_chunks(chunk_size: int, has_bias: bool) -> None:
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if has_bias else None
    labels = torch.randint(0, 5, (7,))

    def scores(h, w, b=None):
        return tuple(token_logprobs(h, w, labels, b, chunk_size=chunk_size, with_entropy=True))

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias) if has_bias else (hidden, weight))


def test_chunks_equal_whole_and_leave_inputs_alone() -> None:
    hidden = torch.randn(9, 3, requires_grad=True)
    weight = torch.randn(5, 3)
    copies = hidden.detach().clone(), weight.clone()
    labels = torch.randint(0, 5, (9,))
    whole = token_logprobs(hidden, weight, labels).logprobs
    chunked = token_logprobs(hidden, weight, labels, chunk_size=2).logprobs
    torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-6)
    chunked.sum().backward()
    assert torch.equal(hidden.detach(), copies[0])
    assert torch.equal(weight, copies[1])
    assert weight.grad is None


def test_low_precision_inputs_give_fp32_scores() -> None:
    scores = token_logprobs(torch.randn(4, 3).bfloat16(), torch.randn(5, 3).bfloat16(), torch.tensor([0, 1, 2, 3]))
    assert scores.logprobs.dtype == torch.float32
    assert (scores.logprobs <= 0).all()


def test_entropy_with_a_masked_vocabulary_entry() -> None:
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    hidden = torch.zeros(1, 2, requires_grad=True)
    entropy = token_logprobs(hidden, torch.ones(3, 2), torch.tensor([0]), bias, with_entropy=True).entropy
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_second_derivative_is_refused() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    logprobs = token_logprobs(hidden, torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), chunk_size=2).logprobs
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
