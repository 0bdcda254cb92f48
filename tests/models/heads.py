"""Tiny models whose heads differ: plain, tied, biased, frozen, with LoRA on it, trained whole beside an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 24


def tiny_lm(*, tied: bool = False, biased: bool = False, seed: int = 0) -> Any:
    """A two-block Llama in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).double()
    if biased:
        head = nn.Linear(12, VOCABULARY, dtype=torch.float64)
        lm.set_output_embeddings(head)
    with torch.no_grad():  # as transformers begins, all tokens are as good as equally likely
        lm.get_output_embeddings().weight.mul_(20)
    return lm


def with_lora(lm: Any, *names: str, seed: int = 1, **options: Any) -> Any:
    """LoRA adapters on q_proj and the head, their B not zero as it is at the start of a training."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_alpha": 6, "lora_dropout": 0.0} | options
    names = names or ("default",)
    model = get_peft_model(lm, LoraConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**options, "r": 2, "lora_alpha": 8}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("lora_A" in name and parameter.dtype != torch.float64):
            parameter.data = torch.randn_like(parameter.data, dtype=torch.float64) * 0.3
    return model.double()


def head_variant(kind: str) -> Any:
    """One of `KINDS`, in float64."""
    if kind == "frozen":
        lm = tiny_lm()
        lm.get_output_embeddings().weight.requires_grad_(False)
        return lm
    if kind == "lora":
        return with_lora(tiny_lm())
    if kind == "whole":
        return with_lora(tiny_lm(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    return tiny_lm(tied=kind == "tied", biased=kind == "biased")


KINDS = ("plain", "tied", "biased", "frozen", "lora", "whole")
