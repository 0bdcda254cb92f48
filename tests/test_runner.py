"""`LossRunner`: the same loss as by hand, whatever way the batch is given; calibrated accumulation; clear errors."""

import pytest
import torch

from tests.conftest import random_head, random_item
from tests.losses.test_custom_loss import LOSSES, loss_of
from toolkit import CELossConfig, ConfigError, DataError, GRPOLossConfig, GRPOLossContext, LossRunner, errors
from toolkit.testing import random_batch


def test_equals_items_and_contexts() -> None:
    runner = LossRunner.from_overrides(["loss=grpo", "kl=k3", "mode=chunk", "loss.chunk_size=5"])
    item, head = random_item(), random_head()
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], runner.loss_cfg)
    loss, _ = GRPOLossContext(runner.loss_cfg, kwargs).forward(*head)
    for _ in range(2):  # a cell may be run again
        result = runner(*head, **dict(item.tensors()))
        assert torch.equal(result.loss, loss)
    result.backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in head)
    assert {"loss", "policy_loss", "kl_ref", "ratio", "entropy"} <= set(result.metrics)


def test_input_ids_are_shifted() -> None:
    hidden, weight, bias = random_head((2, 6))
    ids = torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    labels = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    runner = LossRunner(GRPOLossConfig())
    by_ids = runner(hidden, weight, bias, input_ids=ids, loss_mask=mask, advantages=torch.tensor([1.0, -1.0]))
    short = runner(hidden[:, :-1], weight, bias, input_ids=ids, loss_mask=mask, advantages=torch.tensor([1.0, -1.0]))
    by_labels = runner(
        hidden[:, :-1], weight, bias, shifted_labels=labels, advantages=torch.tensor([[1.0], [-1.0]]).expand(2, 5)
    )
    grads = [torch.autograd.grad(result.loss, weight)[0] for result in (by_ids, short, by_labels)]
    assert grads[0].abs().max() > 1e-3
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("advantages", [0.5, torch.tensor(0.5), torch.full((13,), 0.5), torch.full((2,), 0.5)])
def test_ways_to_give_advantages(advantages) -> None:
    item, head = random_item(), random_head()
    runner = LossRunner(GRPOLossConfig())
    fields = {"shifted_labels": item.shifted_labels, "old_logprobs": item.old_logprobs}
    loss = runner(*head, advantages=advantages, **fields).loss
    torch.testing.assert_close(loss, runner(*head, advantages=torch.full((2, 13), 0.5), **fields).loss)


