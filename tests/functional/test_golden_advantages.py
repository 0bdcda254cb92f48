"""Every advantage that other projects' code computed, from our estimators with their options."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_data import (
    IS_SHIPPED,
    OPERATIONS,
    ULP,
    Case,
    Exclusion,
    Params,
    all_params_read,
    cases,
    is_single,
    peers_error,
    relative_error,
    tolerance,
)
from toolkit.functional.advantages import advantage
from toolkit.functional.advantages.rlsd import rlsd_reweight
from toolkit.functional.rewards import RewardTerms

Call = tuple[str, dict[str, Any]]
EXCLUDED = {
    "xtuner/grpo/*": peers_error("XTuner divides a group of one by the deviation of one number: NaN; ours is 0"),
    "xtuner/dr_grpo/*": peers_error("as xtuner/grpo: a group of one has no deviation"),
    "xtuner/passk/*": peers_error(
        "XTuner gives a group that is all wrong -1 / eps = -1e6, the paper 0; in a mixed group smaller than k its "
        "formula rewards wrong answers"
    ),
}
"""Name pattern -> why some sequences are not compared; `excluded` says which."""
MAX_EXCLUDED = 0.1
"""Of all cases, those with an excluded sequence."""
SINGLES_IN_FP32 = ("verl/grpo/*", "verl/gdpo/*")
"""verl takes mean 0 and deviation 1 of a group of one as fp32 constants, and adds eps to the latter in fp32."""
SWIFT_WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)
PRIME_INPUT_TOKENS = 5


def terms(case: Case) -> RewardTerms:
    """Return the bundle that the peer's function was given."""
    x, mask = case.inputs, case.inputs["response_mask"].bool()
    lengths = x["seq_lens"] if case.peer in ("xtuner", "prime_rl") else mask.sum(-1)
    fields = {
        "rewards": x["rewards"].double(),
        "group_ids": x["group_index"],
        "lengths": lengths,
        "mask": mask,
        "token_rewards": x["token_level_rewards"].double(),
        "values": x["values"],
        "logprobs": x["old_log_probs"],
        "sum_pi_squared": x["sum_pi_squared"],
    }
    if case.peer == "ms_swift" and case.entry != "rlsd":
        fields["rewards"] = x["rewards_multi"] @ SWIFT_WEIGHTS
        fields |= {"rewards_multi": x["rewards_multi"], "reward_weights": SWIFT_WEIGHTS}
    if case.entry == "rae":
        fields["baselines"] = torch.zeros(len(x["rewards"]), dtype=torch.float64)
    if case.peer == "prime_rl":
        fields["input_lengths"] = torch.full_like(x["seq_lens"], PRIME_INPUT_TOKENS)
        fields["num_turns"] = torch.ones_like(x["seq_lens"])
    return RewardTerms(**fields)


# ---------------------------------------------------------------------- one translator per peer


def verl(entry: str, p: Params) -> Call:
    group = {"eps": p.get("epsilon", 1e-6), "singleton": "raw"}
    if entry == "grpo":
        return "grpo", {**group, "std": "sample" if p.get("norm_adv_by_std_in_grpo", True) else "none"}
    if entry == "gdpo":
        return "gdpo", {**group, "weighting": "token", "whiten_eps_to": "variance"}
    if entry == "grpo_passk":
        divides = p.get("norm", p.get("norm_adv_by_std_in_grpo", True))
        return "pass_at_k_margin", {"std": "sample" if divides else "none", "eps": group["eps"]}
    if entry == "gpg":
        return "gpg", {"counted": "nonzero_rewards", "f_norm": p.get("f_norm", 1.0), "singleton": "raw"}
    if entry == "gae":
        return "gae", {"gamma": p["gamma"], "lam": p["lam"]}
    if entry.endswith("optimal_token_baseline"):
        return entry, {"zero_tail": p.get("handle_zero_tail", True), "eps": p.get("epsilon", 1e-8), "singleton": "raw"}
    return {
        "rloo": ("rloo", {"singleton": "raw"}),
        "rloo_vectorized": ("rloo", {}),
        "opo": ("opo", {"singleton": "raw"}),
        "reinforce_plus_plus": ("reinforce_pp", {"gamma": p.get("gamma", 1.0)}),
        "reinforce_plus_plus_baseline": ("reinforce_pp_baseline", {"singleton": "raw"}),
    }[entry]


