"""A run that was stopped goes on as if it had not been; in this process, so that what is lost is found fast."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import trainer_with
from tests.training.test_train import lines, summary
from toolkit import ConfigError
from toolkit import train as command
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.training import checkpoint, run
from toolkit.training.startup import identity, read_state

SETTINGS = [
    *("debug=smoke", "seed=9", "warmup.steps=2", "warmup.stop_accuracy=null", "training.steps=4"),
    *("task.num_heldout=4", "model.hidden_size=16", "model.num_layers=1", "rollout.prompts_per_step=1"),
    *("rollout.group_size=2", "training.minibatches=2", "training.micro_batch_size=1"),
    *("kl=k2", "kl_control=adaptive", "kl_control.target=1e-3", "kl_control.horizon=10"),
]
"""One prompt a step, and two completions: where both have the same reward there is nothing to learn."""
TIMED = ("seconds", "tokens_per_second")


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.tasks.spell_backward.POOL_SIZE", 100)
    monkeypatch.setattr("toolkit.training.report.draw_curves", lambda *_: None)
    whole = tmp_path / "whole"
    command.train([*SETTINGS, f"hydra.run.dir={whole}"])
    assert len({row["kl_coef"] for row in lines(whole) if row["phase"] == "main"}) > 2
    assert 0 < summary(whole)["skipped_updates"] < 8
    for steps in (1, 5):  # in the warm-up, and in the main phase
        cut, resumed = tmp_path / f"cut_{steps}", tmp_path / f"resumed_{steps}"
        answers = iter([False] * steps + [True])
        with monkeypatch.context() as patch:
            patch.setattr(run.StopFlag, "agreed", lambda flag, answers=answers: next(answers))
            command.train([*SETTINGS, f"hydra.run.dir={cut}"])
        assert summary(cut)["interrupted"]
        with (cut / "metrics.jsonl").open("a") as file:  # as a crash leaves it, between two checkpoints
            file.write(json.dumps(lines(whole)[steps]) + "\n")
        command.train([*SETTINGS, f"training.resume={cut}", f"hydra.run.dir={resumed}"])
        rows = [[{k: v for k, v in row.items() if k not in TIMED} for row in lines(own)] for own in (whole, resumed)]
        assert rows[0] == rows[1]
        for name in ("model", "reference"):
            first, second = (load_file(own / "checkpoint" / f"{name}.safetensors") for own in (whole, resumed))
            assert all(torch.equal(first[key], second[key]) for key in first)
        for key in ("accuracy_before", "accuracy_after", "skipped_updates"):
            assert summary(resumed)[key] == summary(whole)[key]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    expected = (torch.rand(2).tolist(), random.random())
    folder, state = read_state(str(tmp_path), trainer.config)
    checkpoint.load_phase(folder, state, phase, trainer)
    assert (torch.rand(2).tolist(), random.random()) == expected


def test_a_crash_while_writing_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {"mark": 1})
    for survived in (0, 1):  # renames before the crash
        moves = iter([os.replace] * survived)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *where, moves=moves: next(moves)(*where))
            with pytest.raises(StopIteration):
                checkpoint.save_checkpoint(tmp_path, trainer, phase, {"mark": 2})
        folder, state = read_state(str(tmp_path), trainer.config)
        assert state["mark"] == 1
        assert {"model.safetensors", "state.pt"} <= {path.name for path in folder.iterdir()}
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {"mark": 3})
    assert read_state(str(tmp_path), trainer.config)[1]["mark"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    def config(*overrides: str) -> Any:
        return build_config(compose_config(overrides))

    (tmp_path / "state.json").write_text(json.dumps({"identity": identity(config()), "phase": "main"}))
    assert read_state(str(tmp_path), config("training.steps=5"))[1]["phase"] == "main"
    for other in ("seed=7", "advantage=rloo", "kl=k1_in_reward", "policy_loss.cliprange_low=0.1"):
        with pytest.raises(ConfigError, match="the earlier run had"):
            read_state(str(tmp_path), config(other))
