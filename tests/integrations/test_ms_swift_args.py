"""What ms-swift's arguments may say beside a loss of ours; ms-swift is not needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import pytest

from tests.integrations.loops import install, namespace
from toolkit import ConfigError
from toolkit.integrations import ms_swift, versions
from toolkit.integrations.chosen import chosen_config, summary
from toolkit.integrations.ms_swift import register, registered
from toolkit.integrations.ms_swift.args import MS_SWIFT, check_args


@dataclass
class GRPOConfig:
    """The arguments that are read, with ms-swift's defaults but for beta."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    rollout_importance_sampling_mode: str | None = None
    sdar_loss_coef: float = 0.0
    temperature: float = 0.9
    beta: float = 0.0
    kl_in_reward: bool = False
    use_vllm: bool = False
    max_completion_length: int = 12
    use_liger_kernel: bool = False
    log_entropy: bool = False
    multi_turn_scheduler: str | None = None
    chord_sft_dataset: list[str] = field(default_factory=list)
    steps_per_generation: int = 2
    num_iterations: int = 1
    gradient_accumulation_steps: int = 2


TEMPLATE = namespace(padding_free=False, sequence_parallel_size=1)
KL = "policy_loss=cispo kl=k3 loss.kl_loss_coef=0.04"


def check(loss: str = "policy_loss=cispo", template: Any = TEMPLATE, **changes: Any) -> Any:
    args = replace(GRPOConfig(), **changes)
    cfg = chosen_config(loss, args, MS_SWIFT)
    check_args(args, cfg, loss, template)
    return cfg


def test_a_loss_has_the_temperature_of_ms_swift() -> None:
    assert check().temperature == 0.9
    assert check(KL, beta=0.04).kl_loss_coef == 0.04
    check(beta=0.04, kl_in_reward=True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "loss_type": ({"loss_type": "dapo"}, "loss_type='dapo' has no effect beside a loss of this toolkit"),
    "epsilon": (
        {"loss": "policy_loss=gspo", "epsilon": 0.1},
        "leave it out, or say it in register(...): policy_loss.cliprange_low=0.1 policy_loss.cliprange_high=0.1",
    ),
    "epsilon of a preset": (
        {"loss": "loss=preset/ms_swift/dapo", "epsilon": 0.1},
        "say it in register(...): loss.policy_loss_cfg.cliprange_low=0.1 loss.policy_loss_cfg.cliprange_high=0.1",
    ),
    "cap": ({"epsilon_high": 0.3}, "say it in register(...): policy_loss.weight_max=0.3"),
    "real": (
        {"loss_type": "real"},
        "leave it out; it has no counterpart in a run, because it compares the completions",
    ),
    "level": (
        {"importance_sampling_level": "sequence"},
        "say in register(...) in the place of your loss: loss=preset/ms_swift/gspo or policy_loss=gspo",
    ),
    "temperature": (
        {"loss": "temperature=0.7"},
        "the loss has the temperature of ms-swift; leave it out, and set temp",
    ),
    "no KL": ({"beta": 0.04}, "set --beta 0, or add kl=k3 loss.kl_loss_coef=0.04 to the loss"),
    "correction": ({"rollout_importance_sampling_mode": "token_truncate"}, "say it in register(...): correction=tis"),
    "sdar": (
        {"sdar_loss_coef": 0.1},
        "sdar_loss_coef=0.1 has no effect beside a loss of this toolkit; leave it out: it",
    ),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel=True is not supported"),
    "packed": ({"template": namespace(padding_free=True)}, "padding_free=True is not supported"),
    "ulysses": ({"template": namespace(sequence_parallel_size=2)}, "sequence_parallel_size=2 is not supported"),
    "chord": ({"chord_sft_dataset": ["data"]}, "chord_sft_dataset=['data'] is not supported"),
    "beta alone": ({"beta": 0.04}, "beta=0.04, and the loss has no KL term; set --beta 0, or"),
    "no beta": ({"loss": KL}, "beta=0, and the loss has a KL term; set --beta 0.04"),
    "other beta": ({"loss": KL, "beta": 0.1}, "beta=0.1, but the loss has kl_loss_coef=0.04"),
    "both": ({"loss": KL, "beta": 0.04, "kl_in_reward": True}, "kl_in_reward=True subtracts the KL from the rewards"),
    "groups": ({"loss": "policy_loss=real"}, "policy_loss=real compares the completions of a prompt"),
    "prompt mean": (
        {"loss": "policy_loss=cispo aggregation=prompt_mean"},
        "aggregation=prompt_mean compares the",
    ),
    "teacher": (
        {"loss": "policy_loss=sdar"},
        "the loss reads a teacher (teacher_logprobs), which ms-swif",
    ),
    "full KL": (
        {"loss": "kl=full loss.kl_loss_coef=0.04", "beta": 0.04},
        "kl=full compares whole distributions",
    ),
    "sampler": (
        {"loss": "policy_loss=gspo correction=tis"},
        "a correction needs it, but ms-swift has them",
    ),
    "sampler's ratio": ({"loss": "policy_loss=rollout_is"}, "policy loss 'rollout_is' needs it, but ms-swift has them"),
    "advantages": (
        {"loss": "advantage=rloo"},
        "ms-swift decides advantage, not the loss; leave it out, and set",
    ),
    "window": ({"gradient_accumulation_steps": 4}, "must be a multiple of gradient_accumulation_steps=4"),
}


