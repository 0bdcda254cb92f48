"""Our losses as rLLM calls them: a stand-in with its signatures, because no registry has rLLM.

The stand-in has the fields of ``LossContext`` and the arguments of ``register_loss`` in
``rllm/trainer/algorithms/loss.py`` of its staging branch (2026). rLLM itself was not run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import import_module, reload
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toolkit
from tests.integrations.loops import DTYPES, LOSSES, batch, check_equal, install, namespace, of_a_trainer, of_our_loop
from toolkit import ConfigError, DataError
from toolkit.functional.policy.registry import policy_loss_names

REGISTRY: dict[str, tuple[Callable[..., Any], str | None]] = {}
PARAMS = {"eps_clip": 0.2, "eps_clip_high": None, "kl_beta": 0.0}
"""What rLLM passes to every loss."""


def register_loss(name: str, *, agg_mode: str | None = None) -> Callable[[Any], Any]:
    def decorator(function: Any) -> Any:
        REGISTRY[name] = function, agg_mode
        return function

    return decorator


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    REGISTRY.clear()
    install(monkeypatch, "rllm.trainer.algorithms.loss", register_loss=register_loss)
    project = tomllib.loads((Path(toolkit.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["rllm.losses"].values()
    reload(import_module(module))


def aggregate(values: Tensor, mask: Tensor, mode: str | None = None) -> Tensor:
    sums = (values * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        return (sums / mask.sum(-1).clamp(min=1)).sum() / (mask.sum(-1) > 0).sum()
    return sums.sum() / mask.sum()


def context(given: dict[str, Tensor], logprobs: Tensor, *, ref: bool = False, **params: Any) -> Any:
    return namespace(
        logp_curr=logprobs,
        logp_old=given["old_logprobs"],
        advantages=given["advantages"],
        action_mask=given["mask"].to(logprobs.dtype),
        obs_mask=torch.zeros_like(logprobs),
        aggregate=aggregate,
        logp_ref=given["ref_logprobs"] if ref else None,
        logp_rollout=None,
        params={**PARAMS, **params},
        backend="verl",
    )


def run(name: str, *arguments: Any, **params: Any) -> Tensor:
    loss, metrics = REGISTRY[f"toolkit/{name}"][0](context(*arguments, **params))
    assert all(isinstance(value, float) for value in metrics.values())
    return loss


CHOSEN: dict[str, dict[str, Any]] = {
    "vanilla": {"eps_clip_high": 0.28},
    "gspo": {"eps_clip": 0.1},
    "cispo": {"weight_max": 1.3},
    "sapo": {},
    "dro": {"tau": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_equals_our_loop(name: str, dtype: torch.dtype) -> None:
    given = batch(dtype)
    mean = "seq_mean_token_mean" if name in ("gspo", "sapo") else "token_mean"
    mine = of_a_trainer(given, lambda logprobs: run(name, given, logprobs, **CHOSEN[name]))
    check_equal(mine, of_our_loop(given, f"{LOSSES[name]} aggregation={mean}"))


def test_one_sequence_a_call_as_on_tinker() -> None:
    given = batch()
    row = {name: values[:1] for name, values in given.items()}
    flat = {name: values[0] for name, values in given.items()}
    mine = of_a_trainer(row, lambda logprobs: run("gspo", flat, logprobs[0], **CHOSEN["gspo"]))
    check_equal(mine, of_our_loop(row, f"{LOSSES['gspo']} aggregation=seq_mean_token_mean"))


def test_sequence_losses_are_pinned_to_the_mean_of_their_paper() -> None:
    assert {*REGISTRY} == {f"toolkit/{name}" for name in policy_loss_names()}
    assert REGISTRY["toolkit/gspo"][1] == "seq-mean-token-mean"
    assert REGISTRY["toolkit/vanilla"][1] is None


def test_a_kl_term_needs_a_reference() -> None:
    given = batch()
    loss = "policy_loss=vanilla kl=k2 loss.kl_loss_coef=0.1"
    further = {"overrides": "kl=k2 loss.kl_loss_coef=0.1"}
    mine = of_a_trainer(given, lambda logprobs: run("vanilla", given, logprobs, ref=True, **further))
    check_equal(mine, of_our_loop(given, loss, fields=["ref_logprobs"]))
    with pytest.raises(DataError, match="rLLM passes no logp_ref"):
        run("vanilla", given, given["old_logprobs"], **further)


def test_wrong_parameters_are_answered_in_one_line() -> None:
    given = batch()
    with pytest.raises(ConfigError, match=r"loss_params\.delt=1 is not an option of policy loss 'vanilla'; it has: "):
        run("vanilla", given, given["old_logprobs"], delt=1)
    with pytest.raises(ConfigError, match=r"set algorithm\.loss_fn instead"):
        run("vanilla", given, given["old_logprobs"], overrides="policy_loss=gspo")
    with pytest.raises(ConfigError, match=r"set algorithm\.loss_agg_mode"):
        run("vanilla", given, given["old_logprobs"], overrides="aggregation=square")


def test_without_rllm_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.integrations.rllm.losses import register

    monkeypatch.setitem(__import__("sys").modules, "rllm.trainer.algorithms.loss", None)
    with pytest.raises(ConfigError, match="this rLLM has no registry of losses"):
        register()
