"""TRL's RLOO and distillation trainers with our losses, live; .ci/peers installs trl, elsewhere they are skipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DistillationConfig, DistillationTrainer, RLOOConfig, RLOOTrainer

from tests.integrations.trl_runs import PROMPTS, SETTINGS, reward, save_model
from tests.processes import run_processes
from toolkit import ConfigError
from toolkit.integrations.trl import ToolkitDistillationTrainer, ToolkitRLOOTrainer

FIVE_DIGITS = 2e-5
OF_RLOO = {**SETTINGS, "epsilon": 0.02}
OF_DISTILLATION = {
    **{name: value for name, value in SETTINGS.items() if name not in ("num_generations", "num_iterations")},
    "learning_rate": 0.1,
    "max_steps": 2,
}
BIG = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def teacher(folder: str) -> LlamaForCausalLM:
    """The student with other weights."""
    lm = LlamaForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


def run(kind: type, folder: str, *, extra: dict[str, Any] | None = None, **settings: Any) -> list[tuple[float, float]]:
    data = Dataset.from_dict({"prompt": PROMPTS})
    if issubclass(kind, RLOOTrainer):
        args = RLOOConfig(output_dir=f"{folder}/out", **{**OF_RLOO, **settings})
        made = kind(folder, reward, args, train_dataset=data, **(extra or {}))
    else:
        args = DistillationConfig(output_dir=f"{folder}/out", **{**OF_DISTILLATION, **settings})
        made = kind(folder, teacher(folder), args, train_dataset=data, **(extra or {}))
    made.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]


def close(ours: Any, theirs: Any) -> bool:
    assert len(ours) == len(theirs) > 1
    return ours == [pytest.approx(pair, rel=FIVE_DIGITS, abs=1e-6) for pair in theirs]


# -------------------------------------------------------------------- RLOO


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_four_steps_of_rloo_equal_those_of_trl(folder: str, beta: float) -> None:
    theirs = run(RLOOTrainer, folder, beta=beta)
    assert theirs[3] != theirs[1]
    assert close(run(ToolkitRLOOTrainer, folder, beta=beta), theirs)
    loss = (
        "policy_loss=rloo_sequence policy_loss.cliprange_low=0.02 policy_loss.cliprange_high=0.02 "
        "aggregation=seq_mean_token_mean loss.log_ratio_range=[null,null]"
    )
    assert close(run(ToolkitRLOOTrainer, folder, beta=beta, epsilon=0.2, extra={"loss": loss}), theirs)


@pytest.mark.parametrize("loss", ["policy_loss=gspo aggregation=token_mean", "policy_loss=cispo"])
def test_accumulation_of_rloo_equals_one_big_batch(folder: str, loss: str) -> None:
    whole = run(ToolkitRLOOTrainer, folder, epsilon=0.2, extra={"loss": loss}, **BIG)
    assert close(run(ToolkitRLOOTrainer, folder, epsilon=0.2, extra={"loss": loss}), whole)


RLOO: dict[str, tuple[dict[str, Any], str]] = {
    "policy_loss=gspo kl=k3": ({"epsilon": 0.2}, "RLOO has the KL in the reward, by beta"),
    "policy_loss=gspo": ({}, "epsilon has no effect beside loss"),
    "policy_loss=gspo loss.temperature=0.5": (
        {"epsilon": 0.2},
        "leave it out of the loss, or give TRL that temperature",
    ),
    "loss=ce": ({"epsilon": 0.2}, "CELossConfig has no policy loss"),
}


@pytest.mark.parametrize("loss", RLOO)
def test_rloo_refuses_what_has_no_effect(folder: str, loss: str) -> None:
    settings, message = RLOO[loss]
    with pytest.raises(ConfigError, match=message):
        run(ToolkitRLOOTrainer, folder, extra={"loss": loss}, **settings)


# -------------------------------------------------------------------- distillation

PAIRS = {"reverse": 1.0, "forward": 0.0}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("direction", PAIRS)
def test_exact_divergences_equal_those_of_trl(folder: str, direction: str, temperature: float) -> None:
    theirs = run(DistillationTrainer, folder, beta=PAIRS[direction], temperature=temperature)
    loss = f"loss=opd loss.variant=top_k loss.direction={direction}"
    assert close(run(ToolkitDistillationTrainer, folder, extra={"loss": loss}, temperature=temperature), theirs)


@pytest.mark.parametrize(
    ("loss", "top_k"),
    [
        ("loss=opd", None),
        ("loss=opd aggregation=seq_mean_token_mean", None),
        ("loss=opd loss.variant=top_k", 4),
    ],
)
def test_accumulation_of_distillation_equals_one_big_batch(folder: str, loss: str, top_k: int | None) -> None:
    extra = {"loss": loss, "top_k": top_k}
    whole = run(ToolkitDistillationTrainer, folder, extra=extra, **BIG)
    assert close(run(ToolkitDistillationTrainer, folder, extra=extra), whole)


def test_a_sampled_loss_is_the_mean_log_ratio_to_the_teacher(folder: str) -> None:
    """On policy, ``loss=opd`` has the value of minus the mean of log teacher - log student, of the student's tokens."""
    args = DistillationConfig(output_dir=f"{folder}/out", **{**OF_DISTILLATION, **BIG})
    data = Dataset.from_dict({"prompt": PROMPTS})
    made = ToolkitDistillationTrainer(folder, teacher(folder), args, train_dataset=data)
    made.model.train()
    inputs = made._prepare_inputs([{"prompt": prompt} for prompt in PROMPTS])
    loss = made.compute_loss(made.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    logprobs = []
    for lm in (made.model, made.teacher_model):
        with torch.no_grad():
            logits = lm(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1))
    kept = inputs["completion_mask"].bool()
    assert loss.item() == pytest.approx((logprobs[0] - logprobs[1])[kept].mean().item(), rel=1e-4, abs=1e-6)
    assert made._metrics["train"]["toolkit/active_tokens"] == [int(kept.sum())]


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "grpo": ({"loss": "policy_loss=gspo"}, {}, "has no teacher; choose loss='loss=opd'"),
    "beta": ({}, {"beta": 0.5}, r"beta=0\.5 has no effect beside loss"),
    "k": ({"top_k": 4}, {}, r"top_k=4 has no effect on loss\.variant=sampled"),
    "kl": ({"loss": "loss=opd kl=k3"}, {}, "reads a reference, which TRL's distillation does not have"),
}


