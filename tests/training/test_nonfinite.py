"""Gradients that are NaN or infinite: the update is skipped and counted, and the run stops when it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from tests.training.test_resume import moments
from toolkit import ToolkitError
from toolkit.training import checkpoint


def trainer_whose_gradients(factors: Iterator[float], most: int = 5) -> Any:
    """Multiply the gradient of the head by the next factor in each update."""
    trainer = trainer_with(
        None, "loss=ce", "warmup.batch_size=4", "training.steps=9", f"optimizer.max_nonfinite_updates={most}"
    )
    weight = next(trainer.policy.parameters())
    weight.register_hook(lambda gradient: gradient * next(factors))
    return trainer


def weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters()]


def test_such_an_update_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    trainer = trainer_whose_gradients(iter([1.0, math.nan, math.inf, 1.0]))
    phase, counts = trainer.main_phase(), []
    for step in range(4):
        before, moments_before = weights(trainer), [tensor.clone() for tensor in moments(phase.optimizer)]
        row = trainer.run_step(phase)
        is_same = all(torch.equal(*pair) for pair in zip(before, weights(trainer), strict=True))
        assert is_same is (step in (1, 2))
        assert ("grad_norm" in row) is (step not in (1, 2))
        if is_same:
            assert all(torch.equal(*pair) for pair in zip(moments_before, moments(phase.optimizer), strict=True))
        counts.append((row.get("nonfinite_updates"), trainer.updater.num_nonfinite, trainer.updater.nonfinite_in_a_row))
    assert counts == [(None, 0, 0), (1, 1, 1), (1, 2, 2), (None, 2, 0)]
    assert all(weight.isfinite().all() for weight in weights(trainer))
    assert trainer.updater.num_skipped == 0


@pytest.mark.slow
def test_the_run_stops_after_some_in_a_row_also_across_a_resume(tmp_path: Path) -> None:
    trainer = trainer_whose_gradients(iter([math.nan, 1.0, math.nan, math.nan]), most=3)
    phase = trainer.main_phase()
    for _ in range(4):
        trainer.run_step(phase)
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    state = checkpoint._state(trainer, phase)
    resumed = trainer_whose_gradients(iter([math.nan]), most=3)
    resumed.restore(state)
    assert (resumed.updater.num_nonfinite, resumed.updater.nonfinite_in_a_row) == (3, 2)
    phase = resumed.main_phase()
    checkpoint.load_phase(tmp_path / "checkpoint", state, phase, resumed)
    with pytest.raises(ToolkitError) as caught:
        resumed.run_step(phase)
    assert str(caught.value).startswith(
        "the gradient was NaN or infinite in 3 updates in a row, the last in main step 4; none of them changed the "
        "weights; lower optimizer.lr"
    )
