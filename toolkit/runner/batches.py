"""The batch of a model, brought to tensors: token ids and everything beside them, padded and on the model's device.

Legend: B rows, T tokens of the longest row, S sequences of a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type, first_line
from toolkit.losses.items import RLLossContextInputItem, is_token_ids
from toolkit.runner.arguments import INTEGERS, as_tensor
from toolkit.runner.suspicions import warn_of_left_padding

BY_TOKEN = (
    *("input_ids", "shifted_labels", "loss_mask", "attention_mask", "advantages"),
    *(name for name in RLLossContextInputItem.model_fields if name.endswith("logprobs") and "_topk_" not in name),
)
"""Fields that may have one value for each token."""


@dataclass(frozen=True)
class ModelBatch:
    """What a model reads of a batch, and the fields that the loss reads."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor
    """[B, T] int64, 1 at text."""
    position_ids: Tensor | None
    """[1, T] for a packed row, starting again at 0 in each sequence; None: a row is a sequence."""
    fields: dict[str, Any]
    """For the item of the loss; positions as in `LossRunner.__call__`."""

    @property
    def num_positions(self) -> int:
        """Positions of the fields, T, or T - 1 if they leave out the last one, which predicts nothing."""
        short = self.input_ids.shape[1] - 1
        widths = [value.shape[1] for name, value in self.fields.items() if name in BY_TOKEN and _is_matrix(value, name)]
        return short if short in widths else short + 1


def model_batch(fields: Mapping[str, Any], device: torch.device, *, is_first: bool = True) -> ModelBatch:
    """Bring the batch of a model to tensors.

    Args:
        fields: ``input_ids`` as a tensor or an array [B, T] or a list of rows, which may differ in length (they are
            padded on the right, and the padding is not scored); the others alike, one value for each token or each but
            the first.
        device: of the model.
        is_first: whether to warn of padding that no mask leaves out, which waits for the device.

    Raises:
        DataError: there are no token ids, or a field cannot be converted.
    """
    if fields.get("input_ids") is None:
        have = ", ".join(map(str, fields)) or "nothing"
        raise DataError(f"batch has no input_ids (it has: {have}); a model needs the token ids [B, T], not shifted")
    lengths = _lengths(fields["input_ids"])
    tensors = {name: _tensor(name, value, lengths, device) for name, value in fields.items()}
    input_ids = tensors["input_ids"]
    if not is_token_ids(input_ids) or input_ids.dim() != 2:
        kind = f"{list(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else a_type(input_ids)
        raise DataError(f"input_ids is {kind}; give token ids as integers, [B, T] (one row: input_ids[None])")
    input_ids = tensors["input_ids"] = input_ids.long()
    mask = tensors.get("attention_mask")
    if mask is None and lengths is not None and len({*lengths}) > 1:
        columns = torch.arange(input_ids.shape[1], device=device)
        mask = (columns < torch.tensor(lengths, device=device).unsqueeze(-1)).long()
        tensors["attention_mask"] = mask
    if mask is None:
        mask = torch.ones_like(input_ids)
        if is_first and fields.get("cu_seq_lens") is None:
            warn_of_left_padding(input_ids)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else a_type(mask)
        raise DataError(f"attention_mask has shape {shape}; it must be that of input_ids, {list(input_ids.shape)}")
    bounds = tensors.get("cu_seq_lens")
    if tensors.get("shifted_labels") is not None:  # the loss takes one of the two
        tensors.pop("input_ids")
    return ModelBatch(input_ids, mask.long(), None if bounds is None else _positions(bounds, input_ids), tensors)


def _is_matrix(value: Any, name: str) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1 and name != "input_ids"


def _lengths(input_ids: Any) -> list[int] | None:
    """Return the length of each row of a list of rows; None for tensors and arrays."""
    if not isinstance(input_ids, (list, tuple)) or not input_ids or not all(map(_is_row, input_ids)):
        return None
    return [len(row) for row in input_ids]


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (hasattr(value, "__len__") and getattr(value, "ndim", 0) == 1)


def _tensor(name: str, value: Any, lengths: list[int] | None, device: torch.device) -> Any:
    """Return a field as a tensor on `device`; rows are padded on the right."""
    is_rows = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_row, value))
    if is_rows and name in BY_TOKEN and lengths is not None:
        value = _padded(name, value, lengths)
    if name in BY_TOKEN or name in ("cu_seq_lens", "rewards"):
        value = as_tensor(name, value, None) if not isinstance(value, (int, float)) else value
    return value.to(device) if isinstance(value, Tensor) else value


def _padded(name: str, rows: Any, lengths: list[int]) -> Tensor:
    """Return rows of one value for each token, or each but the first, as [B, T] (or [B, T - 1] if all are short)."""
    if len(rows) != len(lengths):
        raise DataError(f"{name} has {len(rows)} rows, but input_ids has {len(lengths)}")
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(row) not in (length, length - 1):
            raise DataError(
                f"{name}[{index}] has {len(row)} values, but input_ids[{index}] has {length} tokens; give one value "
                f"for each token, or {length - 1} if value t is of token t + 1"
            )
    pad = -100 if name == "shifted_labels" else 0
    try:
        tensors = [torch.as_tensor(row) for row in rows]
        if name in INTEGERS and any(tensor.is_floating_point() for tensor in tensors if len(tensor)):
            raise TypeError("they hold fractions")
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)[:, : max(lengths)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} holds rows that cannot be converted to a tensor ({first_line(error)})") from None


def _positions(bounds: Any, input_ids: Tensor) -> Tensor:
    """Return the position of each token in its sequence, [1, T], from the boundaries [S + 1] of a packed row."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = torch.as_tensor(bounds, device=input_ids.device).long()
    if len(input_ids) != 1 or starts.dim() != 1 or len(starts) < 2:
        raise DataError(
            f"cu_seq_lens has shape {list(starts.shape)} and input_ids {list(input_ids.shape)}; boundaries [S + 1] go "
            "with one packed row [1, T]"
        )
    index = torch.searchsorted(starts, columns, right=True) - 1
    return (columns - starts[index.clamp(min=0)]).unsqueeze(0)
