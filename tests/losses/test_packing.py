"""Padded on the left or right, packed or one by one: the same loss, gradients and metrics (R12c, R12d, R25)."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.losses.evaluation import evaluate
from toolkit import DataError, GRPOLossConfig, LogprobSpec, RLLossContextInputItem
from toolkit.losses import in_order, pack, plan_rows, unpack

WIDTH, VOCABULARY, GARBAGE = 3, 7, 5
BY_TURN = {"granularity": "segment", "reduction": "mean"}
CONFIGS = {
    "vanilla": {
        "policy_loss_cfg": {"loss_type": "vanilla"},
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_gradient": "straight_through",
    },
    "gspo": {"policy_loss_cfg": {"loss_type": "gspo", "cliprange_low": 0.2}, "aggregation": "seq_mean_token_mean"},
    "fipo": {"policy_loss_cfg": {"loss_type": "fipo"}},
    "segment_ratio": {"policy_loss_cfg": {"loss_type": "segment_ratio"}, "aggregation": "seq_mean_token_sum"},
    "by_turn": {
        "policy_loss_cfg": {"loss_type": "reinforce"},
        "aggregation": "prompt_mean",
        "correction": [
            {"action": "clamp_upper", "upper": 2.0, **BY_TURN},
            {"action": "mask", "lower": 0.5, "upper": 2.0, "denominator": "survivors", **BY_TURN},
        ],
    },
}
Fields = dict[str, Tensor]
"""Of one sequence of L tokens, index t speaking of token t: [L], and hidden states [L, D]."""


def make_sequences(lengths: Sequence[int], seed: int) -> list[Fields]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sequences = []
    for index, length in enumerate(lengths):
        logprobs = {
            name: (-2 + 0.5 * normal(length)).clamp(max=0)
            for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")
        }
        for values in logprobs.values():
            values[0] = torch.nan  # nobody scores the first token
        sequences.append(
            {
                "input_ids": torch.randint(0, VOCABULARY, (length,), generator=draw),
                "mask": torch.rand(length, generator=draw) < 0.7,
                "advantages": normal(length),
                "group_ids": torch.full((length,), index // 2),
                "hidden": normal(length, WIDTH),
                **logprobs,
            }
        )
    return sequences


def item_of(fields: Fields, **others: Any) -> RLLossContextInputItem:
    given = {name: value for name, value in fields.items() if name not in ("input_ids", "hidden")}
    return RLLossContextInputItem.from_unshifted(fields["input_ids"], **given, **others)


def rows_of(sequences: list[Fields], *, on_the_left: bool) -> tuple[RLLossContextInputItem, Tensor, Tensor]:
    """Pad with garbage; return the item, hidden states [B, T, D], and where the text is, bool [B, T]."""
    width = max(len(fields["input_ids"]) for fields in sequences)
    rows: dict[str, list[Tensor]] = {name: [] for name in [*sequences[0], "is_text"]}
    for fields in sequences:
        for name, value in {**fields, "is_text": torch.ones(len(fields["input_ids"]), dtype=torch.bool)}.items():
            missing, garbage = width - len(value), torch.nan if value.is_floating_point() else GARBAGE
            filler = value[:1] if name == "group_ids" else value.new_full((1, *value.shape[1:]), garbage)
            padding = (torch.zeros_like(filler) if name == "is_text" else filler).expand(missing, *value.shape[1:])
            rows[name].append(torch.cat([padding, value] if on_the_left else [value, padding]))
    stacked = {name: torch.stack(values) for name, values in rows.items()}
    is_text = stacked.pop("is_text")
    return item_of(stacked, attention_mask=is_text), stacked["hidden"], is_text


def heads_of(hidden: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(VOCABULARY, dtype=torch.float64, requires_grad=True)
    return [(own.detach().clone().requires_grad_(), weight, bias) for own in hidden]


def assert_same(found: Any, expected: Any, hidden_grads: list[Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-14)
    ours = [*hidden_grads, *found[1][-2:]]
    for own, other in zip(ours, expected[1], strict=True):
        torch.testing.assert_close(own.reshape(other.shape), other, rtol=1e-12, atol=1e-14)
    assert found[2] == pytest.approx(expected[2], rel=1e-11, abs=1e-14, nan_ok=True)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    max_tokens=st.integers(1, 20),
    mode=st.sampled_from(["eager", "chunk"]),
    seed=st.integers(0, 2**31),
)
def test_layout_does_not_matter(name: str, lengths: list[int], max_tokens: int, mode: str, seed: int) -> None:
    sequences = make_sequences([*lengths, 1, 5], seed)
    cfg = GRPOLossConfig(**CONFIGS[name], use_entropy_metric=True)
    items = [item_of({key: value.unsqueeze(0) for key, value in fields.items()}) for fields in sequences]
    hidden = [fields["hidden"].unsqueeze(0) for fields in sequences]
    expected = evaluate(cfg, items, heads_of(hidden))
    cfg = cfg.model_copy(update={"mode": mode, "chunk_size": 3})
    for on_the_left in (True, False):
        item, states, is_text = rows_of(sequences, on_the_left=on_the_left)
        found = evaluate(cfg, [item], heads_of([states]))
        assert_same(found, expected, [found[1][0][row][is_text[row]] for row in range(len(sequences))])
    plan = plan_rows([len(fields["input_ids"]) for fields in sequences], max_tokens)
    rows, bounds = zip(*(pack([items[number] for number in row]) for row in plan), strict=True)
    states = [torch.cat([hidden[number] for number in row], 1) for row in plan]
    found = evaluate(cfg, list(rows), heads_of(states), list(bounds))
    parts = [unpack(grad, own, dim=1) for grad, own in zip(found[1][: len(plan)], bounds, strict=True)]
    assert_same(found, expected, in_order(parts, plan))
    # From the unshifted row at once instead of from shifted items.
    joined = {key: torch.cat([fields[key] for fields in sequences]).unsqueeze(0) for key in sequences[0]}
    lengths_so_far = torch.tensor([0] + [len(fields["input_ids"]) for fields in sequences]).cumsum(0)
    found = evaluate(cfg, [item_of(joined, cu_seq_lens=lengths_so_far)], heads_of([joined["hidden"]]), [lengths_so_far])
    assert_same(found, expected, unpack(found[1][0], lengths_so_far, dim=1))


def test_the_losses_of_the_property_learn_something() -> None:
    sequences = make_sequences([6, 8, 5, 7], 0)
    for options in CONFIGS.values():
        item, states, _ = rows_of(sequences, on_the_left=True)
        loss, grads, metrics = evaluate(GRPOLossConfig(**options), [item], heads_of([states]))
        assert abs(loss.item()) > 1e-4
        assert all(grad.abs().max() > 1e-4 for grad in grads)
        assert metrics["active_tokens"] > 3


# ------------------------------------------------------------------------------------------------ by hand


def labelled(labels: list[int], **fields: Any) -> RLLossContextInputItem:
    return RLLossContextInputItem(shifted_labels=torch.tensor([labels]), **fields)


def test_r25_values_come_back_to_the_sequence_that_they_belong_to() -> None:
    lengths = [2, 5, 1, 4]
    plan = plan_rows(lengths, 6)
    assert plan == [[1, 2], [0, 3]]  # 5 + 1 and 4 + 2 tokens
    items = [labelled([number] * length) for number, length in enumerate(lengths)]
    packed = [pack([items[number] for number in row]) for row in plan]
    assert [item.shifted_labels.tolist() for item, _ in packed] == [[[1, 1, 1, 1, 1, 2]], [[0, 0, 3, 3, 3, 3]]]
    assert [bounds.tolist() for _, bounds in packed] == [[0, 5, 6], [0, 2, 6]]
    parts = [unpack(item.shifted_labels, bounds) for item, bounds in packed]
    assert [values.tolist() for values in in_order(parts, plan)] == [[[0] * 2], [[1] * 5], [[2]], [[3] * 4]]
    as_they_come = [values[0, 0].item() for part in parts for values in part]
    assert as_they_come == [1, 2, 0, 3]  # the bug: taken for sequences 0, 1, 2, 3


def test_rows_have_room_for_what_they_get() -> None:
    assert plan_rows([3, 3, 3], 6) == [[0, 1], [2]]
    assert plan_rows([9, 1, 2], 4) == [[0], [1, 2]]
    assert plan_rows([], 4) == []


def test_what_lies_behind_the_last_boundary_is_left_out() -> None:
    bounds = torch.tensor([0, 2, 2, 3])
    assert [part.tolist() for part in unpack(torch.tensor([5, 6, 7, 0]), bounds)] == [[5, 6], [], [7]]
    assert [part.shape for part in unpack(torch.zeros(1, 4, 3), bounds, dim=1)] == [(1, 2, 3), (1, 0, 3), (1, 1, 3)]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="no items"):
        pack([])
    with pytest.raises(DataError, match=r"only one of items\[0\] and items\[1\] has advantages"):
        pack([labelled([1]), labelled([1], advantages=torch.ones(1, 1))])
    with pytest.raises(DataError, match=r"items\[0\] has 2 rows"):
        pack([RLLossContextInputItem(shifted_labels=torch.zeros(2, 3, dtype=torch.int64))])
    with pytest.raises(DataError, match="must have the same rollout_spec"):
        pack([labelled([1], rollout_spec=LogprobSpec()), labelled([1], rollout_spec=LogprobSpec(temperature=0.5))])
    with pytest.raises(DataError, match="ends at 5, but the values have 4"):
        unpack(torch.zeros(4), torch.tensor([0, 5]))
    with pytest.raises(DataError, match="do not match"):
        in_order([[torch.zeros(1)]], [[0, 1]])
    with pytest.raises(DataError, match=r"each of 0 \.\. 1 once"):
        in_order([[torch.zeros(1), torch.zeros(1)]], [[0, 2]])
