"""Runs of TRL's trainer on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

WORDS = 30
PROMPTS = ["w3 w4", "w5 w6 w7", "w8", "w9 w10 w11 w12", "w1", "w2 w2", "w13", "w14 w15"]
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 8,
    "max_steps": 4,
    "learning_rate": 1.0,  # of SGD: the policy leaves the one that sampled
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "disable_tqdm": True,
}


def save_model(folder: Path) -> str:
    """Save a Llama of two layers with its tokenizer; the words are its tokens."""
    tokens = ["<pad>", "<eos>", *(f"w{index}" for index in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, **heads, **ids)).save_pretrained(folder)
    return str(folder)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(token % 3 == 0 for token in ids)) for ids in completion_ids]


def config(folder: str, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=f"{folder}/out", **{**SETTINGS, **settings})


def trainer(kind: type, folder: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> Any:
    data = Dataset.from_dict({"prompt": PROMPTS})
    return kind(folder, reward, config(folder, **settings), train_dataset=data, **(extra or {}))


def run(kind: type, folder: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> list[tuple[float, float]]:
    """Train, and return loss and gradient norm of each optimizer step."""
    made = trainer(kind, folder, extra=extra, **settings)
    made.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]
