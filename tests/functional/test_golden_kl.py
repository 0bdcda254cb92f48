"""KL estimators against the numbers of other projects' own code: values and the gradient of their sum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_data import IS_SHIPPED, Case, Params, all_params_read, cases, is_single, relative_error, tolerance
from toolkit.functional.kl import kl_estimate

Terms = dict[str, Tensor]
Choice = dict[str, Any]
CASES = list(cases("kl"))


def _areal(params: Params, terms: Terms) -> Choice:
    return {"kl_type": params["t"], "input_clamp": None, "output_clamp": 10.0 if params.get("clamp") else None}


def _nemo_rl(params: Params, terms: Terms) -> Choice:
    choice = {"kl_type": params["t"], "input_clamp": params.get("ic", 20.0), "output_clamp": params.get("oc", 10.0)}
    if params.get("w") == "score":
        choice["gradient"] = "score_corrected"
    elif params.get("w") == "rollout":
        choice |= {"gradient": "is_corrected", "log_ratio": terms["log_probs"] - terms["rollout_log_probs"]}
    return choice


def _open_instruct(params: Params, terms: Terms) -> Choice:
    number = params["kl_estimator"]
    choice = {"kl_type": ["k1", "k2", "k3", "k1"][number], "input_clamp": 40.0, "output_clamp": None}
    if number == 3:  # "ratio times k1"
        choice |= {"gradient": "is_corrected", "log_ratio": terms["log_probs"] - terms["old_log_probs"]}
    return choice


def _openrlhf(params: Params, terms: Terms) -> Choice:
    return {"kl_type": params["t"], "input_clamp": None, "output_clamp": 10.0}


def _roll(params: Params, terms: Terms) -> Choice:
    return {"kl_type": params["t"], "input_clamp": None}


def _skyrl(params: Params, terms: Terms) -> Choice:
    return {"kl_type": params["t"]}


def _slime(params: Params, terms: Terms) -> Choice:
    output = 10.0 if params["t"] == "low_var_kl" else None
    choice = {"kl_type": params["t"], "input_clamp": None, "output_clamp": output}
    if params.get("unbiased"):
        choice |= {"gradient": "is_corrected", "log_ratio": terms["log_probs"] - terms["old_log_probs"]}
    return choice


def _verl(params: Params, terms: Terms) -> Choice:
    name = params["type"]
    if not name.endswith("+"):
        return {"kl_type": name}
    # Its straight-through gradient is that of k2 even where the clamp of k3 binds.
    return {"kl_type": name.removesuffix("+"), "gradient": "straight_through", "input_clamp": None}


def _xtuner(params: Params, terms: Terms) -> Choice:
    assert params.get("loss_weights", "response_mask") == "response_mask"
    return {"kl_type": params["kl_loss_type"]}


PEERS: dict[str, Callable[[Params, Terms], Choice]] = {
    "areal": _areal,
    "nemo_rl": _nemo_rl,
    "open_instruct": _open_instruct,
    "openrlhf": _openrlhf,
    "roll": _roll,
    "skyrl": _skyrl,
    "slime": _slime,
    "verl": _verl,
    "xtuner": _xtuner,
}
"""What each peer's parameters are called here. No case is left out."""


def choice_of(case: Case, terms: Terms) -> Choice:
    """Return our arguments for a case, every parameter of which must be read."""
    with all_params_read(case, {}):
        return PEERS[case.peer](case.params, terms)


def outcome(case: Case) -> str:
    """Return how a case is compared: all are, with arguments that we have."""
    return "matched"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_the_peers(case: Case) -> None:
    mask = case.inputs["response_mask"].bool()
    names = ("log_probs", "old_log_probs", "ref_log_probs", "rollout_log_probs")
    terms = {name: case.inputs[name][mask].clone() for name in names}
    logprobs = terms["log_probs"].requires_grad_()
    values = kl_estimate(logprobs, terms["ref_log_probs"], log_ratio_range=(None, None), **choice_of(case, terms))
    values.sum().backward()
    assert logprobs.grad is not None
    if "values" in case.outputs:
        # exp(-d) - 1 + d: the 1 is rounded away from however small the value is, and no term is larger than 1 + value.
        term = 1.0 if is_single(case) else 0.0
        assert relative_error(values.detach(), case.tensor("values"), term=term) <= tolerance(case)
        assert relative_error(logprobs.grad, case.tensor("grad_of_sum"), term=term) <= tolerance(case)
    else:  # XTuner's function sums
        loss = torch.tensor(float(case.outputs["loss"]), dtype=torch.float64)
        assert relative_error(values.detach().sum(), loss) <= tolerance(case)
        assert relative_error(logprobs.grad, case.tensor("grad")) <= tolerance(case)


@pytest.mark.skipif(not IS_SHIPPED, reason="other cases may be of other kinds alone")
def test_there_are_cases_to_compare() -> None:
    assert CASES
