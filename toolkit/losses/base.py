"""The base of every loss: how kwargs are built, chunked and turned into a loss.

Legend: B rows, T positions of a row, D hidden width, V vocabulary, N selected tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import DataError
from toolkit.head.chunked import chunked_loss
from toolkit.head.logprobs import TokenScores, token_logprobs
from toolkit.losses.config import BaseLossConfig
from toolkit.losses.fields import PerToken, TensorRecord
from toolkit.metrics import merge_metrics, metrics_in

ItemT = TypeVar("ItemT")


class BaseLossKwargs(TensorRecord):
    """What one forward of a loss needs. Declare further tensors as ``Annotated[Tensor, PerToken(pad=...)]``."""

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    """[1, T] or [B, T] int64."""
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of each token, same shape; the loss is ``(loss_weight * token_losses).sum()``."""


class BaseLossContext(ABC, Generic[ItemT]):
    """A config and the kwargs of one micro-batch: call `forward` with what the trunk computed.

    A loss of your own overrides `build_batches_loss_kwargs` (what must be known before the first forward of an
    optimizer step) and `loss_fn` (the loss itself, a *sum* over tokens of weight times token loss).
    """

    loss_cfg: Any
    loss_kwargs: Any

    def __init__(self, loss_cfg: BaseLossConfig, loss_kwargs: BaseLossKwargs) -> None:
        self.loss_cfg = loss_cfg
        self.loss_kwargs = loss_kwargs

    @classmethod
    @abstractmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[ItemT],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[Any]:
        """Return the kwargs of every micro-batch of one optimizer step; every rank must call it together.

        Args:
            data_batches: the items of all micro-batches of this rank; its shards of them where `sp_mesh` is given.
            loss_cfg: the config of this loss.
            cu_seq_lens_list: for each micro-batch the [S + 1] boundaries of its packed row; None: a row is a sequence.
            sp_mesh: ranks that share a sequence.
        """

    @abstractmethod
    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Return the loss of these positions and anything else (metrics by name are merged, None is fine).

        In chunk mode it is called once for each piece of the token axis, with the kwargs of that piece, and the
        results are added up; see `is_separable` for losses where that is wrong.

        Args:
            hidden_states: [..., T, D], with T positions as in `loss_kwargs`.
            head_weight: [V, D].
            head_bias: [V] or None.
            loss_kwargs: kwargs of these positions.
        """

    @property
    def is_separable(self) -> bool:
        """Whether the loss is a sum over tokens, each computed from that token alone."""
        return True

    def forward(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return the loss of this micro-batch and its metrics.

        The loss is calibrated: over the micro-batches of a step the losses add up, and *averaged* over ranks they
        give the loss of the whole batch. Its gradient is right under a back-end that averages gradients (DDP, FSDP);
        set ``gradient_reduction="sum"`` in the config for one that sums.

        Args:
            hidden_states: [1, T, D] or [B, T, D], the last hidden states; those of ignored positions may be anything.
            head_weight: [V, D].
            head_bias: [V], optional.

        Returns:
            A scalar (fp32, float64 for float64 hidden states) with a live graph, and what `loss_fn` returned besides:
            for the losses of this package a dict of mergeable metrics.

        Raises:
            DataError: shapes do not fit, or a label lies outside the vocabulary.
        """
        self._check(hidden_states, head_weight, head_bias)
        if self.loss_cfg.mode == "eager" or not self.is_separable:
            return self._checked(self.loss_fn(hidden_states, head_weight, head_bias, self.loss_kwargs))
        # One row, so that a chunk holds chunk_size tokens whatever the number of rows.
        pieces = self.loss_kwargs.as_one_row().chunk(self.loss_cfg.chunk_size)
        if hidden_states.dim() > 2:
            hidden_states = hidden_states.flatten(0, -2).unsqueeze(0)

        def piece_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, Any]:
            return self._checked(self.loss_fn(hidden, weight, bias, pieces[index]))

        lengths = [piece.shifted_labels.shape[-1] for piece in pieces]
        loss, extras = chunked_loss(piece_loss, hidden_states, head_weight, head_bias, lengths)
        return loss, _merge_extras(extras)

    def token_logprobs(
        self,
        hidden_states: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        labels: Tensor,
        *,
        with_entropy: bool = False,
    ) -> TokenScores:
        """Score [N] labels from [N, D] hidden states, in pieces of `chunk_size` when the mode is chunk."""
        return token_logprobs(
            hidden_states,
            head_weight,
            labels,
            head_bias,
            chunk_size=self.loss_cfg.chunk_size if self.loss_cfg.mode == "chunk" else None,
            temperature=self.loss_cfg.temperature,
            with_entropy=with_entropy,
        )

    def _checked(self, result: Any) -> tuple[Tensor, Any]:
        """Check what `loss_fn` returned, the same way in both modes."""
        if not isinstance(result, tuple) or len(result) != 2:
            raise DataError(f"{type(self).__name__}.loss_fn returned {type(result).__name__}; return (loss, extra)")
        loss, extra = result
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(
                f"{type(self).__name__}.loss_fn returned a loss of {given}; return the scalar sum of weight times loss"
            )
        return loss, extra

    def _check(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
        if not isinstance(self.loss_kwargs, BaseLossKwargs):
            raise DataError(
                f"{type(self).__name__} got {type(self.loss_kwargs).__name__} for its kwargs; build them first"
            )
        labels, ignore_idx = self.loss_kwargs.shifted_labels, self.loss_cfg.ignore_idx
        if hidden_states.shape[:-1] != labels.shape:
            raise DataError(
                f"hidden_states has shape {list(hidden_states.shape)}, but shifted_labels has {list(labels.shape)}; "
                "they must agree in all but the last dimension (drop the last position of the text: it has no label)"
            )
        for name, value in self.loss_kwargs.tensors():
            if self.loss_kwargs.is_per_token(name) and value.shape != labels.shape:
                raise DataError(
                    f"{type(self.loss_kwargs).__name__}.{name} has shape {list(value.shape)}, but shifted_labels has "
                    f"{list(labels.shape)}; a per-token field has one value for each position"
                )
        if head_weight.dim() != 2 or head_weight.shape[1] != hidden_states.shape[-1]:
            raise DataError(
                f"head_weight has shape {list(head_weight.shape)}; it must be [V, {hidden_states.shape[-1]}] "
                f"for hidden states of width {hidden_states.shape[-1]}"
            )
        if hidden_states.dtype != head_weight.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
            raise DataError(
                f"hidden_states are {hidden_states.dtype}, head_weight is {head_weight.dtype}; bring both to one "
                "dtype, or run under torch.autocast"
            )
        vocabulary = head_weight.shape[0]
        if head_bias is not None and head_bias.shape != (vocabulary,):
            raise DataError(f"head_bias has shape {list(head_bias.shape)}; it must be [{vocabulary}]")
        outside = (labels != ignore_idx) & ((labels < 0) | (labels >= vocabulary))
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            raise DataError(
                f"shifted_labels{where} = {int(labels[tuple(where)])} lies outside the vocabulary of {vocabulary} "
                f"(0 .. {vocabulary - 1}); positions that are not scored carry ignore_idx = {ignore_idx}"
            )


def select_active(loss_kwargs: BaseLossKwargs, ignore_idx: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the values of `tensors` at the scored positions, [N] or [N, D] each; None stays None.

    Masked positions are left out *before* any arithmetic, so that a NaN there can reach neither loss nor gradient.
    """
    index = (loss_kwargs.shifted_labels.reshape(-1) != ignore_idx).nonzero().squeeze(-1)
    lead = loss_kwargs.shifted_labels.dim()
    return [None if t is None else t.reshape(-1, *t.shape[lead:]).index_select(0, index) for t in tensors]


def check_finite(name: str, values: Tensor | None, labels: Tensor, ignore_idx: int) -> None:
    """Refuse NaN and inf at scored positions.

    Raises:
        DataError: names the field and the first such position.
    """
    if values is None:
        return
    broken = ~values.isfinite() & (labels != ignore_idx)
    if bool(broken.any()):
        where = broken.nonzero()[0].tolist()
        raise DataError(
            f"{name}{where} = {float(values[tuple(where)])} at a scored position; only positions whose label is "
            f"ignore_idx = {ignore_idx} may hold NaN or inf. Mask the position or repair the value"
        )


def _merge_extras(extras: list[Any]) -> Any:
    """Merge metrics by name; anything else a chunk returned (such as its logits) is let go."""
    return merge_metrics(map(metrics_in, extras)) or None


def as_loss_dtype(weights: Tensor, token_losses: Tensor) -> Tensor:
    """Return fp64 calibration weights in the dtype of the token losses."""
    return weights.to(torch.promote_types(token_losses.dtype, torch.float32))
