"""`diagnose`: each kind of fault on made-up distributions, by hand where possible; and on real models (slow)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mismatch_cases import KINDS, make, names, world_of
from toolkit import DataError, GRPOLossConfig, LossRunner
from toolkit.runner.diagnosis import KINDS as KNOWN
from toolkit.runner.diagnosis import Diagnosis, diagnose
from toolkit.runner.diagnosis.rescoring import nucleus

SHAPE, SIZE = (8, 30), 40


def drawn(change: Any = lambda z: z) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random logits [8, 30, 40]; tokens drawn from ``change(logits)``; the log-probabilities of both."""
    logits = 2.0 * torch.randn(*SHAPE, SIZE)
    sampler = change(logits).log_softmax(-1)
    ids = torch.multinomial(sampler.exp().flatten(0, 1), 1).reshape(SHAPE)
    pick = lambda scores: scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    lengths = torch.arange(16, 16 + SHAPE[0]).unsqueeze(-1)
    return pick(sampler), pick(logits.log_softmax(-1)), torch.arange(SHAPE[1]) < lengths, ids


def test_every_kind_has_words() -> None:
    assert sorted([*KINDS, "negated"]) == sorted(KNOWN)


def test_a_healthy_pair_is_not_flagged() -> None:
    rollout, trainer, mask, ids = drawn()
    for noise in (0.0, 0.01, 0.02):
        outcome = diagnose(rollout + noise * torch.randn(SHAPE), trainer, mask, ids)
        assert not outcome
        assert outcome.kinds == ()
    assert outcome.tokens == int(mask.sum())
    assert outcome.mean_difference == pytest.approx(0.02 * math.sqrt(2 / math.pi), rel=0.2)


@pytest.mark.parametrize("lag", [-2, -1, 1])
def test_a_shift_is_named_with_its_size(lag: int) -> None:
    rollout, trainer, mask, _ = drawn()
    outcome = diagnose(rollout.roll(-lag, -1), trainer, mask)
    assert outcome.kinds == ("shifted",)
    assert outcome.numbers["lag"] == lag
    assert outcome.unexplained < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.4, 2.0])
def test_a_temperature(temperature: float) -> None:
    assert diagnose(*drawn(lambda z: z / temperature)).kinds == ("temperature",)


@pytest.mark.parametrize("p", [0.7, 0.9, 0.95])
def test_a_cut_vocabulary(p: float) -> None:
    outcome = diagnose(*drawn(lambda z: nucleus(z.flatten(0, 1), p).reshape(z.shape)))
    assert outcome.kinds == ("top_p",)


