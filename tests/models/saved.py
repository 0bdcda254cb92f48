"""Tiny random models saved to a folder with their tokenizer, as a user has them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

ALPHABET = string.ascii_lowercase + "="


def save_tiny_model(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a two-block Llama with one token for each letter; `folder` is returned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.models.tiny import character_tokenizer

    torch.manual_seed(seed)
    tokenizer = character_tokenizer(ALPHABET)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # as transformers begins, all tokens are as good as equally likely
        lm.get_output_embeddings().weight.mul_(20)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
