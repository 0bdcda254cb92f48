"""Items and kwargs never change, know their fields, and say clearly what is wrong."""

import copy
import pickle
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch

from tests.conftest import random_item
from toolkit import ConfigError, DataError, GRPOLossConfig, GRPOLossContext, RLLossContextInputItem
from toolkit.losses.grpo import GRPOLossKwargs
from toolkit.losses.record import PerToken

LABELS = torch.tensor([[1, 2, -100, 3]])


def test_a_field_that_is_set_does_not_change() -> None:
    item = RLLossContextInputItem(shifted_labels=LABELS)
    item.advantages = torch.ones(4)  # the interface fills fields that are still None
    assert item.advantages.shape == (1, 4)
    with pytest.raises(DataError, match=r"is already set; item\.replace"):
        item.advantages = torch.zeros(1, 4)
    with pytest.raises(DataError, match="old_logprobs must be a tensor, not list"):
        item.old_logprobs = [0.0]  # type: ignore[assignment]
    with pytest.raises(DataError, match="has no field 'ref_logprob'"):
        item.ref_logprob = torch.zeros(1, 4)  # type: ignore[attr-defined]
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig())
    with pytest.raises(DataError, match="immutable"):
        kwargs.advantages = torch.zeros(1, 4)
    with pytest.raises(ConfigError, match="immutable"):
        GRPOLossConfig().mode = "chunk"  # type: ignore[misc]


def test_nothing_is_deleted_and_chunks_have_a_size() -> None:
    with pytest.raises(DataError, match="cannot be deleted"):
        del random_item().advantages
    with pytest.raises(DataError, match="chunk_size=0"):
        random_item().chunk(0)


@pytest.mark.parametrize("transform", ["to", "chunk", "replace"])
def test_transforms_give_new_objects(transform: str) -> None:
    item = random_item((1, 6))
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig())
    for record in (item, kwargs):
        before = {name: (value, value.clone()) for name, value in record.tensors()}
        changed = {
            "to": lambda r=record: r.to("meta"),
            "chunk": lambda r=record: r.chunk(4)[0],
            "replace": lambda r=record: r.replace(shifted_labels=torch.zeros(1, 6, dtype=torch.int64)),
        }[transform]()
        assert changed is not record
        assert not torch.equal(changed.shifted_labels.cpu(), record.shifted_labels) if transform != "to" else True
        for name, value in record.tensors():
            assert value is before[name][0]
            torch.testing.assert_close(value, before[name][1], rtol=0, atol=0)


def test_to_moves_every_tensor() -> None:
    assert all(value.device.type == "meta" for _, value in random_item().to("meta").tensors())


def test_chunks_cover_every_position_once() -> None:
    item = random_item((2, 7))
    pieces = item.chunk(3)
    assert [piece.shifted_labels.shape[-1] for piece in pieces] == [3, 3, 1]
    for name, value in item.tensors():
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces], -1), value)


def test_shards_are_padded_by_the_ignore_idx_of_the_loss() -> None:
    # Three positions on two ranks: the second has one of them.
    mesh: Any = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[4, 5, 6]]), advantages=torch.ones(1, 3))
    assert item.sp_split(mesh, ignore_idx=-7).shifted_labels.tolist() == [[6, -7]]
    assert item.sp_split(mesh).shifted_labels.tolist() == [[6, -100]]
    assert item.sp_split(mesh, ignore_idx=-7).advantages.tolist() == [[1.0, 0.0]]


