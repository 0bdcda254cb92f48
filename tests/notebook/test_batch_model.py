"""A batch and its weights by hand; no browser, no widgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit import ConfigError, DataError, GRPOLossConfig, LossRunner, RLLossContextInputItem
from toolkit.notebook.batch_model import MASKED, batch_charts, batch_records
from toolkit.notebook.token_model import title_of


def packed() -> RLLossContextInputItem:
    """One row of two sequences: 2 of 3 positions are scored, and 4 of 5."""
    labels = torch.tensor([[-100, 5, 6, -100, 1, 2, 3, 4]])
    return RLLossContextInputItem(
        shifted_labels=labels, advantages=torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    )


BOUNDS = [torch.tensor([0, 3, 8])]


@pytest.mark.parametrize(
    ("aggregation", "first", "second", "words"),
    [
        ("token_mean", 1 / 6, 1 / 6, "1 / N with N = 6"),
        ("seq_mean_token_mean", 1 / 4, 1 / 8, "1 / (S n) with S = 2, n = 2"),
        ("seq_mean_token_sum", 1 / 2, 1 / 2, "1 / S with S = 2"),
        ("per_component", 1 / 2, 1 / 4, "1 / N+ where A > 0, 1 / N- elsewhere"),
    ],
)
def test_weights_by_hand(aggregation: str, first: float, second: float, words: str) -> None:
    runner = LossRunner(GRPOLossConfig(aggregation=aggregation))
    one, two = batch_records([packed()], runner, BOUNDS)
    assert one.tokens["weight"] == [None, pytest.approx(first), pytest.approx(first)]
    assert two.tokens["weight"] == [None, *[pytest.approx(second)] * 4]
    assert one.details["weight"] == words
    assert one.tokens["text"] == [MASKED, "5 ", "6 "]
    assert title_of(two) == (
        f"item 1 · sequence 2 · 5 tokens · positions 3 to 7 of row 1 · scored 4 · weight {two.details['weight']}"
    )


def test_rows_without_boundaries_are_sequences() -> None:
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[1, 2], [3, -100]]), advantages=torch.ones(2, 2))
    records = batch_records([item, item], decode=lambda each: chr(64 + each))
    assert [record.text for record in records] == ["AB", f"C{MASKED}", "AB", f"C{MASKED}"]
    view = batch_charts(records)
    assert [bar.value for bar in view.charts[0].bars] == [2, 1, 2, 1]
    assert [bar.value for bar in view.charts[1].bars] == pytest.approx([100 / 3, 100 / 6, 100 / 3, 100 / 6])
    assert view.notes == ("4 sequences, 8 positions, 6 of them scored; the weights sum to 1.",)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="CELossConfig is not built on a policy loss"):
        batch_records([packed()], LossRunner.from_overrides("loss=ce"))


RUNNER = LossRunner(GRPOLossConfig())
NEEDED = "batch_view needs a list of RLLossContextInputItem, one for each micro-batch"
MADE = "; RLLossContextInputItem.from_unshifted(input_ids, mask, ...) makes one"


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (3, f", not an int{MADE}"),
        (None, f", not None{MADE}"),
        ({"input_ids": torch.ones(1, 2)}, f", not a dict{MADE}"),
        (packed(), ", not the item itself: call batch_view([item], runner)"),
        (RUNNER, "; the first argument is a LossRunner: call batch_view(items, runner)"),
        (GRPOLossConfig(), "; the first argument is a GRPOLossConfig: call batch_view(items, runner)"),
        ([], "; the list is empty"),
        ([packed(), 3], f"; the list holds an int{MADE}"),
    ],
)
def test_what_is_no_list_of_items(items: Any, words: str) -> None:
    for other in (RUNNER, [packed()]):
        with pytest.raises(DataError) as caught:
            batch_records(items, other)
        assert str(caught.value) == NEEDED + words


def test_boundaries_that_are_no_list() -> None:
    for wrong in (BOUNDS[0], [], BOUNDS * 2):
        with pytest.raises(DataError, match="a list with the boundaries of each of the 1 items"):
            batch_records([packed()], None, wrong)  # type: ignore[arg-type]
