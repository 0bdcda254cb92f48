"""What is fixed before the first forward of an optimizer step: one weight for each token and term, from one exchange.

Every rank counts its micro-batches, one exchange adds the counts of all terms up (`census`), and the weights follow.
Under sequence parallelism the items are made whole first and the kwargs are cut last (`shards`); nothing in between
knows of it.

Legend: B rows, T positions of a row, K columns of weights (terms that count alike share one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import sp_split
from toolkit.errors import ConfigError, DataError
from toolkit.functional.aggregation import BY_TOKEN, Share
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.term import LossTerm, weight_columns
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.step.prompts import prompts_of, tokens_of_prompts
from toolkit.losses.step.sequence_parallel import given_and_whole
from toolkit.losses.step.totals import Counts, Table, census
from toolkit.losses.step.weights import (
    aggregated,
    calibrated,
    checked_items,
    count_of,
    counts_here,
    device_of,
    sequence_ids_of_batches,
)

Extra = Mapping[str, "Tensor | float | Table"]
"""What a loss counts beside its terms: numbers (0-dim or [n]) and tables, by name."""


@dataclass(frozen=True)
class StepTotals:
    """What all ranks counted together over all micro-batches of an optimizer step."""

    denominators: Mapping[str, Tensor]
    """By term: what the sum of its values is divided by, 0-dim float64; 1 for ``token_sum``."""
    numbers: Mapping[str, Tensor]
    """What the loss counted besides, by name, [n] float64 each."""
    tables: Mapping[str, Table]
    """The same for its tables."""


@dataclass(frozen=True)
class StepRow:
    """One micro-batch of a step, once the weights are fixed."""

    index: int
    """Its place among the micro-batches of this rank."""
    item: Any
    """What the user gave, over whole rows [B, T]."""
    piece: Any
    """The same as given: under sequence parallelism this rank's shard."""
    labels: Tensor
    """[B, T], `ignore_idx` where a token counts nowhere."""
    weights: Tensor
    """[B, T, K] float64, a column for all terms that count alike; 0 where a term does not count a token."""
    step: Step

    @property
    def sequence_ids(self) -> Tensor:
        """[B, T] int64, the sequence of each position, negative for none."""
        return self.step.sequence_ids[self.index]

    def value(self, name: str) -> Any:
        """Return the item's field of that name, None where it has none.

        Fields with a trailing axis are not joined over shards: there they are empty, to be filled with the piece's own.
        """
        whole = self.item.__dict__.get(name)  # of a name that is no field, too: dozens are asked for
        if whole is not None or self.piece is self.item:
            return whole
        if isinstance(own := self.piece.__dict__.get(name), Tensor):
            return own.new_zeros(*self.labels.shape, 0)
        return whole


