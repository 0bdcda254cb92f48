"""A tiny random Llama with a tokenizer of characters, on disk, as a user's model would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=abcdefghijklmnopqrstuvwxyzT.| "
SPECIAL = ("<pad>", "<eos>", "<unk>", "<bos>", "<user>", "<assistant>", "<system>")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if tools and m['role'] == 'user' %}{{ tools[0]['name'] }}|{% endif %}"
    "{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of(
    *, chat_template: str | None = None, eos: str | None = "<eos>", pad: str | None = "<pad>", adds_bos: bool = False
) -> Any:
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=list(SPECIAL[4:]),
        chat_template=chat_template,
    )


def save_model(folder: Path, *, chat_template: str | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
