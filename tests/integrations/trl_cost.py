"""Time and memory of a micro-batch in TRL's trainer, with its own loss and with ours: one process for each.

Use, on an idle machine: python -m tests.integrations.trl_cost [rows] [completion tokens] [vocabulary]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PROMPT = 16
REPEATS = 3


def measure(kind: str, rows: int, width: int, vocabulary: int) -> str:
    """Return seconds of the fastest loss and backward, and how much the process grew beyond what it held before."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOTrainer

    from tests.integrations.trl_runs import save_model, trainer
    from toolkit.integrations.trl import ToolkitGRPOTrainer

    folder = tempfile.mkdtemp()
    save_model(Path(folder))
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, eos_token_id=1, **sizes, **heads)).save_pretrained(folder)
    settings = {"gradient_accumulation_steps": 1, "num_iterations": 1, "gradient_checkpointing": False}
    made = trainer({"trl": GRPOTrainer, "toolkit": ToolkitGRPOTrainer}[kind], folder, beta=0.0, **settings)
    inputs = {
        "prompt_ids": torch.randint(2, vocabulary, (rows, PROMPT)),
        "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, vocabulary, (rows, width)),
        "completion_mask": torch.ones(rows, width, dtype=torch.long),
        "advantages": torch.randn(rows),
        "num_items_in_batch": torch.tensor(rows * width),
    }
    made._buffered_inputs, made.current_gradient_accumulation_steps = [inputs], 1
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(REPEATS):
        start = time.perf_counter()
        made.model.train()
        made._compute_loss(made.model, inputs).backward()
        seconds.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{kind:8} {min(seconds):6.2f} s {grown / 1024:8.0f} MiB"


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("trl", "toolkit"):
        print(measure(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        chosen = [*sys.argv[1:], *["8", "256", "49152"][len(sys.argv) - 1 :]]
        for kind in ("trl", "toolkit"):
            command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.trl_cost", kind, *chosen]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
