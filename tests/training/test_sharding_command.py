"""The training command with training.sharding=fsdp2: the run, the checkpoint and the weights are those of DDP."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.processes import free_port, start
from tests.training.test_launch import numbers
from tests.training.test_processes import close
from tests.training.test_train import lines, summary
from toolkit.training.full_state import read_optimizer_state

RUN = [
    "model.dtype=float64", "task.reward=coin_flip", "task.num_heldout=11", "warmup.steps=3",
    "warmup.stop_accuracy=0.9",  # looks at the accuracy in between
    "training.steps=3", "training.checkpoint_every=2", "training.minibatches=2", "training.micro_batch_size=7",
    "rollout.prompts_per_step=6", "rollout.group_size=4",
]  # fmt: skip
"""Without a reference: making one would free the weights that an evaluation had gathered."""
RUNS = {
    "ddp": [*RUN, "training.sharding=none"],
    "fsdp2": [*RUN, "training.sharding=fsdp2"],
    "start": [*RUN, "training.sharding=fsdp2", "training.steps=0"],  # as the main phase begins
}


def _run_all(rank: int, folder: str, ports: list[int]) -> None:
    from toolkit.train import train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    for (name, overrides), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train([*overrides, f"hydra.run.dir={name}"])


@pytest.mark.slow
@pytest.mark.dist
def test_sharded_run_is_that_of_ddp(tmp_path: Path) -> None:
    start(_run_all, (str(tmp_path), [free_port() for _ in RUNS]), 2)
    ddp, sharded, at_start = (tmp_path / name for name in RUNS)
    assert summary(sharded)["num_processes"] == 2
    ours, theirs = lines(sharded), lines(ddp)
    assert [row["phase"] for row in ours] == ["warmup"] * 3 + ["main"] * 3
    for mine, other in zip(ours, theirs, strict=True):
        close(numbers(mine), numbers(other), rel=1e-9, abs_=1e-12)
    for name in ("accuracy_before", "accuracy_after", "skipped_updates"):
        assert summary(sharded)[name] == summary(ddp)[name]
    after, exact, before = (load_file(run / "checkpoint/model.safetensors") for run in (sharded, ddp, at_start))
    same(after, exact)
    assert not [name for name in after if torch.equal(before[name], after[name])], "embedding, norm and head learn, too"
    states = [read_optimizer_state(str(run / "checkpoint/optimizer.safetensors")) for run in (sharded, ddp)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, found in states[0]["state"].items():
        same(found, states[1]["state"][key])


def same(found: dict[str, Any], exact: dict[str, Any]) -> None:
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
