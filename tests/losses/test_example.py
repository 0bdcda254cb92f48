"""The interface's own GRPO example (XTuner's loss documentation), with its imports changed and its slips mended."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from toolkit import GRPOLossConfig, GRPOLossContext, RLLossContextInputItem


def gather_logprobs(logits, shifted_labels):
    logprobs = F.log_softmax(logits, dim=-1)
    logprobs = logprobs.gather(dim=-1, index=shifted_labels.clip(min=0).unsqueeze(-1)).squeeze(-1)
    return logprobs


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
def test_example(mode: str, chunk_size: int) -> None:
    emb = nn.Embedding(10, 2)
    head = nn.Linear(2, 10, bias=False)

    input_ids = torch.randint(0, 10, (1, 5))
    shifted_labels = input_ids[:, 1:]
    input_ids = input_ids[:, :-1]
    advantages = torch.tensor([0.5, 0.5, -0.5, -0.5])
    hidden_states = emb(input_ids)

    loss_ctx_input = RLLossContextInputItem(shifted_labels=shifted_labels, advantages=advantages)

    with torch.no_grad():
        logits = head(emb(input_ids))
        old_logprobs = gather_logprobs(logits, loss_ctx_input.shifted_labels)
        loss_ctx_input.old_logprobs = old_logprobs

    loss_ctx_input_list = [loss_ctx_input]
    loss_cfg = GRPOLossConfig(
        policy_loss_cfg=dict(
            cliprange_high=0.2,
            cliprange_low=0.2,
            loss_type="vanilla",
        ),
        use_kl_loss=False,
        mode=mode,
        chunk_size=chunk_size,
    )
    batches_loss_kwargs = GRPOLossContext.build_batches_loss_kwargs(loss_ctx_input_list, loss_cfg)
    loss_ctx = GRPOLossContext(loss_cfg, batches_loss_kwargs[0])
    loss, _ = loss_ctx.forward(hidden_states, head.weight)
    loss.backward()

    # On-policy the ratio is 1: the loss is -mean(A) = 0, its gradient that of -mean(A log pi), which is not 0.
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    ours = head.weight.grad.clone()
    head.weight.grad = None
    logprobs = gather_logprobs(head(emb(input_ids)), shifted_labels)
    (-(advantages * logprobs).mean()).backward()
    assert head.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours, head.weight.grad, rtol=1e-5, atol=1e-7)
