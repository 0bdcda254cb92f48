"""Models in Hugging Face's format."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.errors import ConfigError, first_line
from toolkit.head.logits import LogitTransform
from toolkit.models.policy import Policy, check_head


def build_pretrained(path: str, *, dtype: str, logit_scale: float | None, softcap: float | None) -> tuple[Policy, Any]:
    """Load a causal language model and its tokenizer, and check the transform after its head.

    For the settings see `PretrainedConfig`.

    Raises:
        ConfigError: nothing can be loaded from this path, the dtype is unknown, or the model changes its logits
            after the head in a way that neither its config nor the arguments name.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ConfigError(f"model.dtype={dtype!r} is not a torch dtype; choose 'float32' or 'bfloat16'")
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path!r} cannot be loaded: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    is_explicit = logit_scale is not None or softcap is not None
    policy = Policy(lm, LogitTransform(logit_scale or 1.0, softcap) if is_explicit else None)
    check_head(policy, len(tokenizer))
    return policy, tokenizer
