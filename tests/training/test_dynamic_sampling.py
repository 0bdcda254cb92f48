"""Groups that teach nothing are replaced: which are kept, when sampling stops, and what a step learns from."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit import ConfigError
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.functional.rewards import RewardTerms
from toolkit.metrics import Mean
from toolkit.training.dynamic_sampling import Groups, Round, sample_rounds
from toolkit.training.experience import IGNORED, Rows

SIZE = 2


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.errors._warned", set())


def groups_of(names: list[int], owners: list[int], rank: int = 0, width: int = 3) -> Groups:
    """Groups of two completions; the tokens and rewards of group 7 are 70 and 71."""
    numbers = torch.tensor([[10 * name, 10 * name + 1] for name in names]).reshape(-1)
    local = numbers[torch.tensor([owner == rank for owner in owners], dtype=torch.bool).repeat_interleave(SIZE)]
    ids = local.unsqueeze(-1).expand(-1, width)
    labels = ids[:, 1:]
    rows = Rows(ids, torch.ones_like(ids), labels, advantages=torch.ones(labels.shape), group_ids=labels // 10)
    mask = torch.ones(len(numbers), width - 1, dtype=torch.bool)
    terms = RewardTerms(rewards=numbers.float(), group_ids=numbers // 10, lengths=mask.sum(-1), mask=mask)
    return Groups(rows, torch.tensor(owners, dtype=torch.int64), terms, SIZE)


def rounds_of(*kept: list[int], sampled: int = 4, rank: int = 0) -> Any:
    """Rounds in which the first process samples the even groups, the second one the odd ones."""
    rounds = [
        Round(groups_of(names, [name % 2 for name in names], rank, 3 + number), sampled, {"reward": Mean.of(reward)})
        for number, (names, reward) in enumerate(zip(kept, torch.arange(9.0).split(1), strict=False))
    ]
    asked: list[int] = []
    return asked, lambda number: asked.append(number) or rounds[number]


def test_rounds_by_hand() -> None:
    """Of 4 groups 1 teaches, of the next 4 all; 3 are wanted, so the first two of the second round are taken."""
    for rank, tokens in ((0, [60, 61]), (1, [10, 11, 50, 51])):
        asked, sample = rounds_of([1], [5, 6, 7, 8], [9], rank=rank)
        groups, metrics, number = sample_rounds(sample, wanted=3, max_rounds=5, rank=rank)
        assert asked == [0, 1]
        assert number == 2
        assert groups.terms.rewards.tolist() == [10, 11, 50, 51, 60, 61]
        assert groups.owners.tolist() == [1, 1, 0]
        assert groups.rows.input_ids[:, 0].tolist() == tokens
        assert metrics["sampling_rounds"].value() == 2
        assert metrics["learning_groups"].value() == 3
        assert metrics["dropped_groups"].value() == 5 / 8
        assert metrics["reward"].value() == 0.5  # of all that was sampled


def test_sampling_stops_at_the_limit_and_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            asked, sample = rounds_of([1], [], [2])
            groups, metrics, _ = sample_rounds(sample, wanted=3, max_rounds=2, rank=0)
            assert asked == [0, 1]
            assert groups.owners.tolist() == [1]
            assert metrics["learning_groups"].value() == 1
    assert len(caught) == 1
    assert "max_sampling_rounds=2" in str(caught[0].message)


def test_without_refilling_there_is_one_round_and_no_more_metrics() -> None:
    asked, sample = rounds_of([1], [2, 3])
    groups, metrics, number = sample_rounds(sample, wanted=3, max_rounds=1, rank=1)
    assert (asked, number, list(metrics)) == ([0], 1, ["reward"])
    assert groups.owners.tolist() == [1]


def test_nothing_teaches() -> None:
    _, sample = rounds_of([], [])
    groups, metrics, _ = sample_rounds(sample, wanted=3, max_rounds=2, rank=0)
    assert len(groups.rows) == 0
    assert metrics["dropped_groups"].value() == 1


def test_rows_of_two_rounds_keep_their_columns() -> None:
    """The shorter row gets a position that is not read and not scored."""
    narrow, wide = (groups_of([name], [0], width=width).rows for name, width in ((3, 3), (4, 5)))
    rows = Rows.joined([narrow, wide])
    assert rows.input_ids[0].tolist() == [30, 30, 30, 0, 0]
    assert rows.attention_mask[0].tolist() == [1, 1, 1, 0, 0]
    assert rows.shifted_labels[0].tolist() == [30, 30, IGNORED, IGNORED]
    assert rows.shifted_labels[3].tolist() == [41, 41, 41, 41]
    assert rows.advantages[0].tolist() == [1, 1, 0, 0]
    assert rows.old_logprobs is None


REFILLING = (
    *("rollout.prompts_per_step=6", "rollout.group_size=2", "training.minibatches=2", "training.steps=4"),
    *("rollout.max_sampling_rounds=4", "advantage.level=batch"),
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """A trainer whose rewards are coin flips, and the batches that its task is asked for."""
    trainer = trainer_with(None, *REFILLING)
    batches: list[int] = []
    draw = trainer.task.draw_at
    monkeypatch.setattr(trainer.task, "draw_at", lambda step, *args: batches.append(step) or draw(step, *args))
    return trainer, batches


@pytest.mark.usefixtures("_fresh_state")
def test_a_step_learns_from_as_many_groups_as_it_wants(drawn: tuple[Any, list[int]]) -> None:
    """Half of the pairs of coins agree, so one batch is too little; no batch is drawn twice, and none is skipped."""
    trainer, batches = drawn
    collected: list[Any] = []
    collect = trainer.rollouts.collect
    trainer.rollouts.collect = lambda *args: collected.append(collect(*args)) or collected[-1]
    phase = trainer.main_phase()
    found = [trainer.run_step(phase) for _ in range(3)]
    assert all(row["learning_groups"] == 6 and row["sampling_rounds"] >= 2 for row in found)
    assert batches == list(range(len(batches)))
    assert len(batches) == sum(row["sampling_rounds"] for row in found)
    assert trainer.rollouts.num_refills == len(batches) - 3
    for step, row in zip(collected, found, strict=True):
        rows = step.rows
        assert len(rows) == 12
        assert row["dropped_groups"] == pytest.approx(1 - 6 / (6 * row["sampling_rounds"]))
        assert len(set(rows.group_ids[:, 0].tolist())) == 6
        # Six times 1 and six times 0: of the groups that it learns from, the deviation is sqrt(12 / 4 / 11) = 0.522.
        assert rows.advantages[:, 0].abs().tolist() == pytest.approx([0.5 / (0.52223 + 1e-4)] * 12, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
def test_the_batches_drawn_are_kept_for_a_resumed_run(drawn: tuple[Any, list[int]]) -> None:
    trainer, batches = drawn
    phase = trainer.main_phase()
    trainer.run_step(phase)
    state = trainer.state()
    trainer.run_step(phase)
    second = batches[batches.index(state["rollouts"]["num_refills"] + 1) :]
    trainer.restore(state)
    batches.clear()
    trainer.rollouts.collect(1, None)
    assert batches == second


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.max_sampling_rounds=3", "rollout.skip_uniform_groups=false"],
            "rollout.max_sampling_rounds=3 has no effect with rollout.skip_uniform_groups=false",
        ),
        (["rollout.max_sampling_rounds=3", "loss=ce"], "rollout.max_sampling_rounds=3 has no effect with loss=ce"),
    ],
)
def test_settings_that_do_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(compose_config(overrides))
