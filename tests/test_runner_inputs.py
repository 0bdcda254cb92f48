"""What a person hands to `LossRunner`: heads as modules, outputs of models, lists; and warnings of what looks wrong."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import (
    CELossConfig,
    DataError,
    GRPOLossConfig,
    LossRunner,
    LossTerm,
    RLLossContextInputItem,
    distributed,
    errors,
)
from toolkit.compose.plugins import load_plugins
from toolkit.functional.policy import registry
from toolkit.metrics import Max, Mean, Sum
from toolkit.peers.batch_fields import BATCH, NAMES, counterpart_field
from toolkit.runner import FIELDS

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 1, 2]])
ADVANTAGES = torch.tensor([1.0, -0.5])


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


@pytest.fixture
def head() -> torch.nn.Linear:
    return torch.nn.Linear(4, 11)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 6, 4, requires_grad=True)


def test_a_head_may_be_a_module_and_hidden_states_a_model_s_output(hidden: Tensor, head: torch.nn.Linear) -> None:
    runner, fields = LossRunner(GRPOLossConfig()), {"input_ids": IDS, "advantages": ADVANTAGES}
    expected = runner(hidden, head.weight, head.bias, **fields).loss
    other = torch.zeros_like(hidden)
    for outputs in (
        hidden,
        (other, hidden),
        (hidden,),
        SimpleNamespace(hidden_states=(other, hidden), logits=other),
        SimpleNamespace(last_hidden_state=hidden, hidden_states=None),
        {"last_hidden_state": hidden},
    ):
        assert torch.equal(runner(outputs, head, **fields).loss, expected)
    assert (
        runner.explain((hidden,), head, **fields).name == runner.explain(hidden, head.weight, head.bias, **fields).name
    )
    runner.step([fields], lambda _: (SimpleNamespace(last_hidden_state=hidden), head))
    by_step = head.bias.grad
    assert by_step is not None
    torch.testing.assert_close(by_step, torch.autograd.grad(expected, head.bias)[0])


def test_fields_may_be_lists_and_arrays(hidden: Tensor, head: torch.nn.Linear) -> None:
    runner, mask = LossRunner(GRPOLossConfig()), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    old = -torch.rand(2, 6)
    fields = {"input_ids": IDS, "loss_mask": mask, "advantages": torch.tensor([2.0, -1.0]), "old_logprobs": old}
    expected = runner(hidden, head, **fields).loss
    lists = {name: value.tolist() for name, value in fields.items()}
    arrays = {name: value.numpy() for name, value in fields.items()}
    for other in (lists, arrays, {**fields, "advantages": torch.tensor([2, -1])}):
        torch.testing.assert_close(runner(hidden, head, **other).loss, expected, rtol=1e-6, atol=0)


def test_log_probabilities_of_completions_fit_after_what_the_message_says(
    hidden: Tensor, head: torch.nn.Linear
) -> None:
    """[B, C] of the last C tokens, as TRL and verl hold them, and [B, T - 1] of logits[:, :-1]."""
    runner, by_token = LossRunner(GRPOLossConfig()), -torch.rand(2, 6)
    for count in (3, 5):
        mask = (torch.arange(6) >= 6 - count).expand(2, 6)
        fields = {"input_ids": IDS, "loss_mask": mask, "advantages": ADVANTAGES}
        short = by_token[:, -count:]
        with pytest.raises(DataError, match=rf"torch\.nn\.functional\.pad\(old_logprobs, \({5 - count}, 1\)\)"):
            runner(hidden, head, **fields, old_logprobs=short)
        padded = runner(hidden, head, **fields, old_logprobs=F.pad(short, (5 - count, 1))).loss
        item = RLLossContextInputItem.from_unshifted(IDS, mask, old_logprobs=by_token)
        labels, old = item.shifted_labels, item.old_logprobs
        same = runner(hidden, head, shifted_labels=labels, advantages=ADVANTAGES, old_logprobs=old).loss
        assert padded.item() == pytest.approx(same.item(), rel=1e-6)


def test_attention_mask_leaves_out_padding_on_either_side(hidden: Tensor, head: torch.nn.Linear) -> None:
    runner = LossRunner(GRPOLossConfig())
    text = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    scored = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]])  # the first token of a text has no prediction
    batch = {"input_ids": IDS, "advantages": ADVANTAGES}
    by_mask = runner(hidden, head, **batch, loss_mask=scored).loss
    assert runner(hidden, head, **batch, attention_mask=text).loss.item() == pytest.approx(by_mask.item())
    step = runner.step([{**batch, "attention_mask": text}], lambda _: (hidden, head))
    assert step.loss.item() == pytest.approx(by_mask.item())
    whole = runner(hidden, head, **batch).loss.item()
    four_axes = {**batch, "attention_mask": torch.ones(2, 1, 6, 6)}  # for the model alone
    assert runner.step([four_axes], lambda _: (hidden, head)).loss.item() == pytest.approx(whole)


def test_metrics_of_a_context_are_numbers() -> None:
    for metric, value in ((Sum(torch.tensor(3.0)), 3.0), (Mean.of(torch.tensor([1.0, 2.0])), 1.5)):
        assert float(metric) == metric.item() == metric.value() == value
    assert f"{float(Max.of(torch.tensor([1.0, 4.0]))):.1f}" == "4.0"


# -------------------------------------------------------------------- warnings

PADDED = torch.tensor([[1, 2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 10, 1]])
PROMPTED = torch.tensor([[4, 5, 6, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9, 10]])
ALL = torch.ones(2, 7, dtype=torch.int64)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("ids", "fields", "expected"),
    [
        (PADDED, {}, "looks like padding"),
        (PADDED.flip(1), {}, "looks like padding"),
        (PADDED, {"attention_mask": (PADDED != 0).long()}, "leaves out padding only"),
        (PADDED, {"loss_mask": (PADDED != 0).long()}, "leaves out only token 0, which looks like padding"),
        (PADDED.flip(1), {"loss_mask": (PADDED.flip(1) != 0).long()}, "leaves out only token 0"),
        (PROMPTED, {"loss_mask": (ALL.cumsum(-1) > 3).long(), "attention_mask": ALL}, None),
        (PROMPTED, {"loss_mask": ALL, "attention_mask": ALL}, "equals attention_mask: if the rows hold prompts"),
        (PADDED, {"loss_mask": (PADDED != 0).long(), "attention_mask": (PADDED > 2).long()}, "are the two swapped"),
        (PROMPTED, {"loss_mask": (ALL.cumsum(-1) < 4).long(), "attention_mask": ALL}, "like the mask of the prompts"),
        (  # padding on the left
            PADDED.flip(1),
            {"loss_mask": torch.tensor([[0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0]]), "attention_mask": LEFT},
            "like the mask of the prompts",
        ),
        (
            PROMPTED,
            {"loss_mask": torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]), "attention_mask": ALL},
            None,
        ),
        (PADDED, {"loss_mask": ALL}, None),
        (PROMPTED, {}, "looks like a prompt"),
        (PROMPTED, {"attention_mask": ALL}, "looks like a prompt"),
        (PROMPTED, {"loss_mask": ALL}, None),
        (torch.zeros(2, 7, dtype=torch.int64), {}, None),  # nothing to tell apart
        (PROMPTED[:1], {}, None),
    ],
)
def test_a_forgotten_mask_is_noticed(ids: Tensor, fields: dict, expected: str | None) -> None:
    runner, hidden, head = LossRunner(GRPOLossConfig()), torch.randn(len(ids), 7, 4), torch.randn(11, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # once
            runner(hidden, head, input_ids=ids, advantages=1.0, **fields)
    messages = [str(each.message) for each in caught]
    assert len(messages) == (expected is not None)
    assert expected is None or (expected in messages[0] and "loss_mask" in messages[0])


def test_cross_entropy_may_learn_prompts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LossRunner(CELossConfig())(torch.randn(2, 7, 4), torch.randn(11, 4), input_ids=PROMPTED)
    with pytest.warns(UserWarning, match="looks like padding"):
        LossRunner(CELossConfig())(torch.randn(2, 7, 4), torch.randn(11, 4), input_ids=PADDED)


def test_old_logprobs_of_another_token_are_noticed_in_the_first_step_only() -> None:
    # Logits 0 over 11 tokens: every log-probability is -log 11 = -2.398; old ones 0.75 and 0.25 above: mean 0.5 off.
    hidden, head = torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(11, 4, requires_grad=True)
    new = -torch.tensor(11.0).log()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "advantages": 1.0}
    near = {**batch, "old_logprobs": new + torch.tensor([[0.75, -0.22, -9.0]])}  # the last position is not scored
    far = {**batch, "old_logprobs": new + torch.tensor([[0.75, -0.27, -9.0]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = LossRunner(GRPOLossConfig())
        assert runner.step([near], lambda _: (hidden, head)).metrics["log_ratio_abs"] == pytest.approx(0.485)
        runner.step([far], lambda _: (hidden, head))  # training moved on
    with pytest.warns(UserWarning, match=r"old_logprobs differ .* 0\.51 nats .*token t \+ 1 at position t"):
        LossRunner(GRPOLossConfig()).step([far], lambda _: (hidden, head))
    errors._warned.clear()
    runner = LossRunner(GRPOLossConfig())
    with pytest.warns(UserWarning, match="old_logprobs differ"):
        runner(hidden, head, **far)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(hidden, head, **far)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda old, hidden: (old.roll(1, -1), hidden), "fit the position before: value t seems to be of token t"),
        (lambda old, hidden: (old.roll(-1, -1), hidden), "fit the position after: they seem to be shifted twice"),
        (lambda old, hidden: (old[:, :-1], hidden[:, 1:]), r"hidden_states\[:, 1:\] was passed"),
        (lambda old, hidden: (old, hidden.roll(1, 1)), "one position earlier"),
        (lambda old, hidden: (old + 0.1, hidden), None),
    ],
)
def test_log_probabilities_of_a_neighbour_are_noticed(wrong: Callable, expected: str | None) -> None:
    """A random tiny model: nearly uniform, so a neighbour is off by 0.2 nats only."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 4, generator=generator)
    head = 0.1 * torch.randn(11, 4, generator=generator)
    ids = torch.randint(0, 11, (2, 9), generator=generator)
    scores = (hidden @ head.T).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    old, hidden = wrong(F.pad(scores, (0, 1)), hidden)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LossRunner(GRPOLossConfig())(hidden, head, input_ids=ids, advantages=1.0, old_logprobs=old)
    messages = [str(each.message) for each in caught if "old_logprobs" in str(each.message)]
    assert len(messages) == (expected is not None)
    if expected is not None:
        assert re.search(expected, messages[0]), messages


