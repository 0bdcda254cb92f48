"""What is fixed before the first forward of an optimizer step: one weight for each token and term, from one exchange.

Every rank counts its micro-batches, one exchange adds up the counts of all terms (`exchange_counts`), and the weights
follow. Under sequence parallelism the items are joined to whole rows first (`local_and_full_items`) and the kwargs are
split last; nothing in between depends on it.

Legend: B rows, T positions of a row, K columns of weights (terms that count alike share one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.distributed import sp_split
from toolkit.distributed.sequence import SPMesh
from toolkit.errors import ConfigError, DataError, a_type, described
from toolkit.functional.aggregation import BY_TOKEN, Share
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.term import LossTerm, weight_columns
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.step.groups import prompts_of, tokens_of_prompts
from toolkit.losses.step.sequence_parallel import local_and_full_items
from toolkit.losses.step.totals import Counts, Table, exchange_counts
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
"""What a loss counts in addition to its terms: numbers (0-dim or [n]) and tables, by name."""


@dataclass(frozen=True)
class StepTotals:
    """The counts of all micro-batches and ranks of an optimizer step, added up."""

    denominators: Mapping[str, Tensor]
    """By term: what the sum of its values is divided by, 0-dim float64; 1 for ``token_sum``."""
    numbers: Mapping[str, Tensor]
    """The other numbers that the loss counts, by name, [n] float64 each."""
    tables: Mapping[str, Table]
    """Its tables, by name."""


@dataclass(frozen=True)
class StepRow:
    """One micro-batch of a step, once the weights are fixed."""

    index: int
    """Its index among the micro-batches of this rank."""
    item: Any
    """The user's item, over whole rows [B, T]."""
    piece: Any
    """The user's item, unchanged: under sequence parallelism this rank's shard."""
    labels: Tensor
    """[B, T], `ignore_idx` where a token counts nowhere."""
    weights: tuple[Tensor, ...]
    """K of [B, T] float64, one column for all terms that count alike; 0 where a term does not count a token."""
    step: Step

    @property
    def sequence_ids(self) -> Tensor:
        """[B, T] int64, the sequence of each position, negative for none."""
        return self.step.sequence_ids[self.index]

    def values(self) -> dict[str, Any]:
        """Return the item's fields that have a value, by name.

        Fields with a trailing axis are not joined over shards: they are empty here and filled from the piece later.
        """
        values = {name: value for name, value in self.item.__dict__.items() if value is not None}
        for name, value in self.piece.tensors() if self.piece is not self.item else ():
            values.setdefault(name, value.new_zeros(*self.labels.shape, 0))
        return values