@dataclass
class Step:
    """The micro-batches of one optimizer step on this rank."""

    terms: Sequence[LossTerm]
    cu_seq_lens_list: Sequence[Tensor | None] | None = None
    """Boundaries of each packed row; None: a row is a sequence."""
    sp_mesh: DeviceMesh | None = None
    """Ranks that share every row."""
    ignore_idx: int = -100
    gradient_reduction: Literal["mean", "sum"] = "mean"
    loss_cfg: Any = None
    """The config of the loss, for whoever prepares the step."""

    pieces: list[Any] = field(default_factory=list)
    """Items as given: under sequence parallelism this rank's shards."""
    items: list[Any] = field(default_factory=list)
    """Items of whole rows."""
    labels: list[Tensor] = field(default_factory=list)
    """[B, T], `ignore_idx` where a token counts nowhere; who prepares the step may leave out more."""
    prepared: Any = None
    """Whatever who prepares the step wants to find again in its kwargs."""
    weights: list[Tensor] = field(default_factory=list)
    """[B, T, K] float64 of each micro-batch."""
    totals: StepTotals | None = None

    def count(
        self,
        checked: Callable[[], list[Any]],
        device: torch.device,
        *,
        prepare: Callable[[Step], Extra] | None = None,
        extra: Mapping[str, int | None] | None = None,
    ) -> StepTotals:
        """Count all terms over all ranks in one exchange and fix the weights; every rank must call it.

        Args:
            checked: gives this rank's items; what it raises reaches the other ranks, too.
            device: of the items.
            prepare: looks at items and labels once rows are whole, may leave out labels, and counts what is its own.
            extra: what it counts, by name: how many numbers, None for a table; the same on every rank.
        """
        extra = extra or {}
        columns = self._columns()
        by_prompt = [index for index, term in enumerate(columns) if term.average.name == "prompt_mean"]
        numbers = {name: size for name, size in extra.items() if size is not None}
        has_tables = bool(by_prompt) or len(numbers) < len(extra)
        shares: list[list[Share]] = []

        def count_here() -> Counts:
            self.pieces, self.items = given_and_whole(checked, self.sp_mesh)
            self.labels = [item.shifted_labels for item in self.items]
            if self.cu_seq_lens_list is not None:
                _ = self.sequence_ids  # boundaries that do not fit must reach the other ranks, too
            given = dict(prepare(self)) if prepare is not None else {}
            if given.keys() != extra.keys():
                raise ConfigError(f"prepare counted {sorted(given)}, but {sorted(extra)} was announced")
            tables: dict[str, Table] = {name: given[name] for name in extra if name not in numbers}  # type: ignore[misc]
            for index in by_prompt:
                labels = self._counted(columns[index])
                tables[f"tokens of {index}"] = tokens_of_prompts(labels, self._groups(), ignore_idx=self.ignore_idx)
            shares.extend([] if index in by_prompt else self._shares(term) for index, term in enumerate(columns))
            own = [_as_numbers(given[name], size, device) for name, size in numbers.items()]
            counts = Counts(torch.cat([*own, torch.stack([count_of(each, device) for each in shares])]), tables)
            return counts if counts_here(self.sp_mesh) else counts.uncounted()

        size = sum(numbers.values())
        total = census(count_here, num_numbers=size + len(columns), has_tables=has_tables, device=device)
        denominators = list(total.numbers[size:])
        for index in by_prompt:
            chosen = columns[index].average
            tokens, num = prompts_of(self._groups(), total.tables[f"tokens of {index}"], chosen.count_empty)
            shares[index] = self._shares(columns[index], prompt_tokens=tokens)
            denominators[index] = denominators[index].new_tensor(float(num))
        each = [
            calibrated(own, denominator, gradient_reduction=self.gradient_reduction)
            for own, denominator in zip(shares, denominators, strict=True)
        ]
        self.weights = [torch.stack(own, -1) if own[1:] else own[0].unsqueeze(-1) for own in zip(*each, strict=True)]
        self.totals = StepTotals(
            {
                term.name: torch.ones_like(denominators[column])
                if term.average.name == "token_sum"
                else denominators[column]
                for term, column in zip(self.terms, weight_columns(self.terms), strict=True)
            },
            dict(zip(numbers, total.numbers[:size].split(list(numbers.values())), strict=True)),
            {name: total.tables[name] for name in extra if name not in numbers},
        )
        return self.totals

    @cached_property
    def sequence_ids(self) -> list[Tensor]:
        """[B, T] int64 for each micro-batch, the sequence of each position; computed where something asks for it."""
        labels = [item.shifted_labels for item in self.items]
        return sequence_ids_of_batches(labels, self.cu_seq_lens_list, ignore_idx=self.ignore_idx)

    def rows(self) -> list[StepRow]:
        """Return every micro-batch of this rank with its weights."""
        each = zip(self.items, self.pieces, self.labels, self.weights, strict=True)
        return [StepRow(index, *own, self) for index, own in enumerate(each)]

    def filled(self, kwargs: Sequence[Any]) -> list[Any]:
        """Return this rank's kwargs with every field with a trailing axis taken from its own items, by name."""
        found = []
        for own, piece in zip(kwargs, self.pieces, strict=True):
            changes = {
                name: getattr(piece, name)
                for name in type(own).model_fields
                if name in type(piece).model_fields and _is_wide(type(own), name)
            }
            found.append(own.replace(**changes) if changes else own)
        return found

    def _columns(self) -> list[LossTerm]:
        """Return one term for each column of weights."""
        found: dict[int, LossTerm] = {}
        for term, column in zip(self.terms, weight_columns(self.terms), strict=True):
            found.setdefault(column, term)
        return list(found.values())

    def _counted(self, term: LossTerm) -> list[Tensor]:
        """Return the labels of the tokens that a term counts."""
        if term.token_filter is None:
            return self.labels
        found = []
        for index, (item, labels) in enumerate(zip(self.items, self.labels, strict=True)):
            try:
                chosen = term.token_filter(item)
            except Exception as error:  # the user's function may raise anything
                raise DataError(
                    f"the token_filter of term {term.name!r} failed on data_batches[{index}]: {type(error).__name__}: "
                    f"{str(error).splitlines()[0] if str(error) else ''}; are the fields that it reads given?"
                ) from error
            if not isinstance(chosen, Tensor) or chosen.shape != labels.shape or chosen.dtype != torch.bool:
                given = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
                raise DataError(
                    f"the token_filter of term {term.name!r} returned {given} for data_batches[{index}]; it must be "
                    f"bool {list(labels.shape)}, True for each token that the term counts"
                )
            found.append(labels.masked_fill(~chosen, self.ignore_idx))
        return found

    def _groups(self) -> list[Tensor]:
        groups = [getattr(item, "group_ids", None) for item in self.items]
        missing = next((index for index, own in enumerate(groups) if own is None), None)
        if missing is not None:
            raise DataError(
                f"data_batches[{missing}].group_ids is missing, but prompt_mean looks at all completions of a prompt "
                "together; give one integer for each sequence ([B, 1]), the same for completions of the same prompt"
            )
        return groups  # type: ignore[return-value]

    def _shares(self, term: LossTerm, **prompts: Any) -> list[Share]:
        chosen = term.average
        options: dict[str, Any] = {"count_empty": chosen.count_empty, "length": chosen.length, **prompts}
        if self.cu_seq_lens_list is not None:  # empty sequences leave no trace in the ids
            options["num_sequences"] = [
                len(bounds) - 1 if bounds is not None else len(ids) if ids.dim() > 1 else 1
                for ids, bounds in zip(self.sequence_ids, self.cu_seq_lens_list, strict=True)
            ]
        counted = self._counted(term)
        ids = [None] * len(counted) if chosen.name in BY_TOKEN else self.sequence_ids
        return aggregated(counted, ids, chosen.name, ignore_idx=self.ignore_idx, **options)