def skyrl(entry: str, p: Params) -> Call:
    eps = p.get("epsilon", 1e-6)
    if entry == "grpo":
        std = "sample" if p.get("grpo_norm_by_std", True) else "none"
        return "grpo", {"eps": eps, "singleton": "raw", "std": std}
    if entry == "gae":
        return "gae", {"gamma": p["gamma"], "lam": p["lam"], "holes": "walk"}
    return {
        "rloo": ("rloo", {}),
        "maxrl": ("maxrl", {"eps": eps, "nonpositive_mean": "divide", "singleton": "raw"}),
        "reinforce++": ("reinforce_pp", {"gamma": p.get("gamma", 1.0), "holes": "reset"}),
    }[entry]


def xtuner(entry: str, p: Params) -> Call:
    if entry == "dr_grpo":
        return "grpo_times_length", {"max_length": p["max_length"], "eps": p.get("eps", 1e-8)}
    return {
        "grpo": ("grpo", {"eps": p.get("eps", 1e-8)}),
        "opo": ("opo", {}),
        "passk": ("pass_at_k", {"k": p.get("k", 4), "eps": p.get("eps", 1e-6)}),
        "rloo": ("rloo", {"singleton": "raw"}),
    }[entry]


def ms_swift(entry: str, p: Params) -> Call:
    scale, estimator = p["scale_rewards"], p["advantage_estimator"]
    if scale == "gdpo" and estimator != "reinforce_plus_plus":
        return "gdpo", {}
    scaled = {"std": "sample", "level": scale} if scale in ("group", "batch") else {"std": "none"}
    # Its REINFORCE++ divides by the deviation of what the baseline leaves.
    residuals = {"std_of": "residuals"} if estimator == "reinforce_plus_plus" else {}
    return "rloo" if estimator == "rloo" else "grpo", {**scaled, **residuals}


def nemo_rl(entry: str, p: Params) -> Call:
    if entry == "reinforce++":
        baseline = "group" if p["minus_baseline"] else "none"
        return "reinforce_pp_baseline", {"std": "population", "baseline": baseline, "singleton": "centred"}
    if p["use_leave_one_out_baseline"]:
        return "rloo", {"std": "leave_one_out" if p["normalize_rewards"] else "none", "eps": 1e-6}
    return "grpo", {"std": "sample" if p["normalize_rewards"] else "none", "eps": 1e-6}


def prime_rl(entry: str, p: Params) -> Call:
    if entry == "max_rl":
        return "maxrl", {}
    if entry == "rae":
        return "rae", {"decay": p["decay"]}
    penalty = p.get("length_penalty") or Params({})
    names = {"output": "num_output_tokens_weight", "input": "num_input_tokens_weight", "turns": "num_turns_weight"}
    if not penalty:
        return "dr_grpo", {}
    return "length_shaped", {f"{ours}_weight": penalty[theirs] for ours, theirs in names.items() if theirs in penalty}


def roll(entry: str, p: Params) -> Call:
    if entry == "gae":
        return "gae", {"gamma": p["gamma"], "lam": p["lam"], "holes": "walk", "whiten": False}
    mean, std = p.get("norm_mean_type"), p.get("norm_std_type")
    scaled = {"std": "sample", "level": std} if std else {"std": "none"}
    return "grpo", {"baseline": mean or "none", "eps": 1e-6, **scaled}


def slime(entry: str, p: Params) -> Call:
    return "gae", {"gamma": p["gamma"], "lam": p["lam"], "holes": "walk", "whiten": False}


def areal(entry: str, p: Params) -> Call:
    level, mean = p.get("std_level", "group"), p.get("mean_level", "group")
    kind = "sample" if p.get("std_unbiased", True) else "population"
    # Its deviation is around the baseline, which may leave the sequence out.
    options = {"baseline": mean or "none", "eps": p.get("eps", 1e-5), "std_of": "residuals"}
    options |= {"std": kind, "level": level} if level in ("group", "batch") else {"std": "none"}
    return "rloo" if p.get("mean_leave1out") else "grpo", options


def tinker(entry: str, p: Params) -> Call:
    return "dr_grpo", {}


TRANSLATORS = {f.__name__: f for f in (verl, skyrl, xtuner, ms_swift, nemo_rl, prime_rl, roll, slime, areal, tinker)}


def call_of(case: Case) -> Call:
    """Return the estimator of ours and its options; every parameter must be read."""
    with all_params_read(case, {}):
        if case.entry == "rlsd":
            return "rlsd", {name: case.params[name] for name in ("lam", "clip_range") if name in case.params}
        return TRANSLATORS[case.peer](case.entry, case.params)


