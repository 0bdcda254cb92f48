"""Cross-entropy: against PyTorch's own, and the three reductions by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_head, random_labels
from toolkit import CELossConfig, CELossContext, CELossContextInputItem, ConfigError


def evaluate(cfg: CELossConfig, labels: list, heads: list, cu_seq_lens: list | None = None):
    items = [CELossContextInputItem(shifted_labels=own) for own in labels]
    batches = CELossContext.build_batches_loss_kwargs(items, cfg, cu_seq_lens)
    loss = sum(CELossContext(cfg, kwargs).forward(*head)[0] for kwargs, head in zip(batches, heads, strict=True))
    return loss, torch.autograd.grad(loss, [*[head[0] for head in heads], *heads[0][1:]])


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_token_mean_is_pytorch_s(mode: str) -> None:
    labels, head = random_labels((2, 13), 11), random_head()
    loss, grads = evaluate(CELossConfig(mode=mode, chunk_size=4), [labels], [head])
    hidden, weight, bias = head
    expected = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    # sequences of 1 and 4 scored tokens with token losses log 2 and log 4
    [("token", (1 * 1 + 4 * 2) / 5), ("sample", (1 + 2) / 2), ("square", (1 * 1 + 2 * 2) / 3)],
)
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_reductions_by_hand(reduction: str, expected: float, mode: str) -> None:
    labels = torch.tensor([[0, -100, 0, 0, 0, 0, -100]])
    hidden = torch.tensor([0.0, 9, 1, 1, 1, 1, 9], dtype=torch.float64).reshape(1, 7, 1).requires_grad_()
    # hidden 0 gives two equal classes among four (the other two at -inf-like logits), hidden 1 four equal ones
    weight = torch.tensor([[0.0], [0.0], [60.0], [60.0]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -60.0, -60.0], dtype=torch.float64, requires_grad=True)
    cfg = CELossConfig(loss_reduction=reduction, mode=mode, chunk_size=3)
    loss, _ = evaluate(cfg, [labels], [(hidden, weight, bias)], [torch.tensor([0, 2, 7])])
    assert loss.item() / torch.log(torch.tensor(2.0)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_micro_batches_and_packing_do_not_matter(reduction: str) -> None:
    labels, (hidden, weight, bias) = random_labels((4, 6), 11), random_head((4, 6))
    labels[2] = -100  # a sequence without a scored token
    cfg = CELossConfig(loss_reduction=reduction)
    loss, grads = evaluate(cfg, [labels], [(hidden, weight, bias)])
    rows = [row.detach().requires_grad_() for row in hidden.split(1)]
    by_row, row_grads = evaluate(cfg, list(labels.split(1)), [(row, weight, bias) for row in rows])
    packed_hidden = hidden.detach().reshape(1, 24, -1).requires_grad_()
    packed, packed_grads = evaluate(
        cfg, [labels.reshape(1, 24)], [(packed_hidden, weight, bias)], [torch.tensor([0, 6, 12, 18, 24])]
    )
    for other in (by_row, packed):
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(row_grads[:4]), grads[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(packed_grads[0].reshape_as(hidden), grads[0], rtol=1e-12, atol=1e-15)


def test_own_ignore_idx() -> None:
    labels, head = random_labels((2, 13), 11), random_head()
    usual, _ = evaluate(CELossConfig(), [labels], [head])
    other, _ = evaluate(CELossConfig(ignore_idx=-7), [labels.masked_fill(labels == -100, -7)], [head])
    assert usual.item() == other.item()


def test_unknown_reduction() -> None:
    with pytest.raises(ConfigError, match="loss_reduction='mean' is not one of the choices"):
        CELossConfig(loss_reduction="mean")
