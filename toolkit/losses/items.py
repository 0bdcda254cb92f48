"""The inputs of a loss: one item per micro-batch.

Legend: B rows, T positions of a row, K candidates, V vocabulary. Labels are already shifted: position t of every field
belongs to the token that the model predicts from position t, i.e. to token t + 1 of the text.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self, TypeGuard

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.losses.record import PerToken, TensorRecord
from toolkit.losses.shift import has_next, shift_labels, shift_values
from toolkit.peers.batch_fields import replaces

BY_ROW = ("advantages", "group_ids")
"""Fields that may have one value for each row, [B]."""


class LossContextInputItem(TensorRecord):
    """The base of all items: labels, and a check of every per-token field against them.

    Items are write-once: a `None` field may be assigned once (the interface assigns ``item.old_logprobs`` after
    computing it) and is then checked, too.
    """

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    """[1, T] packed or [B, T] padded, int64; `ignore_idx` (-100) where nothing is scored."""

    def model_post_init(self, context: Any, /) -> None:
        """Check labels and fields, and bring broadcast ones to the shape of the labels."""
        labels = self.shifted_labels
        if labels.dim() not in (1, 2) or labels.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"shifted_labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must be int64 of shape "
                "[1, T] (packed) or [B, T] (padded)"
            )
        self.__dict__["shifted_labels"] = labels.long()
        for name, value in self.tensors():
            if name != "shifted_labels":
                self.__dict__[name] = self._fitted(name, value)

    @classmethod
    def from_unshifted(
        cls,
        input_ids: Tensor,
        mask: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        ignore_idx: int = -100,
        has_last_hidden: bool = True,
        **fields: Any,
    ) -> Self:
        """Build an item from the outputs of samplers and rewards, which are indexed by token.

        Labels, mask and all per-token fields are shifted together, so position t of the item holds the values of the
        token that it predicts. With tokens [10, 11, 12, 13] and mask [0, 0, 1, 0] label, advantage and log-probability
        of token 12 are at position 1. The last position of every sequence is ignored.

        Args:
            input_ids: [B, T] int64, or [1, T] packed.
            mask: [B, T]; which tokens are trained on; None: all that are predicted.
            attention_mask: [B, T]; 0 for padding, needed for rows padded on the left.
            cu_seq_lens: [S + 1] boundaries of the sequences in a packed row.
            ignore_idx: that of the loss config.
            has_last_hidden: False where the model is run on ``input_ids[:, :-1]``; the item is then [B, T - 1].
            fields: as in the constructor, such as ``advantages``. Unreported log-probabilities are NaN, never 0, which
                would be a probability of 1; a loss that reads NaN at a token that counts raises. [B, 1] (one value
                per row), [B] for advantages, and ``group_ids`` describe sequences and are not shifted.

        Raises:
            DataError: a field is unknown or does not have one value for each of the T tokens.
        """
        if "shifted_labels" in fields:
            raise DataError("from_unshifted makes shifted_labels from input_ids; leave it out, or use the constructor")
        mask_name = next((name for name in fields if replaces(name, ("loss_mask",)) or name == "loss_mask"), None)
        if mask_name is not None and mask_name not in cls.model_fields:
            raise DataError(f"{mask_name} is not a field of an item; from_unshifted takes it as mask=...")
        if not is_token_ids(input_ids):
            what = input_ids.dtype if isinstance(input_ids, Tensor) else a_type(input_ids)
            raise DataError(f"input_ids is {what}; give token ids as an integer tensor [B, T] (torch.as_tensor(...))")
        if cu_seq_lens is not None and not has_last_hidden:
            raise DataError("a packed row has a hidden state for every token: leave has_last_hidden=True")
        labels = shift_labels(input_ids, mask, cu_seq_lens, attention_mask=attention_mask, ignore_idx=ignore_idx)
        is_followed = has_next(input_ids.shape, cu_seq_lens, attention_mask, input_ids.device)
        known = {name: value for name, value in fields.items() if name in cls.model_fields}
        shifted = {name: cls._shifted(name, value, is_followed) for name, value in known.items()}
        item = cls(shifted_labels=labels, **{**fields, **shifted})
        return item if has_last_hidden else item.chunk(input_ids.shape[-1] - 1)[0]

    @classmethod
    def _shifted(cls, name: str, value: Any, is_followed: Tensor) -> Any:
        """Return a field as the constructor wants it, from one that is indexed by token."""
        if not isinstance(value, Tensor) or not cls.is_per_token(name):
            return value
        mark, shape = cls.layout(name), is_followed.shape
        assert isinstance(mark, PerToken)
        value = _by_row(name, value, shape)
        value_shape = mark.positions(value)
        allowed = _allowed(name, shape)
        if value_shape not in allowed:
            reported = ", including the first; NaN where a log-probability was not reported" * _is_of_token(name)
            raise DataError(
                f"{name} has shape {list(value.shape)}, but input_ids has {list(shape)}; {_shapes(name, shape)}"
                f"{reported}"
            )
        if len(shape) == 2 and value_shape == (shape[0], 1) != shape:
            return value
        if name == "group_ids":
            return value
        pad = math.nan if name.endswith("logprobs") else mark.pad
        trailing = value.shape[value.dim() - mark.trailing :]
        return shift_values(value.expand(*shape, *trailing), is_followed, pad=pad, dim=mark.dim)

    def __setattr__(self, name: str, value: Any) -> None:
        kind, fields = type(self).__name__, type(self).model_fields
        if name not in fields:
            raise DataError(f"{kind} has no field {name!r}; it has: {', '.join(fields)}")
        if getattr(self, name, None) is not None:
            raise DataError(f"{kind}.{name} is already set; item.replace({name}=...) returns a new item")
        if not isinstance(value, Tensor):
            raise DataError(f"{kind}.{name} must be a tensor, not {type(value).__name__}")
        self.__dict__[name] = self._fitted(name, value)

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """Return `value` in the shape of the labels; `_allowed` are the shapes that it may have."""
        mark = self.layout(name)
        if not isinstance(mark, PerToken):
            return value
        if name == "advantages" and not value.is_floating_point() and value.dtype != torch.bool:
            value = value.to(torch.get_default_dtype())  # rewards are often whole numbers
        _check_kind(name, value, mark.kind)
        value = value.long() if mark.kind == "integer" else value
        value = value.float() if mark.kind == "number" and not value.is_floating_point() else value
        shape = self.shifted_labels.shape
        if mark.trailing:
            if value.dim() < 2 or value.shape[:-1] not in _allowed(name, shape)[:2] or value.shape[-1] == 0:
                raise DataError(
                    f"{name} has shape {list(value.shape)}, but shifted_labels has {list(shape)}; it must be "
                    f"[{', '.join(map(str, shape))}, K] with K candidates for each position"
                )
            return value.expand(*shape, -1)
        value = _by_row(name, value, shape)
        if value.shape not in _allowed(name, shape):
            raise DataError(
                f"{name} has shape {list(value.shape)}, but shifted_labels has {list(shape)}; "
                f"{_shapes(name, shape)}{_how_to_align(name, value.shape, shape)}"
            )
        return value.expand(shape)


def is_token_ids(value: object) -> TypeGuard[Tensor]:
    """Whether a `value` is a tensor [...] of integers."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _is_of_token(name: str) -> bool:
    """Whether a field is a log-probability or its candidates, which no two tokens share."""
    return name.endswith("logprobs") or "_topk_" in name


