"""What is known to be wrong or misleading is said in one sentence with the remedy, and nothing else is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from toolkit import errors
from toolkit.explain import lint
from toolkit.explain.lint import CHECKS, warnings_for
from toolkit.functional.kl_facts import kl_warning
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.losses.config.policy import GRPOLossConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def config(loss_type: str = "vanilla", *, options: dict[str, Any] | None = None, **fields: Any) -> GRPOLossConfig:
    return GRPOLossConfig(policy_loss_cfg={"loss_type": loss_type, **(options or {})}, **fields)


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that is given once in a process stays to be given to other tests."""
    monkeypatch.setattr(errors, "_warned", set(errors._warned))


TIS = {"action": "clamp_upper", "upper": 2.0}
MASK = {"action": "mask", "upper": 2.0}
SEQUENCE = {"granularity": "sequence", "reduction": "sum"}
KL = {"use_kl_loss": True, "kl_loss_type": "k2"}
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (config("gspo"), {}, r"'gspo' under aggregation 'token_mean': .*use aggregation=seq_mean_token_mean$"),
    (config("luspo", aggregation="seq_mean_token_sum"), {}, "'luspo' under aggregation 'seq_mean_token_sum'"),
    (config("topr_sequence"), {}, "sums over the tokens of a sequence.*use aggregation=seq_mean_token_sum"),
    (config("real", aggregation="seq_mean_token_mean"), {}, "use aggregation=prompt_mean"),
    (config("sapo"), {}, "its paper averages differently"),
    (config(aggregation={"name": "constant", "length": 100}), {"longest": 200}, "set loss.aggregation.length=200"),
    (config(aggregation={"name": "constant", "length": 100}), {"advantage": "grpo"}, "use advantage=dr_grpo"),
    (config("tis", options={"weight_min": 2.0}), {}, "weight_min=2 is above weight_max=1"),
    (config("cispo", options={"weight_max": 0.2}), {}, "weight_max=0.2 .*is the ceiling itself.*set cliprange_high"),
    (config("topr", options={"weight_max": 0.5}), {}, "scales down every token.*use 1 or more"),
    (config("cispo", options={"cliprange_high": 5.0}), {}, "ceiling to 6; .*set weight_max=5"),
    (config(options={"cliprange_high": 28.0, "clip_ratio_c": None}), {}, "cliprange_high=28 .* to 29, .*mean 0.28"),
    (config(options={"clip_ratio_c": 1.1}), {}, "clip_ratio_c=1.1 is inside the clip range .*above 1.2"),
    (config(options={"clip_ratio_c": None, "delta": 1.1}), {}, "delta=1.1 is inside"),
    (config(options={"delta": 4.0}), {}, "clip_ratio_c=3 and delta=4 .*set one of them to null"),
    (config("gspo", options={"cliprange_low": 0.2}, aggregation="seq_mean_token_mean"), {}, "almost never bind"),
    (config(options={"cliprange_low": 3e-4, "cliprange_high": 4e-4}), {}, "policy_loss=gspo"),
    (config(options={"anchor": "self"}), {}, "this is REINFORCE"),
    (config("clip_cov", options={"clip_cov_ratio": 0.0}), {}, "still drops the gradient of one token"),
    (config(correction=[{**TIS, **SEQUENCE}]), {}, "product of their ratios.*use reduction='mean'"),
    (
        config(correction=[{**MASK, "denominator": "original"}]),
        {},
        "the smaller the gradient; use denominator='survivors'",
    ),
    (
        config(correction=[{**MASK, "denominator": "original", "between": "current_old"}]),
        {},
        "watch the kept fraction",
    ),
    (config(options={"anchor": "rollout"}, correction=[TIS]), {}, "corrected twice"),
    (config("vespo", options={"use_rollout_weight": True}, correction=[TIS]), {}, "multiplies by it again"),
    (config(correction=[TIS], correction_on_kl=True, **KL), {}, "use correction_on_kl=False"),
    (config(use_kl_loss=True, kl_loss_type="k2", kl_loss_coef=0.0), {}, "kl_loss_coef=0: .*does not affect training"),
    (config(use_kl_loss=True, kl_loss_type="k2", kl_gradient="score_corrected"), {}, "gradient of neither KL"),
    (config(**KL), {"preset": "preset/trl/dapo"}, r"TRL's, which multiplies k3 by the ratio .*kl=k3_is_corrected$"),
    (config("gspo", **KL), {"preset": "preset/trl/gspo"}, "use kl=k3_is_corrected loss.kl_ratio_level=sequence"),
    (config(entropy_coef=-0.01), {}, "lowers the entropy"),
]


@pytest.mark.parametrize(("cfg", "context", "words"), WRONG, ids=[words[:30] for _, _, words in WRONG])
def test_what_is_known_to_be_wrong_is_said(cfg: GRPOLossConfig, context: dict[str, Any], words: str) -> None:
    found = warnings_for(cfg, **context)
    assert [message for message in found if re.search(words, message)], found


@pytest.mark.parametrize("kl_type", ["k1", "k3", "abs"])
def test_expected_gradients_that_are_not_the_reverse_kl_s(kl_type: str) -> None:
    cfg = config(use_kl_loss=True, kl_loss_type=kl_type)
    assert warnings_for(cfg) == [kl_warning(kl_type)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_has_a_case_and_says_it_in_one_line(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "CHECKS", (check,))
    found = [message for cfg, context, _ in WRONG for message in warnings_for(cfg, **context)]
    assert found
    assert all("\n" not in message and not message.endswith(".") for message in found)


@pytest.mark.parametrize(
    "cfg",
    [
        config(),
        config("gspo", aggregation="seq_mean_token_mean"),
        config("gspo", aggregation="seq_mean_token_sum"),  # LUSPO
        config("cispo", options={"cliprange_low": None, "cliprange_high": None, "weight_max": 5.0}),
        config("cispo", options={"cliprange_high": 0.28}),
        config(options={"cliprange_high": 0.28, "clip_ratio_c": None}),
        config(aggregation={"name": "constant", "length": 1024}),
        config(**KL),
        config(correction=[TIS]),
        config(correction=[TIS, {**MASK, "denominator": "survivors"}]),
        config(options={"anchor": "rollout"}),
        config(entropy_coef=0.01),
        CELossConfig(),
        OrealLossConfig(),
        OrealLossConfig(policy_loss_cfg={"loss_type": "sapo"}),
    ],
    ids=range(15),
)
def test_sound_choices_are_not_warned_of(cfg: Any) -> None:
    assert warnings_for(cfg, advantage="dr_grpo", longest=512) == []