def test_packed() -> None:
    hidden, weight, bias = random_head((1, 5))
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    runner = LossRunner(CELossConfig(loss_reduction="sample"))
    packed = runner(hidden, weight, bias, input_ids=ids, cu_seq_lens=torch.tensor([0, 3, 5])).loss
    first = runner(hidden[:, :3], weight, bias, input_ids=ids[:, :3]).loss
    second = runner(hidden[:, 3:], weight, bias, input_ids=ids[:, 3:]).loss
    torch.testing.assert_close(packed, (first + second) / 2)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_step_accumulates_as_one_batch(mode: str) -> None:
    item = random_item((6, 7))
    hidden, weight, bias = random_head((6, 7))
    runner = LossRunner.from_overrides(["kl=k3", f"mode={mode}", "loss.chunk_size=3"])
    whole = runner(hidden, weight, bias, **dict(item.tensors()))
    expected = torch.autograd.grad(whole.loss, (hidden, weight, bias))
    batches = [
        {"rows": slice(start, stop), **{name: value[start:stop] for name, value in item.tensors()}}
        for start, stop in ((0, 1), (1, 4), (4, 6))
    ]
    result = runner.step(batches, lambda batch: (hidden[batch["rows"]], weight, bias))
    torch.testing.assert_close(result.loss.double(), whole.loss.double(), rtol=1e-6, atol=0)
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-9)
    for tensor, grad in zip((hidden, weight, bias), expected, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give exactly one of input_ids"),
        ({"shifted_labels": torch.zeros(2, 13, dtype=torch.int64)}, "advantages is missing"),
        (
            {
                "shifted_labels": torch.zeros(2, 13, dtype=torch.int64),
                "loss_mask": torch.ones(2, 13),
                "advantages": 1.0,
            },
            "loss_mask goes with input_ids",
        ),
        (
            {"input_ids": torch.zeros(2, 13, dtype=torch.int64), "advantages": torch.ones(5)},
            r"advantages has shape \[5\]",
        ),
        ({"input_ids": torch.full((2, 13), 11), "advantages": 1.0}, "outside the vocabulary of 11"),
    ],
)
def test_mistakes_are_named(fields: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        LossRunner(GRPOLossConfig())(*random_head(), **fields)


def test_step_takes_hidden_states_without_the_last_position() -> None:
    hidden, weight, bias = random_head((2, 6))
    batch = {"input_ids": torch.randint(0, 11, (2, 6)), "advantages": torch.tensor([1.0, -1.0])}
    runner = LossRunner(GRPOLossConfig())
    runner.step([batch], lambda _: (hidden[:, :-1], weight, bias))
    assert weight.grad is not None
    expected = torch.autograd.grad(runner(hidden, weight, bias, **batch).loss, weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-15)


def test_one_advantage_a_row_is_ambiguous_when_rows_and_positions_agree() -> None:
    hidden, weight, bias = random_head((3, 3))
    runner, labels = LossRunner(GRPOLossConfig()), torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(DataError, match=r"may mean rows or positions"):
        runner(hidden, weight, bias, shifted_labels=labels, advantages=torch.ones(3))
    runner(hidden, weight, bias, shifted_labels=labels, advantages=torch.ones(3, 1))


def test_step_names_misspelt_fields_and_takes_boundaries_of_some_batches() -> None:
    hidden, weight, bias = random_head((1, 4))
    labels = torch.zeros(1, 4, dtype=torch.int64)
    runner = LossRunner(GRPOLossConfig())
    batch = {"shifted_labels": labels, "advantages": 1.0, "row": 3}
    with pytest.raises(DataError, match="did you mean 'old_logprobs'"):
        runner.step([{**batch, "old_logprob": labels}], lambda _: (hidden, weight, bias))
    with pytest.raises(DataError, match=r"step\(\[batch\], forward\)"):
        runner.step(batch, lambda _: (hidden, weight, bias))  # type: ignore[arg-type]
    runner.step([batch, {**batch, "cu_seq_lens": torch.tensor([0, 2, 4])}], lambda _: (hidden, weight, bias))


def test_step_reads_boundaries() -> None:
    hidden, weight, bias = random_head((1, 5))
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "cu_seq_lens": torch.tensor([0, 2, 5])}
    runner = LossRunner(CELossConfig(loss_reduction="sample"))
    expected = runner(hidden, weight, bias, **batch).loss.item()
    assert runner.step([batch], lambda _: (hidden, weight, bias)).loss.item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_refuses_what_it_does_not_read() -> None:
    hidden, weight, bias = random_head((1, 4))
    with pytest.raises(DataError, match="advantages has no effect"):
        LossRunner(CELossConfig())(hidden, weight, bias, input_ids=torch.zeros(1, 4, dtype=torch.int64), advantages=1.0)


def test_wrong_construction() -> None:
    with pytest.raises(ConfigError, match="from_overrides"):
        LossRunner(["loss=grpo"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="try: loss=grpo"):
        LossRunner.from_overrides(["loss=grop"])
    with pytest.raises(DataError, match="no batches"):
        LossRunner(GRPOLossConfig()).step([], lambda batch: ())


def test_repr_is_readable() -> None:
    assert "  mode='chunk'" in repr(LossRunner.from_overrides(["mode=chunk"]))
    item, head = random_item(), random_head()
    assert repr(LossRunner(GRPOLossConfig())(*head, **dict(item.tensors()))).startswith("LossResult(loss=")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("advantage=rloo", "LossRunner has no advantage; leave it out"),
        ("training.steps=3", "LossRunner has no training; leave it out"),
        ("rollout.group_size=4", "LossRunner has no rollout; leave it out"),
        ("kl_control=adaptive", "LossRunner has no kl_control; leave it out"),
        ("kl=k1_in_reward", "LossRunner has no rewards"),
        ("seed=1", "LossRunner has no seed; leave it out"),
    ],
)
def test_overrides_that_a_loss_cannot_honour(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        LossRunner.from_overrides(["kl=k2", override] if not override.startswith("kl=") else [override])
    assert str(caught.value).startswith(override)


def test_a_single_override_may_be_a_string() -> None:
    assert LossRunner.from_overrides("policy_loss=gspo").loss_cfg.policy_loss_cfg["loss_type"] == "gspo"
    assert LossRunner.from_overrides("rollout.temperature=0.7").loss_cfg.temperature == 0.7


def test_values_of_wrong_types_are_named_and_not_printed_whole() -> None:
    head, labels = random_head((2, 4)), torch.zeros(2, 4, dtype=torch.int64)
    runner = LossRunner(GRPOLossConfig())
    with pytest.raises(DataError, match=r"group_ids is a list.*tensor of integers"):
        runner(*head, shifted_labels=labels, advantages=1.0, group_ids=["a", "b"])
    with pytest.raises(DataError, match="old_logprobs") as caught:
        runner(*head, shifted_labels=labels, advantages=1.0, old_logprobs=[[0.0] * 4000] * 2)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["aggregation=constant", "loss.aggregation.length=0"], "loss.aggregation.length=0 is not allowed"),
        (["loss.aggregation=foo"], "loss.aggregation.name='foo' is not one"),
        (["loss.mode=foo"], "loss.mode='foo' is not one"),
    ],
)
def test_paths_of_nested_settings(overrides: list[str], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossRunner.from_overrides(overrides)
    assert str(caught.value).startswith(start)


def test_nested_settings_in_python() -> None:
    with pytest.raises(ConfigError, match=r"^aggregation\.name='seq_mean'.*did you mean 'seq_mean_token_mean'"):
        GRPOLossConfig(aggregation="seq_mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^aggregation\.lenght is not a setting.*did you mean 'length'"):
        GRPOLossConfig(aggregation={"name": "constant", "lenght": 3})  # type: ignore[arg-type]


def test_warnings_point_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match="no effect with use_kl_loss=False") as caught:
        GRPOLossConfig(kl_loss_type="k2")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="directly") as caught:
        errors.warn_once("directly")
    assert caught[0].filename == __file__


