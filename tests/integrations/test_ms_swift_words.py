"""What is said of ms-swift's words, against ms-swift as installed: its arguments, its loss and its advantages.

Skipped where ms-swift is not installed (.ci/peers installs it).
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields

import pytest
import torch

pytest.importorskip("swift.rlhf_trainers.grpo_trainer", exc_type=ImportError)

from swift.arguments.rlhf_args import GRPOArguments
from swift.rl_core.advantage import compute_advantages
from swift.rlhf_trainers.grpo_trainer import WINDOW_NORMALIZED_LOSS_TYPES, GRPOTrainer

from tests.integrations.loops import check_equal, of_our_loop
from tests.integrations.swift_trainer import CEILING, LONGEST, RANGE, THRESHOLD, Arguments, of_ms_swift
from tests.integrations.test_ms_swift import given_of
from toolkit.functional.advantages import advantage
from toolkit.functional.rewards import RewardTerms
from toolkit.peers import Word, words_of

WORDS = {word.name: word for word in words_of("ms_swift").words}
CLIPPED = f"loss.policy_loss_cfg.cliprange_low={RANGE[0]} loss.policy_loss_cfg.cliprange_high={RANGE[1]}"
BETA = 0.04
KL = WORDS["beta"].answer.ways[0].replace("{}", str(BETA))
THRESHOLDS = dict(
    zip(
        ("token_truncate", "token_mask", "sequence_mask"),
        WORDS["rollout_importance_sampling_threshold"].answer.ways,
        strict=True,
    )
)


def of_value(word: str, value: str) -> str:
    """Return what a value of a word is here, the first way if there are several."""
    answer = WORDS[word].answer_to(value)
    assert answer is not None
    return answer.ways[0]


def of_ours(way: str, *, with_sampler: bool = False, **changes: torch.Tensor) -> list[torch.Tensor]:
    names = ["ref_logprobs", *(["rollout_logprobs"] if with_sampler else [])]
    return of_our_loop(given_of(torch.float64), way, fields=names if "kl=" in way else names[1:], **changes)


def test_every_argument_of_grpo_is_in_the_table() -> None:
    names = {field.name for field in fields(GRPOArguments)}
    assert len(names) > 100
    assert not names - {*WORDS} - {*words_of("ms_swift").left_out}


def test_every_loss_type_and_mode_of_ms_swift_is_in_the_table() -> None:
    known = inspect.getsource(GRPOTrainer._compute_loss_and_metrics)
    named = set(re.findall(r"'(\w+)'", " ".join(re.findall(r"self\.loss_type (?:==|in) (\[.*?\]|'\w+')", known))))
    assert {*WORDS["loss_type"].values} == {*named, *WINDOW_NORMALIZED_LOSS_TYPES}
    literals = ("importance_sampling_level", "advantage_estimator", "scale_rewards", "rollout_importance_sampling_mode")
    for word in literals:
        kind = str(next(field.type for field in fields(GRPOArguments) if field.name == word))
        assert {*re.findall(r"'(\w+)'", kind)} == {*WORDS[word].values} - {"None", "null"}


@pytest.mark.parametrize("name", sorted(WORDS["loss_type"].values))
def test_a_loss_type_is_the_loss_of_ms_swift(name: str) -> None:
    way = of_value("loss_type", name).replace("512", str(LONGEST)).replace("...", str(CEILING))
    if name == "real":
        given = given_of(torch.float64)
        given["mask"][2, 1:4] = True
        ours = of_our_loop(given, way, group_ids=torch.tensor([0, 0, 1, 1]))
        check_equal(ours, of_ms_swift(Arguments(name), given))
    else:
        way = way if name in ("cispo", "sapo") else f"{way} {CLIPPED}"
        check_equal(of_ours(way), of_ms_swift(Arguments(name), given_of(torch.float64)))
        way, arguments = f"{way} {KL}", Arguments(name, beta=BETA)
        check_equal(of_ours(way), of_ms_swift(arguments, given_of(torch.float64)))


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_a_level_is_the_ratio_of_ms_swift(level: str, name: str) -> None:
    """The preset of the level for grpo, those of the loss types with its policy loss for the others."""
    level_alone = of_value("importance_sampling_level", level)
    policy_loss = level_alone.removeprefix("loss=preset/ms_swift/")
    of_the_type = (
        f"{of_value('loss_type', name).replace('512', str(LONGEST))} loss.policy_loss_cfg.loss_type={policy_loss}"
    )
    theirs = of_ms_swift(Arguments(name, level), given_of(torch.float64))
    for way in (of_the_type, *([level_alone] if name == "grpo" else [])):
        check_equal(of_ours(f"{way} {CLIPPED}"), theirs)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
@pytest.mark.parametrize("mode", [each for each in WORDS["rollout_importance_sampling_mode"].values if "_" in each])
def test_a_mode_is_the_correction_of_ms_swift(mode: str, name: str) -> None:
    """Under ms-swift's own threshold and under that of the tests, with the KL that is weighted, too."""
    base = f"loss=preset/ms_swift/{name} {CLIPPED} {KL} loss.correction_on_kl=true"
    chosen, arguments = of_value("rollout_importance_sampling_mode", mode), Arguments(name, beta=BETA, rollout=mode)
    narrow = THRESHOLDS.get(mode, f"{chosen} loss.correction.tis.upper={{}}").replace("{}", str(THRESHOLD))
    given = far_from_the_sampler()
    losses = []
    for way, threshold in ((chosen, 2.0), (narrow, THRESHOLD)):
        theirs = of_ms_swift(arguments, given, rollout_importance_sampling_threshold=threshold)
        losses.append(theirs[0].item())
        check_equal(of_ours(f"{base} {way}", rollout_logprobs=given["rollout_logprobs"]), theirs)
    unbounded = of_ms_swift(arguments, given, rollout_importance_sampling_threshold=1e9)
    assert len({*losses, unbounded[0].item()}) == 3, "both thresholds bind"


