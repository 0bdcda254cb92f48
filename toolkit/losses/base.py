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

from toolkit.distributed import counted_with
from toolkit.errors import DataError
from toolkit.head.chunked import chunked_loss
from toolkit.head.inputs import check_head
from toolkit.head.plan import HeadPlan, Scope, auto_chunk, autograd_plan, equal_chunks
from toolkit.head.vocabulary import vocab_group
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

        Everything that the loss divides by is counted here, over all micro-batches and ranks, in one exchange. (With
        `sp_mesh` the items' fields are gathered before it; for a loss of the whole step those of all tokens after it.)
        Every rank needs at least one micro-batch (with nothing to score, if it has no work), and as many as the others
        only where each forward is an exchange by itself (FSDP).

        **The contract.** The losses that `forward` returns for the micro-batches of a step add up, and so do their
        gradients. With ``gradient_reduction="mean"`` (DDP, FSDP) each rank's sum carries a factor R, the number of
        ranks, so that their *average* is loss and gradient of the whole step; with "sum" their sum is. Nothing else may
        divide or multiply: no 1 / micro-batches, no R. Terms that a model adds itself (a router's loss) are not to be
        multiplied by R: `toolkit.losses.auxiliary` has their weights.

        Args:
            data_batches: the items of all micro-batches of this rank; its shards of them where `sp_mesh` is given.
            loss_cfg: the config of this loss.
            cu_seq_lens_list: for each micro-batch the [S + 1] boundaries of its packed row, of the whole row where
                `sp_mesh` is given; None: a row is a sequence.
            sp_mesh: one-dimensional mesh of ranks that share every row; each sequence counts once.
        """

    @abstractmethod
    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Return the loss of these positions and anything else (metrics by name are merged, None is fine).

        In chunk mode it is called once for each chunk of the scored tokens, as one row with the kwargs of these tokens,
        and the results are added up; see `scope` for losses where that is wrong. A loss that needs log-probabilities
        only is better off as a `ScoredLossContext`.

        Args:
            hidden_states: [..., T, D], with T positions as in `loss_kwargs`.
            head_weight: [V, D].
            head_bias: [V] or None.
            loss_kwargs: kwargs of these positions.
        """

    @property
    def scope(self) -> Scope:
        """What one token's loss depends on: itself ("token"), its "sequence" or the "batch"; not cut unless "token"."""
        return "token"

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
        if self.loss_cfg.mode == "eager" or self.scope != "token":
            return self._checked(self.loss_fn(hidden_states, head_weight, head_bias, self.loss_kwargs))
        positions = self._scored_positions()
        spans = equal_chunks(0, len(positions), self._general_chunk(head_weight))
        pieces = [positions[span] for span in spans] or [positions]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, positions).unsqueeze(0)

        def piece_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, Any]:
            piece = self.loss_kwargs.take(pieces[index], as_row=True)
            return self._checked(self.loss_fn(hidden, weight, bias, piece))

        loss, extras = chunked_loss(piece_loss, flat, head_weight, head_bias, [len(piece) for piece in pieces])
        return loss, merge_extras(extras)

    def num_learning(self) -> Tensor:
        """Return how many tokens this micro-batch can learn from, a 0-dim tensor; a step with none anywhere is void."""
        return (self.loss_kwargs.shifted_labels != self.loss_cfg.ignore_idx).sum()

    def explain(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None) -> HeadPlan:
        """Return how `forward` with these tensors would go through the head, why, and at what cost; ``print`` it.

        Costs are those of the head; for the eager and the general path they are estimates, for there the loss may do
        anything with the logits.

        Raises:
            DataError: as `forward`.
        """
        self._check(hidden_states, head_weight, head_bias)
        if self.loss_cfg.mode == "chunk":
            return self._chunk_plan(hidden_states, head_weight, head_bias)
        tokens = len(self._scored_positions())
        return autograd_plan(
            "eager",
            "mode is eager: the logits of all scored tokens at once",
            hidden_states,
            head_weight,
            head_bias,
            [slice(0, tokens)],
        )

    def _chunk_plan(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> HeadPlan:
        name = type(self).__name__
        if self.scope != "token":
            why = f"{name}.loss_fn takes the logits of a whole {self.scope}, so that it cannot be cut"
            spans = [slice(0, self.loss_kwargs.shifted_labels.numel())]
            return autograd_plan("eager", why, hidden_states, head_weight, head_bias, spans)
        why = f"{name} computes its loss_fn from hidden states and head, so each chunk is differentiated by autograd"
        spans = equal_chunks(0, len(self._scored_positions()), self._general_chunk(head_weight))
        return autograd_plan("general", why, hidden_states, head_weight, head_bias, spans)

    def _general_chunk(self, head_weight: Tensor) -> int:
        size = self.loss_cfg.chunk_size
        return auto_chunk(head_weight.shape[0], head_weight.dtype, head_weight.device) if size == "auto" else size

    def _scored_positions(self) -> Tensor:
        """Return where the scored tokens lie; the first position if there is none, for a loss that needs one."""
        labels = self.loss_kwargs.shifted_labels.reshape(-1)
        positions = (labels != self.loss_cfg.ignore_idx).nonzero().squeeze(-1)
        return positions if len(positions) else labels.new_zeros(min(1, len(labels)))

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
        check_head(hidden_states, head_weight, labels, head_bias, ignore_idx=ignore_idx, labels_name="shifted_labels")
        check_counted_once(vocab_group(head_weight).group)
        for name, value in self.loss_kwargs.tensors():
            mark = self.loss_kwargs.layout(name) if self.loss_kwargs.is_per_token(name) else None
            if isinstance(mark, PerToken) and mark.positions(value) != labels.shape:
                raise DataError(
                    f"{type(self.loss_kwargs).__name__}.{name} has shape {list(value.shape)}, but shifted_labels has "
                    f"{list(labels.shape)}; a per-token field has one value for each position"
                )


def check_counted_once(group: Any) -> None:
    """Refuse ranks that share a vocabulary (`group`, None: nobody does) and count each other's tokens.

    Raises:
        DataError: says how to count over the others alone.
    """
    shared = counted_with(group) if group is not None else 0
    if shared > 1:
        raise DataError(
            f"{shared} ranks share the head's vocabulary, and each counts the same tokens: build the kwargs, run the "
            "loss and reduce metrics inside `with toolkit.distributed.counting_over(group)`, group being the ranks "
            'with other tokens, such as mesh["dp"].get_group() of a mesh of ("dp", "tp"). If it was FSDP that sharded '
            "the head, it was not gathered: call the loss inside the wrapped model's forward"
        )


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


def merge_extras(extras: list[Any]) -> Any:
    """Merge metrics by name; anything else a chunk returned (such as its logits) is let go."""
    return merge_metrics(map(metrics_in, extras)) or None


def as_loss_dtype(weights: Tensor, token_losses: Tensor) -> Tensor:
    """Return fp64 calibration weights in the dtype of the token losses."""
    return weights.to(torch.promote_types(token_losses.dtype, torch.float32))
