"""A run that refills groups, repeats rollouts and refreshes its reference goes on after a stop, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.training.test_train import lines
from toolkit import train as command
from toolkit.training import run

SETTINGS = [
    *("debug=smoke", "seed=3", "warmup=none", "training.steps=5", "task.num_heldout=4"),
    *("model.hidden_size=16", "model.num_layers=1", "rollout.prompts_per_step=4", "rollout.group_size=2"),
    *("training.minibatches=2", "training.epochs=2", "rollout.max_sampling_rounds=3", "kl=k2"),
    *(
        "training.refresh_reference_every=2",
        "training.reference_mixup=0.5",
        "rollout.overlong_buffer=2",
        "rollout.max_new_tokens=6",
    ),
]
TIMED = ("seconds", "tokens_per_second")


@pytest.mark.slow
def test_the_loop_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.tasks.spell_backward.POOL_SIZE", 100)
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)
    whole = tmp_path / "whole"
    command.train([*SETTINGS, f"hydra.run.dir={whole}"])
    found = lines(whole)
    assert any(row["sampling_rounds"] > 1 for row in found[:3]), "batches beside the first of a step"
    assert ["rollout_mismatch" in row for row in found] == [True, False, False, False, False]
    cut, resumed = tmp_path / "cut", tmp_path / "resumed"
    answers = iter([False] * 3 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(run.StopFlag, "agreed", lambda flag: next(answers))
        command.train([*SETTINGS, f"hydra.run.dir={cut}"])
    state = json.loads((cut / "checkpoint/state.json").read_text())
    assert state["rollouts"]["num_refills"] == sum(row["sampling_rounds"] - 1 for row in found[:3])
    assert state["rollouts"]["old_logprobs"]["is_same"] is True
    command.train([*SETTINGS, f"training.resume={cut}", f"hydra.run.dir={resumed}"])
    rows = [[{k: v for k, v in row.items() if k not in TIMED} for row in lines(each)] for each in (whole, resumed)]
    assert rows[0] == rows[1]
    for name in ("model", "reference"):
        first, second = (load_file(each / "checkpoint" / f"{name}.safetensors") for each in (whole, resumed))
        assert all(torch.equal(first[key], second[key]) for key in first)