@dataclass
class Step:
    """The micro-batches of one optimizer step on this rank."""

    terms: Sequence[LossTerm]
    cu_seq_lens_list: Sequence[Tensor | None] | None = None
    """Boundaries of each packed row; None: a row is a sequence."""
    sp_mesh: SPMesh | None = None
    """Ranks that share every row."""
    ignore_idx: int = -100
    gradient_reduction: Literal["mean", "sum"] = "mean"
    loss_cfg: Any = None
    """The config of the loss, for the `prepare` of `count`."""

    pieces: list[Any] = field(default_factory=list)
    """The user's items, unchanged: under sequence parallelism this rank's shards."""
    items: list[Any] = field(default_factory=list)
    """Items of whole rows."""
    labels: list[Tensor] = field(default_factory=list)
    """[B, T], `ignore_idx` where a token counts nowhere; `prepare` may ignore more tokens."""
    is_scored: list[Tensor] = field(default_factory=list)
    """[B, T] bool, where the labels are not `ignore_idx`; known once `prepare` has run."""
    prepared: Any = None
    """What `prepare` stores for the kwargs of the step."""
    weights: list[tuple[Tensor, ...]] = field(default_factory=list)
    """K of [B, T] float64 for each micro-batch."""
    largest_labels: list[int | None] = field(default_factory=list)
    """Of each of `pieces`; None: it has a negative label besides `ignore_idx`."""
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
            checked: returns this rank's items; if it raises, the other ranks raise, too.
            device: of the items.
            prepare: looks at items and labels of whole rows, may ignore labels, and returns further counts.
            extra: what `prepare` counts, by name: how many numbers, None for a table; equal on every rank.
        """
        extra = extra or {}
        columns = self._columns()
        by_prompt = _by_prompt(columns)
        numbers = {name: size for name, size in extra.items() if size is not None}
        shares: list[list[Share]] = []

        def count_here() -> Counts:
            self.pieces, self.items = local_and_full_items(checked, self.sp_mesh, self.cu_seq_lens_list)
            self.labels = [item.shifted_labels for item in self.items]
            if self.cu_seq_lens_list is not None:
                _ = self.sequence_ids  # raises here, so the other ranks know of boundaries that do not fit
            counted = dict(prepare(self)) if prepare is not None else {}
            self.is_scored = [labels != self.ignore_idx for labels in self.labels]
            if counted.keys() != extra.keys():
                raise ConfigError(f"prepare counted {sorted(counted)}, but {sorted(extra)} was announced")
            tables: dict[str, Table] = {name: counted[name] for name in extra if name not in numbers}  # type: ignore[misc]
            for index in by_prompt:
                tables[f"tokens of {index}"] = tokens_of_prompts(self._counted(columns[index]), self._groups())
            shares.extend([] if index in by_prompt else self._shares(term) for index, term in enumerate(columns))
            extras = [_as_numbers(counted[name], size, device) for name, size in numbers.items()]
            counts = Counts(torch.cat([*extras, *(count_of(each, device).reshape(1) for each in shares)]), tables)
            return counts if counts_here(self.sp_mesh) else counts.uncounted()

        total = exchange_counts(
            count_here,
            num_numbers=sum(numbers.values()) + len(columns),
            has_tables=bool(by_prompt) or len(numbers) < len(extra),
            device=device,
            settings=self._settings,
        )
        *extras, denominators = total.numbers.split_with_sizes([*numbers.values(), len(columns)])
        of_columns = self._fix_weights(columns, shares, list(denominators.unbind()), total.tables)
        self.totals = StepTotals(
            {
                term.name: torch.ones_like(of_columns[column])
                if term.average.name == "token_sum"
                else of_columns[column]
                for term, column in zip(self.terms, weight_columns(self.terms), strict=True)
            },
            dict(zip(numbers, extras, strict=True)),
            {name: total.tables[name] for name in extra if name not in numbers},
        )
        return self.totals

    def _fix_weights(
        self,
        columns: Sequence[LossTerm],
        shares: list[list[Share]],
        denominators: list[Tensor],
        tables: Mapping[str, Table],
    ) -> list[Tensor]:
        """Set `weights` from what all ranks counted; return the denominators of all columns, 0-dim each."""
        for index in _by_prompt(columns):
            chosen = columns[index].average
            tokens, num = prompts_of(self._groups(), tables[f"tokens of {index}"], chosen.count_empty)
            shares[index] = self._shares(columns[index], prompt_tokens=tokens)
            denominators[index] = denominators[index].new_tensor(float(num))
        by_column = [
            calibrated(column_shares, denominator, gradient_reduction=self.gradient_reduction)
            for column_shares, denominator in zip(shares, denominators, strict=True)
        ]
        self.weights = list(zip(*by_column, strict=True))
        return denominators

    @cached_property
    def sequence_ids(self) -> list[Tensor]:
        """[B, T] int64 for each micro-batch, the sequence of each position; computed on first use."""
        labels = [item.shifted_labels for item in self.items]
        return sequence_ids_of_batches(labels, self.cu_seq_lens_list, ignore_idx=self.ignore_idx)

    def rows(self) -> list[StepRow]:
        """Return every micro-batch of this rank with its weights."""
        batches = zip(self.items, self.pieces, self.labels, self.weights, strict=True)
        return [StepRow(index, *fields, self) for index, fields in enumerate(batches)]

    def filled(self, kwargs: Sequence[Any]) -> list[Any]:
        """Return this rank's kwargs with every field with a trailing axis taken from the pieces, by name."""
        filled = []
        for batch, piece in zip(kwargs, self.pieces, strict=True):
            changes = {
                name: getattr(piece, name)
                for name in type(batch).model_fields
                if name in type(piece).model_fields and _is_wide(type(batch), name)
            }
            filled.append(batch.replace(**changes) if changes else batch)
        return filled

    def _settings(self) -> dict[str, str]:
        """Return what must be equal on all ranks, as text."""
        if self.loss_cfg is not None:
            return self.loss_cfg.shared_settings
        aggregations = {f"aggregation of {term.name}": repr(term.average) for term in self.terms}
        return {**aggregations, "ignore_idx": str(self.ignore_idx), "gradient_reduction": self.gradient_reduction}

    def _columns(self) -> list[LossTerm]:
        """Return one term for each column of weights."""
        first_terms: dict[int, LossTerm] = {}
        for term, column in zip(self.terms, weight_columns(self.terms), strict=True):
            first_terms.setdefault(column, term)
        return list(first_terms.values())

    def _counted(self, term: LossTerm) -> list[Tensor]:
        """Return which tokens a term counts."""
        if term.token_filter is None:
            return self.is_scored
        counted = []
        for index, (item, is_scored) in enumerate(zip(self.items, self.is_scored, strict=True)):
            try:
                chosen = term.token_filter(item)
            except Exception as error:  # the user's function may raise anything
                raise DataError(
                    f"the token_filter of term {term.name!r} failed on data_batches[{index}]: "
                    f"{described(error)}; do all items have the fields that it reads?"
                ) from error
            if not isinstance(chosen, Tensor) or chosen.shape != is_scored.shape or chosen.dtype != torch.bool:
                kind = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
                raise DataError(
                    f"the token_filter of term {term.name!r} returned {kind} for data_batches[{index}]; it must be "
                    f"bool {list(is_scored.shape)}, True for each token that the term counts"
                )
            counted.append(is_scored & chosen)
        return counted

    def _groups(self) -> list[Tensor]:
        groups = [getattr(item, "group_ids", None) for item in self.items]
        missing = next((index for index, ids in enumerate(groups) if ids is None), None)
        if missing is not None:
            raise DataError(
                f"data_batches[{missing}].group_ids is missing, but prompt_mean looks at all completions of a prompt "
                "together; give one integer for each sequence ([B, 1]), the same for completions of the same prompt"
            )
        return groups  # type: ignore[return-value]

    def _shares(self, term: LossTerm, **prompts: Any) -> list[Share]:
        chosen = term.average
        options: dict[str, Any] = {"count_empty": chosen.count_empty, "length": chosen.length, **prompts}
        if self.cu_seq_lens_list is not None:  # the ids do not show empty sequences
            options["num_sequences"] = [
                len(bounds) - 1 if bounds is not None else len(ids) if ids.dim() > 1 else 1
                for ids, bounds in zip(self.sequence_ids, self.cu_seq_lens_list, strict=True)
            ]
        counted = self._counted(term)
        ids = [None] * len(counted) if chosen.name in BY_TOKEN else self.sequence_ids
        return aggregated(counted, ids, chosen.name, **options)


