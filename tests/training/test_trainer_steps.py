"""What one step of the trainer puts together: prompts and their rewards, KL before advantages, metrics of updates."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("reasoning_gym")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit.metrics import Mean, Sum, merge_metrics, to_floats
from toolkit.training import generation, rollouts
from toolkit.training.layout import Shares
from toolkit.training.rewarding import Rewarded
from toolkit.training.step import per_update

pytestmark = pytest.mark.usefixtures("_fresh_state")


def test_advantages_are_made_of_rewards_less_kl() -> None:
    trainer = trainer_with(None, "kl=k1_in_reward", "kl_control.reward_coef=0.5", "rollout.temperature=0.8")
    seen: list[torch.Tensor] = []
    kept = trainer.rollouts._advantages
    trainer.rollouts._advantages = lambda terms: seen.append(terms.rewards) or kept(terms)
    phase = trainer.main_phase()
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.mul_(0.5)
    found = trainer.run_step(phase)
    assert found["reward_with_kl"] == pytest.approx(found["reward"] - 0.5 * found["kl_completion"], rel=1e-5)
    assert abs(found["kl_completion"]) > 1e-3
    assert float(seen[0].mean()) == pytest.approx(found["reward_with_kl"], rel=1e-5)
    assert found["rollout_mismatch"] < 1e-4  # scored at the temperature of the sampling


def test_a_process_rewards_and_samples_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes, which has prompts 2 and 3 of 4 and rows 4 to 7 of 8."""
    settings = ("rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.skip_uniform_groups=false")
    trainer = trainer_with(None, *settings, "rollout.temperature=0.8")
    rewarded: list[tuple[str, int]] = []
    seeds: list[str] = []
    draw = generation.row_uniforms

    def rewarder(examples: Any, completions: Any, seeds: Any) -> Rewarded:
        numbers = [int(seed.rpartition("/")[2]) for seed in seeds]
        rewarded.extend((example.prompt, number) for example, number in zip(examples, numbers, strict=True))
        return Rewarded(torch.tensor(numbers, dtype=torch.float32), {})

    monkeypatch.setattr(generation, "row_uniforms", lambda own, number: seeds.extend(own) or draw(own, number))
    monkeypatch.setattr(trainer.rollouts, "rewarder", Mock(side_effect=rewarder))
    trainer.rollouts.shares = Shares(rank=1, world=2)
    monkeypatch.setattr(rollouts, "all_gather_objects", lambda part: [part, part])
    trainer.rollouts._advantages = lambda _: torch.arange(8.0).unsqueeze(-1)
    prompts = trainer.task.heldout[:4]
    rows = trainer.rollouts.sample_round(prompts, 6, 0, None).groups.rows
    assert rewarded == [(prompts[2].prompt, 4), (prompts[2].prompt, 5), (prompts[3].prompt, 6), (prompts[3].prompt, 7)]
    assert seeds == [f"{trainer.config.seed}/main/6/sample/{prompt}/{sample}" for prompt in (2, 3) for sample in (0, 1)]
    assert rows.advantages[:, 0].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert rows.group_ids[:, 0].tolist() == [2, 2, 3, 3]
    assert rows.item(-100).rollout_spec.temperature == 0.8


def test_losses_of_updates_are_averaged_and_counts_add_up() -> None:
    updates = [
        per_update(
            {"loss": Sum(torch.tensor(own)), "active_tokens": Sum(torch.tensor(own)), "nll": Mean.of(torch.ones(2))}
        )
        for own in (1.0, 3.0)
    ]
    assert to_floats(merge_metrics(updates)) == {"loss": 2.0, "active_tokens": 4.0, "nll": 1.0}


def test_a_rate_of_its_own_for_every_update() -> None:
    # 3 steps of 2 updates, falling to 0: after the first step the rate is that of its second update, 5/6.
    trainer = trainer_with(None, "training.minibatches=2", "optimizer.lr=0.6", "rollout.skip_uniform_groups=false")
    phase = trainer.main_phase()
    assert [trainer.run_step(phase)["lr"] for _ in range(2)] == pytest.approx([0.5, 0.3])
