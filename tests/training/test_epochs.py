"""Several passes over a rollout, and a reference policy that follows the policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit import ConfigError
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.training.sharding import mix_weight

SMALL = ("rollout.skip_uniform_groups=false", "rollout.prompts_per_step=4", "rollout.group_size=2")


@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize("source", ["sampler", "recomputed"])
def test_each_epoch_is_divided_anew_and_has_one_old_policy(source: str) -> None:
    settings = ("training.epochs=3", "training.minibatches=2", f"rollout.old_logprobs={source}")
    trainer = trainer_with(None, *SMALL, *settings)
    seen: list[Any] = []
    step = trainer.updater.step
    trainer.updater.step = lambda phase, rows, *args: seen.append(rows) or step(phase, rows, *args)
    phase = trainer.main_phase()
    metrics = trainer.run_step(phase)
    assert phase.num_updates == 6
    assert [len(rows) for rows in seen] == [4] * 6
    epochs = [seen[start : start + 2] for start in (0, 2, 4)]
    keys = [[tuple(row.tolist()) for rows in epoch for row in rows.input_ids] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert len({tuple(map(tuple, (sorted(k[:4]), sorted(k[4:])))) for k in keys}) == 3, "other minibatches in each"
    old = [sorted(float(row.sum()) for rows in epoch for row in rows.old_logprobs) for epoch in epochs]
    if source == "recomputed":
        assert old[0] == old[1] == old[2]
    assert metrics["ratio_max"] > 1.0


@pytest.mark.usefixtures("_fresh_state")
def test_the_rate_falls_over_all_epochs() -> None:
    # 3 steps of 2 epochs, falling to 0: after the first step the rate is that of its second update, 5/6.
    trainer = trainer_with(None, *SMALL, "training.minibatches=1", "training.epochs=2", "optimizer.lr=0.6")
    phase = trainer.main_phase()
    assert [trainer.run_step(phase)["lr"] for _ in range(2)] == pytest.approx([0.5, 0.3])


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_one_minibatch_and_several_epochs_need_the_old_policy() -> None:
    trainer = trainer_with(None, *SMALL, "training.minibatches=1", "training.epochs=2")
    assert trainer.rollouts.collect(0, None).rows.old_logprobs is not None
    trainer = trainer_with(None, *SMALL, "training.minibatches=1")
    assert trainer.rollouts.collect(0, None).rows.old_logprobs is None


# ---------------------------------------------------------------- reference


def weights(policy: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.usefixtures("_fresh_state")
def test_the_reference_is_refreshed_every_second_step() -> None:
    trainer = trainer_with(None, *SMALL, "kl=k2", "training.refresh_reference_every=2")
    phase = trainer.main_phase()
    start = weights(trainer.policy)
    first = trainer.run_step(phase)
    assert first["kl_ref"] > 0  # after the first of its updates
    assert equal(weights(trainer.reference), start)
    trainer.run_step(phase)
    assert equal(weights(trainer.reference), weights(trainer.policy))
    assert not equal(weights(trainer.policy), start)
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())
    kept = weights(trainer.reference)
    trainer.run_step(phase)
    assert equal(weights(trainer.reference), kept)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_a_reference_that_follows_in_part() -> None:
    target, source = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 2.0])
    mix_weight(target, source, 0.25)
    assert target.tolist() == [2.0, -1.0]
    trainer = trainer_with(None, *SMALL, "kl=k2", "training.refresh_reference_every=1", "training.reference_mixup=0.25")
    phase = trainer.main_phase()
    start = weights(trainer.policy)
    trainer.run_step(phase)
    mixed = [0.75 * ours + 0.25 * theirs for ours, theirs in zip(start, weights(trainer.policy), strict=True)]
    for ours, theirs in zip(weights(trainer.reference), mixed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.refresh_reference_every=2"], "has no effect: nothing reads a reference policy"),
        (["training.reference_mixup=0.5", "kl=k3"], "has no effect without training.refresh_reference_every"),
        (["training.epochs=2", "loss=ce"], "training.epochs=2 has no effect with loss=ce"),
        (["training.refresh_reference_every=2", "loss=ce"], "has no effect with loss=ce"),
    ],
)
def test_settings_that_do_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(compose_config(overrides))


@pytest.mark.slow
def test_losses_and_rewards_that_read_a_reference_may_refresh_it() -> None:
    for reader in (["kl=k3"], ["kl=k1_in_reward"], ["loss=opd", "loss.teacher=reference"]):
        build_config(compose_config(["training.refresh_reference_every=2", *reader]))
