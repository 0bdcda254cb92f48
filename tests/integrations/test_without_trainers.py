"""What the integrations do before a trainer is asked; runs without any installed."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit import ConfigError, GRPOLossConfig, RLLossContextInputItem
from toolkit.integrations import versions
from toolkit.integrations.forward import accept_loss, fitted_loss
from toolkit.integrations.trl.args import loss_from, overrides_of
from toolkit.integrations.trl.batches import item_of
from toolkit.integrations.verl import options


@dataclass
class Args:
    """The fields of TRL 1.16's GRPOConfig that describe a loss, with its defaults."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    temperature: float = 1.0
    max_completion_length: int = 256
    num_iterations: int = 1
    steps_per_generation: int = 2
    gradient_accumulation_steps: int = 2
    use_liger_kernel: bool = False
    use_adaptive_entropy: bool = False
    top_entropy_quantile: float = 1.0
    cast_lm_head_to_fp32: bool = False
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    off_policy_mask_threshold: float | None = None


# -------------------------------------------------------------------- TRL's arguments


def test_overrides_for_the_defaults_of_trl() -> None:
    assert list(overrides_of(Args())) == [
        "loss=preset/trl/dapo",
        "loss.policy_loss_cfg.cliprange_low=0.2",
        "loss.policy_loss_cfg.cliprange_high=0.2",
    ]


def test_overrides_for_gspo_with_a_kl_term() -> None:
    chosen = Args(loss_type="dr_grpo", importance_sampling_level="sequence", epsilon_high=0.3, delta=4.0, beta=0.04)
    assert list(overrides_of(chosen)) == [
        "loss=preset/trl/gspo",
        "loss.aggregation.name=constant",
        "++loss.aggregation.length=256",
        "loss.policy_loss_cfg.cliprange_low=0.2",
        "loss.policy_loss_cfg.cliprange_high=0.3",
        "++loss.policy_loss_cfg.delta=4.0",
        "kl=k3_is_corrected",
        "loss.kl_loss_coef=0.04",
        "loss.kl_input_clamp=null",
        "loss.kl_output_clamp=null",
        "loss.kl_ratio_level=sequence",
    ]
    cfg = loss_from(None, chosen)
    assert cfg.aggregation.length == 256
    assert cfg.kl_input_clamp is None


def test_corrections_of_vllm() -> None:
    mask, weight = loss_from(None, Args(use_vllm=True)).correction
    assert (mask.granularity, mask.action, mask.upper, mask.denominator) == ("sequence", "mask", 3.0, "original")
    assert (weight.action, weight.upper, weight.max_log_ratio) == ("clamp_upper", 3.0, None)
    (clamp,) = loss_from(
        None,
        Args(use_vllm=True, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_min=0.5),
    ).correction
    assert (clamp.granularity, clamp.action, clamp.lower, clamp.upper) == ("token", "clamp", 0.5, 3.0)


def test_the_temperature_is_that_of_sampling() -> None:
    assert loss_from("policy_loss=gspo", Args(temperature=0.7)).temperature == 0.7
    assert loss_from(GRPOLossConfig(), Args(temperature=0.7)).temperature == 0.7
    with pytest.raises(ConfigError, match=r"temperature 1, but TRL samples .*; set temperature=0\.7 in the config"):
        loss_from(GRPOLossConfig(temperature=1.0), Args(temperature=0.7))
    with pytest.raises(ConfigError, match=r"temperature 0\.5, but TRL samples .* at 0\.7; leave it out of the loss"):
        loss_from("policy_loss=gspo rollout.temperature=0.5", Args(temperature=0.7))
    with pytest.raises(ConfigError, match=r"^temperature=0\.7: the loss has the temperature of TRL; leave it out"):
        loss_from("temperature=0.7", Args())


def test_entropies_are_measured_unless_a_config_says_no() -> None:
    assert loss_from(GRPOLossConfig(), Args()).use_entropy_metric
    assert not loss_from(GRPOLossConfig(use_entropy_metric=False), Args()).use_entropy_metric


@pytest.mark.parametrize(
    "chosen", ["loss=preset/trl/dr_grpo", "aggregation=constant", "loss.aggregation.name=constant"]
)
def test_a_constant_length_is_that_of_the_trainer(chosen: str) -> None:
    assert loss_from(chosen, Args(max_completion_length=12)).aggregation.length == 12
    assert loss_from(f"{chosen} ++loss.aggregation.length=1024", Args()).aggregation.length == 1024
    assert loss_from("loss=preset/trl/dr_grpo aggregation=token_mean", Args()).aggregation.length is None


OF_TRAINER = {
    "advantage=rloo": "advantage=rloo: TRL decides advantage, not the loss; leave it out, and set scale_rewards",
    "kl=k1_in_reward": "kl=k1_in_reward: TRL decides a KL in the reward, not the loss; leave it out",
    "seed=3": "seed=3: TRL decides seed, not the loss; leave it out",
    "polcy_loss=gspo": "did you mean 'policy_loss'",
    "loss=ce": "CELossConfig has no policy loss; choose loss=grpo or a preset (loss=preset/trl/dapo)",
    "": "the loss is empty; write one in loss=...",
}


@pytest.mark.parametrize("chosen", OF_TRAINER)
def test_settings_of_the_trainer_are_not_those_of_the_loss(chosen: str) -> None:
    with pytest.raises(ConfigError) as error:
        loss_from(chosen, Args())
    assert OF_TRAINER[chosen] in str(error.value)


