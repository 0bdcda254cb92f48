"""Hugging Face's Trainer with our losses, live, on a tiny random model."""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import toolkit
from tests.processes import run_processes
from toolkit import ConfigError, DataError, LossRunner, PolicyTerms, errors, register_policy_loss
from toolkit.integrations.transformers import ToolkitTrainer, make_compute_loss_func

VOCABULARY = 19
LENGTHS = (9, 3, 6, 2, 7, 4, 8, 5)
"""Of the rows, so micro-batches have unequal numbers of labels."""
SETTINGS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "per_device_train_batch_size": 4,
    "seed": 1,
}
PARTS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
HALVES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
"""Of two processes: four rows in a step, as in one batch of `SETTINGS`."""
EXACT = {"rtol": 1e-6, "atol": 1e-6}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def rows(**fields: float) -> list[dict[str, torch.Tensor]]:
    """Return rows of 10 tokens, each with a prompt of one token and padding."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, VOCABULARY, (10,), generator=generator)
        labels = ids.clone()
        labels[0], labels[length + 1 :] = -100, -100
        noise = {name: scale * torch.randn(10, generator=generator) for name, scale in fields.items()}
        made.append({"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels, **noise})
        made[-1]["attention_mask"][0] = 1
    return made


def run(folder: str, kind: type = ToolkitTrainer, *, data: Any = None, extra: Any = None, **settings: Any) -> Any:
    """Train; return loss and gradient norm of each step, and the head's weights."""
    args = TrainingArguments(output_dir=folder, **{**SETTINGS, **settings})
    made = kind(model(), args, train_dataset=data or rows(), **(extra or {}))
    made.train()
    logged = [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]
    assert len(logged) == 2
    return torch.tensor(logged), made.model.lm_head.weight.detach().clone()


def same(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


FUNCTION = {"compute_loss_func": make_compute_loss_func("loss=ce")}


def test_both_ways_are_the_loss_of_transformers(tmp_path: Path) -> None:
    theirs = run(str(tmp_path), Trainer, **PARTS)
    same(run(str(tmp_path), Trainer, extra=FUNCTION, **PARTS), theirs)
    same(run(str(tmp_path), **PARTS), theirs)


@pytest.mark.parametrize(
    "loss",
    [
        "loss=ce",
        "loss=ce loss.loss_reduction=sample",
        "loss=ce loss.loss_reduction=square mode=chunk loss.chunk_size=3",
        "policy_loss=gspo policy_loss.cliprange_high=0.1 aggregation=seq_mean_token_mean",
        "policy_loss=cispo kl=k3 loss.kl_loss_coef=0.1",
    ],
)
def test_accumulation_equals_one_big_batch(tmp_path: Path, loss: str) -> None:
    data = rows(advantages=1.0)
    extra = {"loss": loss}
    if "kl" in loss:
        data = [{**row, "ref_logprobs": torch.full((10,), -3.0)} for row in data]
    whole = run(str(tmp_path), data=data, extra=extra)
    same(run(str(tmp_path), data=data, extra=extra, **PARTS), whole)
    assert whole[0][0, 1] > 1e-3


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "sapo", "dro"])
def test_the_loss_of_a_batch_is_that_of_our_own_loop(tmp_path: Path, name: str) -> None:
    data = [{**row, "old_logprobs": row["old_logprobs"] - 2.9} for row in rows(advantages=1.0, old_logprobs=0.3)]
    loss = f"policy_loss={name} aggregation=seq_mean_token_mean"
    (logged, _), lm = run(str(tmp_path), data=data[:4], extra={"loss": loss}), model()
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    hidden = lm.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], 1)
    fields = {name: torch.cat([batch[name][:, 1:], torch.zeros(4, 1)], 1) for name in ("advantages", "old_logprobs")}
    result = LossRunner.from_overrides(loss.split())(hidden, lm.lm_head, shifted_labels=shifted, **fields)
    result.backward()
    norm = torch.stack([p.grad.norm() for p in lm.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(torch.stack([result.loss.detach(), norm]), logged[0], **EXACT)


def _two_processes(rank: int, world: int, folder: str, expected: dict[str, Any]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), ACCELERATE_USE_CPU="1")
    from accelerate.state import AcceleratorState, PartialState

    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "function": (Trainer, FUNCTION),
        "loss=ce": (ToolkitTrainer, {"loss": "loss=ce"}),
        "loss=ce loss.loss_reduction=sample": (ToolkitTrainer, {"loss": "loss=ce loss.loss_reduction=sample"}),
    }
    for name, (kind, extra) in runs.items():
        got = run(folder, kind, extra=extra, **HALVES)
        assert PartialState().num_processes == world
        same(got, expected[name])
        AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_one_big_batch(tmp_path: Path) -> None:
    folder = str(tmp_path)
    sample = "loss=ce loss.loss_reduction=sample"
    expected = {
        "function": run(folder, Trainer, extra=FUNCTION),
        "loss=ce": run(folder),
        sample: run(folder, extra={"loss": sample}),
    }
    run_processes(2, _two_processes, folder, expected)


def test_metrics_and_evaluation(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, **PARTS, "eval_strategy": "steps"})
    both = []
    for kind in (Trainer, ToolkitTrainer):
        made = kind(model(), args, train_dataset=rows(), eval_dataset=rows()[:3])
        made.train()
        both.append(made.state.log_history)
    ours = next(entry for entry in both[1] if "toolkit/nll" in entry)
    assert ours["toolkit/nll"] == pytest.approx(ours["loss"], rel=1e-5)
    assert sum(entry.get("toolkit/active_tokens", 0) for entry in both[1]) == sum(LENGTHS)
    evaluated = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in both]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)