def outcome(case: Case) -> str:
    """Return how a case is compared: a category of exclusion of some of its sequences, or "matched"."""
    exclusions: list[Exclusion] = [why for pattern, why in EXCLUDED.items() if matches(case, [pattern])]
    return exclusions[0].category if excluded(case).any() else "matched"


def computed(case: Case) -> Tensor:
    """Return our advantages in the case's layout: [S], or one per scored token."""
    r = terms(case)
    name, options = call_of(case)
    if name == "rlsd":
        teacher = r.require("logprobs") + case.inputs["kl"]
        found = rlsd_reweight(r.rewards, r.require("logprobs"), teacher, r.require("mask"), **options)
    else:
        found = advantage(name).compute(r, **options)
    mask = case.inputs["response_mask"].bool()
    if "advantages_tok" in case.outputs:
        return (found if found.dim() == 2 else found.unsqueeze(-1).expand(mask.shape))[mask]
    if found.dim() == 2:  # constant per sequence, as the file says
        first = mask.to(torch.uint8).argmax(-1, keepdim=True)
        found = found.gather(-1, first).squeeze(-1)
    return found


def expected(case: Case) -> Tensor:
    return case.tensor("advantages_tok" if "advantages_tok" in case.outputs else "advantages_seq")


def matches(case: Case, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)


def group_sums(case: Case, values: Tensor) -> Tensor:
    """Return the sum over the group of each sequence, [S]."""
    groups = case.inputs["group_index"]
    return (groups.unsqueeze(0) == groups.unsqueeze(1)).double() @ values.double()


def allowed(case: Case) -> float:
    """The relative tolerance of the case, all that float32 costs where every number fits it: then the peer rounded."""
    theirs, sizes = expected(case), group_sums(case, torch.ones(len(case.inputs["rewards"])))
    rounded = torch.equal(theirs.float().double(), theirs)
    single = is_single(case) or (matches(case, SINGLES_IN_FP32) and bool((sizes == 1).any()))
    return max(tolerance(case), ULP * (OPERATIONS + cancellation(case))) if rounded or single else tolerance(case)


def cancellation(case: Case) -> float:
    """Return how many times larger rewards are than the largest of what their group's mean leaves of one.

    A mean rounded to float32 is off by an ulp of the reward, which stays when the rest cancels.
    """
    rewards = terms(case).rewards
    sizes = group_sums(case, torch.ones(len(rewards)))
    rest = (rewards - group_sums(case, rewards) / sizes).abs().max()
    return float(rewards.abs().max() / rest.clamp(min=ULP))


CASES = list(cases("advantage"))


def excluded(case: Case) -> Tensor:
    """Return which sequences a peer's bug concerns, [S] bool."""
    rewards = case.inputs["rewards"]
    if not matches(case, EXCLUDED):
        return torch.zeros(len(rewards), dtype=torch.bool)
    sizes, right = group_sums(case, torch.ones(len(rewards))), group_sums(case, rewards > 0)
    if case.entry != "passk":
        return sizes == 1
    return (right == 0) | ((sizes < case.params.get("k", 4)) & (right < sizes))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_peer_computes_it(case: Case) -> None:
    ours, theirs, left_out = computed(case), expected(case), excluded(case)
    if left_out.any():
        differs = (ours - theirs)[left_out].abs().nan_to_num(1.0) > allowed(case)
        assert differs.all() or not IS_SHIPPED, "it agrees: no exclusion"
        ours, theirs = ours[~left_out], theirs[~left_out]
    assert ours.isfinite().all()
    error = relative_error(ours, theirs)
    assert error <= allowed(case), (error, case.params)


@pytest.mark.parametrize("case", [c for c in CASES if "returns_tok" in c.outputs], ids=lambda case: case.name)
def test_returns_are_advantages_plus_values(case: Case) -> None:
    r, mask = terms(case), case.inputs["response_mask"].bool()
    _, options = call_of(case)
    found = advantage("gae").compute(r, **{**options, "whiten": False}) + r.require("values")
    assert relative_error(found[mask], case.tensor("returns_tok")) <= tolerance(case)


@pytest.mark.skipif(not IS_SHIPPED, reason="other cases may be any")
def test_few_are_excluded() -> None:
    assert sum(bool(excluded(case).any()) for case in CASES) <= MAX_EXCLUDED * len(CASES)


@pytest.mark.skipif(not IS_SHIPPED, reason="other cases need not contain every one")
def test_every_exclusion_is_used() -> None:
    for pattern in EXCLUDED:
        assert any(matches(case, [pattern]) and excluded(case).any() for case in CASES), pattern
