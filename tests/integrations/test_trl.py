"""TRL's trainer with our losses, live; skipped where trl is not installed (.ci/peers installs it)."""

from __future__ import annotations

import os
import re
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

import toolkit
from tests.integrations.trl_runs import PROMPTS, config, reward, run, save_model, trainer
from tests.processes import run_processes
from toolkit import GRPOLossConfig
from toolkit.integrations.trl import ToolkitGRPOTrainer, ToolkitLossMixin
from toolkit.integrations.trl.args import loss_from

FIVE_DIGITS = 2e-5
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.02}
LOSSES = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "gspo": GSPO,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def close(ours: Any, theirs: Any) -> bool:
    return ours == [pytest.approx(pair, rel=FIVE_DIGITS, abs=1e-6) for pair in theirs]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", LOSSES)
def test_four_steps_equal_those_of_trl(folder: str, name: str, beta: float) -> None:
    theirs = run(GRPOTrainer, folder, beta=beta, **LOSSES[name])
    assert len(theirs) == 4
    assert close(run(ToolkitGRPOTrainer, folder, beta=beta, **LOSSES[name]), theirs)


def test_a_loss_by_overrides_is_the_one_that_the_arguments_describe(folder: str) -> None:
    theirs = run(GRPOTrainer, folder, **GSPO)
    clipping = "policy_loss.cliprange_low=0.02 policy_loss.cliprange_high=0.02"
    loss = f"policy_loss=gspo aggregation=seq_mean_token_mean {clipping}"
    assert close(run(ToolkitGRPOTrainer, folder, extra={"loss": loss}), theirs)
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": "gspo", "cliprange_low": 0.02, "cliprange_high": 0.02},
        aggregation="seq_mean_token_mean",
    )
    assert close(run(ToolkitGRPOTrainer, folder, extra={"loss": cfg}), theirs)


def test_a_kl_term_makes_trl_compute_the_reference(folder: str) -> None:
    theirs = run(GRPOTrainer, folder, beta=0.04, use_bias_correction_kl=False)
    loss = ["loss=preset/trl/dapo", "kl=k3", "loss.kl_loss_coef=0.04"]
    assert close(run(ToolkitGRPOTrainer, folder, extra={"loss": loss}), theirs)


UNEVEN = [
    "aggregation=token_mean",
    "aggregation=square",
    "aggregation=prompt_mean",
    "aggregation=per_component",
    "policy_loss=gspo aggregation=seq_mean_token_mean loss.entropy_coef=0.01",
    "policy_loss=real",
]


@pytest.mark.parametrize("loss", UNEVEN)
def test_accumulation_equals_one_big_batch(folder: str, loss: str) -> None:
    extra = {"loss": loss}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    big = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = run(ToolkitGRPOTrainer, folder, extra=extra, **big)
    assert close(run(ToolkitGRPOTrainer, folder, extra=extra, **parts), whole)


def test_trl_itself_differs_there(folder: str) -> None:
    """So the test above compares what can differ."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    big = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    whole = run(GRPOTrainer, folder, loss_type="bnpo", **big)
    assert not close(run(GRPOTrainer, folder, loss_type="bnpo", **parts), whole)
    assert close(run(ToolkitGRPOTrainer, folder, loss_type="bnpo", **parts), whole)


def test_several_steps_per_generation_have_their_own_denominator(folder: str) -> None:
    """TRL's dapo divides each step by the mean over the steps of a generation; with equal counts they agree."""
    window = {"steps_per_generation": 4}
    theirs = run(GRPOTrainer, folder, loss_type="grpo", **window)
    assert close(run(ToolkitGRPOTrainer, folder, loss_type="grpo", **window), theirs)


def test_lora_and_gradient_checkpointing(folder: str) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    settings = {"beta": 0.04, "learning_rate": 5.0}
    theirs = run(GRPOTrainer, folder, extra={"peft_config": lora}, **settings)
    for checkpointing in (True, False):
        ours = run(
            ToolkitGRPOTrainer, folder, extra={"peft_config": lora}, gradient_checkpointing=checkpointing, **settings
        )
        assert close(ours, theirs)