def test_a_mask_of_another_name_beside_ours_is_for_the_forward(hidden: Tensor, head: torch.nn.Linear) -> None:
    mask = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "loss_mask": mask, "completion_mask": mask, "advantages": ADVANTAGES}
    masks = []
    LossRunner(GRPOLossConfig()).step([batch], lambda each: (masks.append(each["completion_mask"]), (hidden, head))[1])
    assert masks[0] is mask


def written_by_a_good_model() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [2, 30], hidden states [2, 30, 11] of probability 1 / (1 + 10 e^-8) for the next one, and a head.

    Its log is -0.0033; that of another token is 8 less, and one in eleven tokens equals its neighbour.
    """
    ids = torch.randint(0, 11, (2, 30), generator=torch.Generator().manual_seed(0))
    return ids, F.one_hot(ids.roll(-1, -1), 11).float(), 8 * torch.eye(11)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda ids, hidden: (hidden[:, :-1], {"input_ids": ids[:, 1:]}), "shifted twice.*all of them, not input_ids"),
        (lambda ids, hidden: (hidden, {"shifted_labels": ids}), "labels seem not to be shifted"),
        (lambda ids, hidden: (hidden[:, 1:], {"input_ids": ids}), r"or hidden_states\[:, 1:\] was passed"),
        (lambda ids, hidden: (hidden, {"input_ids": ids}), None),
        (lambda ids, hidden: (hidden[:, :-1], {"input_ids": ids}), None),
        (lambda ids, hidden: (hidden[:, :-1], {"shifted_labels": ids[:, 1:]}), None),
    ],
)
@pytest.mark.parametrize("is_cross_entropy", [False, True])
def test_labels_of_a_neighbour_are_noticed(call: Callable, expected: str | None, is_cross_entropy: bool) -> None:
    ids, hidden, head = written_by_a_good_model()
    hidden, fields = call(ids, hidden)
    fields = fields if is_cross_entropy else {**fields, "advantages": 1.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LossRunner(CELossConfig() if is_cross_entropy else GRPOLossConfig())(hidden, head, **fields)
    messages = [str(each.message) for each in caught]
    assert len(messages) == (expected is not None), messages
    if expected is not None:
        assert re.search(f"the labels have log-probability -7.* but -0.0033 .*{expected}", messages[0]), messages


def test_labels_that_are_shifted_twice_are_noticed_by_right_old_logprobs() -> None:
    """Nearly uniform, so the labels themselves say nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 9, 4, generator=generator), 0.1 * torch.randn(11, 4, generator=generator)
    ids = torch.randint(0, 11, (2, 9), generator=generator)
    old = (hidden @ head.T).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    runner = LossRunner(GRPOLossConfig())
    with pytest.warns(UserWarning, match="old_logprobs differ .*labels seem to be shifted twice"):
        runner(hidden[:, :-1], head, input_ids=ids[:, 1:], advantages=1.0, old_logprobs=old)
    runner = LossRunner(GRPOLossConfig())
    with pytest.warns(UserWarning, match="old_logprobs differ .*labels seem not to be shifted"):
        runner(hidden, head, shifted_labels=ids, advantages=1.0, old_logprobs=F.pad(old, (0, 1)))


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (0, None),
        (1, r"0 at the first scored position .* not 0 just after the last one: value t seems to be of token t\."),
        (-1, r"0 at the last scored position .* not 0 just before the first one: .* of token t \+ 2\."),
    ],
)
def test_advantages_of_a_neighbour_are_noticed(
    hidden: Tensor, head: torch.nn.Linear, shift: int, expected: str | None
) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    advantages = ADVANTAGES.unsqueeze(-1) * mask.roll(shift - 1, -1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LossRunner(GRPOLossConfig())(hidden, head, input_ids=IDS, loss_mask=mask, advantages=advantages)
    messages = [str(each.message) for each in caught]
    assert len(messages) == (expected is not None), messages
    if expected is not None:
        assert re.search(expected, messages[0]), messages


def test_what_learns_nothing_is_noticed(hidden: Tensor, head: torch.nn.Linear) -> None:
    runner = LossRunner.from_overrides(["loss=grpo"])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    batch = {"input_ids": IDS, "loss_mask": mask, "advantages": ADVANTAGES}

    def warned(call: Callable[[], object]) -> list[str]:
        errors._warned.clear()
        runner._is_first = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return [str(each.message) for each in caught]

    assert warned(lambda: runner(hidden, head, **batch)) == []
    (frozen,) = warned(lambda: runner(hidden.detach(), head, **batch))
    assert "so only the head will train" in frozen
    assert [frozen.partition(":")[2]] == [
        each.partition(":")[2] for each in warned(lambda: runner.step([batch], lambda _: (hidden.detach(), head)))
    ]
    with torch.no_grad():
        assert warned(lambda: runner(hidden, head, **batch)) == []
    (unread,) = warned(lambda: runner(hidden, head, **batch, ref_logprobs=-torch.rand(2, 6)))
    assert "ref_logprobs has no effect" in unread
    assert "kl=k3" in unread
    (rewards,) = warned(lambda: runner(hidden, head, **{**batch, "advantages": torch.tensor([0.0, 1.0])}))
    assert "looks like rewards" in rewards
    assert "Give them as rewards=..., with group_ids=..." in rewards
    embedding = torch.nn.Embedding(11, 4)
    (untied,) = warned(lambda: runner(hidden, embedding, **batch))
    assert "ties the two" in untied


def test_current_logprobs_are_compared_with_the_forward(hidden: Tensor, head: torch.nn.Linear) -> None:
    batch = {"shifted_labels": IDS, "advantages": ADVANTAGES, "old_logprobs": -torch.rand(2, 6)}
    exact = F.linear(hidden, head.weight, head.bias).log_softmax(-1).gather(-1, IDS.unsqueeze(-1)).squeeze(-1).detach()
    overrides = ["policy_loss=kl_cov", "policy_loss.kl_cov_ratio=0.2"]
    for shift, is_warned in ((0.0, False), (0.25, True)):
        errors._warned.clear()
        given = {**batch, "current_logprobs": exact - shift}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = LossRunner.from_overrides(overrides).step([given], lambda _: (hidden, head))
        assert result.metrics["current_mismatch"] == pytest.approx(shift, abs=1e-6)
        about = [str(each.message) for each in caught if "current_logprobs differ" in str(each.message)]
        assert len(about) == is_warned


# -------------------------------------------------------------------- around it


def test_terms_may_be_a_tuple_in_the_body_of_a_config(hidden: Tensor, head: torch.nn.Linear) -> None:
    class Tripled(CELossConfig):
        terms = (LossTerm(coef=3.0),)

    once, thrice = (LossRunner(cfg)(hidden, head, input_ids=IDS).loss for cfg in (CELossConfig(), Tripled()))
    assert thrice.item() == pytest.approx(3 * once.item())
    assert "terms" not in Tripled.model_fields


def test_two_threads_count_over_their_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 8 if group is None else group)
    both_inside, counted = threading.Barrier(2), {}

    def count(group: int) -> None:
        with distributed.counting_over(group):
            both_inside.wait(10)
            counted[group] = distributed.world_size()
            both_inside.wait(10)

    threads = [threading.Thread(target=count, args=(group,)) for group in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == {2: 2, 4: 4}
    assert distributed.world_size() == 8


def test_a_file_may_be_imported_and_then_be_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from toolkit import register_policy_loss\n@register_policy_loss('seen_twice')\ndef f(t): return t.logprobs\n"
    )
    (tmp_path / "real").mkdir()
    (tmp_path / "real/seen_twice.py").write_text(source)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    import seen_twice  # type: ignore[import-not-found]

    (plugin,) = load_plugins([str(tmp_path / "real/seen_twice.py")])
    assert plugin.f is not seen_twice.f
    assert registry.policy_loss("seen_twice").function is plugin.f


def test_fields_in_the_words_of_others_are_fields_here() -> None:
    for name, there in NAMES.items():
        assert name not in FIELDS
        assert set(there.ours) <= {*FIELDS, "logprobs"}, name
        assert counterpart_field(name, FIELDS), name
        assert counterpart_field(name, ()) or not there.otherwise
    assert set(BATCH) <= set(FIELDS)


def test_explain_takes_fields_by_name() -> None:
    runner = LossRunner(GRPOLossConfig())
    with pytest.raises(DataError, match=r"not a fourth one \(Tensor\); the fields of the batch are given by name"):
        runner.explain(torch.zeros(1, 2, 4), torch.zeros(5, 4), None, torch.tensor([[1, 2]]))
