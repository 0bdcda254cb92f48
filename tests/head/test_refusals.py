"""Tensors that the head must refuse, or must take alike in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from toolkit.errors import DataError
from toolkit.head import explain, fused_loss, token_logprobs
from toolkit.head.inputs import check_head
from toolkit.head.logits import LogitTransform
from toolkit.head.scores import eager_scores

LABELS = torch.tensor([0, 4, 2])
ALL = pytest.mark.parametrize("call", [token_logprobs, explain, lambda *head: check_head(*head, None, ignore_idx=-100)])


@ALL
@pytest.mark.parametrize("which", [0, 1])
def test_a_tensor_on_meta(call: Any, which: int) -> None:
    head = [torch.randn(3, 4), torch.randn(5, 4)]
    head[which] = head[which].to("meta")
    with pytest.raises(DataError, match=r"on device meta.*has none: load it first"):
        call(*head, LABELS)


@ALL
def test_fp8(call: Any) -> None:
    hidden, weight = torch.randn(3, 4).to(torch.float8_e4m3fn), torch.randn(5, 4).to(torch.float8_e4m3fn)
    with pytest.raises(DataError, match="float8_e4m3fn; it must be a floating-point tensor: float64"):
        call(hidden, weight, LABELS)


@pytest.mark.parametrize("scope", [None, "token"])
def test_forward_mode_derivatives(scope: str | None) -> None:
    def call(hidden: Tensor) -> Tensor:
        if scope is None:
            return token_logprobs(hidden, torch.ones(5, 4), LABELS)
        return fused_loss(lambda s, _: (s.logprobs.sum(), None), hidden, torch.ones(5, 4), LABELS)[0]

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="does not support forward-mode"):
        call(forward_ad.make_dual(torch.randn(3, 4), torch.ones(3, 4)))
    with pytest.raises(RuntimeError, match="does not support forward-mode"):
        torch.func.jvp(call, (torch.randn(3, 4),), (torch.ones(3, 4),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_of_another_dtype(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    ours = token_logprobs(hidden, weight, LABELS, bias)
    eager = eager_scores(hidden, weight, LABELS, bias, LogitTransform()).logprobs
    torch.testing.assert_close(eager, ours)
    grads = [torch.autograd.grad(scores.sum(), bias)[0] for scores in (ours, eager)]
    torch.testing.assert_close(*grads, rtol=2**-7, atol=2**-7)


def test_a_weight_of_inference_mode() -> None:
    with torch.inference_mode():
        weight = torch.randn(5, 4)
    hidden = torch.randn(3, 4, requires_grad=True)
    ours = token_logprobs(hidden, weight, LABELS)
    eager = eager_scores(hidden, weight, LABELS, None, LogitTransform()).logprobs
    torch.testing.assert_close(*(torch.autograd.grad(scores.sum(), hidden)[0] for scores in (ours, eager)))


def test_a_mask_that_changes_before_backward() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    mask = torch.tensor([True, True, True, False, True])
    first, second = (token_logprobs(hidden, weight, LABELS, vocab_mask=mask) for _ in range(2))
    expected = torch.autograd.grad(first.sum(), hidden)[0]
    mask[:] = True
    assert torch.equal(torch.autograd.grad(second.sum(), hidden)[0], expected)