def test_one_line_says_what_beside_a_loss_has_no_effect() -> None:
    with pytest.raises(ConfigError, match=r"epsilon=0\.3 has no effect.*policy_loss\.cliprange_low=0\.3"):
        loss_from("policy_loss=gspo", Args(epsilon=0.3))
    with pytest.raises(ConfigError, match=r"loss_type='grpo' has no effect.*loss=preset/trl/grpo"):
        loss_from("policy_loss=gspo", Args(loss_type="grpo"))


def test_completions_of_the_whole_window_must_be_there() -> None:
    with pytest.raises(ConfigError, match="a multiple of gradient_accumulation_steps"):
        loss_from(None, Args(gradient_accumulation_steps=4, steps_per_generation=2))
    loss_from(None, Args(gradient_accumulation_steps=4, steps_per_generation=2, num_iterations=2))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no-such-trainer is not installed; pip install no-such-trainer==1\.0"):
        versions.check_version("no-such-trainer", "1.0")
    monkeypatch.setattr(versions, "version", lambda name: "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with trl 1\.16\.0, but 1\.17\.0 is installed"):
        versions.check_version("trl", "1.16.0")
    monkeypatch.setattr(versions, "version", lambda name: "1.16.3")
    assert versions.check_version("trl", "1.16.0") == "1.16.3"


# -------------------------------------------------------------------- TRL's batches and the model's forward


def batch() -> dict[str, torch.Tensor]:
    return {
        "prompt_ids": torch.tensor([[0, 5]]),
        "prompt_mask": torch.tensor([[0, 1]]),
        "completion_ids": torch.tensor([[6, 7, 8]]),
        "completion_mask": torch.tensor([[1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 0, 1]]),
        "advantages": torch.tensor([2.0]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, -2.5, math.nan]]),
    }


def test_an_item_by_hand() -> None:
    item = item_of(batch(), fills_missing=True)
    assert item.shifted_labels.tolist() == [[-100, 6, -100, 8, -100]]
    assert item.old_logprobs[0, [1, 3]].tolist() == [-1.0, -3.0]
    assert item.rollout_logprobs[0, [1, 3]].tolist() == [-1.5, -3.0]  # the trainer's where vLLM has none
    assert item.advantages[0, [1, 3]].tolist() == [2.0, 2.0]
    assert item_of(batch()).rollout_logprobs[0, 3].isnan()
    assert item.ref_logprobs is None


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **heads)).eval()


def test_the_model_returns_the_loss_if_it_is_given_one() -> None:
    lm, cfg = tiny(), GRPOLossConfig(mode="chunk", chunk_size=2)
    before = inspect.signature(lm.forward)
    ids, mask = torch.tensor([[3, 5, 6, 7, 8]]), torch.ones(1, 5, dtype=torch.long)
    usual = lm(input_ids=ids, attention_mask=mask).logits
    accept_loss(lm)
    assert inspect.signature(lm.forward) == before  # `generate` reads it
    torch.testing.assert_close(lm(input_ids=ids, attention_mask=mask).logits, usual)
    item = RLLossContextInputItem.from_unshifted(ids, torch.tensor([[0, 0, 1, 1, 1]]), advantages=torch.tensor([[2.0]]))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    loss, metrics = lm(input_ids=ids, attention_mask=mask, toolkit_loss=cfg.loss_ctx_cls(cfg, kwargs))
    assert loss.item() == pytest.approx(-2.0)  # a ratio of 1 times the advantage
    loss.backward()
    assert metrics["active_tokens"].value() == 3
    logprobs = usual.log_softmax(-1)[0, [1, 2, 3], ids[0, 2:]]
    gradient = torch.autograd.grad(-2.0 * logprobs.mean(), lm.lm_head.weight)[0]
    torch.testing.assert_close(lm.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_scale_of_the_logits_is_found() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 11}
    lm = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, logits_scaling=4.0))
    assert fitted_loss(lm, GRPOLossConfig()).logit_scale == 0.25


# -------------------------------------------------------------------- verl's options


def actor(**settings: Any) -> Any:
    of_policy = {"dro_beta": 0.3, "clip_cov_lb": 0.5, "ppo_kl_coef": 0.1}
    own = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, **settings}
    return SimpleNamespace(**own, policy_loss=of_policy, get=own.get)


def test_options_that_verl_has_come_from_its_config() -> None:
    low_high = ["policy_loss.cliprange_low=0.2", "policy_loss.cliprange_high=0.28"]
    assert [*options.options_of("gspo", actor())] == low_high  # no dual clip
    assert [*options.options_of("vanilla", actor())] == [*low_high, "policy_loss.clip_ratio_c=3.0"]
    assert [*options.options_of("dro", actor())] == ["policy_loss.tau=0.3"]
    assert [*options.options_of("kimi", actor())] == []
    assert [*options.options_of("clip_cov", actor())] == [*low_high, "policy_loss.cov_low=0.5"]


def test_options_of_an_estimator() -> None:
    assert options.advantage_options("advantage.std=none advantage.eps=1e-6") == {"std": "none", "eps": 1e-6}
    with pytest.raises(ConfigError, match=r"advantage=rloo is not an option of an estimator"):
        options.advantage_options("advantage=rloo")


def test_without_trl_the_import_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "toolkit.integrations.trl.trainer", raising=False)
    with pytest.raises(ImportError, match=r"ToolkitGRPOTrainer needs TRL: pip install .* trl==1\.16\.0"):
        from toolkit.integrations.trl import ToolkitGRPOTrainer  # noqa: F401
