"""Packed rows: sequences end to end in one row, each of which a model must read as if it were alone.

Legend: T tokens of a row.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor


def attention_masks(trunk: Any, position_ids: Tensor) -> Any:
    """Return what keeps attention within each sequence of a packed row, as the model takes its attention mask.

    transformers makes it from the positions: a mask [1, 1, T, T], one for each kind of layer, or None where the
    attention reads the positions itself (flash attention). Many models would do so themselves if they got no mask, but
    not all of them: GPT-OSS, Falcon and OPT do not look at the positions.

    Args:
        trunk: the model below the head.
        position_ids: [1, T], starting again at 0 in each sequence.
    """
    masking = sys.modules.get("transformers.masking_utils")
    make, config = getattr(masking, "create_masks_for_generate", None), getattr(trunk, "config", None)
    if make is None or not hasattr(config, "get_text_config"):  # not a model of transformers
        return None
    dtype = next(parameter.dtype for parameter in trunk.parameters())
    embeddings = torch.empty(*position_ids.shape, 1, dtype=dtype, device=position_ids.device)  # only its kind is read
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": embeddings,
        "input_embeds": embeddings,  # its name before transformers 5.0
        "attention_mask": None,
        "cache_position": torch.arange(position_ids.shape[1], device=position_ids.device),
        "past_key_values": None,
        "position_ids": position_ids,
    }
    accepted = inspect.signature(make).parameters
    return make(**{name: value for name, value in arguments.items() if name in accepted})


def why_not_packed(trunk: Any) -> str | None:
    """Return why a model cannot read packed rows, as a clause, if that shows without a forward; None: it does not."""
    if getattr(trunk, "_is_stateful", False):
        return "carries a state over the whole row, from one sequence into the next"
    if "position_ids" not in inspect.signature(getattr(trunk, "forward", trunk)).parameters:
        return "takes no position_ids, so it cannot know where a sequence begins"
    return None
