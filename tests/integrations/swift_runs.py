"""Runs of ``swift rlhf --rlhf_type grpo`` on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift import rlhf_main
from swift.rewards import ORM, orms

from tests.integrations.trl_runs import PROMPTS, SETTINGS, save_model


class Thirds(ORM):
    """How many words of a completion have a number divisible by three."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [float(sum(int(word[1:]) % 3 == 0 for word in text.split())) for text in completions]


orms["thirds"] = Thirds
OWN: dict[str, Any] = {
    "rlhf_type": "grpo",
    "model_type": "llama",
    "template": "default",
    "reward_funcs": "thirds",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "warmup_ratio": 0,
    "split_dataset_ratio": 0,
    "dataloader_num_workers": 0,
    "load_from_cache_file": False,
    "check_model": False,  # it asks a server
    "use_vllm": False,
    "report_to": "none",
}
"""Arguments beside those of the runs of TRL."""


def prepare(folder: Path) -> dict[str, Any]:
    """Save a model and prompts; return the arguments that name them."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in PROMPTS))
    return {"model": save_model(folder / "model"), "dataset": str(data), "output_dir": str(folder / "out")}


def run(prepared: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Train, and return what was logged of each optimizer step."""
    chosen = {**SETTINGS, **OWN, **prepared, **settings}
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return [entry for entry in rlhf_main(words)["log_history"] if "grad_norm" in entry]