def test_every_per_token_field_declares_its_padding() -> None:
    for record in (RLLossContextInputItem, GRPOLossKwargs):
        no_tensor = {"rollout_spec", "step_metrics", "has_current", "num_scored", "global_view", "built"}
        for name in set(record.model_fields) - no_tensor:
            assert isinstance(record.layout(name), PerToken), name
    assert RLLossContextInputItem.layout("shifted_labels") == PerToken(pad=-100)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"advantages": torch.ones(3)}, ["advantages has shape [3]", "[1, 4]"]),
        ({"advantage": torch.ones(4)}, ["advantage is not a field", "did you mean 'advantages'"]),
        ({"ref_logprob": torch.ones(4)}, ["ref_logprob", "did you mean 'ref_logprobs'"]),
        ({"old_logprobs": torch.ones(1, 5)}, ["old_logprobs has shape [1, 5]"]),
        ({"advantages": torch.ones(4, dtype=torch.bool)}, ["advantages has dtype torch.bool"]),
        ({"advantages": [1.0, 2.0]}, ["advantages is a list", "torch.as_tensor"]),
    ],
)
def test_wrong_fields_are_named(fields: dict, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        RLLossContextInputItem(shifted_labels=LABELS, **fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("labels", [torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 4)])
def test_wrong_labels(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="shifted_labels has shape"):
        RLLossContextInputItem(shifted_labels=labels)


def test_broadcasts() -> None:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    rows = RLLossContextInputItem(shifted_labels=labels, advantages=torch.tensor([[1.0], [2.0]]))
    positions = RLLossContextInputItem(shifted_labels=labels, advantages=torch.tensor([1.0, 2.0, 3.0]))
    assert rows.advantages is not None
    assert positions.advantages is not None
    assert rows.advantages.tolist() == [[1.0] * 3, [2.0] * 3]
    assert positions.advantages.tolist() == [[1.0, 2.0, 3.0]] * 2


def test_replace_checks_as_a_new_item_does() -> None:
    with pytest.raises(DataError, match="did you mean 'advantages'"):
        random_item().replace(advantage=torch.zeros(2, 13))
    with pytest.raises(DataError, match="advantages has shape"):
        random_item().replace(advantages=torch.zeros(5))


def test_configs_and_records_can_be_copied_pickled_and_compared() -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", "cliprange_low": 0.1})
    for again in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert again == cfg
        assert hash(again) == hash(cfg)
    assert cfg.model_dump()["policy_loss_cfg"]["cliprange_low"] == 0.1
    with pytest.raises(ConfigError, match="immutable"):
        cfg.policy_loss_cfg["cliprange_low"] = 0.3  # type: ignore[index]
    item = random_item()
    assert torch.equal(pickle.loads(pickle.dumps(item)).advantages, item.advantages)


def test_a_mapping_given_is_not_kept() -> None:
    given = {"loss_type": "vanilla"}
    cfg = GRPOLossConfig(policy_loss_cfg=given)
    given["loss_type"] = "other"
    assert cfg.policy_loss_cfg["loss_type"] == "vanilla"


def test_int32_labels() -> None:
    assert RLLossContextInputItem(shifted_labels=LABELS.int()).shifted_labels.dtype == torch.int64


def test_repr_shows_shapes_not_numbers() -> None:
    assert repr(random_item((1, 4))).startswith("RLLossContextInputItem(shifted_labels=[1, 4] int64, advantages=[1, 4]")


def test_an_optional_field_declares_its_layout_inside_or_around_the_union() -> None:
    class Around(RLLossContextInputItem):
        is_tool: Annotated[torch.Tensor | None, PerToken(pad=0.0)] = None

    class Inside(RLLossContextInputItem):
        is_tool: Annotated[torch.Tensor, PerToken(pad=0.0)] | None = None

    for item_cls in (Around, Inside):
        (_, last) = item_cls(shifted_labels=LABELS, is_tool=torch.tensor([[1.0, 0.0, 1.0, 2.0]])).chunk(3)
        assert last.is_tool is not None
        assert last.is_tool.tolist() == [[2.0]]

    class Undeclared(RLLossContextInputItem):
        is_tool: torch.Tensor | None = None

    expected = (
        r"write is_tool: Annotated\[Tensor \| None, PerToken\(pad=0\.0\)\] = None if .*from toolkit import PerToken"
    )
    with pytest.raises(DataError, match=expected):
        Undeclared(shifted_labels=LABELS, is_tool=torch.zeros(1, 4))
