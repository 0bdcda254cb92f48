"""The sampler's log-probabilities as those of the old policy: compared once, replaced where they differ too much."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.test_mixed_precision import _fresh_state, trainer_with  # noqa: F401
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.training.experience import IGNORED, Rows
from toolkit.training.old_logprobs import BOUNDS, MISMATCH, OldLogprobs


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.errors._warned", set())


def rows() -> Rows:
    """Two rows of which the first has two scored tokens and the second one."""
    labels = torch.tensor([[IGNORED, 5, 6], [IGNORED, 7, IGNORED]])
    ids = torch.zeros(2, 4, dtype=torch.int64)
    sampled = torch.tensor([[torch.nan, -1.0, -2.0], [torch.nan, -3.0, torch.nan]])
    return Rows(ids, torch.ones_like(ids), labels, rollout_logprobs=sampled)


class Scorer:
    """An updater whose forward is `shift` nats from the sampler at the first token, and counts its calls."""

    def __init__(self, shift: float, dtype: torch.dtype = torch.float32, precision: str = "no") -> None:
        self.shift, self.num_calls = shift, 0
        self.policy = torch.nn.Linear(1, 1).to(dtype)
        self.accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))

    def score(self, rows: Rows, most: int) -> Tensor:
        self.num_calls += 1
        scored = torch.tensor([[9.0, -1.0 + self.shift, -2.0], [9.0, -3.0, 9.0]])
        return scored[: len(rows)]


def old_logprobs(scorer: Scorer, *overrides: str) -> OldLogprobs:
    return OldLogprobs(build_config(compose_config(list(overrides))), scorer)  # type: ignore[arg-type]


def test_the_samplers_serve_after_one_comparison() -> None:
    scorer = Scorer(shift=1.5e-4)  # over three tokens 5e-5 nats on average
    old = old_logprobs(scorer)
    first, metrics = old.add(rows(), 2)
    assert metrics[MISMATCH].value() == pytest.approx(5e-5, rel=1e-2)
    again, nothing = old.add(rows(), 2)
    assert nothing == {}
    assert scorer.num_calls == 1
    for found in (first, again):
        assert found.old_logprobs.tolist() == [[0, -1, -2], [0, -3, 0]]
        assert found.rollout_logprobs is None, "a loss would compare them with themselves"


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "no", 1e-4),
        (torch.bfloat16, "no", 2e-2),
        (torch.float32, "bf16", 2e-2),
        (torch.float32, "fp16", 2.5e-3),
        (torch.float64, "no", 1e-4),
    ],
)
def test_beyond_the_bound_of_the_dtype_they_are_recomputed(dtype: torch.dtype, precision: str, bound: float) -> None:
    assert bound in BOUNDS.values()
    for factor, is_same in ((0.9, True), (1.1, False)):
        scorer = Scorer(3 * bound * factor, dtype, precision)
        old = old_logprobs(scorer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [old.add(rows(), 2)[0] for _ in range(3)]
        assert old.is_same is is_same
        assert scorer.num_calls == (1 if is_same else 3)
        assert len(caught) == (0 if is_same else 1)
        assert all((each.rollout_logprobs is None) is is_same for each in found)
        if not is_same:
            assert "the sampler's log-probabilities are" in str(caught[0].message)
            assert found[0].old_logprobs[0, 1] == -1.0 + scorer.shift


@pytest.mark.filterwarnings("ignore:the sampler's")
def test_a_token_that_the_sampler_did_not_report_is_a_difference() -> None:
    scorer = Scorer(shift=0.0)
    old = old_logprobs(scorer)
    lacking = rows()
    lacking.rollout_logprobs[1, 1] = torch.nan
    assert old.add(lacking, 2)[0].old_logprobs[1, 1] == -3.0
    assert old.is_same is False


def test_nothing_to_compare_decides_nothing() -> None:
    old = old_logprobs(Scorer(shift=1.0))
    old.add(rows().select(slice(0)), 0)
    assert old.is_same is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.old_logprobs=recomputed"],
        ["correction=tis"],
        ["correction=bypass"],
        ["kl=k3_is_corrected", "loss.kl_anchor=rollout"],
        ["policy_loss=rollout_is"],
    ],
    ids=" ".join,
)
def test_what_compares_sampler_and_trainer_gets_both(overrides: list[str]) -> None:
    scorer = Scorer(shift=0.0)
    old = old_logprobs(scorer, *overrides)
    for _ in range(2):
        found, metrics = old.add(rows(), 2)
        assert metrics == {}
        assert found.rollout_logprobs is not None
        assert found.old_logprobs[0, 0] == 9.0
    assert scorer.num_calls == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the sampler's")
def test_the_decision_is_kept_until_settings_change() -> None:
    for shift in (0.0, 1.0):
        scorer = Scorer(shift)
        old = old_logprobs(scorer)
        old.add(rows(), 2)
        state = json.loads(json.dumps(old.state()))
        same, other = old_logprobs(scorer), old_logprobs(scorer, "rollout.temperature=0.8", "loss.temperature=0.8")
        half = old_logprobs(Scorer(shift, precision="bf16"))
        for resumed in (same, other, half):
            resumed.restore(state)
        assert same.is_same is (shift == 0)
        assert other.is_same is None
        assert half.is_same is None
        old.restore({})  # of a checkpoint of before
        assert old.is_same is (shift == 0)


SMALL = ("rollout.skip_uniform_groups=false", "training.minibatches=2")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_state")
@pytest.mark.parametrize(("kl", "num_references"), [([], 0), (["kl=k1_in_reward"], 1)])
def test_a_step_saves_a_forward(kl: list[str], num_references: int) -> None:
    """Two steps with each: the same losses but for rounding, and two scorings less, or one in the first step."""
    found, calls = {}, {}
    for source in ("sampler", "recomputed"):
        trainer = trainer_with(None, *SMALL, *kl, f"rollout.old_logprobs={source}")
        number: list[Any] = []
        score = trainer.updater.score
        trainer.updater.score = lambda *args, score=score, number=number: number.append(args) or score(*args)
        phase = trainer.main_phase()
        found[source] = [trainer.run_step(phase) for _ in range(2)]
        calls[source] = len(number)
    assert calls == {"sampler": 1 + 2 * num_references, "recomputed": 2 + 2 * num_references}
    assert [MISMATCH in row for row in found["sampler"]] == [True, False]
    assert found["sampler"][0][MISMATCH] < 1e-6
    for ours, theirs in zip(found["sampler"], found["recomputed"], strict=True):
        for name in ("loss", "grad_norm", "kl_old", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
