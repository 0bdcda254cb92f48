"""Aggregations against the numbers of other projects' own code: the weight of every token, and the sum.

The loss matrix of a case is its ``log_probs``, so the peer's gradient is its weight matrix. A translator turns a peer's
parameters into a `Plan`; explicit counts over a whole step (of tokens, of sequences) take the place of our own.

Tolerances: 1e-9, or some ulps of float32 where the file says that the peer computed in it. The 1e-8 that NeMo-RL,
OpenRLHF, ROLL and verl add to the denominator of a row's mean, NeMo-RL to every denominator and ROLL to the number of
rows that it counts itself, is in the plan and not in the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dialects.parts import shrunk, without_effect
from tests.golden_data import (
    IS_SHIPPED,
    Case,
    Exclusion,
    all_params_read,
    cases,
    peers_error,
    relative_error,
    tolerance,
)
from toolkit.functional.aggregation import share

CASES = list(cases("aggregation"))
EPSILON = 1e-8
"""What some peers add to a denominator."""
ROWS_PER_PROMPT, MAX_SEQ_LEN = 2, 16
"""SkyRL's file: rows of a prompt, and of a micro-batch; the constant of ``seq_mean_token_sum_norm``."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the peer's function is said in ours."""

    name: str
    """The aggregation."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `share`."""
    denominator: float | None = None
    """What the peer divides by, where it is told; None: what this batch adds to the denominator."""
    factor: float = 1.0
    """The peer's weights are this times ours: data-parallel ranks, whose gradients are averaged afterwards."""
    row_epsilon: float = 0.0
    """What the peer adds to the number of a row's tokens before it divides their sum by it."""

    @property
    def is_adjusted(self) -> bool:
        """Whether the peer's weights are ours only after an epsilon, a factor, or without one of our counts."""
        is_other_count = self.denominator is not None and (self.denominator == 1 or self.denominator % 1 != 0)
        return self.row_epsilon != 0 or self.factor != 1 or is_other_count


def nemo_rl(case: Case) -> Plan:
    given = case.params
    if given["level"] == "token":
        tokens = given.get("gtoks", float(mask_of(case).sum()))
        return Plan(name="token_mean", denominator=tokens + EPSILON)
    rows = given.get("gseqs", float(mask_of(case).any(-1).sum()))
    return Plan(name="seq_mean_token_mean", denominator=rows + EPSILON, row_epsilon=EPSILON)


def openrlhf(case: Case) -> Plan:
    given = case.params
    factor = float(given.get("dp_size", 1))
    if given.get("token_level_loss", True):
        return Plan(name="token_mean", denominator=given.get("batch_num_tokens"), factor=factor)
    rows = given.get("global_batch_size")
    return Plan(name="seq_mean_token_mean", denominator=rows, factor=factor, row_epsilon=EPSILON)


def roll(case: Case) -> Plan:
    given = case.params
    if given["loss_agg_mode"] == "token-mean":
        return Plan(name="token_mean", denominator=given.get("batch_num_tokens"))
    if given["loss_agg_mode"] == "seq-mean-token-sum-norm":  # the padded width, and no number of sequences
        return Plan(name="constant", options={"length": mask_of(case).shape[-1]}, denominator=1.0)
    # Where it is not told how many sequences there are it counts all rows, also those without a scored token.
    rows = given.get("global_valid_samples", len(mask_of(case)) + EPSILON)
    if given["loss_agg_mode"] == "seq-mean-token-sum":
        return Plan(name="seq_mean_token_sum", denominator=rows)
    return Plan(name="seq_mean_token_mean", denominator=rows, row_epsilon=EPSILON)


def skyrl(case: Case) -> Plan:
    count_all = {"count_empty": True}
    plans = {
        "token_mean": Plan(name="token_mean"),
        "sequence_mean": Plan(name="seq_mean_token_mean", options=count_all),
        "seq_mean_token_sum_norm": Plan(name="constant", options={"length": MAX_SEQ_LEN, **count_all}),
        "prompt_mean": Plan(name="prompt_mean", options=of_prompts(case)),
        # The mean over micro-batches of their token means: that over prompts with the rows of a micro-batch.
        "token_mean_legacy": Plan(name="prompt_mean", options=of_prompts(case)),
    }
    return plans[case.params["r"]]


def of_prompts(case: Case) -> dict[str, Any]:
    mask = mask_of(case)
    prompts = torch.arange(len(mask)) // ROWS_PER_PROMPT
    tokens = torch.zeros(int(prompts.max()) + 1).index_add(0, prompts, mask.sum(-1).float())
    return {"prompt_tokens": tokens[prompts].unsqueeze(-1).expand(mask.shape), "num_prompts": len(tokens)}


