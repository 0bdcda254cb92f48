"""The off-by-one, in one place (R12)."""

import pytest
import torch

from toolkit import DataError
from toolkit.losses.shift import shift_labels


def test_mask_names_targets() -> None:
    labels = shift_labels(torch.tensor([[10, 11, 12, 13]]), torch.tensor([[0, 0, 1, 0]]))
    assert labels.tolist() == [[-100, 12, -100, -100]]  # the bug selects 13


def test_packed_sequences_do_not_leak() -> None:
    # R12b: rolling the row would give [11, 12, 20, 21, 10].
    labels = shift_labels(torch.tensor([[10, 11, 12, 20, 21]]), cu_seq_lens=torch.tensor([0, 3, 5]))
    assert labels.tolist() == [[11, 12, -100, 21, -100]]


def test_padding_after_the_last_sequence_is_not_scored() -> None:
    labels = shift_labels(torch.tensor([[10, 11, 0, 0]]), cu_seq_lens=torch.tensor([0, 2]))
    assert labels.tolist() == [[11, -100, -100, -100]]


def test_padding_on_either_side_neither_predicts_nor_is_predicted() -> None:
    # R12d: without the attention mask the first row's padding would predict 10, and the second's 11 would predict 0.
    ids = torch.tensor([[0, 10, 11], [10, 11, 0], [0, 0, 12]])
    labels = shift_labels(ids, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1]]))
    assert labels.tolist() == [[-100, 11, -100], [11, -100, -100], [-100] * 3]
    assert shift_labels(ids).tolist() == [[10, 11, -100], [11, 0, -100], [0, 12, -100]]


def test_mask_of_another_shape() -> None:
    with pytest.raises(DataError, match="loss_mask has shape"):
        shift_labels(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3))
    with pytest.raises(DataError, match="attention_mask has shape"):
        shift_labels(torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 3))


@pytest.mark.parametrize("mask", [torch.tensor([-100, 2, 3]), torch.tensor([0.5, 1.0, 0.0])])
def test_labels_are_not_taken_for_a_mask(mask: torch.Tensor) -> None:
    with pytest.raises(DataError, match="loss_mask holds values other than 0 and 1"):
        shift_labels(torch.tensor([1, 2, 3]), mask)
    with pytest.raises(DataError, match="attention_mask holds"):
        shift_labels(torch.tensor([1, 2, 3]), attention_mask=mask)
