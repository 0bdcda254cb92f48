"""A loss as a sum of terms; no torch here.

``loss = sum over terms of coef * sum over tokens of weight * value``. A config lists the terms; the step fixes one
weight for each token and term (`losses.step`); the context returns the values by the name of their term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from toolkit.errors import ConfigError
from toolkit.losses.config.aggregation import PER_COMPONENT, AggregationConfig, aggregation_from


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One summand of a loss.

    Raises:
        ConfigError: the name is not an identifier, the aggregation is unknown or lacks a setting, or it is
            ``per_component``, which is two terms.
    """

    name: str = "loss"
    """The context returns the values of this term under this name."""
    coef: float = 1.0
    """Factor of the term. Its metric, ``<name>_loss``, does not include it."""
    aggregation: AggregationConfig | str = "token_mean"
    """How the values of its tokens become one number; a name, or `AggregationConfig` with settings."""
    token_filter: Callable[[Any], Any] | None = None
    """``f(item) -> [B, T] bool``: which of the scored tokens the term counts; None: all. It gets the item of each
    micro-batch, whole rows, with its ``shifted_labels``, ``advantages`` and custom fields: ``lambda item:
    item.advantages > 0``. Sequences and prompts of the term are those with such a token. The values of the other
    tokens must be finite, too, and have a finite gradient."""
    use_correction: bool = False
    """Whether ``importance`` of the kwargs multiplies it: policy losses fill it from rollout corrections, your context
    in `fields_of`."""

    def __new__(cls, *by_position: Any, **fields: Any) -> Self:
        """Raise `ConfigError` if a field is given by position."""
        if by_position:
            raise ConfigError(
                f"LossTerm takes its fields by name; write LossTerm(name={by_position[0]!r}, coef=..., "
                "aggregation=..., token_filter=..., use_correction=...)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"LossTerm(name={self.name!r}): the name becomes a metric's, so it must be an identifier")
        is_number = isinstance(self.coef, (int, float)) and not isinstance(self.coef, bool)
        if not is_number or not math.isfinite(self.coef):
            raise ConfigError(f"LossTerm(name={self.name!r}, coef={self.coef!r}): coef must be a finite number")
        if self.token_filter is not None and not callable(self.token_filter):
            kind = type(self.token_filter).__name__
            raise ConfigError(
                f"LossTerm(name={self.name!r}): token_filter is a {kind}; give a function, "
                "token_filter=lambda item: item.advantages > 0"
            )
        settings = aggregation_from(self.aggregation)
        chosen = settings if isinstance(settings, AggregationConfig) else AggregationConfig(**settings)
        if chosen.name == PER_COMPONENT:
            raise ConfigError(
                f"LossTerm(name={self.name!r}, aggregation='per_component'): that is two terms; write one with "
                "token_filter=lambda item: item.advantages > 0 and one with <= 0, each with aggregation='token_mean'"
            )
        object.__setattr__(self, "aggregation", chosen)

    @property
    def average(self) -> AggregationConfig:
        """The aggregation with its settings."""
        assert isinstance(self.aggregation, AggregationConfig)  # __post_init__ made it one
        return self.aggregation


def checked_terms(listed: Any, owner: str) -> tuple[LossTerm, ...]:
    """Return the `terms` of a config, as `listed` in the class `owner`.

    Raises:
        ConfigError: they are empty, an entry is not a `LossTerm`, or two have the same name.
    """
    terms: tuple[LossTerm, ...] = tuple(listed) if isinstance(listed, (tuple, list)) else (listed,)
    strange = next((term for term in terms if not isinstance(term, LossTerm)), None)
    if not terms or strange is not None:
        hint = "; write @property above it" if callable(strange) else ""
        raise ConfigError(f"{owner}.terms must be a tuple of at least one LossTerm, not {strange or terms!r}{hint}")
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{owner}.terms has two terms called {twice!r}; values are returned by name")
    return terms


def weight_columns(terms: Sequence[LossTerm]) -> tuple[int, ...]:
    """Return the column of weights that each term reads: terms that count the same tokens the same way share one."""
    if len(terms) == 1:
        return (0,)
    kinds: list[tuple[Any, Any]] = []
    columns = []
    for term in terms:
        kind = (term.average, term.token_filter)
        if kind not in kinds:
            kinds.append(kind)
        columns.append(kinds.index(kind))
    return tuple(columns)