def slime(case: Case) -> Plan:
    """Sums over samples: its back-end divides by their number."""
    if case.params.get("per_token"):
        return Plan(name="token_sum")
    if "denom" in case.params:  # the tokens of all samples of a rollout, for each of them
        return Plan(name="constant", options={"length": case.params["denom"]}, denominator=1.0)
    return Plan(name="seq_mean_token_mean", denominator=1.0)


def verl(case: Case) -> Plan:
    given, mode = case.params, case.params["mode"]
    factor = float(given.get("dp_size", 1))
    if mode in ("token-mean", "token-sum"):
        tokens = given.get("batch_num_tokens") if mode == "token-mean" else None
        return Plan(name=mode.replace("-", "_"), denominator=tokens, factor=factor)
    rows = given.get("global_batch_size")
    if mode == "seq-mean-token-sum-norm":
        length = given.get("loss_scale_factor") or mask_of(case).shape[-1]
        return Plan(name="constant", options={"length": length}, denominator=rows, factor=factor)
    epsilon = EPSILON if mode == "seq-mean-token-mean" else 0.0
    return Plan(name=mode.replace("-", "_"), denominator=rows, factor=factor, row_epsilon=epsilon)


def xtuner(case: Case) -> Plan:
    names = {"token": "token_mean", "sample": "seq_mean_token_mean", "square": "square"}
    return Plan(name=names[case.params["loss_reduction"]])


PEERS: dict[str, Callable[[Case], Plan]] = {
    "nemo_rl": nemo_rl,
    "openrlhf": openrlhf,
    "roll": roll,
    "skyrl": skyrl,
    "slime": slime,
    "verl": verl,
    "xtuner": xtuner,
}


MEANS_OF_ROWS = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
IGNORED: dict[str, dict[str, str]] = {
    "roll": {
        **without_effect(("token-mean",), ("global_valid_samples",), "it divides by tokens"),
        **without_effect(("seq-mean-token-sum-norm",), ("global_valid_samples",), "it divides by the width alone"),
        **without_effect(MEANS_OF_ROWS, ("batch_num_tokens",), "it does not divide by tokens"),
    },
    "verl": {
        **without_effect(("token-mean", "token-sum"), ("global_batch_size",), "it does not divide by rows"),
        **without_effect((*MEANS_OF_ROWS, "token-sum"), ("batch_num_tokens",), "it does not divide by tokens"),
        **without_effect(
            ("token-mean", "token-sum", *MEANS_OF_ROWS[:2]), ("loss_scale_factor",), "it does not divide by a constant"
        ),
    },
    "openrlhf": {"global_batch_size": "the mean over tokens does not divide by it", "batch_num_tokens": "nor this"},
    "nemo_rl": {"gtoks": "the mean over sequences does not divide by it", "gseqs": "nor that over tokens by this"},
}
"""Of each peer "name" or "entry/name" of what its function takes and does not use -> why."""


def plan_of(case: Case) -> Plan:
    """Return how a case is said in ours; every parameter must be read."""
    with all_params_read(case, IGNORED.get(case.peer, {})):
        return PEERS[case.peer](case)


def outcome(case: Case) -> str:
    """Return how a case is compared: a category of exclusion (of its loss), "adjusted" or "matched"."""
    if exclusion := why_the_loss_differs(case):
        return exclusion.category
    return "adjusted" if plan_of(case).is_adjusted else "matched"


def mask_of(case: Case) -> Tensor:
    return case.inputs["response_mask"] != 0


def weights_of(case: Case) -> Tensor:
    """Return our weights, [B, T]."""
    plan, mask = plan_of(case), mask_of(case)
    rows = torch.arange(len(mask)).unsqueeze(-1).expand(mask.shape)
    own = share(mask, rows, plan.name, **plan.options)
    count = own.count if plan.denominator is None else torch.full_like(own.count, plan.denominator)
    weights = own.weights if own.is_sum else own.divided(count)
    return shrunk(weights * plan.factor, mask, plan.row_epsilon)


def why_the_loss_differs(case: Case) -> Exclusion | None:
    """Return why only the weights of scored tokens are compared, None if the loss is, too."""
    if "grad_off_mask_maxabs" in case.outputs:
        return peers_error("masked tokens enter the peer's sum: a bug, not a definition")
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_peer(case: Case) -> None:
    weights, mask = weights_of(case), mask_of(case)
    assert (weights[~mask] == 0).all()
    assert relative_error(weights[mask], case.tensor("grad")) <= tolerance(case)
    if why_the_loss_differs(case) is None:
        loss = (weights * case.inputs["log_probs"]).sum()
        assert float(loss) == pytest.approx(float(case.outputs["loss"]), rel=tolerance(case))


def test_nothing_is_excluded_but_the_loss_of_a_bug() -> None:
    partly = [case.name for case in CASES if why_the_loss_differs(case)]
    assert CASES or not IS_SHIPPED
    assert all(case.startswith("roll/token-mean/") for case in partly), partly
    assert {case.peer for case in CASES} <= set(PEERS)
