"""`LossRunner` on a model: the same as its logits give, for every kind of head; batches and rewards as they come."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.processes import run_processes
from toolkit import CELossConfig, ConfigError, DataError, GRPOLossConfig, LossRunner, errors
from toolkit.functional.advantages import advantage
from toolkit.functional.rewards import RewardTerms
from toolkit.models.policy import Policy

ROWS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
MASKS = [[0, 0, 1, 1, 1], [0, 1, 1], [0, 0, 1, 1]]
ADVANTAGES = [1.0, -1.0, 0.5]
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


def causal_lm(kind: str) -> Any:
    import transformers

    torch.manual_seed(1)
    if kind == "soft cap":
        config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
        return transformers.Gemma2ForCausalLM(config).double().eval()
    if kind == "logit scale":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.25)).double().eval()
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")).double()
    if kind == "LoRA":
        peft = pytest.importorskip("peft")
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(lm, options).eval()
    return lm.eval()


def by_hand(lm: Any, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of each row alone, by the logits of the model, [3, 5], NaN where none is predicted."""
    result = torch.full((3, 5), float("nan"), dtype=torch.float64)
    for index, row in enumerate(ROWS):
        ids = torch.tensor([row])
        logits = lm(input_ids=ids).logits / temperature
        scores = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        result[index, : len(row) - 1] = scores
    return result


@pytest.mark.parametrize("kind", ["plain", "tied", "soft cap", "logit scale", "LoRA"])
def test_a_model_gives_what_its_logits_give(kind: str) -> None:
    lm = causal_lm(kind)
    runner = LossRunner(GRPOLossConfig(temperature=0.5))
    batch = {"input_ids": ROWS, "loss_mask": MASKS, "advantages": ADVANTAGES}
    reference = by_hand(lm, temperature=0.5)
    torch.testing.assert_close(
        runner.logprobs(lm, batch).double(), reference.detach(), rtol=2e-6, atol=2e-6, equal_nan=True
    )
    is_scored = F.pad(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]), (0, 1)).bool()
    expected = -(torch.tensor(ADVANTAGES).unsqueeze(-1) * (reference - reference.detach()).exp())[is_scored].mean()
    result = runner(lm, batch)
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    result.backward()
    for parameter, wanted in zip(parameters, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        if wanted is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-9)


def test_batches_in_every_form_are_the_same() -> None:
    from transformers import BatchEncoding

    lm, runner = causal_lm("plain"), LossRunner(GRPOLossConfig())
    padded = F.pad(torch.tensor(ROWS[0]), (0, 0))
    ids = torch.stack([padded, F.pad(torch.tensor(ROWS[1]), (0, 2)), F.pad(torch.tensor(ROWS[2]), (0, 1))])
    mask = torch.stack([F.pad(torch.tensor(row), (0, 5 - len(row))) for row in MASKS])
    attended = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    old = -torch.rand(3, 5).double()
    lists = [row[: len(tokens) - 1].tolist() for row, tokens in zip(old, ROWS, strict=True)]
    left = {"input_ids": ids[1:2, [4, 3, 0, 1, 2]], "attention_mask": attended[1:2, [4, 3, 0, 1, 2]],
            "loss_mask": mask[1:2, [4, 3, 0, 1, 2]], "advantages": -1.0}  # fmt: skip
    fields = {"loss_mask": mask, "advantages": ADVANTAGES, "old_logprobs": old}
    expected = runner(lm, {"input_ids": ids, "attention_mask": attended, **fields}).loss.item()
    ragged = {"input_ids": ROWS, "loss_mask": MASKS, "advantages": ADVANTAGES, "old_logprobs": lists}
    arrays = {"input_ids": [np.array(row) for row in ROWS], "loss_mask": [np.array(row) for row in MASKS]}
    for batch in (
        BatchEncoding({"input_ids": ids, "attention_mask": attended, **fields}),
        {"input_ids": ids.numpy(), "attention_mask": attended.numpy(), "loss_mask": mask.numpy(), **fields},
        ragged,
        {**ragged, **arrays},
        {"input_ids": ids, "attention_mask": attended, **fields, "old_logprobs": old[:, :-1]},
    ):
        assert runner(lm, batch).loss.item() == pytest.approx(expected, abs=1e-9)
    assert runner(lm, {"input_ids": ids, "attention_mask": attended}, **fields).loss.item() == pytest.approx(expected)
    alone = runner(lm, {"input_ids": [ROWS[1]], "loss_mask": [MASKS[1]], "advantages": -1.0}).loss.item()
    assert runner(lm, left).loss.item() == pytest.approx(alone, abs=1e-9)


