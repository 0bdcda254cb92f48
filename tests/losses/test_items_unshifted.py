"""From what samplers give, index t speaking of token t, to items: labels, mask and fields move together (R12, R31)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit import (
    CELossContextInputItem,
    DataError,
    GRPOLossConfig,
    LogprobSpec,
    LossRunner,
    RLLossContextInputItem,
)

IDS = torch.tensor([[10, 11, 12, 13]])
NAN = math.nan


def shown(values: Tensor | None) -> list[Any]:
    assert values is not None
    return [[None if math.isnan(v) else v for v in row] for row in values.tolist()]


def test_r12_label_mask_advantage_and_logprob_meet_at_one_position() -> None:
    item = RLLossContextInputItem.from_unshifted(
        IDS,
        torch.tensor([[0, 0, 1, 0]]),
        advantages=torch.tensor([[0.0, 0.1, 0.2, 0.3]]),
        old_logprobs=torch.tensor([[NAN, NAN, -2.0, NAN]]),
    )
    assert item.shifted_labels.tolist() == [[-100, 12, -100, -100]]
    assert item.advantages.tolist()[0] == pytest.approx([0.1, 0.2, 0.3, 0.0])
    assert shown(item.old_logprobs) == [[None, -2.0, None, None]]
    scored = item.shifted_labels != -100
    assert item.old_logprobs[scored].tolist() == [-2.0]  # the bug, a mask that is not shifted, selects that of 13
    assert IDS.tolist() == [[10, 11, 12, 13]]


def test_r12b_a_packed_row_keeps_its_sequences_apart() -> None:
    item = RLLossContextInputItem.from_unshifted(
        torch.tensor([[10, 11, 12, 20, 21]]),
        cu_seq_lens=torch.tensor([0, 3, 5]),
        advantages=torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]),
        rollout_logprobs=torch.tensor([[NAN, -1.0, -2.0, NAN, -4.0]]),
    )
    assert item.shifted_labels.tolist() == [[11, 12, -100, 21, -100]]  # rolled: [11, 12, 20, 21, 10]
    assert item.advantages.tolist() == [[2.0, 3.0, 0.0, 5.0, 0.0]]
    assert shown(item.rollout_logprobs) == [[-1.0, -2.0, None, -4.0, None]]


def test_r12c_sequences_of_one_token_stay_sequences() -> None:
    # Lengths 3, 1, 1, 4: the two in the middle have nothing to predict.
    item = CELossContextInputItem.from_unshifted(
        torch.arange(9).unsqueeze(0), cu_seq_lens=torch.tensor([0, 3, 4, 5, 9])
    )
    assert item.shifted_labels.tolist() == [[1, 2, -100, -100, -100, 6, 7, 8, -100]]


def test_r12d_padding_on_the_left_moves_and_changes_nothing() -> None:
    left = RLLossContextInputItem.from_unshifted(
        torch.tensor([[0, 0, 10, 11, 12]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        advantages=torch.tensor([[9.0, 9.0, 1.0, 2.0, 3.0]]),
    )
    alone = RLLossContextInputItem.from_unshifted(
        torch.tensor([[10, 11, 12]]), advantages=torch.tensor([[1.0, 2.0, 3.0]])
    )
    assert left.shifted_labels.tolist() == [[-100, -100, *alone.shifted_labels.tolist()[0]]]
    assert left.advantages.tolist() == [[0.0, 0.0, *alone.advantages.tolist()[0]]]


def test_values_of_whole_rows_and_groups_are_not_shifted() -> None:
    ids = torch.arange(6).reshape(2, 3)
    item = RLLossContextInputItem.from_unshifted(
        ids,
        advantages=torch.tensor([[1.0], [2.0]]),
        group_ids=torch.tensor([[4], [5]]),
        old_logprobs=torch.tensor([[-1.0, -2.0, -3.0]] * 2),
        rollout_spec=LogprobSpec(),
    )
    assert item.advantages.tolist() == [[1.0] * 3, [2.0] * 3]
    assert item.group_ids.tolist() == [[4] * 3, [5] * 3]
    assert shown(item.old_logprobs) == [[-2.0, -3.0, None]] * 2
    assert item.rollout_spec == LogprobSpec()
    packed = RLLossContextInputItem.from_unshifted(
        ids.reshape(1, 6), cu_seq_lens=torch.tensor([0, 3, 6]), group_ids=torch.tensor([[4, 4, 4, 5, 5, 5]])
    )
    assert packed.group_ids.tolist() == [[4, 4, 4, 5, 5, 5]]


def test_candidates_move_with_their_tokens() -> None:
    item = RLLossContextInputItem.from_unshifted(
        torch.tensor([[10, 11, 12]]),
        teacher_topk_ids=torch.tensor([[[0, 1], [2, 3], [4, 5]]]),
        teacher_topk_logprobs=torch.tensor([[[-0.0, -1.0], [-2.0, -3.0], [-4.0, -5.0]]]),
    )
    assert item.teacher_topk_ids.tolist() == [[[2, 3], [4, 5], [-1, -1]]]
    assert item.teacher_topk_logprobs[0, :2].tolist() == [[-2.0, -3.0], [-4.0, -5.0]]


def test_without_the_last_hidden_state_and_with_another_ignore_idx() -> None:
    options: dict[str, Any] = {"advantages": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "ignore_idx": -1}
    whole = RLLossContextInputItem.from_unshifted(IDS, **options)
    short = RLLossContextInputItem.from_unshifted(IDS, has_last_hidden=False, **options)
    assert whole.shifted_labels.tolist() == [[11, 12, 13, -1]]
    assert short.shifted_labels.tolist() == [[11, 12, 13]]
    assert short.advantages.tolist() == [[2.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"old_logprobs": torch.zeros(1, 3)},
            ["old_logprobs has shape [1, 3]", "input_ids has [1, 4]", "the first"],
        ),
        ({"advantages": torch.zeros(5)}, ["advantages has shape [5]", "[1, 4]"]),
        ({"old_logprob": torch.zeros(1, 4)}, ["old_logprob", "did you mean 'old_logprobs'"]),
        ({"old_logprobs": [0.0]}, ["old_logprobs is a list", "torch.as_tensor"]),
        ({"advantages": torch.zeros(1, 4, dtype=torch.bool)}, ["advantages has dtype torch.bool"]),
        ({"shifted_labels": IDS}, ["makes shifted_labels from input_ids"]),
        ({"cu_seq_lens": torch.tensor([0, 5])}, ["cu_seq_lens"]),
        ({"cu_seq_lens": torch.tensor([0, 4]), "has_last_hidden": False}, ["has_last_hidden=True"]),
        ({"mask": torch.zeros(1, 3)}, ["mask has shape [1, 3]"]),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        RLLossContextInputItem.from_unshifted(IDS, **fields)
    for word in words:
        assert word in str(caught.value)


def test_r31_a_missing_logprob_is_refused_where_it_counts_and_nowhere_else() -> None:
    cfg = GRPOLossConfig()
    reported = torch.tensor([[NAN, NAN, -2.0, -3.0]])
    for mask, words in (([[0, 0, 1, 1]], None), ([[0, 1, 1, 1]], r"old_logprobs\[0, 0\] = nan at a scored position")):
        item = RLLossContextInputItem.from_unshifted(
            IDS, torch.tensor(mask), advantages=torch.ones(1, 4), old_logprobs=reported
        )
        if words is None:
            (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
            assert kwargs.loss_weight.tolist() == [[0.0, 0.5, 0.5, 0.0]]
            continue
        with pytest.raises(DataError, match=words):
            cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)


def test_the_item_is_what_the_runner_makes_of_ids_and_shifted_fields() -> None:
    hidden, head = torch.randn(1, 4, 3), torch.randn(20, 3)
    advantages, old = torch.randn(1, 4), -torch.rand(1, 4)
    item = RLLossContextInputItem.from_unshifted(IDS, advantages=advantages, old_logprobs=old)
    cfg = GRPOLossConfig()
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    ours = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, head)[0]
    theirs = LossRunner(cfg)(
        hidden, head, input_ids=IDS, advantages=advantages.roll(-1, 1), old_logprobs=old.roll(-1, 1)
    )
    assert ours.item() == theirs.loss.item() != 0.0
    wrong = LossRunner(cfg)(hidden, head, input_ids=IDS, advantages=advantages, old_logprobs=old)
    assert wrong.loss.item() != ours.item()
