"""A run that was stopped goes on as if it had not been; in this process, so that what is lost is found fast."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

from tests.processes import run_processes
from tests.test_mixed_precision import trainer_with
from tests.training.made_up import a_checkpoint
from tests.training.test_train import lines, summary
from toolkit import ConfigError
from toolkit import train as command
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.distributed import all_gather_objects
from toolkit.training import checkpoint, run, saved
from toolkit.training.draws import Draws
from toolkit.training.random_state import random_states, restore_random_state
from toolkit.training.saved import write_manifest
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


def drawn() -> list[Any]:
    return [torch.rand(2).tolist(), random.random(), numpy.random.rand(2).tolist(), numpy.random.normal()]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    numpy.random.normal()  # leaves a second number behind
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    expected = drawn()
    folder, state = read_state(str(tmp_path), trainer.config)
    checkpoint.load_phase(folder, state, phase, trainer)
    assert drawn() == expected


def random_numbers_of_each(rank: int, world: int, folder: str) -> None:
    """Each process continues with its own numbers; one that was not there draws others, which the seed decides."""
    for library in (random, numpy.random, torch.random):
        getattr(library, "seed" if library is not torch.random else "manual_seed")(rank)
    states = random_states()
    assert len(states) == world
    expected, draws = drawn(), Draws(5)
    restore_random_state(json.loads(json.dumps(states)), draws)
    assert drawn() == expected
    new = []
    for _ in range(2):
        restore_random_state(states[:1], draws)
        new.append(drawn())
    assert new[0] == new[1]
    assert (new[0] == expected) is (rank == 0)
    everyone = all_gather_objects(new[0])
    assert len({json.dumps(each) for each in everyone}) == world


@pytest.mark.dist
def test_random_numbers_of_each_process(tmp_path: Path) -> None:
    run_processes(3, random_numbers_of_each, str(tmp_path))


def moments(optimizer: Any) -> list[torch.Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    return [tensor for each in parameters for _, tensor in sorted(optimizer.state[each].items())]


@pytest.mark.slow
def test_settings_of_the_optimizer_that_may_change_are_applied(tmp_path: Path) -> None:
    trainer = trainer_with(None, "loss=ce", "optimizer.weight_decay=0.1")
    phase = trainer.main_phase()
    trainer.run_step(phase)
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    stored = moments(phase.optimizer)
    other = trainer_with(None, "loss=ce", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.6]", "optimizer.lr=3")
    resumed = other.main_phase()
    folder, state = read_state(str(tmp_path), other.config)
    checkpoint.load_phase(folder, state, resumed, other)
    (group,) = resumed.optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.5, 0.6), 3)
    restored = moments(resumed.optimizer)
    assert len(restored) == len(stored) > 0
    assert all(torch.equal(*pair) for pair in zip(restored, stored, strict=True))


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    mark, bomb = tmp_path / "exploded", pickle.dumps(Bomb(tmp_path / "exploded"))
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    run_dir = tmp_path / "run"
    checkpoint.save_checkpoint(run_dir, trainer, phase, {})
    folder = run_dir / "checkpoint"
    state = json.loads((folder / "state.json").read_text())
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ""}  # "": the tokenizer
    calls = {
        "state.json": lambda: read_state(str(run_dir), trainer.config),
        "random_states.json": lambda: checkpoint.load_phase(folder, state, phase, trainer),
        "model.safetensors": lambda: checkpoint.load_weights(folder, trainer),
        "optimizer.safetensors": lambda: checkpoint.load_phase(folder, state, phase, trainer),
    }
    (folder / "state.pt").write_bytes(bomb)  # where checkpoints of other programs have one
    for name, call in calls.items():
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        write_manifest(folder, "main", 0)
        with pytest.raises(ConfigError, match=rf"{name} (is damaged|cannot be read)") as caught:
            call()
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(content)
        write_manifest(folder, "main", 0)
        call()
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()


@pytest.mark.parametrize("wrong", ["[]", "{}", '{"phase": "main"}'])
def test_a_state_that_is_none(tmp_path: Path, wrong: str) -> None:
    config = build_config(compose_config([]))
    folder = a_checkpoint(tmp_path / "checkpoint")
    (folder / "state.json").write_text(wrong)
    write_manifest(folder, "main", 1)
    with pytest.raises(ConfigError, match=r"checkpoint/state\.json is not the state of a run; restore it"):
        read_state(str(tmp_path), config)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    config = build_config(compose_config([]))
    (a_checkpoint(tmp_path / "checkpoint", 2) / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no checkpoint that is complete: .*state\.json has 2 of \d+ bytes;"):
        read_state(str(tmp_path), config)
    a_checkpoint(tmp_path / "checkpoint-main-1", 1, identity=identity(config))
    said = rf"state\.json has 2 of \d+ bytes; the run continues from {tmp_path}/checkpoint-main-1"
    with pytest.warns(UserWarning, match=said):
        assert read_state(str(tmp_path), config)[1]["next_step"] == 1


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    best = tmp_path / "checkpoint-best"
    for step, value, is_better in ((2, 0.5, True), (4, 0.5, False), (6, 0.7, True), (8, 0.6, False)):
        phase.next_step = step
        assert checkpoint.save_best(tmp_path, trainer, phase, {}, value) is is_better
    assert saved.position(best) == (1, 6)
    assert (saved.read_manifest(best) or {})["value"] == 0.7
    assert read_state(str(best), trainer.config)[1]["next_step"] == 6
    phase.next_step = 4  # the run has gone back: the one of step 6 is of another future
    assert checkpoint.save_best(tmp_path, trainer, phase, {}, 0.1)
    best.rename(tmp_path / "checkpoint-best.old")  # a crash between two renames
    phase.next_step = 5
    assert not checkpoint.save_best(tmp_path, trainer, phase, {}, 0.1)
    assert checkpoint.save_best(tmp_path, trainer, phase, {}, 0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


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
        assert (folder.name, state["mark"]) == ("checkpoint.writing", 2)
    with monkeypatch.context() as patch:  # before the new one is complete: the earlier one, which was renamed
        patch.setattr(checkpoint, "write_manifest", lambda *_: next(iter(())))
        with pytest.raises(StopIteration):
            checkpoint.save_checkpoint(tmp_path, trainer, phase, {"mark": 3})
    folder, state = read_state(str(tmp_path), trainer.config)
    assert (folder.name, state["mark"]) == ("checkpoint", 2)
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {"mark": 3})
    assert read_state(str(tmp_path), trainer.config)[1]["mark"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


@pytest.mark.slow
def test_other_settings_are_another_run(tmp_path: Path) -> None:
    def config(*overrides: str) -> Any:
        return build_config(compose_config(overrides))

    a_checkpoint(tmp_path, identity=identity(config()))
    assert read_state(str(tmp_path), config("training.steps=5"))[1]["phase"] == "main"
    for other in ("seed=7", "advantage=rloo", "kl=k1_in_reward", "policy_loss.cliprange_low=0.1"):
        with pytest.raises(ConfigError, match="the earlier run had"):
            read_state(str(tmp_path), config(other))