def _by_prompt(columns: Sequence[LossTerm]) -> list[int]:
    """Return the indices of the columns whose weights depend on all completions of a prompt."""
    return [index for index, term in enumerate(columns) if term.average.name == "prompt_mean"]


def _as_numbers(value: Any, size: int, device: torch.device) -> Tensor:
    make = torch.as_tensor if isinstance(value, Tensor) else torch.tensor  # of numbers in half the time
    numbers = make(value, dtype=torch.float64, device=device).reshape(-1)
    if numbers.numel() != size:
        raise ConfigError(f"prepare counted {numbers.numel()} numbers where {size} were announced")
    return numbers


def _is_wide(record: type[Any], name: str) -> bool:
    return record.is_per_token(name) and record.layout(name).trailing > 0


def step_weights(
    items_or_labels: Sequence[LossContextInputItem | Tensor],
    aggregation: str | AggregationConfig = "token_mean",
    cu_seq_lens_list: Sequence[Tensor | None] | None = None,
    sp_mesh: SPMesh | None = None,
    *,
    token_filter: Callable[[Any], Tensor] | None = None,
    gradient_reduction: Literal["mean", "sum"] = "mean",
    ignore_idx: int = -100,
) -> list[Tensor]:
    """Return the weights of every token of an optimizer step, for loops without contexts.

    The loss of a micro-batch is then ``(weights * values).sum()``, with values that are not averaged. Added up over
    micro-batches, and averaged (or summed) over ranks by the back-end, losses and gradients are those of the whole
    step. If values may be NaN or inf at masked positions, write ``values.where(weights != 0, 0)``. Every rank must
    call it together, once for each optimizer step.

    Args:
        items_or_labels: for each micro-batch of this rank an item, or its shifted labels, [1, T] or [B, T] int64; this
            rank's shards with `sp_mesh`.
        aggregation: a name, or `AggregationConfig` with settings; not ``per_component``, which is two terms.
        cu_seq_lens_list: for each micro-batch the [S + 1] boundaries of its packed row; None: a row is a sequence.
        sp_mesh: one-dimensional mesh of ranks that share every row.
        token_filter: ``f(item) -> [B, T] bool``, which scored tokens count; None: all.
        gradient_reduction: what the back-end does to gradients over ranks: DDP and FSDP average ("mean").
        ignore_idx: label of positions that are not scored.

    Returns:
        For each micro-batch float64 weights of the shape of its labels, 0 where nothing counts; this rank's shards
        with `sp_mesh`.

    Raises:
        ConfigError: the aggregation is unknown or lacks a setting.
        DataError: labels, boundaries or filter are invalid, on this rank or on another one.
    """
    if gradient_reduction not in ("mean", "sum"):
        raise ConfigError(f"gradient_reduction={gradient_reduction!r} must be 'mean' or 'sum'")
    if not isinstance(aggregation, (str, Mapping, AggregationConfig)):
        raise ConfigError(
            f"aggregation is {a_type(aggregation)}; give a name such as 'token_mean', or an AggregationConfig"
        )

    def checked() -> list[LossContextInputItem]:
        items: Any = items_or_labels
        if isinstance(items, (list, tuple)):
            items = [LossContextInputItem(shifted_labels=each) if isinstance(each, Tensor) else each for each in items]
        return checked_items(items, LossContextInputItem)

    term = LossTerm(aggregation=aggregation, token_filter=token_filter)
    step = Step((term,), cu_seq_lens_list, sp_mesh, ignore_idx, gradient_reduction)
    step.count(checked, device_of(items_or_labels))
    weights = [columns[0] for columns in step.weights]
    return weights if sp_mesh is None else [sp_split(batch, sp_mesh, dim=-1, pad=0.0) for batch in weights]
