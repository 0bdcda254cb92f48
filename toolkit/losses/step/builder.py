"""Builds the kwargs of an optimizer step: one method shared by all losses, and hooks for what differs between them.

Legend: B rows, T positions of a row, S sequences, K columns of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from toolkit.distributed.sequence import SPMesh
from toolkit.errors import ConfigError, DataError, did_you_mean
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem
from toolkit.losses.kwargs import BaseLossKwargs
from toolkit.losses.step.step import Extra, Step, StepRow
from toolkit.losses.step.value_checks import check_values
from toolkit.losses.step.weights import check_config, checked_items, device_of

ItemT = TypeVar("ItemT")


class KwargsBuilder(Generic[ItemT]):
    """Builds the kwargs of every micro-batch of a step; `build_batches_loss_kwargs` calls the hooks in this order."""

    item_cls: ClassVar[type[LossContextInputItem]] = LossContextInputItem
    """The items that this loss takes; a subclass may declare further fields."""
    kwargs_cls: ClassVar[type[BaseLossKwargs]] = BaseLossKwargs
    """What a forward needs; its fields are filled from the items' fields of the same name."""
    cfg_cls: ClassVar[type[BaseLossConfig]] = BaseLossConfig
    """The configs that this loss takes."""

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[ItemT],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: SPMesh | None = None,
    ) -> list[Any]:
        """Return the kwargs of every micro-batch of one optimizer step; every rank must call it together.

        One exchange counts every denominator over all micro-batches and ranks. (With `sp_mesh` the items' fields are
        gathered before it; a loss of the whole step gathers those of all tokens after it.) Every rank needs at least
        one micro-batch (with nothing to score, if it has no work). The number of micro-batches may differ between
        ranks, unless each forward communicates (FSDP).

        **The contract.** The losses that `forward` returns for the micro-batches of a step add up, and so do their
        gradients. With ``gradient_reduction="mean"`` (DDP, FSDP) each rank's sum carries a factor R, the number of
        ranks, so their *average* is loss and gradient of the whole step; with "sum" their sum is. Do not divide or
        multiply by anything else: no 1 / micro-batches, no R. Do not multiply terms that a model adds itself (a
        router's loss) by R: `toolkit.losses.auxiliary` has their weights.

        Args:
            data_batches: the items of all micro-batches of this rank; with `sp_mesh` its shards of them.
            loss_cfg: the config of this loss.
            cu_seq_lens_list: for each micro-batch the [S + 1] boundaries of its packed row, with `sp_mesh` those of
                the whole row; None: a row is a sequence.
            sp_mesh: one-dimensional mesh of ranks that share every row; each sequence counts once.

        Raises:
            ConfigError: the config is that of another loss, or its terms are invalid.
            DataError: the items are invalid, on this rank or on another one.
        """
        check_config(loss_cfg, cls.cfg_cls)
        cls.check_loss(loss_cfg)
        step = Step(
            loss_cfg.checked_terms,
            cu_seq_lens_list,
            sp_mesh,
            loss_cfg.ignore_idx,
            loss_cfg.gradient_reduction,
            loss_cfg,
        )

        def checked() -> list[Any]:
            items = [cls.completed(item, loss_cfg) for item in checked_items(data_batches, cls.item_cls)]
            cls._check_fields(items)
            step.largest_labels = check_values(items, cls.finite_fields(loss_cfg), loss_cfg.ignore_idx)
            return items

        step.count(checked, device_of(data_batches), prepare=cls.prepare, extra=cls.counted_besides(loss_cfg))
        cls.check_totals(step)
        batches = cls.of_this_rank([cls.kwargs_of(row) for row in step.rows()], step)
        for kwargs, largest_label in zip(batches, step.largest_labels, strict=True):
            if isinstance(kwargs, BaseLossKwargs):
                kwargs.remember(loss_cfg.step_settings, largest_label)
        return batches

    @classmethod
    def check_loss(cls, loss_cfg: Any) -> None:
        """Raise `ConfigError` if the config is wrong in a way that only running it shows."""

    @classmethod
    def completed(cls, item: Any, loss_cfg: Any) -> Any:
        """Return an item with the fields filled in that this loss does not ask for; by default unchanged."""
        return item

    @classmethod
    def finite_fields(cls, loss_cfg: Any) -> Collection[str]:
        """Return the item fields that must be finite wherever a token is scored; those that `kwargs_cls` requires."""
        return [name for name, field in cls.kwargs_cls.model_fields.items() if field.is_required()]

    @classmethod
    def counted_besides(cls, loss_cfg: Any) -> dict[str, int | None]:
        """Return what `prepare` counts, by name: how many numbers, None for a table; must be equal on every rank."""
        return {}

    @classmethod
    def prepare(cls, step: Step) -> Extra:
        """Check the items, ignore labels that count nowhere, and count what `counted_besides` announces.

        Called on every rank before the exchange, with ``step.items`` over whole rows. If it raises, the other ranks
        raise, too. It may set ``step.labels`` and ``step.prepared``.
        """
        return {}

    @classmethod
    def check_totals(cls, step: Step) -> None:
        """Raise if the totals forbid the step; every rank sees the same ``step.totals``."""

    @classmethod
    def kwargs_of(cls, row: StepRow) -> Any:
        """Return the kwargs of one micro-batch over whole rows; by default from `fields_of`."""
        return cls.kwargs_cls(**cls.fields_of(row))

    @classmethod
    def fields_of(cls, row: StepRow) -> dict[str, Any]:
        """Return labels, weights and every field of `kwargs_cls` that the item has under the same name."""
        fields: dict[str, Any] = {"shifted_labels": row.labels, "loss_weight": row.weights[0]}
        if len(row.weights) > 1:
            fields["term_weights"] = torch.stack(row.weights, -1)
        known = cls.kwargs_cls.field_names()
        if "sequence_ids" in known and cls.reads_sequences(row.step.loss_cfg):
            fields["sequence_ids"] = row.sequence_ids
        return {name: value for name, value in row.values().items() if name in known} | fields

    @classmethod
    def reads_sequences(cls, loss_cfg: Any) -> bool:
        """Whether the kwargs' field `sequence_ids` is filled, where `kwargs_cls` has one."""
        return True

    @classmethod
    def _check_fields(cls, items: Sequence[Any]) -> None:
        """Check that every kwargs field is filled; runs before the exchange, so the other ranks raise, too.

        Raises:
            ConfigError: items have no field of this name.
            DataError: one of `items` lacks a value that `kwargs_cls` requires.
        """
        fills_itself = (
            cls.fields_of.__func__ is not KwargsBuilder.fields_of.__func__  # type: ignore[attr-defined]
            or cls.kwargs_of.__func__ is not KwargsBuilder.kwargs_of.__func__  # type: ignore[attr-defined]
        )
        if fills_itself:
            return
        known = {*BaseLossKwargs.model_fields, *cls.item_cls.model_fields, "sequence_ids"}
        stray = next((name for name in cls.kwargs_cls.model_fields if name not in known), None)
        if stray is not None:
            raise ConfigError(
                f"{cls.kwargs_cls.__name__}.{stray} stays empty: {cls.item_cls.__name__}, the item_cls of "
                f"{cls.__name__}, has no field of this name; declare it there, too"
                + did_you_mean(stray, cls.item_cls.model_fields)
            )
        required = [name for name, field in cls.kwargs_cls.model_fields.items() if field.is_required()]
        for index, item in enumerate(items):
            missing = next((name for name in required if getattr(item, name, item) is None), None)
            if missing is not None:
                raise DataError(
                    f"data_batches[{index}].{missing} is missing, but {cls.__name__} reads it; give it to every item"
                )

    @classmethod
    def of_this_rank(cls, batches: list[Any], step: Step) -> list[Any]:
        """Return this rank's kwargs from those of whole rows."""
        if step.sp_mesh is None:
            return batches
        return step.filled([batch.sp_split(step.sp_mesh, ignore_idx=step.ignore_idx) for batch in batches])


def item_class(context: type[KwargsBuilder[Any]]) -> type[LossContextInputItem]:
    """Return the item class of a context; that of a policy loss if it builds its kwargs itself and names none."""
    builds_itself = context.build_batches_loss_kwargs.__func__ is not KwargsBuilder.build_batches_loss_kwargs.__func__  # type: ignore[attr-defined]
    is_unset = builds_itself and context.item_cls is LossContextInputItem
    return RLLossContextInputItem if is_unset else context.item_cls
