"""The recipe for Lightning, as it is on its page: one batch, micro-batches and two processes have one gradient."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit

pytest.importorskip("pytorch_lightning")

ROOT = Path(toolkit.__file__).parents[1]
PAGE = ROOT / "tutorials/reference/trainers/lightning.md"
LOSSES = [["policy_loss=gspo", "aggregation=token_mean"], ["policy_loss=vanilla", "aggregation=token_mean"]]
RUN = """
import sys, json, torch, warnings
warnings.filterwarnings("ignore")
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = torch.tensor([1, 7, 3, 8, 2, 2, 5, 6])
CUTS = {"one": [[(0, 8)]], "three": [[(0, 2), (2, 5), (5, 8)]], "ranks": [[(0, 2), (2, 5)], [(5, 7), (7, 8)]]}


class Rows(torch.utils.data.Dataset):
    def __init__(self, cuts):
        self.cuts = cuts

    def __len__(self):
        return len(self.cuts)

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 50, (8, 12), generator=draw)
        place = torch.arange(12)
        fields = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "loss_mask": ((place >= 3) & (place < 3 + LENGTHS[:, None])).long(),
            "advantages": torch.randn(8, generator=draw),
            "old_logprobs": -3.9 + 0.1 * torch.randn(8, 12, generator=draw),
        }
        return [{name: value[a:b] for name, value in fields.items()} for a, b in self.cuts[index]]


class Measured(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer):
        norm = torch.stack([each.grad.double().norm() for each in self.parameters() if each.grad is not None]).norm()
        if self.global_rank == 0:
            print(json.dumps({"norm": norm.item()}), flush=True)


if __name__ == "__main__":
    cut, losses = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    processes = 2 if cut == "ranks" else 1
    for overrides in losses:
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", devices=processes, strategy="ddp_spawn" if processes > 1 else "auto",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(Rows(CUTS[cut]), batch_size=None, shuffle=False)
        trainer.fit(Measured(lm, overrides), loader)
"""


def norms_of(folder: Path, cut: str) -> list[float]:
    """Return the gradient norm of one step of the page's module with each of `LOSSES`, in a process of its own."""
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    script = folder / "recipe.py"
    script.write_text("\n".join([*blocks, RUN]))
    done = subprocess.run(
        [sys.executable, str(script), cut, json.dumps(LOSSES)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [float(json.loads(line)["norm"]) for line in done.stdout.splitlines() if line.startswith('{"norm"')]


@pytest.mark.slow
def test_the_recipe_is_exact(tmp_path: Path) -> None:
    whole = norms_of(tmp_path, "one")
    assert len(whole) == len(LOSSES)
    assert min(whole) > 0.1
    for cut in ("three", "ranks"):
        assert norms_of(tmp_path, cut) == pytest.approx(whole, rel=1e-6)
