"""The policy: trunk and head in ONE forward.

DDP and FSDP hook the forward of the module they wrap. A loss that called the trunk alone would skip these hooks, and
the weights of the ranks would drift apart without an error; so the loss runs inside.

Legend: B rows, T tokens of a row, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ConfigError
from toolkit.head import token_logprobs
from toolkit.losses.base import BaseLossContext


class Policy(nn.Module):
    """A causal language model whose forward returns a loss or log-probabilities, never logits."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_ctx: BaseLossContext[Any] | None = None,
        *,
        score_chunk: int = 4096,
        temperature: float = 1.0,
    ) -> Any:
        """Return ``(loss, metrics)`` of `loss_ctx`, or without one the log-probabilities of the text itself.

        Args:
            input_ids: [B, T] token ids, padded on either side.
            attention_mask: [B, T], 1 at real tokens.
            loss_ctx: its kwargs speak of positions 0 .. T - 2, each predicting the next token.
            score_chunk: tokens whose logits are held at once when there is no `loss_ctx`.
            temperature: of the softmax when there is no `loss_ctx`.

        Returns:
            What ``loss_ctx.forward`` returns; or [B, T - 1] log-probabilities of tokens 1 .. T - 1 in nats.
        """
        hidden = self.hidden_states(input_ids[:, :-1], attention_mask[:, :-1])
        head = self.lm.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if loss_ctx is not None:
            return loss_ctx.forward(hidden, head.weight, bias)
        labels = input_ids[:, 1:]
        return token_logprobs(hidden, head.weight, labels, bias, chunk_size=score_chunk, temperature=temperature)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the trunk's last hidden states, [B, T, D]."""
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        trunk = self.lm.base_model
        return trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state


@torch.no_grad()
def check_head(policy: Policy, vocab_size: int) -> None:
    """Compare head(trunk(x)) with the model's own logits on a few tokens.

    Some models scale or cap their logits after the head (Granite, Cohere, Gemma 2); their log-probabilities would be
    silently wrong here.

    Raises:
        ConfigError: they differ.
    """
    device = next(policy.parameters()).device
    input_ids = torch.arange(1, 6, device=device).remainder(vocab_size).unsqueeze(0)
    mask = torch.ones_like(input_ids)
    head = policy.lm.get_output_embeddings()
    ours = head(policy.hidden_states(input_ids, mask)).float()
    theirs = policy.lm(input_ids=input_ids, attention_mask=mask).logits.float()
    error = (ours - theirs).abs().max()
    if error > 1e-2 * theirs.abs().max():
        raise ConfigError(
            f"{type(policy.lm).__name__} changes its logits after the head (largest difference {float(error):.3g}): "
            "a scale or soft cap that the training command does not apply yet; use a model without one, or the losses "
            "in a loop of your own with loss.logit_scale and loss.softcap"
        )
