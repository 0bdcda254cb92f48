"""Immutable records of tensors (items, kwargs): every transform returns a new one.

Legend: B rows, T positions of a row, K values of one position. A per-token field has the shape of ``shifted_labels``,
[1, T] or [B, T]; or [.., T, K] where it is declared with a trailing axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from toolkit.display import html_table
from toolkit.distributed import sp_split
from toolkit.distributed.sequence import SPMesh
from toolkit.errors import ConfigError, DataError, ToolkitError, listed
from toolkit.schema import Model

Kind = Literal["any", "float", "number", "integer", "bool"]


@dataclass(frozen=True)
class PerToken:
    """Marks a field with one value for each position: ``Annotated[Tensor | None, PerToken(pad=0.0)]``."""

    pad: float
    """Value where there is no token; 0 is False."""
    trailing: int = 0
    """1 where a position has K values, [B, T, K]."""
    kind: Kind = "any"
    """What its values must be; integers become int64, as a "number" fp32."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.trailing not in (0, 1):
            raise ConfigError(
                f"PerToken(kind={self.kind!r}, trailing={self.trailing!r}): kind must be {listed(get_args(Kind))}; "
                "trailing must be 0 or 1"
            )

    @property
    def dim(self) -> int:
        """The token axis, counted from the end."""
        return -1 - self.trailing

    def positions(self, value: Tensor) -> torch.Size:
        """Return the shape of `value` without the axes of one position: [B, T]."""
        return value.shape[: value.dim() - self.trailing]


@dataclass(frozen=True)
class Shared:
    """Marks a tensor of the micro-batch that is the same in every chunk and shard."""


