"""What TRL's trainer with our losses refuses, each in one line; skipped where trl is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import LlamaForCausalLM

from tests.integrations.trl_runs import reward, save_model, trainer
from toolkit import ConfigError, DataError, GRPOLossConfig
from toolkit.integrations.trl import ToolkitGRPOTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "liger": ({"use_liger_kernel": True}, None, "use_liger_kernel=True replaces parts of the model"),
    "words": ({}, "policy_loss=gpso", "try: policy_loss=gspo"),
    "not_of_loss": ({}, "policy_loss=gspo optimizer.lr=1e-5", "optimizer.lr"),
    "type": ({}, 3, "loss=int is not a loss"),
    "beside": ({"epsilon": 0.3}, "policy_loss=gspo", "epsilon=0.3 has no effect beside loss"),
    "beta": ({"beta": 0.1}, "policy_loss=gspo", "beta=0.1 has no effect beside a loss without KL term"),
    "two_betas": ({"beta": 0.1}, "kl=k3 loss.kl_loss_coef=0.2", "leave beta out"),
    "top_k": ({}, "kl=top_k", "ref_topk_logprobs, which TRL's trainer does not compute"),
    "temperature": ({"temperature": 0.7}, GRPOLossConfig(temperature=1.0), "set temperature=0.7 in the config"),
    "reduction": ({}, GRPOLossConfig(gradient_reduction="sum"), "leave it at 'mean'"),
    "adaptive": ({"use_adaptive_entropy": True}, None, "use_adaptive_entropy=True of TRL has no counterpart"),
    "quantile": ({"top_entropy_quantile": 0.2}, None, "top_entropy_quantile=0.2 of TRL has no counterpart"),
    "sequence": ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, None, "is not known here"),
    "unknown": ({"loss_type": "grpoo"}, None, "'grpoo' is not a loss of TRL"),
    "later": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 1},
        None,
        "a multiple of gradient_accumulation",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_answered_in_one_line(folder: str, name: str) -> None:
    settings, loss, message = WRONG[name]
    with pytest.raises(ConfigError) as error:
        trainer(ToolkitGRPOTrainer, folder, extra={} if loss is None else {"loss": loss}, **settings)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_sampler_that_reports_nothing_is_warned_of(folder: str) -> None:
    with pytest.warns(UserWarning, match=r"a correction needs it, but TRL has them from vLLM.*set use_vllm=True"):
        trainer(ToolkitGRPOTrainer, folder, extra={"loss": "policy_loss=gspo correction=tis"})


def test_a_preset_divides_by_the_longest_completion_of_trl(folder: str) -> None:
    made = trainer(ToolkitGRPOTrainer, folder, extra={"loss": "loss=preset/trl/dr_grpo"})
    assert made.loss_cfg.aggregation.length == made.args.max_completion_length == 8


def test_arguments_are_needed(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"args is missing; give a trl\.GRPOConfig"):
        ToolkitGRPOTrainer(folder, reward, train_dataset=None)


def test_router_losses_and_images(folder: str) -> None:
    from datasets import Dataset

    from tests.integrations.trl_runs import PROMPTS, config

    model, data = LlamaForCausalLM.from_pretrained(folder), Dataset.from_dict({"prompt": PROMPTS})
    made = trainer(ToolkitGRPOTrainer, folder)
    with pytest.raises(DataError, match="the batch has images"):
        made._compute_loss(made.model, {"pixel_values": torch.zeros(1)})
    model.config.output_router_logits, model.config.router_aux_loss_coef = False, 0.01
    with pytest.raises(ConfigError, match=r"set router_aux_loss_coef=0\.0 to train without"):
        ToolkitGRPOTrainer(model, reward, config(folder), train_dataset=data, processing_class=made.processing_class)
