"""A parameter of a recorded case that nothing reads fails by its name, in every kind and for every project."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.functional.test_golden_counts import KINDS
from tests.golden_data import IS_SHIPPED, Case, Params, params_of

TESTS: dict[str, Callable[[Case], None]] = {
    "policy_loss": KINDS["policy_loss"].test_as_the_peer_computed_it,
    "kl": KINDS["kl"].test_values_and_gradients_are_the_peers,
    "aggregation": KINDS["aggregation"].test_equals_the_peer,
    "is_correction": KINDS["is_correction"].test_equals_the_peer,
    "advantage": KINDS["advantage"].test_as_the_peer_computes_it,
}
COMPARED = {
    (kind, case.peer): case
    for kind, module in KINDS.items()
    for case in module.CASES
    if module.outcome(case) in ("matched", "adjusted")
}
"""One case of each kind and project."""
needs_own_cases = pytest.mark.skipif(not IS_SHIPPED, reason="takes certain cases of ours")


def with_more(case: Case, **params: Any) -> Case:
    return dataclasses.replace(case, params=params_of({**case.params.written, **params}))


@pytest.mark.parametrize("key", COMPARED, ids="/".join)
def test_a_parameter_that_nothing_reads_fails_by_name(key: tuple[str, str]) -> None:
    case = COMPARED[key]
    TESTS[case.kind](case)
    with pytest.raises(AssertionError, match=f"{case.peer}: nothing reads parameter 'surplus'"):
        TESTS[case.kind](with_more(case, surplus=1))
    with pytest.raises(AssertionError, match=f"{case.peer}: nothing reads parameter 'surplus'"):
        TESTS[case.kind](with_more(case, _call={"surplus": 1}))


def test_a_parameter_of_a_nested_value_counts() -> None:
    params = Params({"outer": {"known": 1, "new": 2}, "rules": [{"known": 1}, {"new": 2}]})
    assert params["outer"]["known"] == params["rules"][0]["known"] == 1
    assert params.unread() == ["outer.new", "rules.new"]


def test_params_cannot_be_read_all_at_once() -> None:
    params = Params({"one": 1, "two": 2})
    for read_all in (dict, list, lambda p: {**p}, lambda p: p.items(), lambda p: p.keys(), lambda p: p.values()):
        with pytest.raises(TypeError):
            read_all(params)
    assert params.unread() == ["one", "two"]
    assert repr(params) == "{'one': 1, 'two': 2}"
    assert params.unread() == ["one", "two"]


def test_defaults_share_what_is_read() -> None:
    params = Params({"one": 1, "two": None})
    over = params.over({"two": 2, "three": 3})
    assert (over["two"], over["three"], "one" in over, over.get("four", 4)) == (None, 3, True, 4)
    assert params.unread() == []
    params.forget()
    assert params.unread() == ["one", "two"]


def test_call_arguments_are_parameters() -> None:
    params = params_of({"one": 1, "_call": {"two": 2}})
    assert (params["one"], params["two"], params.unread()) == (1, 2, [])
    with pytest.raises(AssertionError, match="both in _call and beside it"):
        params_of({"one": 1, "_call": {"one": 2}})


@needs_own_cases
@pytest.mark.parametrize(
    ("peer", "entry", "params", "factor"),
    [
        ("openrlhf", "ppo", {"_call": {"dp_size": 2, "batch_num_tokens": 64}}, lambda case: 2 * tokens(case) / 64),
        ("nemo_rl", "ppo", {"_call": {"global_valid_toks": 64}}, lambda case: tokens(case) / 64),
        ("verl", "vanilla", {"dp_size": 2, "batch_num_tokens": 64}, lambda case: 2 * tokens(case) / 64),
        ("roll", "ppo", {"_call": {"global_valid_samples": 16}}, lambda case: rows(case) / 16),
        ("prime_rl", "ce", {"_call": {"ce_scale": 64}}, lambda case: tokens(case) / 64),
        ("liger", "dapo", {"num_items_in_batch": 64}, lambda case: tokens(case) / 64),
    ],
)
def test_counts_of_a_whole_step_rescale(peer: str, entry: str, params: dict[str, Any], factor: Any) -> None:
    module = KINDS["policy_loss"]
    case = next(case for case in module.CASES if (case.peer, case.entry) == (peer, entry))
    plain, _ = module.ours(case, module.translated(case))
    more = with_more(case, **params)
    rescaled, _ = module.ours(more, module.translated(more))
    assert float(rescaled) == pytest.approx(float(plain) * factor(case), rel=1e-6)


def tokens(case: Case) -> float:
    return float((case.inputs["response_mask"] != 0).sum())


def rows(case: Case) -> float:
    return float((case.inputs["response_mask"] != 0).any(-1).sum())


@needs_own_cases
def test_adv_tau_multiplies_advantages_alone() -> None:
    module = KINDS["policy_loss"]
    case = next(case for case in module.CASES if (case.peer, case.entry) == ("prime_rl", "default_dppo"))
    loss = {
        key: float(module.ours(changed, module.translated(changed))[0])
        for key, changed in {
            "plain": case,
            "half": with_more(case, adv_tau=0.5),
            "none": with_more(case, adv_tau=0.0),
        }.items()
    }
    assert loss["half"] - loss["none"] == pytest.approx((loss["plain"] - loss["none"]) / 2)
    assert loss["none"] != 0  # the square of the log ratio stays


@needs_own_cases
@pytest.mark.parametrize("entry", ["grpo_loss_context", "oreal_loss_context"])
def test_use_kl_loss_adds_the_kl_term(entry: str) -> None:
    module = KINDS["policy_loss"]
    case = next(case for case in module.CASES if (case.peer, case.entry) == ("xtuner", entry))
    mask, difference = case.inputs["response_mask"] != 0, case.inputs["log_probs"] - case.inputs["ref_log_probs"]
    losses = []
    for is_used in (True, False):
        changed = with_more(case, use_kl_loss=is_used, kl_loss_type="k2", kl_loss_coef=0.5)
        losses.append(float(module.ours(changed, module.translated(changed))[0]))
    assert losses[0] - losses[1] == pytest.approx(0.5 * float((difference[mask] ** 2 / 2).mean()))