# -------------------------------------------------------------------- the function alone


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([[-100, 3, 5, 2], [-100, 7, -100, -100]])


def test_four_labels_by_hand() -> None:
    logits, labels = logits_and_labels()
    leaf = logits.clone().requires_grad_()
    loss = make_compute_loss_func()({"logits": leaf}, labels, num_items_in_batch=torch.tensor(8))
    log = logits.log_softmax(-1)
    assert loss.item() == pytest.approx(-(log[0, 0, 3] + log[0, 1, 5] + log[0, 2, 2] + log[1, 0, 7]).item() / 8)
    loss.backward()
    assert not leaf.grad[1, 1:].any()
    assert leaf.grad[0, 0, 3].item() == pytest.approx((log[0, 0, 3].exp().item() - 1) / 8)


def test_ignored_positions_may_hold_anything_and_none_counts_the_micro_batch() -> None:
    logits, labels = logits_and_labels()
    function = make_compute_loss_func("loss=ce")
    expected = function({"logits": logits}, labels, num_items_in_batch=4)
    garbage = logits.clone()
    garbage[1, 1:] = float("nan")
    assert function((garbage,), labels) == expected
    assert make_compute_loss_func("loss=ce loss.temperature=2.0")((logits,), labels) != expected


def test_a_micro_batch_without_labels_is_zero_with_a_graph() -> None:
    logits, labels = logits_and_labels()
    leaf = logits.requires_grad_()
    loss = make_compute_loss_func()({"logits": leaf}, torch.full_like(labels, -100), num_items_in_batch=4)
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


WRONG = {
    "loss=ce loss.loss_reduction=sample": "averages by seq_mean_token_mean, but compute_loss_func is given the number",
    "policy_loss=gspo": "reads advantages, but compute_loss_func gets labels alone; use toolkit.integrations",
    "loss=ce loss.softcap=30": "applied by the model already",
    "loss=cee": "loss=ce",
}


@pytest.mark.parametrize("loss", WRONG)
def test_the_function_says_what_it_cannot_do(loss: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_compute_loss_func(loss)
    assert WRONG[loss] in str(error.value)


def test_labels_and_processes_must_be_as_expected() -> None:
    logits, labels = logits_and_labels()
    with pytest.raises(DataError, match="the batch has no labels"):
        make_compute_loss_func()({"logits": logits}, None)
    with pytest.raises(ConfigError, match="start the processes by torchrun"):
        make_compute_loss_func()({"logits": logits}, labels, num_items_in_batch=torch.tensor([[4], [4]]))
    with pytest.raises(ConfigError, match=r"loss is an int; give overrides"):
        make_compute_loss_func(3)


TRAINER = {
    "both": ({}, {"compute_loss_func": print}, "compute_loss_func has no effect beside loss"),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor has no effect"),
    "sum": ({}, {"loss": "loss=ce loss.gradient_reduction=sum"}, "average their gradients"),
}


@pytest.mark.parametrize("case", TRAINER)
def test_the_trainer_refuses_what_has_no_effect(tmp_path: Path, case: str) -> None:
    settings, extra, message = TRAINER[case]
    with pytest.raises(ConfigError, match=message):
        run(str(tmp_path), extra=extra, **settings)


def test_without_labels_the_trainer_says_so(tmp_path: Path) -> None:
    data = [{name: value for name, value in row.items() if name != "labels"} for row in rows()]
    with pytest.raises(DataError, match="the batch has no labels"):
        run(str(tmp_path), data=data)


def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    page = Path(toolkit.__file__).parents[1] / "tutorials/reference/trainers/transformers.md"
    blocks = re.findall(r"^```py\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        args = TrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 1})
        exec(block, {"model": model(), "args": args, "data": rows()})


def test_a_loss_of_ones_own_runs(tmp_path: Path) -> None:
    @register_policy_loss("of_transformers_test", overwrite=True)
    def own(t: PolicyTerms, *, power: float = 1.0) -> torch.Tensor:
        return -t.advantages * t.logprobs * power

    loss = ["policy_loss=of_transformers_test", "policy_loss.power=2.0"]
    logged, _ = run(str(tmp_path), data=rows(advantages=1.0), extra={"loss": loss})
    assert logged.isfinite().all()


def test_log_probabilities_by_position_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of `LossRunner.logprobs`, one place before the token."""
    data, lm = rows(advantages=1.0), model()
    with torch.no_grad():
        lm.lm_head.weight *= 30  # else all tokens are about as likely
    monkeypatch.setitem(globals(), "model", lambda: copy.deepcopy(lm))
    for row in data:
        with torch.no_grad():
            all_logprobs = lm(input_ids=row["input_ids"][None]).logits.log_softmax(-1)[0, :-1]
        by_position = F.pad(all_logprobs.gather(-1, row["input_ids"][1:, None]).squeeze(-1), (0, 1))
        row["old_logprobs"] = by_position
    loss = {"loss": "policy_loss=vanilla"}
    with pytest.warns(UserWarning, match="indexed by token, as labels are"):
        run(str(tmp_path), data=data, extra=loss)
    for row in data:
        row["old_logprobs"] = F.pad(row["old_logprobs"][:-1], (1, 0))
    errors._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="old_logprobs differ")
        run(str(tmp_path), data=data, extra=loss)


def test_columns_that_the_trainer_would_remove(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove_unused_columns=True removes advantages from the data"):
        run(str(tmp_path), extra={"loss": "policy_loss=vanilla"}, remove_unused_columns=True)