class TensorRecord(Model):
    """Base of items and kwargs: known fields only, no assignment, transforms that return new objects."""

    model_config = ConfigDict(frozen=True)
    error_class: ClassVar[type[ToolkitError]] = DataError

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raise if a layout stands where the type of a field belongs.

        Raises:
            ConfigError: it does; the message shows the annotation to write.
        """
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            kind = next((kind for kind in (PerToken, Shared) if field.annotation is kind), None)
            if kind is not None:
                mark = "PerToken(pad=0.0)" if kind is PerToken else "Shared()"
                raise ConfigError(
                    f"class {cls.__name__}: {kind.__name__} is the layout of {name}, not its type; write "
                    f"{_annotated(cls, name, mark)}"
                )

    @classmethod
    @cache
    def field_names(cls) -> frozenset[str]:
        """Return the names of all fields; looked up once, because `model_fields` takes as long as an operation."""
        return frozenset(cls.model_fields)

    @classmethod
    def layout(cls, name: str) -> PerToken | Shared:
        """Return the layout of field `name`, declared in this class or in one that it extends.

        Raises:
            DataError: it is not declared.
        """
        if (mark := _mark_of(cls, name)) is not None:
            return mark
        raise DataError(
            f"{cls.__name__}.{name} is a tensor without a declared layout; write "
            f"{_annotated(cls, name, 'PerToken(pad=0.0)')} if it has one value per position, else Shared() in place of "
            "PerToken(pad=0.0); from typing import Annotated, from toolkit import PerToken, Shared"
        )

    @classmethod
    def is_per_token(cls, name: str) -> bool:
        """Whether field `name` is declared to have one value for each position."""
        return isinstance(_mark_of(cls, name), PerToken)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every field that holds a tensor: [B, T], [B, T, K], or any shape if `Shared`."""
        return iter(
            [(name, value) for name, value in self.__dict__.items() if value is not None and isinstance(value, Tensor)]
        )

    def per_token(self) -> Iterator[tuple[str, Tensor, PerToken]]:
        """Yield name, value ([B, T] or [B, T, K]) and layout of every per-token field."""
        for name, value in self.tensors():
            mark = self.layout(name)
            if isinstance(mark, PerToken):
                yield name, value, mark

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new record."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor on `device`."""
        return self.model_copy(update={name: value.to(device=device) for name, value in self.tensors()})

    def take(self, positions: Tensor, *, as_row: bool = False) -> Self:
        """Return a record of some `positions`, [n] int64 in the flattened per-token fields: [n], or `as_row` [1, n]."""
        taken = {
            name: value.reshape(-1, *value.shape[value.dim() - mark.trailing :]).index_select(0, positions)
            for name, value, mark in self.per_token()
        }
        if as_row:
            taken = {name: value.unsqueeze(0) for name, value in taken.items()}
        return self.model_copy(update=taken)  # parts of a checked record need no check

    def chunk(self, chunk_size: int) -> list[Self]:
        """Cut the token axis into pieces of at most `chunk_size` positions, views of this record."""
        if chunk_size < 1:
            raise DataError(f"chunk_size={chunk_size} must be at least 1")
        pieces = {name: value.split(chunk_size, dim=mark.dim) for name, value, mark in self.per_token()}
        lengths = {name: value.shape[mark.dim] for name, value, mark in self.per_token()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the per-token fields of {type(self).__name__} differ in length: {lengths}")
        number = max(map(len, pieces.values()), default=1)
        return [self.model_copy(update={name: piece[i] for name, piece in pieces.items()}) for i in range(number)]

    def sp_split(self, sp_mesh: SPMesh | None, *, ignore_idx: int | None = None) -> Self:
        """Return this rank's shard of every per-token field, each padded with its declared value where needed.

        Args:
            sp_mesh: one-dimensional mesh of the ranks that share a sequence; None: the record is returned as it is.
            ignore_idx: what pads ``shifted_labels`` when the loss uses another value than -100.

        Raises:
            DataError: the order of the mesh is "head_tail" and T is not divisible by twice its ranks.
        """
        if sp_mesh is None:
            return self
        changes = {}
        for name, value, mark in self.per_token():
            pad = ignore_idx if name == "shifted_labels" and ignore_idx is not None else mark.pad
            changes[name] = sp_split(value, sp_mesh, dim=mark.dim, pad=pad)
        return self.model_copy(update=changes)

    def cp_buffers(self) -> tuple[Self, list[Tensor], list[int]]:
        """Return a copy, its per-token tensors, and their token axes: for ``accelerator.maybe_context_parallel``.

        The tensors are [B, T] or [B, T, K]; the axes are counted from the front. Inside that context the copy holds
        this rank's shards, because the tensors are changed in place; this record keeps its own. Build the kwargs there,
        with the `sp_mesh` of `toolkit.distributed.from_accelerate`. Outside of it, `sp_split` gives the same shards.
        """
        # In their own memory: a value of a row that is expanded over its positions cannot be resized.
        copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value, _ in self.per_token()}
        dims = [value.dim() + mark.dim for _, value, mark in self.per_token()]
        return self.model_copy(update=copies), list(copies.values()), dims

    def __delattr__(self, name: str) -> None:
        raise self.error_class(f"{type(self).__name__}.{name} cannot be deleted: a {type(self).__name__} is immutable")

    def __repr__(self) -> str:
        shown = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                shown.append(f"{name}={list(value.shape)} {str(value.dtype).removeprefix('torch.')}")
            elif value is not None:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                rows.append((name, str(list(value.shape)), str(value.dtype).removeprefix("torch."), str(value.device)))
            elif value is not None:
                rows.append((name, repr(value), "", ""))
        return html_table(type(self).__name__, ("field", "shape", "dtype", "device"), rows)


@cache
def _mark_of(record: type[TensorRecord], name: str) -> PerToken | Shared | None:
    """Return what a class, or one that it extends, declares for a field."""
    for owner in record.__mro__:
        field = getattr(owner, "model_fields", {}).get(name)
        for mark in (*field.metadata, *_marks_inside(field.annotation)) if field is not None else ():
            if isinstance(mark, (PerToken, Shared)):
                return mark
    return None


def _marks_inside(annotation: Any) -> Iterator[Any]:
    """Yield what is declared inside a union: ``Annotated[Tensor, PerToken(pad=0.0)] | None``."""
    for part in get_args(annotation):
        yield from getattr(part, "__metadata__", ())


def _annotated(record: type[TensorRecord], name: str, mark: str) -> str:
    """Return how field `name` is declared with a layout."""
    field = record.model_fields.get(name)
    is_optional = field is not None and not field.is_required()
    return f"{name}: Annotated[Tensor{' | None' * is_optional}, {mark}]{' = None' * is_optional}"