def test_what_waits_for_the_device_is_looked_for_in_the_first_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    for name in ("batches.warn_of_left_padding", "rewarded._warn_of_groups"):
        monkeypatch.setattr(f"toolkit.runner.{name}", lambda *_, looks=name, **__: looked.append(looks))
    lm, runner = causal_lm("plain"), LossRunner(GRPOLossConfig())
    ids = torch.tensor(ROWS[0]).expand(2, -1)
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "rewards": [1.0, 0.0], "group_ids": [0, 0]}
    for _ in range(2):
        runner(lm, batch)
        runner.step([batch], model=lm)
    assert sorted(looked) == ["batches.warn_of_left_padding", "rewarded._warn_of_groups"]


def test_a_packed_row_of_a_model() -> None:
    lm, runner = causal_lm("plain"), LossRunner(GRPOLossConfig())
    packed = {
        "input_ids": torch.tensor([[token for row in ROWS for token in row]]),
        "loss_mask": torch.tensor([[is_scored for row in MASKS for is_scored in row]]),
        "cu_seq_lens": torch.tensor([0, 5, 8, 12]),
    }
    rewards = {"rewards": [1.0, 0.0, 1.0], "group_ids": [0, 0, 0]}
    rows = runner(lm, {"input_ids": ROWS, "loss_mask": MASKS, **rewards}).loss
    assert runner(lm, {**packed, **rewards}).loss.item() == pytest.approx(rows.item(), abs=1e-9)
    alone = torch.cat([scores[: len(row)] for scores, row in zip(by_hand(lm).detach(), ROWS, strict=True)])
    packed_scores = runner.logprobs(lm, packed)[0].double()  # each sequence is read as if it were alone
    torch.testing.assert_close(packed_scores, alone, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_rewards_become_advantages_over_all_batches_of_a_step() -> None:
    lm, runner = causal_lm("plain"), LossRunner(GRPOLossConfig())
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 4.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 0])
    for name, options in (("grpo", {}), ("rloo", {}), ("grpo", {"eps": 0.5})):
        values = advantage(name).compute(RewardTerms(rewards=rewards, group_ids=groups), **options)
        texts = {"input_ids": ROWS, "loss_mask": MASKS}
        one, two = copy.deepcopy(lm), copy.deepcopy(lm)
        by_hand = [{**texts, "advantages": part} for part in values.split(3)]
        rewarded = [
            {**texts, "rewards": r, "group_ids": g} for r, g in zip(rewards.split(3), groups.split(3), strict=True)
        ]
        first = runner.step(by_hand, model=one)
        second = runner.step(rewarded, model=two, advantage=name, advantage_options=options)
        assert second.loss.item() == pytest.approx(first.loss.item(), abs=1e-12)
        torch.testing.assert_close(two.lm_head.weight.grad, one.lm_head.weight.grad)
    hidden, head = torch.randn(3, 4, 16), torch.randn(50, 16)
    ids = torch.tensor([[1, 2, 3, 4]] * 3)
    fields = {"input_ids": ids, "rewards": [1.0, 0.0, 2.0], "group_ids": [7, 7, 7]}
    values = advantage("grpo").compute(
        RewardTerms(rewards=torch.tensor([1.0, 0.0, 2.0]), group_ids=torch.zeros(3).long())
    )
    assert runner(hidden, head, **fields).loss.item() == pytest.approx(
        runner(hidden, head, input_ids=ids, advantages=values).loss.item(), abs=1e-6
    )