def test_a_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert nucleus(logits, 0.6).softmax(-1)[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert nucleus(logits, 0.4).softmax(-1)[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_values_that_are_no_log_probabilities() -> None:
    rollout, trainer, mask, ids = drawn()
    assert diagnose(rollout.exp(), trainer, mask, ids).kinds == ("probabilities",)
    for dtype in (torch.bfloat16, torch.float16):
        assert diagnose(rollout.to(dtype).float(), trainer, mask, ids).kinds == ("dtype_noise",)


def test_a_wrong_sign_is_named_on_either_side() -> None:
    rollout, trainer, mask, ids = drawn()
    for pair, whose in (
        ((-rollout, trainer), "sampler's"),
        ((rollout, -trainer), "trainer's"),
        ((-rollout.roll(1, -1), trainer), "sampler's"),
        ((-0.01 * rollout, 0.01 * trainer), "sampler's"),  # all in (0, 1], but no probabilities
    ):
        outcome = diagnose(*pair, mask, ids)
        assert outcome.kinds == ("negated",)
        assert f"100% of the {whose} values" in outcome.because
        assert "negative log-likelihoods: change the sign" in outcome.because
    assert outcome.unexplained < 1e-6
    assert diagnose(-rollout, -trainer).kinds == ("negated",)
    assert diagnose([2.0], [-2.0]).kinds == ("negated",)  # also of few values
    assert diagnose(rollout, trainer.exp(), mask, ids).kinds == ("probabilities",)
    assert sorted(diagnose([0.5] * 30, [0.5] * 30).kinds) == ["negated", "probabilities"]
    assert diagnose([1e-9] * 30, [-1e-9] * 30).kinds == ()


def test_few_values_and_values_left_out_are_said() -> None:
    few, nan = diagnose([-1.0] * 19, [-1.0] * 19), [math.nan]
    assert repr(few).startswith("too few values to judge: ")
    assert "too few values to judge" in few._repr_html_()
    assert repr(diagnose([-1.0] * 20, [-1.0] * 20)).startswith("no fault seen: ")
    outcome = diagnose([-1.0] * 30 + nan, nan * 2 + [-1.0] * 29)
    assert (outcome.tokens, outcome.dropped) == (28, 3)
    assert "over 28 tokens; 3 values left out, NaN or infinite" in repr(outcome)
    assert "left out" not in repr(few)
    outcome = diagnose([-1.0] * 30 + nan, [-1.0] * 31, [0, 1] * 15 + [0])
    assert (outcome.tokens, outcome.dropped) == (15, 0)


@pytest.mark.parametrize("invalid", [0.0, 1.0, math.nan, -math.inf])
def test_ends_of_rows_without_values(invalid: float) -> None:
    rollout, trainer, mask, ids = drawn()
    is_last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    outcome = diagnose(rollout.masked_fill(is_last, invalid), trainer, mask, ids)
    assert outcome.kinds == ("dropped_eos",)
    assert outcome.unexplained < 1e-6
    outcome = diagnose(rollout.masked_fill(~mask, invalid), trainer, torch.ones(SHAPE), ids)
    assert outcome.kinds == ("padding_scored",)
    assert outcome.numbers["longest"] == SHAPE[1] - 16


def test_rows_in_another_order() -> None:
    rollout, trainer, mask, _ = drawn()
    order = [1, 0, 2, 3, 4, 5, 6, 7]
    outcome = diagnose(rollout[order], trainer, mask)
    assert outcome.kinds == ("swapped_rows",)
    assert "0 -> 1, 1 -> 0" in outcome.because


def test_other_tokens_are_less_likely_than_a_guess() -> None:
    rollout, _, mask, ids = drawn()
    trainer = (3.0 * torch.randn(*SHAPE, SIZE)).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    outcome = diagnose(rollout, trainer, mask, ids)
    assert "tokenizer_offset" in outcome.kinds
    assert f"uniform guess over {SIZE} tokens" in outcome.because


def test_other_weights_are_named_as_a_set() -> None:
    small = diagnose(*drawn(lambda z: z + 0.1 * torch.randn(z.shape)))
    assert {"stale_weights", "dtype_noise"} <= {*small.kinds}
    large = diagnose(*drawn(lambda z: z + 0.8 * torch.randn(z.shape)))
    assert large.kinds == ("stale_weights", "duplicated_bos", "prompt_missing")


def test_arrays_of_every_kind_are_taken_and_wrong_ones_named() -> None:
    rollout, trainer, mask, ids = drawn()
    expected = diagnose(rollout, trainer, mask, ids)
    assert diagnose(rollout.tolist(), trainer.numpy(), mask.int(), ids.numpy()) == expected
    runner = LossRunner(GRPOLossConfig())
    assert runner.diagnose(rollout, trainer, mask, ids) == expected
    for call, message in (
        (lambda: diagnose(rollout, trainer[:, 1:]), r"trainer_logprobs has shape \[8, 29\]"),
        (lambda: diagnose(rollout, trainer, torch.zeros(SHAPE)), "mask leaves nothing to compare"),
        (lambda: diagnose(rollout, trainer, ids + 2), r"^mask holds \d+; give booleans.* by name: ids="),
        (lambda: diagnose(rollout, trainer, mask * 0.5), "^mask holds 0.5; give booleans"),
        (lambda: diagnose(rollout * math.nan, trainer), "^all values of rollout_logprobs are NaN or infinite"),
        (lambda: diagnose(rollout * math.nan, trainer, mask), "^all values of rollout_logprobs are NaN or infinite"),
        (lambda: diagnose(rollout, trainer - math.inf, mask), "^all values of trainer_logprobs are NaN or infinite"),
        (lambda: diagnose([-1.0, math.nan], [math.nan, -1.0]), "^all values to compare, on one side or the other"),
        (lambda: diagnose(rollout, trainer, ids=rollout), "ids are not token ids"),
        (lambda: diagnose(1.0, trainer), "rollout_logprobs is a float"),
        (lambda: runner.diagnose(rollout), r"or model=\.\.\. and batch="),
        (lambda: runner.diagnose(rollout, trainer, model=torch.nn.Linear(1, 1), batch={}), "no effect beside model="),
        (lambda: runner.diagnose(rollout, model=torch.nn.Linear(1, 1)), "batch is a NoneType|batch is None"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_a_diagnosis_shows_what_decided_and_what_to_do() -> None:
    outcome = Diagnosis(("shifted",), "values <fit> the token 1 later", 1.5, 100, 0.01)
    assert repr(outcome).splitlines()[0] == "shifted: values <fit> the token 1 later"
    assert "from_unshifted" in repr(outcome)
    assert "&lt;fit&gt;" in outcome._repr_html_()
    assert "from_unshifted" in outcome._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("kind_of_model", ["opt", "phi"])
def test_faults_of_models_that_no_threshold_was_chosen_on(kind_of_model: str) -> None:
    """The table of ``python -m tests.mismatch_cases opt phi`` with two seeds; with the model few sets are left."""
    world = world_of(kind_of_model)
    assert not any(names(make("clean", world, seed), "clean", world, with_model=False) for seed in range(25))
    for kind in KINDS:
        for seed in range(2):
            case = make(kind, world, seed)
            assert kind in names(case, kind, world, with_model=False), (kind, seed)
            kinds = names(case, kind, world, with_model=True)
            assert kinds == (kind,) or (kind in kinds and kind in ("dtype_noise", "stale_weights")), (kind, seed)