def _by_row(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Return advantages or groups [B], one for each row of `shape` [B, T], as [B, 1]; others unchanged.

    Raises:
        DataError: B = T, so they may mean rows or positions.
    """
    if name not in BY_ROW or len(shape) != 2 or value.shape != shape[:1]:
        return value
    if shape[0] == shape[1] > 1:
        raise DataError(
            f"{name} of shape [{len(value)}] may mean rows or positions here; give [{len(value)}, 1] for "
            f"one per row, or {list(shape)}"
        )
    return value.unsqueeze(-1)


def _allowed(name: str, shape: torch.Size) -> list[tuple[int, ...]]:
    """Return the shapes that a field [B, T] may have: a log-probability belongs to one token, so none is repeated."""
    shapes: list[tuple[int, ...]] = [shape]
    if len(shape) == 2 and (shape[0] == 1 or not _is_of_token(name)):
        shapes.append(shape[1:])
    if len(shape) == 2 and not _is_of_token(name):
        shapes.append((shape[0], 1))
    return shapes


def _shapes(name: str, shape: torch.Size) -> str:
    """Say which shapes a field may have."""
    if len(shape) != 2:
        return f"it must be {list(shape)}"
    if _is_of_token(name):
        return f"it must be {list(shape)}, one value for each token"
    rows = f"[{shape[0]}] or [{shape[0]}, 1]" if name in BY_ROW else f"[{shape[0]}, 1]"
    return (
        f"allowed are {list(shape)}, {rows} (one for each of the {shape[0]} rows) and [{shape[1]}] (the same for each)"
    )


def _how_to_align(name: str, shape: torch.Size, labels: torch.Size) -> str:
    """Say how values by token [B, C] of `shape` are brought to `labels` [B, T]; empty for other shapes and fields."""
    if (
        not (name.endswith("logprobs") or name == "advantages")
        or len(shape) != 2
        or len(labels) != 2
        or shape[0] != labels[0]
    ):
        return ""
    missing = labels[1] - shape[1]
    if shape[1] == 1:
        return "; a sum or a mean over a sequence cannot be spread over its tokens"
    if missing == -1:
        return (
            f". One position has no label: give {name}[:, :-1] if value t is of token t + 1, or {name}[:, 1:] if it is "
            "of token t"
        )
    if missing < 1:
        return ""
    return (
        f". Position t has the value of token t + 1: if these are of the last {shape[1]} tokens (a completion, or "
        f"those of logits[:, :-1]), write torch.nn.functional.pad({name}, ({missing - 1}, 1)); for values of all "
        "tokens, and for padding elsewhere, use RLLossContextInputItem.from_unshifted"
    )


def _check_kind(name: str, value: Tensor, kind: str) -> None:
    actual = "float" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "integer"
    if kind not in ("any", actual) and not (kind == "number" and actual != "bool"):
        wanted = {"float": "a floating-point", "integer": "an integer", "bool": "a bool"}.get(kind, "a numeric")
        raise DataError(f"{name} has dtype {value.dtype}; it must be {wanted} tensor")


class CELossContextInputItem(LossContextInputItem):
    """Labels, for cross-entropy."""


class RLLossContextInputItem(LossContextInputItem):
    """All inputs of a policy loss. Masked positions may hold anything, NaN included.

    Log-probabilities have the shape of the labels, because each belongs to one token: nothing is broadcast.
    """

    advantages: Annotated[Tensor | None, PerToken(pad=0.0, kind="number")] = None
    """[1, T] or [B, T], integers become fp32; [B] and [B, 1] (one per row) and [T] (for every row) broadcast."""
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, kind="float")] = None
    """Log-probabilities before this optimizer step, in nats; None: on-policy, the current ones detached."""
    current_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, kind="float")] = None
    """Log-probabilities under the policy that is about to be updated, in nats, from a forward without gradient before
    the step. With them, losses of scope "group" and "batch" see the whole step, however it is cut, and corrections that
    compare the current policy are applied before the forward."""
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, kind="float")] = None
    """Log-probabilities of the reference policy, in nats; needed with ``use_kl_loss``."""
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, kind="float")] = None
    """Log-probabilities as the sampler reported them, in nats; NaN where it did not. Read by ``anchor="rollout"``, by
    corrections and by metrics."""
    teacher_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, kind="float")] = None
    """Log-probabilities of a teacher, in nats; for distillation."""
    teacher_topk_ids: Annotated[Tensor | None, PerToken(pad=-1, trailing=1, kind="integer")] = None
    """[.., T, K] int64, candidate tokens of each position; a negative id means none. None: the whole vocabulary,
    K = V in order."""
    teacher_topk_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1, kind="float")] = None
    """[.., T, K] the teacher's log-probabilities of them in nats, over its full vocabulary, at the temperature of the
    loss. For distillation with ``variant="top_k"``."""
    ref_topk_ids: Annotated[Tensor | None, PerToken(pad=-1, trailing=1, kind="integer")] = None
    """[.., T, K] the same of the reference policy."""
    ref_topk_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1, kind="float")] = None
    """[.., T, K] the same of the reference policy; for ``kl_loss_type`` "top_k" and "full"."""
    group_ids: Annotated[Tensor | None, PerToken(pad=-1, kind="integer")] = None
    """int64, the prompt that a position's sequence answers; the same number for all completions of one prompt, in
    all micro-batches and on all ranks. For ``prompt_mean`` and losses of scope "group"; [B] and [B, 1] broadcast."""
    rollout_spec: LogprobSpec | None = None
    """How ``rollout_logprobs`` were taken; compared with the settings of the loss before they are used."""