@pytest.mark.parametrize("case", WRONG)
def test_distillation_refuses_what_has_no_effect(folder: str, case: str) -> None:
    extra, settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        run(ToolkitDistillationTrainer, folder, extra=extra, **settings)


def _two_processes(rank: int, world: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), ACCELERATE_USE_CPU="1")
    from accelerate.state import AcceleratorState, PartialState

    half = {"per_device_train_batch_size": 2}
    exact = {"loss": "loss=opd loss.variant=top_k"}
    for mine, theirs, extra in (
        (ToolkitRLOOTrainer, RLOOTrainer, None),
        (ToolkitDistillationTrainer, DistillationTrainer, exact),
    ):
        ours, other = run(mine, folder, extra=extra, **half), run(theirs, folder, **half)
        assert PartialState().num_processes == world
        assert close(ours, other), (ours, other)
        AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_trl(folder: str) -> None:
    run_processes(2, _two_processes, folder)


def test_a_distilled_model_is_saved_as_usual(folder: str, tmp_path: Path) -> None:
    args = DistillationConfig(output_dir=f"{folder}/out", **{**OF_DISTILLATION, "max_steps": 1})
    data = Dataset.from_dict({"prompt": PROMPTS})
    made = ToolkitDistillationTrainer(folder, teacher(folder), args, train_dataset=data)
    made.train()
    made.save_model(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()