def far_from_the_sampler() -> dict[str, torch.Tensor]:
    """Return a batch with ratios to the sampler above 2: of tokens, and on average of a sequence, which has 2.2."""
    given = given_of(torch.float64)
    old, rollout = given["old_logprobs"], given["rollout_logprobs"]
    rollout[1:] = old[1:] + 4 * (rollout[1:] - old[1:])
    scored = given["mask"][0]
    rollout[0] += (old[0] - rollout[0])[scored].mean() - math.log(2.2)
    return given


@pytest.mark.parametrize("beta", [0, BETA])
@pytest.mark.parametrize("index", [0, 1])
def test_off_policy_masking_is_that_of_ms_swift(index: int, beta: float) -> None:
    way = WORDS["off_policy_sequence_mask_delta"].answer.ways[index].replace("{}", "0.1")
    base = "" if way.startswith("loss=") else "loss=preset/ms_swift/grpo "
    kl = f" {KL} loss.correction_on_kl=true" if beta else ""
    ours = of_ours(f"{base}{way} {CLIPPED}{kl}", with_sampler=True)
    check_equal(ours, of_ms_swift(Arguments("grpo", beta=beta, off_policy=0.1), given_of(torch.float64)))


def test_under_bnpo_what_is_masked_leaves_the_denominator() -> None:
    way = f"loss=preset/ms_swift/bnpo correction=opsm loss.correction.opsm.upper=0.1 {CLIPPED}"
    arguments, given = Arguments("bnpo", off_policy=0.1), given_of(torch.float64)
    theirs = of_ms_swift(arguments, given)
    with pytest.raises(AssertionError):
        check_equal(of_ours(way, with_sampler=True), theirs)
    current = given["logits"].log_softmax(-1).gather(-1, given["labels"].unsqueeze(-1)).squeeze(-1)
    survivors = f"{way} loss.correction.opsm.denominator=survivors"
    check_equal(of_ours(survivors, with_sampler=True, current_logprobs=current), theirs)


OPTIONS = {
    "tau_pos": ("sapo", 1.4),
    "tau_neg": ("sapo", 1.4),
    "real_tau": ("real", 0.8),
    "fipo_clip_range": ("fipo", 0.1),
    "fipo_clip_high_only": ("fipo", False),
    "fipo_safety_threshold": ("fipo", 1.1),
    "fipo_decay_rate": ("fipo", 4.0),
}


@pytest.mark.parametrize("word", OPTIONS)
def test_an_option_of_a_loss_is_that_of_ms_swift(word: str) -> None:
    name, value = OPTIONS[word]
    option = _in_a_preset(WORDS[word], str(value))
    given = given_of(torch.float64)
    given["mask"][2, 1:4] = True
    groups = {"group_ids": torch.tensor([0, 0, 1, 1])} if name == "real" else {}
    clipped = f" {CLIPPED}" if name == "fipo" else ""
    ours = of_our_loop(given, f"loss=preset/ms_swift/{name} {option}{clipped}", **groups)
    theirs = {"fipo_gamma": 2 ** (-1 / value)} if word == "fipo_decay_rate" else {word: value}
    check_equal(ours, of_ms_swift(Arguments(name), given, **theirs))
    with pytest.raises(AssertionError):
        check_equal(ours, of_ms_swift(Arguments(name), given))


def _in_a_preset(word: Word, value: str) -> str:
    """Return an option of a policy loss as it stands in a preset."""
    answer = word.answer_to(value)
    assert answer is not None
    _, option = answer.ways[0].split(" ")
    return option.replace("policy_loss.", "loss.policy_loss_cfg.").replace("{}", value)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_advantages_are_those_of_ms_swift(estimator: str, scale: str) -> None:
    base = of_value("advantage_estimator", estimator)
    base = base.replace("advantage.level=batch ", "") if scale == "group" else base
    check_advantages(f"{base} {of_value('scale_rewards', scale)}", estimator, scale)


def test_advantages_of_several_rewards_are_those_of_ms_swift() -> None:
    check_advantages(of_value("scale_rewards", "gdpo"), "grpo", "gdpo")


def check_advantages(way: str, estimator: str, scale: str) -> None:
    """Compare the advantages that overrides choose with ms-swift's, of three groups of four and two rewards."""
    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    theirs, summed = compute_advantages(rewards, weights, 4, estimator, scale)
    options = dict(token.removeprefix("advantage.").split("=") for token in way.split(" "))
    terms = RewardTerms(
        rewards=summed,
        rewards_multi=rewards,
        reward_weights=weights,
        group_ids=torch.arange(12) // 4,
        lengths=torch.ones(12),
    )
    ours = advantage(options.pop("advantage")).compute(terms, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