def test_bf16_follows_trl(folder: str) -> None:
    """Under autocast both round the products; the second step no longer has the same weights."""
    (theirs, *_), (ours, *_) = (
        run(kind, folder, bf16=True, learning_rate=1e-3, max_steps=1) for kind in (GRPOTrainer, ToolkitGRPOTrainer)
    )
    assert ours == pytest.approx(theirs, rel=2e-2, abs=1e-3)


def _two_processes(rank: int, world: int, folder: str, names: list[str]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), ACCELERATE_USE_CPU="1")
    from accelerate.state import AcceleratorState, PartialState

    half = {"per_device_train_batch_size": 2}
    for name in names:
        theirs = run(GRPOTrainer, folder, beta=0.04, **LOSSES[name], **half)
        ours = run(ToolkitGRPOTrainer, folder, beta=0.04, **LOSSES[name], **half)
        assert PartialState().num_processes == world
        assert close(ours, theirs), (ours, theirs)
        AcceleratorState._reset_state(reset_partial_state=False)
    extra = {"loss": "aggregation=prompt_mean"}
    one = run(ToolkitGRPOTrainer, folder, extra=extra, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    two = run(ToolkitGRPOTrainer, folder, extra=extra, gradient_accumulation_steps=1, per_device_train_batch_size=4)
    assert close(one, two)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_trl(folder: str) -> None:
    run_processes(2, _two_processes, folder, ["dapo", "gspo"])


def test_a_mixin_before_another_subclass(folder: str) -> None:
    class Theirs(GRPOTrainer):
        calls = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            type(self).calls += 1
            return super()._generate_and_score_completions(inputs)

    class Mine(ToolkitLossMixin, Theirs):
        pass

    assert close(run(Mine, folder), run(ToolkitGRPOTrainer, folder))
    assert Theirs.calls == 0
    assert Mine.calls == 2


def test_metrics_have_the_names_of_trl_and_ours(folder: str) -> None:
    def logged(kind: type) -> list[dict[str, float]]:
        made = trainer(kind, folder, beta=0.04, per_device_train_batch_size=8, gradient_accumulation_steps=1)
        made.train()
        return [entry for entry in made.state.log_history if "grad_norm" in entry]

    for ours, theirs in zip(logged(ToolkitGRPOTrainer), logged(GRPOTrainer), strict=True):
        for name in ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert ours["toolkit/loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert ours["toolkit/active_tokens"] > 0


def test_evaluation_is_logged(folder: str) -> None:
    data = Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7"]})
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    both = []
    for kind in (GRPOTrainer, ToolkitGRPOTrainer):
        made = trainer(kind, folder, extra={"eval_dataset": data}, loss_type="grpo", **settings)
        made.train()
        both.append([entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry])
    assert len(both[0]) == 2
    assert both[1] == pytest.approx(both[0], rel=1e-4, abs=1e-6)


# -------------------------------------------------------------------- one micro-batch, all options


def batch(generator: torch.Generator, rows: int = 4) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL makes it, with tools, a sampler and a row without a scored token."""
    prompt, completion = 3, 6

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, completion, generator=generator)

    lengths = torch.tensor([6, 4, 2, 0])
    mask = (torch.arange(completion) < lengths[:, None]).long()
    tools = torch.ones_like(mask)
    tools[0, 2:4] = 0
    old = -3.4 + noise(0.2)
    return {
        "prompt_ids": torch.randint(2, 32, (rows, prompt), generator=generator),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(2, 32, (rows, completion), generator=generator),
        "completion_mask": mask,
        "tool_mask": tools,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.2]),
        "num_items_in_batch": (mask * tools).sum(),
        "old_per_token_logps": old,
        "sampling_per_token_logps": old + noise(0.5),
        "ref_per_token_logps": old + noise(0.3),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    **LOSSES,
    "bnpo": {"loss_type": "bnpo"},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo_token": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo"},
    "gspo_dapo": {**GSPO, "loss_type": "dapo"},
    "gspo_dr_grpo": {**GSPO, "loss_type": "dr_grpo"},
    "delta": {"delta": 1.1, "loss_type": "grpo"},
    "clip_higher": {"epsilon_high": 0.28},
    "plain_kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "kl_of_sequence": {"beta": 0.1, **GSPO},
    "kl_cispo": {"beta": 0.1, **LOSSES["cispo"]},
    "entropy": {"entropy_coef": 0.01},
    "temperature": {"temperature": 0.7},
    "off_policy_mask": {"off_policy_mask_threshold": 0.05},
}
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
OPTIONS |= {
    f"vllm_{mode}": {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.4} for mode in MODES
}
OPTIONS["vllm_both"] = {
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": 0.8,
    "vllm_importance_sampling_clip_max": 1.2,
}


def their_ratio(inputs: dict[str, torch.Tensor], args: Any) -> torch.Tensor:
    """TRL's `_generate_and_score_completions`, lines 2660 to 2708, where vLLM reported all tokens."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    difference = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
    unit, _, action = args.vllm_importance_sampling_mode.partition("_")
    ratio = (difference.sum(-1, keepdim=True) if unit == "sequence" else difference).exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if action == "truncate":
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < (-1 if low is None else low)) | (ratio > high), 0.0)