def test_a_loss_over_the_batch_in_two_micro_batches() -> None:
    """kl_cov looks at all tokens of the step: with the current log-probabilities the cut does not matter."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    labels, advantages = torch.randint(0, 7, (4, 5)), torch.randn(4, 5, dtype=torch.float64)
    current = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    old = current + 0.3 * torch.randn(4, 5, dtype=torch.float64)
    runner = LossRunner.from_overrides(["policy_loss=kl_cov", "policy_loss.kl_cov_ratio=0.2"])
    grads, losses = [], []
    for cuts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        head = weight.clone().requires_grad_()
        batches = [
            {
                "shifted_labels": labels[own],
                "advantages": advantages[own],
                "old_logprobs": old[own],
                "current_logprobs": current[own],
                "hidden": hidden[own],
            }
            for own in cuts
        ]
        result = runner.step(batches, lambda batch, head=head: (batch["hidden"], head))
        grads.append(head.grad)
        losses.append(result.metrics["loss"])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-15)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    with pytest.raises(DataError, match="statistics of the whole batch"):
        runner.step(
            [{name: value for name, value in batch.items() if name != "current_logprobs"} for batch in batches],
            lambda batch: (batch["hidden"], head),
        )


def test_fields_of_one_s_own_items() -> None:
    cfg = LOSSES["tools"]
    batch = random_batch(cfg)
    head = (batch.hidden_states, batch.head_weight, batch.head_bias)
    fields = {
        name: value for name, value in batch.item.tensors() if name in ("shifted_labels", "advantages", "old_logprobs")
    }
    runner = LossRunner(cfg)
    found = runner(*head, **fields, is_tool=batch.item.is_tool)
    torch.testing.assert_close(found.loss, loss_of(cfg, batch), rtol=1e-12, atol=0)
    assert runner.explain(*head, **fields, is_tool=batch.item.is_tool).name == "eager"
    with pytest.raises(DataError, match=r"'is_toll' is not a field of a batch \(did you mean 'is_tool'\?\)"):
        runner(*head, **fields, is_toll=batch.item.is_tool)
    with pytest.raises(DataError, match=r"is_tool has dtype torch.int64; it must be a bool tensor"):
        runner(*head, **fields, is_tool=batch.item.is_tool.long())
    with pytest.raises(DataError, match=r"advantages has no effect on FocalLossConfig, .* item_cls = RL"):
        LossRunner(LOSSES["focal"])(*head, shifted_labels=fields["shifted_labels"], advantages=1.0)


def test_one_advantage_for_the_only_row() -> None:
    hidden, weight = torch.randn(1, 7, 3), torch.randn(5, 3)
    labels = torch.randint(0, 5, (1, 7))
    runner = LossRunner(GRPOLossConfig())
    found = runner(hidden, weight, shifted_labels=labels, advantages=torch.tensor([2.0]))
    assert found.loss.item() == runner(hidden, weight, shifted_labels=labels, advantages=2.0).loss.item()
