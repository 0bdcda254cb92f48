"""Models in Hugging Face's format."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.errors import ConfigError
from toolkit.head.logits import LogitTransform
from toolkit.models.config import PretrainedConfig
from toolkit.models.policy import Policy, check_head


def build_pretrained(config: PretrainedConfig) -> tuple[Policy, Any]:
    """Load a causal language model and its tokenizer, and check that we know what follows its head.

    Raises:
        ConfigError: there is nothing to load at this path, the dtype is unknown, or the model changes its logits
            after the head in a way that neither its config nor ours names.
    """
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.dtype={config.dtype!r} is not a torch dtype; choose 'float32' or 'bfloat16'")
    try:
        lm = AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(config.path, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    is_given = config.logit_scale is not None or config.softcap is not None
    policy = Policy(lm, LogitTransform(config.logit_scale or 1.0, config.softcap) if is_given else None)
    check_head(policy, len(tokenizer))
    return policy, tokenizer
