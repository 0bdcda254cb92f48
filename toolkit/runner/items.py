"""From the fields of a call to the item of a loss.

Legend: B rows, T positions that have hidden states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type
from toolkit.functional.advantages import Advantage
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem
from toolkit.losses.step.builder import item_class
from toolkit.runner.arguments import as_tensor, labels_of, padding_of, spread
from toolkit.runner.mistakes import not_a_field
from toolkit.runner.rewarded import DEFAULT, Sequences, advantages_of
from toolkit.runner.suspicions import warn_of_masks, warn_of_values

RL_FIELDS = tuple(name for name in RLLossContextInputItem.model_fields if name != "shifted_labels")
FIELDS = ("input_ids", "shifted_labels", "loss_mask", "attention_mask", "cu_seq_lens", *RL_FIELDS)
"""Keys of a batch that the loss reads; all others are for the caller's forward."""


def check_names(fields: Mapping[str, Any], loss_cfg: BaseLossConfig, *, strictly: Collection[str] = ()) -> None:
    """Raise `DataError` if one of the names `strictly` is unknown, or another looks like a field's and is not.

    Others may be for the caller's forward.
    """
    rewards = ("rewards",) if takes_rewards(loss_cfg) else ()
    known = tuple(dict.fromkeys((*FIELDS, *rewards, *_item_cls(loss_cfg).model_fields)))
    for name in fields:
        if name in known:
            continue
        message = not_a_field(name, fields, known, loss_cfg, name not in strictly)
        if message is not None:
            raise DataError(message)


def takes_rewards(loss_cfg: BaseLossConfig) -> bool:
    """Whether a batch may have rewards in the place of advantages."""
    names = _item_cls(loss_cfg).model_fields
    return "advantages" in names and "rewards" not in names


def has_rewards(fields: Mapping[str, Any], loss_cfg: BaseLossConfig) -> bool:
    """Whether advantages are to be computed from the rewards of a batch.

    Raises:
        DataError: it has both.
    """
    if fields.get("rewards") is None or not takes_rewards(loss_cfg):
        return False
    if fields.get("advantages") is not None:
        raise DataError("give rewards or advantages, not both: advantages are computed from rewards")
    return True


def _refuse_without_rewards(fields: Mapping[str, Any], loss_cfg: BaseLossConfig, advantage: Any, options: Any) -> None:
    """Raise `DataError` if an estimator or its options are given for a batch without rewards."""
    if advantage is None and options is None:
        return
    name = "advantage_options" if advantage is None else "advantage"
    words = f"{name}={advantage!r}" if isinstance(advantage, str) else name
    if not takes_rewards(loss_cfg):
        raise DataError(f"{words} has no effect on {type(loss_cfg).__name__}, which reads no advantages; leave it out")
    if advantage is not None and not isinstance(advantage, (str, Advantage)):
        raise DataError(
            f"advantage is {a_type(advantage)}; give an estimator of rewards by name, such as advantage='grpo' "
            "(did you mean 'advantages'?)"
        )
    if fields.get("advantages") is not None:
        raise DataError(f"{words} needs rewards, but the batch has advantages; give rewards or advantages, not both")
    near = next((key for key in ("reward", "scores", "returns") if fields.get(key) is not None), None)
    hint = f" (the batch has {near!r}; did you mean 'rewards'?)" if near else ""
    raise DataError(f"{words} needs rewards, one number for each row{hint}")