def test_step_with_a_model_accumulates_clears_and_steps() -> None:
    lm, runner = causal_lm("tied"), LossRunner(GRPOLossConfig())
    parts = [{"input_ids": ROWS[:1], "loss_mask": MASKS[:1], "advantages": ADVANTAGES[:1]},
             {"input_ids": ROWS[1:], "loss_mask": MASKS[1:], "advantages": ADVANTAGES[1:]}]  # fmt: skip
    runner(lm, {"input_ids": ROWS, "loss_mask": MASKS, "advantages": ADVANTAGES}).backward()
    together = lm.lm_head.weight.grad.clone()
    before = lm.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    runner.step(parts, model=lm, optimizer=optimizer)  # what the first call left is cleared
    torch.testing.assert_close(lm.lm_head.weight.grad, together)
    torch.testing.assert_close(lm.lm_head.weight.detach(), before - 0.5 * together)
    one_of_them = torch.optim.SGD([nn.Parameter(torch.ones(1)), lm.lm_head.weight], lr=0.5)
    runner.step(parts, model=lm, optimizer=one_of_them)  # a part of the model may be trained


class StatesAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Any:
        return self.embedding(input_ids), self.lm_head


def test_a_module_that_returns_states_and_head_and_a_policy_are_models() -> None:
    module, runner = StatesAndHead(), LossRunner(GRPOLossConfig())
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]] * 2), "advantages": [1.0, -2.0]}
    expected = runner(*module(batch["input_ids"]), **batch).loss.item()
    assert runner(module, batch).loss.item() == pytest.approx(expected, abs=1e-7)
    lm = causal_lm("soft cap")
    assert runner(Policy(lm), batch).loss.item() == pytest.approx(runner(lm, batch).loss.item(), abs=1e-12)


Answered = list[tuple[dict[str, Any], dict[str, Any], str]]
WRONG: Answered = [
    ({"advantages": 1.0}, {}, "batch has no input_ids"),
    ({"input_ids": ROWS, "loss_mask": MASKS[:2], "advantages": 1.0}, {}, "loss_mask has 2 rows, but input_ids has 3"),
    (
        {"input_ids": ROWS, "old_logprobs": [[0.1]] * 3, "advantages": 1.0},
        {},
        r"old_logprobs\[0\] has 1 values, .* 5 t",
    ),
    ({"input_ids": [1, 2, 3], "advantages": 1.0}, {}, r"one row: input_ids\[None\]"),
    ({"input_ids": ROWS}, {"rewards": [1.0, 2.0, 3.0]}, "group_ids is missing beside rewards"),
    ({"input_ids": ROWS}, {"rewards": [1.0, 2.0], "group_ids": [0, 0, 0]}, "one number for each of the 3 sequences"),
    (
        {"input_ids": ROWS},
        {"rewards": [0.0, math.nan, 1.0], "group_ids": [0, 0, 0]},
        r"^rewards\[1\] is nan \(1 of 3 rewards",
    ),
    (
        {"input_ids": ROWS},
        {"rewards": [0.0, 1.0, -math.inf], "group_ids": [0, 0, 0]},
        r"^rewards\[2\] is -inf",
    ),
    ({"input_ids": ROWS, "advantages": 1.0}, {"advantages": 2.0}, "also given by name"),
    ({"input_ids": ROWS}, {"rewards": [1, 2, 3], "group_ids": [0] * 3, "advantage": "grp"}, "did you mean 'grpo'"),
]
"""Batch, fields by name, and the answer."""


