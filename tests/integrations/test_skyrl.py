"""Our losses as SkyRL calls them: a stand-in with its signatures, because SkyRL 0.3.0 does not import on Python 3.11.

Source: SkyRL 0.3.0, ``skyrl/backends/skyrl_train/utils/ppo_utils.py``: ``PolicyLossRegistry``,
``register_policy_loss``, and ``apply_loss_reduction_to_advantages_minibatch`` with ``reduce_loss`` in `reduced`.
SkyRL itself was not run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.loops import DTYPES, LOSSES, batch, check_equal, install, of_a_trainer, of_our_loop
from toolkit import ConfigError
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.integrations.skyrl import register, registration

REGISTRY: dict[str, Callable[..., Any]] = {}


class PolicyLossRegistry:
    @classmethod
    def list_available(cls) -> list[str]:
        return list(REGISTRY)


def register_policy_loss(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda function: REGISTRY.setdefault(name, function)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    REGISTRY.clear()
    name = "skyrl.backends.skyrl_train.utils.ppo_utils"
    install(monkeypatch, name, PolicyLossRegistry=PolicyLossRegistry, register_policy_loss=register_policy_loss)
    monkeypatch.setattr(registration, "check_version", lambda *_: None)
    monkeypatch.delenv(registration.LOSS, raising=False)
    register()


def config(**settings: Any) -> SimpleNamespace:
    values = {"eps_clip_low": 0.1, "eps_clip_high": 0.28, "clip_ratio_c": 3.0, "loss_reduction": "token_mean"}
    cispo = SimpleNamespace(cispo_eps_clip_low=0.3, cispo_eps_clip_high=0.3)
    sapo = SimpleNamespace(tau_pos=1.0, tau_neg=1.05)
    off = SimpleNamespace(**dict.fromkeys(registration.OF_CORRECTION))
    return SimpleNamespace(**{**values, "cispo": cispo, "sapo": sapo, "off_policy_correction": off, **settings})


def reduced(given: dict[str, Tensor], reduction: str) -> Tensor:
    """The advantages of a mini-batch, scaled so a sum over tokens is the mean that SkyRL's reduction names."""
    tokens = given["mask"].sum(-1, keepdim=True).clamp(min=1)
    return given["advantages"] / {"token_mean": given["mask"].sum(), "sequence_mean": len(tokens) * tokens}[reduction]


def step(name: str, given: dict[str, Tensor], cfg: Any, logprobs: Tensor) -> Tensor:
    """Two micro-batches of a mini-batch."""
    advantages, total = reduced(given, cfg.loss_reduction), logprobs.sum() * 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        loss, metrics = REGISTRY[f"toolkit/{name}"](
            logprobs[rows],
            given["old_logprobs"][rows],
            advantages[rows],
            config=cfg,
            loss_mask=given["mask"][rows].float(),
            rollout_logprobs=None,
        )
        assert all(isinstance(value, float) for value in metrics.values())
        total = total + loss
    return total


OURS = {
    "vanilla": "policy_loss=vanilla policy_loss.cliprange_low=0.1 policy_loss.cliprange_high=0.28 "
    "policy_loss.clip_ratio_c=null",
    "gspo": "policy_loss=gspo policy_loss.cliprange_low=0.1 policy_loss.cliprange_high=0.28",
    "cispo": "policy_loss=cispo policy_loss.cliprange_low=0.3 policy_loss.cliprange_high=0.3",
    "sapo": "policy_loss=sapo",
}
MEANS = {"token_mean": "token_mean", "sequence_mean": "seq_mean_token_mean loss.aggregation.count_empty=true"}


@pytest.mark.filterwarnings("ignore:policy loss .* is defined with the mean")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", MEANS)
@pytest.mark.parametrize("name", OURS)
def test_micro_batches_add_up_to_our_loop(name: str, reduction: str, dtype: torch.dtype) -> None:
    given, cfg = batch(dtype), config(loss_reduction=reduction)
    mine = of_a_trainer(given, lambda logprobs: step(name, given, cfg, logprobs))
    check_equal(mine, of_our_loop(given, f"{OURS[name]} aggregation={MEANS[reduction]}"))


def test_regular_is_skyrls_formula() -> None:
    """Source: ``ppo_policy_loss`` with ``policy_loss_type="regular"``: -min(r A, clip(r) A) summed over the mask."""
    given, cfg = batch(), config()

    def theirs(logprobs: Tensor) -> Tensor:
        ratio, advantages = (logprobs - given["old_logprobs"]).exp(), reduced(given, "token_mean")
        values = -torch.min(ratio * advantages, ratio.clamp(0.9, 1.28) * advantages)
        return values.where(given["mask"], 0.0).sum()

    mine = of_a_trainer(given, lambda logprobs: step("vanilla", given, cfg, logprobs))
    check_equal(mine, of_a_trainer(given, theirs))


def test_losses_that_do_not_grow_with_the_advantage_are_refused() -> None:
    given = batch()
    for name in ("dro", "kimi"):
        with pytest.raises(ConfigError, match=r"scaling the advantages; choose a loss that is proportional"):
            step(name, given, config(), given["ref_logprobs"])
    with pytest.raises(ConfigError, match="has a part that does not grow"):
        step("dro", given, config(), given["ref_logprobs"])


def test_every_policy_loss_is_registered_once() -> None:
    register()
    assert {*REGISTRY} == {f"toolkit/{name}" for name in policy_loss_names()}
    assert LOSSES.keys() < {*policy_loss_names()}


def test_options_and_what_skyrl_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch()
    plain = step("vanilla", given, config(), given["ref_logprobs"])
    monkeypatch.setenv(registration.LOSS, "policy_loss.delta=1.05")
    assert step("vanilla", given, config(), given["ref_logprobs"]) != plain
    for text, message in {
        "policy_loss=gspo": "chooses a loss; set trainer.algorithm.policy_loss_type",
        "aggregation=square": "set trainer.algorithm.loss_reduction",
        "kl=k3": "set trainer.algorithm.use_kl_loss",
    }.items():
        monkeypatch.setenv(registration.LOSS, text)
        with pytest.raises(ConfigError, match=message):
            step("vanilla", given, config(), given["ref_logprobs"])
    monkeypatch.delenv(registration.LOSS)
    off = SimpleNamespace(tis_ratio_type="token")
    with pytest.raises(ConfigError, match="tis_ratio_type='token' is applied inside SkyRL's losses"):
        step("vanilla", given, config(off_policy_correction=off), given["ref_logprobs"])


def test_another_reduction_is_named_once() -> None:
    given = batch()
    with pytest.warns(UserWarning, match=r"set trainer\.algorithm\.loss_reduction=sequence_mean"):
        step("gmpo", given, config(), given["ref_logprobs"])
