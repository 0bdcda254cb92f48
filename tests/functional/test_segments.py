"""Boundaries of sequences on packed and padded rows."""

import pytest
import torch

from toolkit import DataError
from toolkit.functional.segments import segment_mean, segment_sum, sequence_ids


def test_packed_row_with_sequences_of_length_one_and_a_padded_end() -> None:
    # R12c: lengths 3, 1, 1, 4 are four sequences; the last two positions belong to none.
    ids = sequence_ids(torch.Size([1, 11]), torch.tensor([0, 3, 4, 5, 9]))
    assert ids.tolist() == [[0, 0, 0, 1, 2, 3, 3, 3, 3, -1, -1]]


def test_a_sequence_without_a_token_keeps_its_number() -> None:
    assert sequence_ids(torch.Size([1, 4]), torch.tensor([0, 2, 2, 4])).tolist() == [[0, 0, 2, 2]]


def test_padded_rows_are_one_sequence_each() -> None:
    assert sequence_ids(torch.Size([2, 3]), None).tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("bounds", [[1, 3], [0, 4, 2], [0, 9], [0]])
def test_boundaries_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(DataError, match="does not cut a row of 5"):
        sequence_ids(torch.Size([1, 5]), torch.tensor(bounds))


def test_boundaries_with_several_rows_are_refused() -> None:
    with pytest.raises(DataError, match="2 rows"):
        sequence_ids(torch.Size([2, 5]), torch.tensor([0, 5]))


def test_sums_and_means_by_hand() -> None:
    values, ids = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 2])
    assert segment_sum(values, ids, 3).tolist() == [6.0, 0.0, 10.0]
    assert segment_mean(values, ids, 3).tolist() == [2.0, 0.0, 10.0]
