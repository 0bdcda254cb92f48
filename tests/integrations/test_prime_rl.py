"""Our losses as prime-rl calls them: a stand-in with its signatures, because no registry has prime-rl.

The stand-in has the fields of ``LossInputs`` and ``LossOutputs`` and the sums of ``compute_loss`` in
``src/prime_rl/trainer/rl/loss.py``, as they were in October 2026. prime-rl itself was not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.loops import DTYPES, LOSSES, batch, check_equal, install, of_a_trainer, of_our_loop
from toolkit import ConfigError, DataError
from toolkit.integrations.prime_rl import policy_loss


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)


def step(
    given: dict[str, Tensor], logprobs: Tensor, *, ref: bool = False, weights: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """One call a sequence; the sum is divided by the tokens of the step, as prime-rl does."""
    total = logprobs[0].sum() * 0.0
    for row in range(len(logprobs)):
        inputs = LossInputs(
            trainer_logprobs=logprobs[row],
            inference_logprobs=given["old_logprobs"][row],
            ref_logprobs=given["ref_logprobs"][row] if ref else None,
            advantages=given["advantages"][row],
            loss_mask=given["mask"][row],
            loss_weights=None if weights is None else weights[row],
        )
        outputs = policy_loss(inputs, **kwargs)
        assert all(value.shape == () for value in outputs.metrics.values())
        total = total + outputs.loss
    return total / given["mask"].sum()


@pytest.mark.filterwarnings("ignore:policy loss .* is averaged by")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_equals_our_loop(name: str, dtype: torch.dtype) -> None:
    given = batch(dtype)
    mine = of_a_trainer(given, lambda logprobs: step(given, logprobs, loss=LOSSES[name]))
    check_equal(mine, of_our_loop(given, f"{LOSSES[name]} aggregation=token_mean"))


def test_ipo_is_prime_rls_formula() -> None:
    """Source: ``IPOLoss``: -A r where |p - q| <= eps, plus kl_tau (log r)^2 everywhere."""
    given = batch()

    def theirs(logprobs: Tensor) -> Tensor:
        log_ratio = logprobs - given["old_logprobs"]
        near = ((logprobs.exp() - given["old_logprobs"].exp()).abs() <= 0.1).to(logprobs.dtype)
        values = -near * given["advantages"] * log_ratio.exp() + 1e-3 * log_ratio**2
        return values[given["mask"]].sum() / given["mask"].sum()

    mine = of_a_trainer(given, lambda logprobs: step(given, logprobs, loss="loss=preset/prime_rl/ipo"))
    check_equal(mine, of_a_trainer(given, theirs))


def test_a_reference_gives_a_kl_term_and_a_teacher() -> None:
    given = batch()
    loss = "policy_loss=vanilla kl=k2 loss.kl_loss_coef=0.1"
    mine = of_a_trainer(given, lambda logprobs: step(given, logprobs, ref=True, loss=loss))
    check_equal(mine, of_our_loop(given, loss, fields=["ref_logprobs"]))
    mine = of_a_trainer(given, lambda logprobs: step(given, logprobs, ref=True, loss="loss=opd"))
    check_equal(mine, of_our_loop(given, "loss=opd", teacher_logprobs=given["ref_logprobs"]))
    with pytest.raises(DataError, match="reads ref_logprobs, but this batch has none"):
        step(given, given["old_logprobs"], loss=loss)


def test_weights_scale_tokens_and_masked_positions_may_hold_anything() -> None:
    given = batch()
    weights = torch.full_like(given["advantages"], 2.0)
    plain = of_a_trainer(given, lambda logprobs: step(given, logprobs, loss=LOSSES["vanilla"]))
    double = of_a_trainer(given, lambda logprobs: step(given, logprobs, weights=weights, loss=LOSSES["vanilla"]))
    check_equal([value / 2 for value in double], plain)
    for name in ("advantages", "old_logprobs"):
        given[name] = given[name].masked_fill(~given["mask"], float("nan"))
    check_equal(of_a_trainer(given, lambda logprobs: step(given, logprobs, loss=LOSSES["vanilla"])), plain, 0)


def test_tokens_that_the_sampler_did_not_report() -> None:
    given = batch()
    given["old_logprobs"][0, 1] = float("-inf")
    with pytest.raises(DataError, match="inference_logprobs is NaN or infinite at 1 positions"):
        step(given, given["ref_logprobs"], loss=LOSSES["vanilla"])
    loss = f"{LOSSES['vanilla']} policy_loss.anchor=rollout loss.missing_rollout=reject"
    assert of_a_trainer(given, lambda logprobs: step(given, logprobs, loss=loss))[1].isfinite().all()


WRONG = {
    "aggregation=square": "aggregation=square has no effect in prime-rl; it divides by the tokens of the step",
    "correction=tis": "ratios are already to the sampler",
    "loss=ce": "CELossConfig has no policy loss, which prime-rl asks for",
    "policy_loss=clip_cov": "compares tokens of several sequences",
    "policy_loss=real": "compares tokens of several sequences",
    "policy_loss=vanilla kl=full": "compares distributions",
    "policy_loss=gpso": "try: policy_loss=gspo",
    "policy_loss=vanilla loss.entropy_coef=0.1": "an entropy bonus or a further term",
}


@pytest.mark.parametrize("loss", WRONG)
def test_what_prime_rl_does_itself_is_refused_in_one_line(loss: str) -> None:
    given = batch()
    with pytest.raises(ConfigError) as error:
        step(given, given["old_logprobs"], loss=loss)
    assert WRONG[loss] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_another_mean_is_named_once() -> None:
    given = batch()
    with pytest.warns(UserWarning, match="by seq_mean_token_sum as a rule, but prime-rl averages by token_mean"):
        step(given, given["old_logprobs"], loss="policy_loss=topr_sequence")


def test_without_prime_rl_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prime_rl.trainer.rl.loss", None)
    given = batch()
    with pytest.raises(ConfigError, match=r"prime_rl\.trainer\.rl\.loss\.LossOutputs is missing"):
        step(given, given["old_logprobs"], loss="policy_loss=vanilla")