@pytest.mark.parametrize(("batch", "fields", "message"), WRONG)
def test_wrong_batches_are_answered(batch: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        LossRunner(GRPOLossConfig())(causal_lm("plain"), batch, **fields)


def test_a_reward_that_is_no_number_is_named_with_its_batch_and_row() -> None:
    lm, fields = causal_lm("plain"), {"input_ids": ROWS, "group_ids": [0, 0, 0], "rewards": [1.0, 0.0, 0.5]}
    with pytest.raises(DataError, match=r"^batches\[1\]: rewards\[2\] is inf"):
        LossRunner(GRPOLossConfig()).step([fields, {**fields, "rewards": [0.0, 1.0, math.inf]}], model=lm)


def test_wrong_models_are_answered() -> None:
    lm, runner, batch = causal_lm("plain"), LossRunner(GRPOLossConfig()), {"input_ids": ROWS, "advantages": 1.0}
    for call, message in (
        (lambda: runner.step([batch], lambda b: b, model=lm), "give one of them"),
        (lambda: runner.step([batch], model=lm, optimizer=0.1), r"optimizer is a float without step\(\)"),
        (lambda: runner.step([batch], model=lm, optimizer=torch.optim.SGD), r"is the class SGD; .* SGD\(model\.param"),
        (
            lambda: runner.step([batch], model=lm, optimizer=torch.optim.SGD(copy.deepcopy(lm).parameters(), lr=0.1)),
            "^the optimizer holds none of the model's parameters",
        ),
        (lambda: runner.step([batch], model="gpt2"), "model is a str"),
        (lambda: runner(nn.Linear(2, 2), batch), "takes no input_ids"),
        (lambda: runner.logprobs(torch.ones(2), batch), r"write runner\.logprobs\(model, batch\)"),
        (lambda: runner(batch, lm), r"is a dict without hidden states; write runner\(model, batch\)$"),
        (lambda: runner(lm, [batch]), r"write runner\(model, batch\), or runner\.step\(batches, model=model\)$"),
        (lambda: runner([batch], lm), r"list of batches; write runner\.step\(batches, model=model\)"),
        (lambda: runner("gpt2", batch), r"is a str; write runner\(model, batch\) with the loaded model$"),
        (lambda: runner(lm, torch.ones(3, 4)), r"is a Tensor; write runner\(model, batch\) with a mapping such as"),
        (lambda: runner.explain(batch, lm), r"write runner\.explain\(model, batch\)$"),
        (lambda: runner.compare(["kl=none"], batch, lm), r"write runner\.compare\(losses, model, batch\)$"),
        (lambda: runner.sweep("kl", ["none"], batch, lm), r"write runner\.sweep\(key, values, model, batch\)$"),
        (lambda: runner.step([batch], lm), r"For a model write step\(batches, model=model\)"),
        (lambda: runner.step([batch]), r"step\(\) needs a model or a function; write step\(batches, model=model\)"),
        (lambda: runner.step(lm, [batch]), r"takes the batches first: step\(\[batch\], model=model\)$"),
        (lambda: LossRunner(CELossConfig())(lm, {"input_ids": ROWS}, rewards=[1, 2, 3]), "rewards"),
        (lambda: LossRunner(CELossConfig())(lm, {"input_ids": ROWS}, advantage="rloo"), "no effect on CELossConfig"),
        (lambda: runner(lm, {**batch, "rewards": [1, 2, 3]}), "give rewards or advantages, not both"),
        (lambda: runner.step([{**batch, "rewards": [1, 2, 3]}], model=lm), "give rewards or advantages, not both"),
        (lambda: runner.step([batch], model=lm, advantage="grpo"), "^advantage='grpo' needs rewards"),
        (lambda: runner.explain(lm, batch, advantage="grpo"), "^advantage='grpo' needs rewards"),
        (lambda: runner(lm, {"input_ids": ROWS, "reward": [1, 2, 3]}), "did you mean 'rewards'"),
        (
            lambda: runner.step([{"input_ids": ROWS, "reward": [1, 2, 3]}], model=lm, advantage="grpo"),
            "needs rewards, .*the batch has 'reward'; did you mean 'rewards'",
        ),
        (lambda: runner(lm, {"input_ids": ROWS, "rewards": [1, 2, 3], "advantage": "rloo"}), "an argument of the call"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ConfigError, match="DataParallel copies the model"):
        runner(nn.DataParallel(lm), batch)


def _compare_ddp(rank: int, world: int) -> None:
    """Each rank has a part of the rows; the gradient is that of all rows together in one process."""
    lm = causal_lm("tied")
    model, alone = nn.parallel.DistributedDataParallel(copy.deepcopy(lm)), copy.deepcopy(lm)
    runner, part = LossRunner(GRPOLossConfig()), slice(0, 1) if rank == 0 else slice(1, 3)
    batch = {"input_ids": ROWS[part], "loss_mask": MASKS[part]}
    result = runner.step([{**batch, "advantages": ADVANTAGES[part]}, {**batch, "advantages": 0.25}], model=model)
    policy, reference = by_hand(alone), by_hand(alone).detach()
    is_scored = F.pad(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]), (0, 1)).bool()
    weights = torch.tensor(ADVANTAGES).unsqueeze(-1) + 0.25
    expected = -(weights * (policy - reference).exp())[is_scored].sum() / (2 * is_scored.sum())
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(model.module.lm_head.weight.grad, alone.lm_head.weight.grad, rtol=1e-6, atol=2e-8)
    assert "forward" not in model.module.__dict__
    again = runner(model, {**batch, "advantages": ADVANTAGES[part]})  # a call, whose backward the caller runs
    model.zero_grad()
    again.backward()
    gradients = [torch.zeros_like(alone.lm_head.weight) for _ in range(world)]
    torch.distributed.all_gather(gradients, model.module.lm_head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.dist
def test_a_model_in_ddp_gets_the_gradient_of_all_ranks_together() -> None:
    run_processes(2, _compare_ddp)


@pytest.mark.dist
@pytest.mark.slow
def test_a_launched_step_is_the_step_of_one_process() -> None:
    lm, runner = causal_lm("tied"), LossRunner(GRPOLossConfig())
    one = {"input_ids": ROWS, "loss_mask": MASKS, "rewards": [1.0, 0.0, 0.5], "group_ids": [0, 0, 1]}
    batches = [one, {**one, "rewards": [0.0, 3.0, 1.0]}]  # groups across both
    launched = runner.launch(batches, lm, num_processes=2)
    assert lm.lm_head.weight.grad is None
    alone = runner.step(batches, model=lm)
    norm = torch.stack([p.grad.square().sum() for p in lm.parameters() if p.grad is not None]).sum().sqrt()
    assert launched.loss.item() == pytest.approx(alone.loss.item(), abs=1e-9)
    assert launched.metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert launched.metrics["denominator"] == alone.metrics["denominator"] == 14
    with pytest.raises(DataError, match="has 1 micro-batches for num_processes=2"):
        runner.launch([one], lm)


# ------------------------------------------------------------- rewards of wrong groups

GROUPED = {
    # Two prompts, [3 4 5] and [6 7 8], of two completions each.
    "input_ids": torch.tensor([[3, 4, 5, 1, 2], [3, 4, 5, 9, 9], [6, 7, 8, 1, 1], [6, 7, 8, 2, 9]]),
    "loss_mask": torch.tensor([[0, 0, 0, 1, 1]] * 4),
    "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([0, 0, 1, 1], None),
        ([0, 1, 2, 3], "every group has one completion, so all advantages of grpo are 0"),
        ([0, 1, 0, 1], "follow different prompts"),
    ],
)
def test_wrong_groups_are_noticed(groups: list[int], expected: str | None) -> None:
    hidden, head = torch.randn(4, 5, 16), torch.randn(50, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LossRunner(GRPOLossConfig())(hidden, head, **GROUPED, group_ids=groups)
    messages = [str(each.message) for each in caught]
    assert (
        [expected in message for message in messages] == [True] * (expected is not None) if expected else not messages
    )


def test_completions_without_a_prompt_are_not_compared() -> None:
    hidden, head = torch.randn(4, 5, 16), torch.randn(50, 16)
    fields = GROUPED | {"loss_mask": torch.ones(4, 5, dtype=torch.long), "group_ids": [0, 1, 0, 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossRunner(GRPOLossConfig())(hidden, head, **fields)


def test_padding_on_the_left_needs_an_attention_mask() -> None:
    lm = causal_lm("plain")
    ids = torch.tensor([[0, 0, 0, 0, 3, 4, 5, 6], [7, 8, 9, 10, 3, 4, 5, 6]])
    batch = {"input_ids": ids, "loss_mask": torch.tensor([[0] * 6 + [1] * 2] * 2), "advantages": [1.0, -1.0]}
    with pytest.warns(UserWarning, match="input_ids without attention_mask: some rows start with 3 equal tokens"):
        LossRunner(GRPOLossConfig())(lm, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossRunner(GRPOLossConfig())(lm, batch | {"attention_mask": (ids != 0).long()})


def test_what_a_tokenizer_returns_besides_is_no_mistake() -> None:
    batch = {"input_ids": ROWS, "loss_mask": MASKS, "advantages": [1.0, -1.0, 0.5]}
    lm, runner = causal_lm("plain"), LossRunner(GRPOLossConfig())
    others = {
        "token_type_ids": [[0] * len(row) for row in ROWS],
        "special_tokens_mask": [[0] * len(row) for row in ROWS],
    }
    assert runner(lm, batch | others).loss.item() == runner(lm, batch).loss.item()