def _as_numbers(given: Any, size: int, device: torch.device) -> Tensor:
    found = torch.as_tensor(given, dtype=torch.float64, device=device).reshape(-1)
    if len(found) != size:
        raise ConfigError(f"prepare counted {len(found)} numbers where {size} were announced")
    return found


def _is_wide(record: type[Any], name: str) -> bool:
    return record.is_per_token(name) and record.layout(name).trailing > 0


def step_weights(
    items_or_labels: Sequence[LossContextInputItem | Tensor],
    aggregation: str | AggregationConfig = "token_mean",
    cu_seq_lens_list: Sequence[Tensor | None] | None = None,
    sp_mesh: DeviceMesh | None = None,
    *,
    token_filter: Callable[[Any], Tensor] | None = None,
    gradient_reduction: Literal["mean", "sum"] = "mean",
    ignore_idx: int = -100,
) -> list[Tensor]:
    """Return the weights of every token of an optimizer step, for loops without contexts.

    The loss of a micro-batch is then ``(weights * values).sum()``, with values that are not averaged: added up over
    micro-batches, and averaged (or summed) over ranks by the back-end, losses and gradients are those of the whole
    step. Where values may be NaN or inf at masked positions, write ``values.where(weights != 0, 0)``. Every rank must
    call it together, once for each optimizer step.

    Args:
        items_or_labels: for each micro-batch of this rank an item, or its shifted labels, [1, T] or [B, T] int64; this
            rank's shards where `sp_mesh` is given.
        aggregation: a name, or `AggregationConfig` with settings; not ``per_component``, which is two.
        cu_seq_lens_list: for each micro-batch the [S + 1] boundaries of its packed row; None: a row is a sequence.
        sp_mesh: one-dimensional mesh of ranks that share every row.
        token_filter: ``f(item) -> [B, T] bool``, which scored tokens count; None: all.
        gradient_reduction: what the back-end does to gradients over ranks: DDP and FSDP average ("mean").
        ignore_idx: label of positions that are not scored.

    Returns:
        For each micro-batch float64 weights of the shape of its labels, 0 where nothing counts; this rank's shards
        where `sp_mesh` is given.

    Raises:
        ConfigError: the aggregation is unknown or lacks a setting.
        DataError: labels, boundaries or filter do not fit; on the other ranks, that they do not here.
    """
    if gradient_reduction not in ("mean", "sum"):
        raise ConfigError(f"gradient_reduction={gradient_reduction!r} must be 'mean' or 'sum'")

    def checked() -> list[LossContextInputItem]:
        given: Any = items_or_labels
        if isinstance(given, (list, tuple)):
            given = [LossContextInputItem(shifted_labels=own) if isinstance(own, Tensor) else own for own in given]
        return checked_items(given, LossContextInputItem)

    term = LossTerm(aggregation=aggregation, token_filter=token_filter)
    step = Step((term,), cu_seq_lens_list, sp_mesh, ignore_idx, gradient_reduction)
    step.count(checked, device_of(items_or_labels))
    weights = [own[..., 0] for own in step.weights]
    return weights if sp_mesh is None else [sp_split(own, sp_mesh, dim=-1, pad=0.0) for own in weights]