@pytest.mark.filterwarnings("ignore:kl_loss_type")
@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_refused_in_one_line(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        check(**changes)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_length_of_dr_grpo_need_not_be_said() -> None:
    with pytest.raises(ConfigError, match=r"in the place of your loss: loss=preset/ms_swift/dr_grpo$"):
        check(loss_type="dr_grpo")


def test_a_loss_in_one_line() -> None:
    text = summary(check("loss=preset/ms_swift/dr_grpo kl=k3 loss.kl_loss_coef=0.04", beta=0.04))
    assert text == (
        "policy_loss=vanilla (cliprange_low=0.2, cliprange_high=0.2, anchor=old), aggregation=constant with length=12, "
        "kl=k3 with kl_loss_coef=0.04, temperature=0.9"
    )
    assert "1 correction, " in summary(check("correction=tis", use_vllm=True))


def test_registering_puts_our_trainer_in_the_place_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = namespace(
        TRAINER_MAPPING={"grpo": "swift.rlhf_trainers.GRPOTrainer"},
        TRAINING_ARGS_MAPPING={"grpo": "swift.rlhf_trainers.GRPOConfig"},
    )
    install(monkeypatch, "swift.trainers", TrainerFactory=factory)
    monkeypatch.setattr(versions, "version", lambda _: "4.6.0")
    monkeypatch.setattr(ms_swift, "_registered", [])
    with pytest.raises(ConfigError, match=r"call toolkit\.integrations\.ms_swift\.register\(loss\) first"):
        registered()
    register(KL)
    assert factory.TRAINER_MAPPING == {"grpo": "toolkit.integrations.ms_swift.ToolkitGRPOTrainer"}
    assert factory.TRAINING_ARGS_MAPPING == {"grpo": "toolkit.integrations.ms_swift.ToolkitGRPOConfig"}
    assert registered() == KL
    for wrong in ("policy_loss=cipso", "", "policy_loss.weight_mx=5", 3):
        with pytest.raises(ConfigError):
            register(wrong)
    assert registered() == KL
    with pytest.warns(UserWarning, match="register was called with 'policy_loss=cispo kl=k3.* takes its place"):
        register("aggregation=constant")
    install(monkeypatch, "swift.trainers")
    with pytest.raises(ConfigError, match=r"no table of trainers .*; install 4\.6\.0"):
        register(KL)


@pytest.mark.skipif(find_spec("swift") is not None, reason="ms-swift is installed")
def test_without_ms_swift_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ms-swift is not installed; pip install ms-swift==4\.6\.0"):
        register(KL)
    assert "swift" not in sys.modules
