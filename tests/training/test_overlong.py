"""Completions near and at their longest: DAPO's soft punishment by hand, and those that are left out of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit import ConfigError
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.rollout.config import RolloutConfig
from toolkit.rollout.sampler import Completions
from toolkit.training.experience import IGNORED
from toolkit.training.overlong import PENALTY, Overlong, overlong_penalty
from toolkit.training.rewarding import Rewarded


def completions(lengths: list[int], finished: list[bool]) -> Completions:
    is_new = torch.arange(10) < torch.tensor(lengths).unsqueeze(-1)
    zeros = torch.zeros(is_new.shape, dtype=torch.int64)
    return Completions(zeros, zeros, is_new, zeros.float(), ["" for _ in lengths], finished)


def test_the_punishment_of_the_paper_by_hand() -> None:
    """Section 4.1: 16,384 tokens and 4,096 of punishment, so L_max = 20,480 and L_cache = 4,096."""
    lengths = torch.tensor([1, 16384, 16385, 17408, 18432, 20480, 30000])
    found = overlong_penalty(lengths, max_length=20480, buffer=4096)
    assert found.tolist() == [0.0, 0.0, -1 / 4096, -0.25, -0.5, -1.0, -1.0]


def test_it_is_part_of_the_reward_and_a_part_by_itself() -> None:
    # L_max 10 and L_cache 4: 6 tokens lose nothing, 7 a quarter, 10 all.
    overlong = Overlong(RolloutConfig(max_new_tokens=10, overlong_buffer=4, overlong_penalty=2.0))
    written = completions([6, 7, 10, 10], [True, True, True, False])
    rewards = torch.tensor([1.0, 1.0, 0.0, torch.nan])
    found = overlong.penalised(Rewarded(rewards, {}), written)
    assert found.totals[:3].tolist() == [1.0, 0.5, -2.0]
    assert found.totals[3].isnan(), "no reward applies to it"
    assert found.metrics[PENALTY].value() == pytest.approx((0 - 0.5 - 2 - 2) / 4)
    assert found.parts[:3].tolist() == [[1.0, 0.0], [1.0, -0.25], [0.0, -1.0]]
    assert found.weights.tolist() == [1.0, 2.0]
    both = Rewarded(rewards, {}, torch.tensor([[1.0, 0.0]] * 4), torch.tensor([1.0, 3.0]))
    assert overlong.penalised(both, written).parts[1].tolist() == [1.0, 0.0, -0.25]
    assert overlong.penalised(both, written).weights.tolist() == [1.0, 3.0, 2.0]
    unchanged = Rewarded(rewards, {})
    assert Overlong(RolloutConfig()).penalised(unchanged, written) is unchanged


def test_cut_completions_are_masked_if_asked() -> None:
    written = completions([3, 10, 10], [True, False, True])
    assert Overlong(RolloutConfig(truncated="mask")).masked(written).tolist() == [False, True, False]
    assert Overlong(RolloutConfig()).masked(written).tolist() == [False, False, False]


@pytest.mark.usefixtures("_fresh_state")
def test_a_masked_completion_counts_in_its_group_but_not_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards 1, 0 with the second completion cut: the first one's advantage is that of both, and only it is scored."""
    settings = ("rollout.group_size=2", "advantage=dr_grpo", "training.minibatches=1", "rollout.prompts_per_step=3")
    kept, masked = [trainer_with(None, *settings, *more) for more in ((), ("rollout.truncated=mask",))]
    found: list[Any] = []
    for trainer in (kept, masked):
        sample = trainer.generator.sample
        # Of three groups one is not cut, one is cut at the second completion, and one at both.
        finished = [True, True, True, False, False, False]

        def cut(*args: Any, sample: Any = sample, finished: Any = finished, **options: Any) -> Completions:
            return Completions(**{**vars(sample(*args, **options)), "finished": finished})

        monkeypatch.setattr(trainer.generator, "sample", cut)
        monkeypatch.setattr(
            trainer.rollouts,
            "rewarder",
            Rewards(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])),
        )
        found.append(trainer.rollouts.collect(0, None))
    everything, some = (each.rows for each in found)
    assert everything.advantages[:, 0].tolist() == [0.5, -0.5] * 3
    assert some.advantages[:, 0].tolist() == [0.5, -0.5] * 2, "a group that is masked entirely teaches nothing"
    assert (some.shifted_labels != IGNORED).any(-1).tolist() == [True, True, True, False]
    assert found[1].metrics["truncated"].value() == 0.5
    assert found[1].owners.tolist() == [0, 0, 0, 0]
    assert masked.run_step(masked.main_phase())["active_tokens"] == float((some.shifted_labels != IGNORED).sum())


class Rewards:
    """Rewards that are known before."""

    def __init__(self, totals: torch.Tensor) -> None:
        self.totals = totals

    def __call__(self, *_: Any) -> Rewarded:
        return Rewarded(self.totals, {})

    def check_failures(self, *_: Any) -> None:
        pass


@pytest.mark.usefixtures("_fresh_state")
def test_the_penalty_reaches_the_advantages() -> None:
    settings = ("rollout.max_new_tokens=5", "rollout.overlong_buffer=5", "rollout.overlong_penalty=0.5")
    trainer = trainer_with(None, *settings, "rollout.group_size=8")
    trainer.rollouts.rewarder = Rewards(torch.zeros(64))
    found = trainer.run_step(trainer.main_phase())
    assert found[PENALTY] == pytest.approx(-0.5 * found["completion_tokens"] / 5)  # from the first token on
    assert found["uniform_groups"] < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.overlong_penalty=2"], "rollout.overlong_penalty=2.0 has no effect without rollout.overlong_buffer"),
        (["rollout.overlong_buffer=9", "rollout.max_new_tokens=8"], "which has at most rollout.max_new_tokens=8"),
        (["rollout.overlong_buffer=2"], "rollout.overlong_buffer=2 needs rollout.max_new_tokens"),
        (
            ["rollout.overlong_buffer=2", "rollout.max_new_tokens=8", "loss=ce"],
            "rollout.overlong_buffer=2 has no effect with loss=ce",
        ),
        (["rollout.truncated=mask", "loss=ce"], "rollout.truncated=mask has no effect with loss=ce"),
        (
            ["rollout.overlong_buffer=2", "rollout.max_new_tokens=8", "advantage=gdpo", "kl=k1_in_reward"],
            "would not see the KL in the reward",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(compose_config(overrides))