def with_advantages(
    batches: Sequence[Mapping[str, Any]],
    widths: Sequence[int | None],
    loss_cfg: BaseLossConfig,
    advantage: Any,
    options: Any,
    *,
    is_first: bool = False,
) -> list[Mapping[str, Any]]:
    """Return batches whose rewards became advantages and groups [B, T]; unchanged if they have no rewards.

    Args:
        batches: the fields of each.
        widths: positions that have hidden states, of each; None: not known.
        loss_cfg: the loss.
        advantage: an estimator, or its name; None: grpo.
        options: of that estimator.
        is_first: whether to warn of what was probably not meant.

    Raises:
        DataError: only some of them have rewards, or one has rewards and advantages, or an estimator is given without
            rewards; or as `advantages_of`.
    """
    having = [has_rewards(fields, loss_cfg) for fields in batches]
    if not any(having):
        _refuse_without_rewards(batches[0], loss_cfg, advantage, options)
        return list(batches)
    if not all(having):
        where = having.index(False)
        raise DataError(f"batches[{where}] has no rewards, but batches[{having.index(True)}] has; give all of them")
    sequences, shapes = [], []
    for fields, width in zip(batches, widths, strict=True):
        tensors = {name: as_tensor(name, fields.get(name), None) for name in FIELDS[:5]}
        labels = labels_of(tensors, width, loss_cfg.ignore_idx)
        sequences.append(Sequences.of(labels, tensors["cu_seq_lens"], loss_cfg.ignore_idx))
        shapes.append(labels.shape)
    estimator = DEFAULT if advantage is None else advantage
    advantages = advantages_of(batches, sequences, estimator, options, is_first=is_first)
    result: list[Mapping[str, Any]] = []
    for fields, part, values, shape in zip(batches, sequences, advantages, shapes, strict=True):
        kept = {name: value for name, value in fields.items() if name != "rewards"}
        groups = kept.pop("group_ids", None)
        if groups is not None:
            flat = torch.as_tensor(groups, device=part.index.device).reshape(-1)
            kept["group_ids"] = part.spread(flat).reshape(shape)
        result.append({**kept, "advantages": values.reshape(shape)})
    return result


def item_of(
    fields: Mapping[str, Any], num_positions: int | None, loss_cfg: BaseLossConfig, *, is_first: bool
) -> LossContextInputItem:
    """Return the item of one batch.

    Args:
        fields: of the batch.
        num_positions: how many have hidden states; None: not known yet.
        loss_cfg: the loss.
        is_first: whether to warn of what was probably not meant.

    Raises:
        DataError: a field is unknown, missing or of the wrong shape.
    """
    item_cls = _item_cls(loss_cfg)
    check_names(fields, loss_cfg)
    like = next((value for value in fields.values() if isinstance(value, Tensor)), None)
    known = {*FIELDS, *item_cls.model_fields} - {"advantages"}  # a number is an advantage, too
    fields = {
        name: as_tensor(name, value, None if like is None else like.device) if name in known else value
        for name, value in fields.items()
    }
    labels = labels_of(fields, num_positions, loss_cfg.ignore_idx)
    names = {*RL_FIELDS, *item_cls.model_fields} - {"shifted_labels"}
    values = {name: fields[name] for name in names if fields.get(name) is not None}
    unread = [name for name in RL_FIELDS if name in values and name not in item_cls.model_fields]
    if unread:
        if isinstance(loss_cfg, CELossConfig):
            raise DataError(f"{unread[0]} has no effect on cross-entropy; leave it out or use a policy loss")
        raise DataError(
            f"{unread[0]} has no effect on {type(loss_cfg).__name__}, whose context takes "
            f"{item_cls.__name__}; leave it out, or write item_cls = RLLossContextInputItem in "
            f"{loss_cfg.loss_ctx_cls.__name__}"
        )
    for name in ("advantages", "group_ids"):
        if name in values:
            values[name] = spread(name, values[name], labels)
    item = item_cls(shifted_labels=labels, **values)
    if is_first:
        if fields.get("input_ids") is not None and fields.get("cu_seq_lens") is None:
            is_policy_loss = not isinstance(loss_cfg, CELossConfig)
            masks = fields.get("loss_mask"), padding_of(fields)
            warn_of_masks(fields["input_ids"], *masks, is_policy_loss=is_policy_loss)
        warn_of_values(item, loss_cfg)
    return item


def _item_cls(loss_cfg: BaseLossConfig) -> type[LossContextInputItem]:
    return item_class(loss_cfg.loss_ctx_cls)
