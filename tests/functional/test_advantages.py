"""Advantage estimators: numbers worked by hand, and slow references written from the papers as loops."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import pytest
import torch

from toolkit import ConfigError, DataError
from toolkit.functional.advantages import advantage, advantage_names, register_advantage
from toolkit.functional.advantages.baselines import rae_baselines
from toolkit.functional.advantages.rlsd import rlsd_reweight
from toolkit.functional.rewards import RewardTerms

NAN = math.nan
HOLES = [[True, True, False, True], [True, True, True, False]]


def terms(rewards: list[float], groups: list[int] | None = None, **fields: Any) -> RewardTerms:
    tensors = {
        name: torch.tensor(value) if name == "mask" else torch.tensor(value, dtype=torch.float64)
        for name, value in fields.items()
    }
    return RewardTerms(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.tensor(groups if groups is not None else [0] * len(rewards)),
        **tensors,
    )


def run(name: str, r: RewardTerms, **options: Any) -> list[Any]:
    return advantage(name).compute(r, **options).tolist()


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-6, abs=1e-7)


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize(("std", "value"), [("sample", 0.5 / math.sqrt(0.5)), ("population", 1.0), ("none", 0.5)])
def test_grpo(std: str, value: float) -> None:
    assert run("grpo", terms([0.0, 1.0]), std=std, eps=1e-12) == near([-value, value])


def test_grpo_levels() -> None:
    r = terms([0, 2, 0, 4], [7, 7, -1, -1])
    spread = math.sqrt((2.25 + 0.25 + 2.25 + 6.25) / 3)  # around the mean of the batch, 1.5
    assert run("grpo", r, level="batch", eps=1e-12) == near([-1 / spread, 1 / spread, -2 / spread, 2 / spread])
    residuals = math.sqrt((1 + 1 + 4 + 4) / 3)
    found = run("grpo", r, level="batch", std_of="residuals", eps=1e-12)
    assert found == near([-1 / residuals, 1 / residuals, -2 / residuals, 2 / residuals])
    assert run("grpo", r, baseline="batch", std="none") == near([-1.5, 0.5, -1.5, 2.5])
    assert run("grpo", r, baseline="none", std="none") == near([0, 2, 0, 4])


def test_singletons() -> None:
    r = terms([3.0, 1.0, 0.0], [0, 1, 1], lengths=[2, 1, 1])
    for name in ("grpo", "dr_grpo", "rloo", "opo", "maxrl", "gpg"):
        assert run(name, r)[0] == 0
    assert run("dr_grpo", r, singleton="raw")[0] == 3
    assert run("opo", r, singleton="raw")[0] == 3
    assert run("rloo", r, singleton="raw")[0] == 3
    assert run("maxrl", r, singleton="raw")[0] == 3
    assert run("grpo", r, singleton="raw", eps=0.5)[0] == near(2.0)
    assert run("gpg", r, singleton="raw", counted="nonzero_rewards")[0] == near(4.5)  # alpha = 3 / 2
    assert run("reinforce_pp_baseline", r)[0] == 0
    assert run("gdpo", r)[0] == 0


def test_rewards_that_could_not_be_computed() -> None:
    assert run("grpo", terms([NAN, 1, 0]), eps=1e-12) == near([0, math.sqrt(0.5), -math.sqrt(0.5)])
    assert run("rloo", terms([NAN, 1, 0])) == [0, 1, -1]
    assert run("grpo", terms([NAN, 1.0])) == [0, 0]  # one that is left is alone
    assert run("grpo", terms([NAN, NAN])) == [0, 0]
    assert run("grpo", terms([math.inf, 1, 1])) == [0, 0, 0]


def test_dr_grpo_and_rloo() -> None:
    assert run("dr_grpo", terms([0, 0, 3])) == [-1, -1, 2]
    assert run("rloo", terms([0, 0, 3])) == [-1.5, -1.5, 3]
    # The others of the first: 0 and 3, deviation sqrt(4.5); of the last: equal, so nothing to divide by.
    found = run("rloo", terms([0, 0, 3]), std="leave_one_out", eps=1e-12)
    assert found == near([-1.5 / math.sqrt(4.5), -1.5 / math.sqrt(4.5), 3])
    # Equal numbers whose mean is not exact leave a rounding, which is no deviation to divide by.
    assert run("rloo", terms([1.1, 0.1, 0.1, 0.1, 0.1]), std="leave_one_out", eps=1e-12)[0] == near(1.0)


def test_opo() -> None:
    assert run("opo", terms([1, 0], lengths=[3, 1])) == [0.25, -0.75]
    assert run("opo", terms([1, 0], mask=HOLES)) == [0.5, -0.5]  # lengths are scored tokens: 3 and 3


def test_maxrl() -> None:
    assert run("maxrl", terms([1, 0, 0, 0])) == [3, -1, -1, -1]
    assert run("maxrl", terms([-1, -3])) == [0, 0]
    assert run("maxrl", terms([-1, -3]), nonpositive_mean="divide") == [-0.5, 0.5]
    assert run("maxrl", terms([-1, 1]), nonpositive_mean="divide") == [0, 0]


def test_gpg() -> None:
    r = terms([1, 1, 0, 1], [0, 0, 1, 1])
    assert run("gpg", r) == [0, 0, -1, 1]  # half of the sequences teach something: alpha = 2
    assert run("gpg", r, counted="nonzero_rewards", f_norm=2.0) == near([0, 0, -1 / 3, 1 / 3])


def test_lengths() -> None:
    r = terms([0, 1], lengths=[2, 4])
    assert run("grpo_times_length", r, max_length=8.0, std="population") == near([-0.25, 0.5])
    # Mean reward 1: penalties 0.5 x 2/4 and 0.5 x 4/4, so rewards 0.75 and 0.5 of equals.
    r = terms([1, 1], lengths=[2, 4], input_lengths=[5, 5])
    assert run("length_shaped", r, output_weight=0.5) == near([0.125, -0.125])
    assert run("length_shaped", terms([0, 0], lengths=[2, 4])) == [0, 0]
    r = terms([1, 1], lengths=[2, 2], input_lengths=[5, 10], num_turns=[1, 1])
    assert run("length_shaped", r, input_weight=1.0) == near([0.25, -0.25])
    assert run("length_shaped", terms([1, 1, NAN], lengths=[2, 4, 40]), output_weight=0.5) == near([0.125, -0.125, 0])


def test_pass_at_k() -> None:
    # n = 4, c = 1, k = 2: rho = 1 - 3/6 = 1/2, sigma = 1/2; wrong ones (1/2 - C(2,1)/C(3,1)) / sigma.
    assert run("pass_at_k", terms([1, 0, 0, 0]), k=2, eps=0.0) == near([1, -1 / 3, -1 / 3, -1 / 3])
    for rewards in ([0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]):  # 1 wrong: every team of 2 succeeds
        assert run("pass_at_k", terms(rewards), k=2) == [0] * 4
    assert run("pass_at_k", terms([1, 0]), k=8) == [0, 0]  # the group is one team
    assert run("pass_at_k", terms([0.4, 0.2]), k=1, threshold=0.3, eps=0.0) == near([1, -1])


def test_pass_at_k_margin() -> None:
    assert run("pass_at_k_margin", terms([1, 5, 3])) == [0, 2, 0]
    assert run("pass_at_k_margin", terms([5, 5, 3])) == [0, 0, 0]
    assert run("pass_at_k_margin", terms([1, 5, 3]), std="sample", eps=1e-12) == near([0, 1, 0])
    assert run("pass_at_k_margin", terms([5, NAN, 9, -3], [0, 0, 1, 2])) == [0, 0, 0, 0]


def test_reinforce_pp() -> None:
    r = terms([4, 0], [0, 1], mask=[[True, True], [True, False]])
    # Returns 2, 4 and 0 at gamma 1/2: mean 2, sample variance 4.
    assert run("reinforce_pp", r, gamma=0.5, eps=1e-12) == [near([0, 1]), near([-1, 0])]


def test_reinforce_pp_holes() -> None:
    r = terms([1, 0], [0, 1], mask=HOLES)
    carried = advantage("reinforce_pp").compute(r)
    assert carried[0, 0] == carried[0, 1] == carried[0, 3] > 0
    reset = advantage("reinforce_pp").compute(r, holes="reset")
    assert reset[0, 0] == reset[0, 1] == reset[1, 0] < 0 < reset[0, 3]  # the first turn never hears of the reward


def test_reinforce_pp_baseline() -> None:
    r = terms([0, 2, 0, 2], [0, 0, 1, 1], lengths=[1, 1, 1, 1])
    one = 1 / math.sqrt(4 / 3)
    assert run("reinforce_pp_baseline", r, eps=1e-12) == near([-one, one, -one, one])
    assert run("reinforce_pp_baseline", r, std="population", eps=1e-12) == near([-1, 1, -1, 1])
    assert run("reinforce_pp_baseline", r, std="population", eps=1.0, eps_to="std") == near([-0.5, 0.5, -0.5, 0.5])
    assert run("reinforce_pp_baseline", r, std="population", eps=3.0) == near([-0.5, 0.5, -0.5, 0.5])
    long = terms([0, 2], lengths=[3, 1])  # by tokens: mean of -1 -1 -1 1 is -1/2, variance 3/4
    found = run("reinforce_pp_baseline", long, std="population", eps=1e-12)
    assert found == near([-0.5 / math.sqrt(0.75), 1.5 / math.sqrt(0.75)])
    alone = terms([5.0, 0, 2], [0, 1, 1], lengths=[1, 1, 1])
    assert run("reinforce_pp_baseline", alone, singleton="centred", eps=1e-12) == near([0, -1, 1])


def test_gdpo_keeps_rewards_of_different_scale_apart() -> None:
    r = terms([0, 0], rewards_multi=[[0, 100], [1, 0]], reward_weights=[1.0, 0.5], lengths=[1, 1])
    one = math.sqrt(0.5)  # scores -one + one / 2 and one - one / 2, whitened again
    assert run("gdpo", r) == near([-one, one])
    r = terms([0, 0, 0], rewards_multi=[[0, NAN], [1, 0], [NAN, NAN]], lengths=[1, 1, 1])
    assert run("gdpo", r) == near([-one, one, 0])


def test_remax_and_rae() -> None:
    assert run("remax", terms([1, 0, 2], greedy_rewards=[0.5, 0.5, NAN])) == [0.5, -0.5, 0]
    r = terms([1, 2, NAN, 3], [0, 1, 0, 0], baselines=[0, 10, 0, 0])
    assert run("rae", r, decay=0.5) == [1, -8, 0, 2.5]
    assert rae_baselines(r, decay=0.5).tolist() == [1.75, 6, 1.75, 1.75]


def test_gae() -> None:
    r = terms([1.0], mask=[[True, True]], values=[[0.5, 0.25]])
    # delta = 0.25 - 0.5 and 1 - 0.25; A_0 = -0.25 + 0.5 x 0.75.
    assert run("gae", r, lam=0.5, whiten=False) == [near([0.125, 0.75])]
    assert run("gae", r, lam=0.5) == [near([-math.sqrt(0.5), math.sqrt(0.5)])]
    r = terms([1.0], mask=[[True, False, True]], values=[[0.5, 9.0, 0.25]])
    assert run("gae", r, lam=0.5, whiten=False) == [near([0.125, 0, 0.75])]
    # delta 8.5, -8.75, 0.75: the hole's value counts.
    assert run("gae", r, lam=0.5, whiten=False, holes="walk") == [near([8.5 - 4.375 + 0.1875, 0, 0.75])]


def test_optimal_token_baseline() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    r = terms(
        [1, 0],
        mask=[[True, True], [True, False]],
        logprobs=[[half, half], [quarter, 0.0]],
        sum_pi_squared=[[0.5, 0.5], [0.5, 0.5]],
    )
    # W = 1/2 and 1 in the first, 1 in the second: baseline (1/2) / (3/2) at 0, nothing beyond the second.
    for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
        assert run(name, r) == [near([2 / 3, 1]), near([-1 / 3, 0])]
        assert run(name, r, zero_tail=False) == [near([2 / 3, 0]), near([-1 / 3, 0])]


def test_rlsd() -> None:
    arguments = (torch.tensor([2.0, -2.0]), torch.zeros(2, 2), torch.tensor([[0.1, 9.0], [0.1, NAN]]))
    mask = torch.tensor([[True, True], [True, False]])
    found = rlsd_reweight(*arguments, mask, lam=0.5, clip_range=0.2)
    up, down = 2 * (0.5 + 0.5 * math.exp(0.1)), -2 * (0.5 + 0.5 * math.exp(-0.1))
    assert found.tolist() == [near([up, 2.2]), near([down, 0.0])]
    assert rlsd_reweight(*arguments, mask, negative_only=True)[0].tolist() == [2, 2]
    assert rlsd_reweight(*arguments, mask, lam=0.0).tolist() == [[2, 2], [-2, 0]]


# ---------------------------------------------------------------------- slow references


def test_pass_at_k_against_all_teams() -> None:
    """The paper's own definition: average over every team of k, of the team's reward standardised over teams."""
    for n, k in ((5, 2), (6, 3), (4, 4)):
        for c in range(n + 1):
            rewards = [1.0] * c + [0.0] * (n - c)
            teams = list(itertools.combinations(range(n), k))
            scores = [max(rewards[i] for i in team) for team in teams]
            mean = sum(scores) / len(scores)
            deviation = math.sqrt(mean * (1 - mean))
            expected = []
            for i in range(n):
                mine = [score - mean for team, score in zip(teams, scores, strict=True) if i in team]
                expected.append(sum(mine) / len(mine) / deviation if deviation > 0 else 0.0)
            assert run("pass_at_k", terms(rewards), k=k, eps=0.0) == near(expected)


def random_batch(draw: Random, num: int = 9, width: int = 7) -> dict[str, Any]:
    mask = [[draw.random() < 0.7 for _ in range(width)] for _ in range(num)]
    for row in mask:
        row[draw.randrange(width)] = True
    noise = [[draw.gauss(0, 1) for _ in range(width)] for _ in range(num)]
    return {
        "rewards": [draw.gauss(0, 1) for _ in range(num)],
        "groups": [draw.choice([3, -5, 11]) for _ in range(num)],
        "mask": mask,
        "values": noise,
        "logprobs": [[-draw.random() * 3 for _ in range(width)] for _ in range(num)],
        "sum_pi_squared": [[draw.random() for _ in range(width)] for _ in range(num)],
    }


def test_gae_against_sums_of_deltas() -> None:
    draw = Random(0)
    for _ in range(10):
        batch, gamma, lam = random_batch(draw), draw.random(), draw.random()
        found = run("gae", terms(**batch), gamma=gamma, lam=lam, whiten=False)
        for row, mask in enumerate(batch["mask"]):
            places = [t for t, scored in enumerate(mask) if scored]
            values = [batch["values"][row][t] for t in places] + [0.0]
            rewards = [0.0] * (len(places) - 1) + [batch["rewards"][row]]
            deltas = [rewards[i] + gamma * values[i + 1] - values[i] for i in range(len(places))]
            for i, t in enumerate(places):
                expected = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(places)))
                assert found[row][t] == near(expected)


@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline_against_loops(name: str) -> None:
    draw = Random(1)
    for _ in range(10):
        batch = random_batch(draw)
        found = run(name, terms(**batch), zero_tail=False, eps=1e-12, singleton="raw")
        num, width = len(batch["mask"]), len(batch["mask"][0])
        places = [[t for t in range(width) if row[t]] for row in batch["mask"]]
        slots = places if name == "optimal_token_baseline" else [list(range(len(own))) for own in places]
        energies = []
        for i in range(num):
            steps = [1 - 2 * math.exp(batch["logprobs"][i][t]) + batch["sum_pi_squared"][i][t] for t in places[i]]
            energies.append(dict(zip(slots[i], itertools.accumulate(steps), strict=True)))
        for i in range(num):
            peers = [j for j in range(num) if batch["groups"][j] == batch["groups"][i]]
            for slot, t in zip(slots[i], places[i], strict=True):
                there = [j for j in peers if slot in energies[j]]
                total = sum(energies[j][slot] for j in there)
                baseline = sum(energies[j][slot] * batch["rewards"][j] for j in there) / total if len(peers) > 1 else 0
                assert found[i][t] == pytest.approx(batch["rewards"][i] - baseline, rel=1e-6, abs=1e-6)


def test_leave_one_out_deviation_against_loops() -> None:
    draw = Random(2)
    rewards = [draw.gauss(0, 1) for _ in range(6)]
    expected = []
    for i, own in enumerate(rewards):
        others = [value for j, value in enumerate(rewards) if j != i]
        mean = sum(others) / 5
        expected.append((own - mean) / (math.sqrt(sum((value - mean) ** 2 for value in others) / 4) + 0.1))
    assert run("rloo", terms(rewards), std="leave_one_out", eps=0.1) == near(expected)


# ---------------------------------------------------------------------- the registry


def test_one_of_your_own() -> None:
    @register_advantage("raw", within_group=False)
    def raw(r, *, scale: float = 1.0):
        """Reward as it is."""
        return r.result(r.filled * scale)

    assert "raw" in advantage_names()
    assert run("raw", terms([1, NAN]), scale=2.0) == [2, 0]
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        advantage("raw").options({"scal": 1})
    with pytest.raises(ConfigError, match="already registered"):
        register_advantage("grpo")(lambda r: r.rewards)
    with pytest.raises(ConfigError, match="level='tokens'"):
        register_advantage("x", level="tokens")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs 'value'"):
        register_advantage("x", needs=("value",))  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        advantage("grop")
    with pytest.raises(DataError, match=r"advantage 'gae' needs mask; give RewardTerms\(mask=...\)"):
        advantage("gae").compute(terms([1.0]))
    with pytest.raises(DataError, match="lengths"):
        advantage("opo").compute(terms([1.0]))


@pytest.mark.parametrize("name", advantage_names())
def test_documentation_has_a_title_and_a_source(name: str) -> None:
    text = advantage(name).function.__doc__
    assert text.splitlines()[0].endswith(".")
    assert "Source: " in text
    for option, field in advantage(name).options_model.model_fields.items():
        assert f"    {option}: {field.description[:9]}" in text, option


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group_ids": None}, r"RewardTerms.group_ids is None; it must be a tensor \[S\]: one integer for each"),
        ({"rewards": [1.0, 2.0]}, r"RewardTerms.rewards is a list; it must be a tensor \[S\]"),
        ({"group_ids": torch.zeros(3)}, r"group_ids has shape \[3\] beside rewards of shape \[2\]; it must be \[S\]"),
        ({"rewards": torch.zeros(2, 4)}, r"rewards has shape \[2, 4\] .*; it must be \[S\]"),
        ({"mask": torch.ones(4, 2)}, r"mask has shape \[4, 2\] .*; it must be \[S, T\]"),
        ({"rewards_multi": torch.ones(2)}, r"rewards_multi has shape \[2\] .*; it must be \[S, K\]"),
    ],
)
def test_rewards_of_other_shapes_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        RewardTerms(**{"rewards": torch.zeros(2), "group_ids": torch.zeros(2, dtype=torch.int64), **fields})