ONE = {"gradient_accumulation_steps": 1, "num_iterations": 1, "gradient_checkpointing": False}


def gradients(made: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    made._step, made._buffered_inputs, made.current_gradient_accumulation_steps = 0, [inputs], 1
    made.model.train().zero_grad()
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in made.model.parameters() if p.grad is not None)]


def with_vllm(made: Any) -> Any:
    """Return our trainer as if vLLM had sampled, which is not installed."""
    args = copy(made.args)
    args.use_vllm = True
    made.loss_cfg = loss_from(None, args)
    return made


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_of_every_option(folder: str, name: str) -> None:
    theirs = trainer(GRPOTrainer, folder, **ONE, **OPTIONS[name])
    ours = trainer(ToolkitGRPOTrainer, folder, **ONE, **OPTIONS[name])
    inputs = batch(torch.Generator().manual_seed(1))
    if name.startswith("vllm"):
        inputs["importance_sampling_ratio"] = their_ratio(inputs, theirs.args)
        theirs.use_vllm, ours = True, with_vllm(ours)
    elif name == "off_policy_mask":  # without vLLM the policy that sampled is the old one
        del inputs["sampling_per_token_logps"]
    for mine, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_tokens_that_vllm_did_not_report_have_a_ratio_of_one(folder: str) -> None:
    ours = with_vllm(trainer(ToolkitGRPOTrainer, folder, **ONE, vllm_importance_sampling_mode="token_truncate"))
    inputs = batch(torch.Generator().manual_seed(1))
    reported = inputs["sampling_per_token_logps"].clone()
    reported[1, 1], inputs["sampling_per_token_logps"][1, 1] = inputs["old_per_token_logps"][1, 1], float("nan")
    missing = gradients(ours, inputs)
    for mine, other in zip(missing, gradients(ours, {**inputs, "sampling_per_token_logps": reported}), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_the_model_is_saved_as_usual(folder: str, tmp_path: Path) -> None:
    made = trainer(ToolkitGRPOTrainer, folder, max_steps=1)
    made.train()
    made.save_model(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()


def test_the_page_runs_as_printed(folder: str) -> None:
    page = Path(toolkit.__file__).parents[1] / "tutorials/reference/trainers/trl.md"
    for block in re.findall(r"^```py\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        data = Dataset.from_dict({"prompt": PROMPTS})
        names = {"model": folder, "reward": reward, "args": config(folder, max_steps=1), "data": data}
        exec(block, {**names, "TheirTrainer": GRPOTrainer})
