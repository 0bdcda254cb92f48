"""Warnings of inputs that are valid but probably not what was meant: each once, and only in the first step of a runner.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.errors import warn_once

REPEATED = 3
"""Equal tokens at the end (or start) of a row that look like padding, and equal first tokens of two rows that look like
a prompt: random tokens of a vocabulary of 1,000 do this once in a million rows."""
MISMATCH = {
    "log_ratio_abs": ("old_logprobs", 0.5, "of the weights before the step"),
    "rollout_mismatch": ("rollout_logprobs", 0.5, "that the sampler reported"),
    "current_mismatch": ("current_logprobs", 0.1, "of a forward with the same weights"),
}
"""Metric -> the field that it judges, the largest usual value in nats, and what the field holds. A step changes the
policy by less than its clip range of about 0.2, and samplers differ by about 0.02; log-probabilities of another token
are off by about an entropy or more, 0.5 to 3 nats. Current ones differ by rounding only, about 0.02 in bf16."""


def warn_of_unmasked(input_ids: Tensor, attention_mask: Tensor | None, *, is_policy_loss: bool) -> None:
    """Warn if all tokens of `input_ids` [B, T] are scored although some look like padding or a prompt.

    Waits for the device once. Call it only if there is no loss mask.

    Args:
        input_ids: [B, T] of padded rows.
        attention_mask: [B, T], which leaves out padding; None: nothing is left out.
        is_policy_loss: whether a prompt should not be scored; cross-entropy may be meant to learn it.
    """
    if input_ids.dim() != 2 or input_ids.shape[-1] <= REPEATED:
        return
    same = input_ids[1:] == input_ids[:-1]
    starts_alike = same[:, :REPEATED].all(-1) & ~same.all(-1)
    if attention_mask is None:
        is_constant = (input_ids == input_ids[:, :1]).all(-1)
        ends = torch.stack([input_ids[:, :REPEATED], input_ids[:, -REPEATED:]])
        has_padding = ((ends == ends[..., :1]).all(-1).any(0) & ~is_constant).any()
    else:  # padding on the left is alike, too
        starts_alike &= attention_mask[1:, 0].bool() & attention_mask[:-1, 0].bool()
        has_padding = torch.zeros_like(starts_alike.any())
    is_padded, is_prompted = torch.stack([has_padding, starts_alike.any()]).tolist()  # waits for the device once
    if is_padded:
        warn_once(
            f"input_ids without loss_mask: some rows start or end with {REPEATED} equal tokens, which looks like "
            "padding, and all of them are scored; give loss_mask [B, T], 1 on the tokens to train on (or "
            "attention_mask, to leave out padding only)"
        )
    if is_prompted and not is_padded and is_policy_loss:
        warn_once(
            f"input_ids without loss_mask: some rows start with the same {REPEATED} tokens, which looks like a prompt, "
            "and it is scored like the completions; give loss_mask [B, T], 1 on the tokens of the completions"
        )


def warn_of_mismatch(numbers: Mapping[str, float]) -> None:
    """Warn if log-probabilities that were given are far from the policy's in the first step.

    Args:
        numbers: metrics of the step, in nats; see `MISMATCH`.
    """
    for metric, (name, largest, holds) in MISMATCH.items():
        if numbers.get(metric, 0.0) > largest:
            warn_once(
                f"{name} differ from the policy's log-probabilities by {numbers[metric]:.2g} nats on average in the "
                f"first step (metric {metric!r}; up to {largest:g} is usual). They must be those {holds}, in nats, of "
                "the token that each position predicts, which is token t + 1 at position t; values by token are "
                "shifted by RLLossContextInputItem.from_unshifted"
            )
