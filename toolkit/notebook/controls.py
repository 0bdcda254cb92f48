"""Which control shows an option: a slider, a check box, a list of choices; derived from its type. No widgets here."""

from __future__ import annotations

import ast
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from toolkit.errors import ConfigError
from toolkit.schema import Config

Kind = Literal["slider", "integer", "switch", "choice", "text"]
STEPS = 100
"""Steps of a slider from end to end, at least."""
SMALL_SHARE = 0.1
"""A default below this share of the allowed range gets a slider of its size: 0.0003 of [0, 1]."""
ABOVE_DEFAULT = 5
"""How far such a slider reaches, in multiples of the default."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One option as something to move, tick or type."""

    name: str
    kind: Kind
    default: Any
    is_optional: bool = False
    """Whether None is allowed; a check box turns the value off."""
    low: float = 0.0
    """Left end of a slider, a value that is allowed."""
    high: float = 1.0
    """Right end of a slider."""
    step: float = 0.01
    """Smallest change of a slider."""
    start: Any = None
    """The value to begin with when an option that is None is turned on."""
    choices: tuple[Any, ...] = ()
    meaning: str = ""
    """The description of the option."""

    def parsed(self, text: str) -> Any:
        """Return the value that a text stands for: a Python literal, or the text itself."""
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text


def controls_of(model: type[Config], values: Mapping[str, Any] | None = None) -> list[Control]:
    """Return one control for each field of an options model, in order.

    Args:
        model: `PolicyLoss.options_model`, for example.
        values: values in use; a slider reaches them.
    """
    chosen = values or {}
    return [control_of(name, field, chosen.get(name)) for name, field in model.model_fields.items()]


def control_of(name: str, field: FieldInfo, value: Any = None) -> Control:
    """Return the control of one field; `value` is the one in use, None: the default.

    Raises:
        ConfigError: the default is missing, so there is nothing to begin with.
    """
    if field.is_required():
        raise ConfigError(f"{name} has no default; give one, so a control has a value to begin with")
    inner, bounds, is_optional = _unwrapped(field.annotation, list(field.metadata))
    default = field.default
    common: dict[str, Any] = {
        "name": name,
        "default": default,
        "is_optional": is_optional,
        "meaning": field.description or "",
    }
    sample = default if value is None else value
    if get_origin(inner) is Literal:
        return Control(kind="choice", choices=get_args(inner), **common)
    if inner is bool or isinstance(sample, bool):
        return Control(kind="switch", start=False, **common)
    if inner in (int, float) or isinstance(sample, (int, float)):
        is_integer = inner is int or (inner not in (int, float) and isinstance(sample, int))
        return _number(common, bounds, sample, is_integer=is_integer)
    return Control(kind="text", start="", **common)


def _unwrapped(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any], bool]:
    """Return the type without None and without `Annotated`, all its metadata, and whether None is allowed."""
    is_optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata = [*metadata, *more]
        elif get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
            rest = [each for each in get_args(annotation) if each is not type(None)]
            is_optional = True
            annotation = rest[0] if len(rest) == 1 else Any
        else:
            return annotation, metadata, is_optional


def _number(common: dict[str, Any], bounds: list[Any], sample: Any, *, is_integer: bool) -> Control:
    low, excludes_low, limit = _limits(bounds, sample)
    size = abs(float(sample)) if sample not in (None, 0) else 0.0
    high = _round_up(ABOVE_DEFAULT * size) if size else low + 1 if sample == 0 else low + 10 * max(1.0, low)
    if math.isfinite(limit) and (not size or size >= SMALL_SHARE * limit):
        high = limit
    high = min(high, limit)
    step = 1.0 if is_integer else 10 ** math.floor(math.log10((high - low) / STEPS) + 1e-9)
    low += step if excludes_low else 0.0
    if is_integer:
        high = max(high, low + 10)
    middle = low + (high - low) / (2 if math.isfinite(limit) else 5)
    start = sample if sample is not None else round(round(middle / step) * step, 9)
    return Control(kind="integer" if is_integer else "slider", low=low, high=high, step=step, start=start, **common)


def _limits(bounds: list[Any], sample: Any) -> tuple[float, bool, float]:
    """Return the smallest value, whether it is excluded, and the largest value, infinity without one."""
    limits: dict[type, list[float]] = {kind: [] for kind in (Ge, Gt, Le, Lt)}
    for bound in bounds:
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(bound, kind):
                limits[kind].append(float(getattr(bound, name)))
    lows = [*((value, False) for value in limits[Ge]), *((value, True) for value in limits[Gt])]
    free = -_round_up(ABOVE_DEFAULT * -sample) if (sample or 0) < 0 else 0.0
    low, is_excluded = max(lows, default=(free, False))
    return low, is_excluded, min([*limits[Le], *limits[Lt]], default=math.inf)


def _round_up(value: float) -> float:
    """Return the smallest of 1, 1.5, 2, 3, 5 or 10 times a power of ten that is at least `value`."""
    power = 10 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 1.5, 2, 3, 5, 10) if factor * power >= value * (1 - 1e-9))
