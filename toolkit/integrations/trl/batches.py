"""TRL's batches as our items.

Legend: B rows, P prompt tokens, C completion tokens, T = P + C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.losses.items import RLLossContextInputItem

Inputs = Mapping[str, Any]
"""A micro-batch as ``GRPOTrainer._prepare_inputs`` returns it: prompt_ids [B, P], completion_ids [B, C] ..."""


def ids_and_mask(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, T] and the attention mask [B, T] of prompts and completions."""
    both = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
    ids, mask = (torch.cat([inputs[prompt], inputs[completion]], 1) for prompt, completion in both)
    return ids, mask


def item_of(
    inputs: Inputs, *, ignore_idx: int = -100, fills_missing: bool = False, current_logprobs: Tensor | None = None
) -> RLLossContextInputItem:
    """Return a micro-batch of TRL as an item; prompts, padding and the results of tools are not scored.

    Args:
        inputs: see `Inputs`.
        ignore_idx: that of the loss.
        fills_missing: take the trainer's log-probability where vLLM reported none, as TRL's correction does: a ratio
            of 1.
        current_logprobs: [B, C] under the policy that is about to be updated, in nats.
    """
    ids, _ = ids_and_mask(inputs)
    mask = inputs["completion_mask"]
    if inputs.get("tool_mask") is not None:
        mask = mask * inputs["tool_mask"]
    advantages = inputs["advantages"]
    advantages = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand(mask.shape)
    old, rollout = inputs.get("old_per_token_logps"), inputs.get("sampling_per_token_logps")
    if fills_missing and rollout is not None and old is not None:
        rollout = torch.where(rollout.isnan(), old, rollout)
    width = inputs["prompt_ids"].shape[1]
    by_token = {
        "advantages": advantages,
        "old_logprobs": old,
        "rollout_logprobs": rollout,
        "ref_logprobs": inputs.get("ref_per_token_logps"),
        "current_logprobs": current_logprobs,
    }
    fields: dict[str, Any] = {
        name: _after_prompt(name, value, width) for name, value in by_token.items() if value is not None
    }
    groups = inputs.get("group_ids")
    if groups is not None:
        fields["group_ids"] = groups.unsqueeze(1)
    return RLLossContextInputItem.from_unshifted(ids, F.pad(mask, (width, 0)), ignore_idx=ignore_idx, **fields)


def _after_prompt(name: str, values: Tensor, width: int) -> Tensor:
    """Return values [B, C] of the completion as values [B, T] of all tokens."""
    return F.pad(values, (width, 0), value=math.nan if name.endswith("logprobs") else 0.0)
