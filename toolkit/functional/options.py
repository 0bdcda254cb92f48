"""The options of a registered function: what its signature declares becomes a validated model; no torch here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import create_model

from toolkit.errors import ConfigError
from toolkit.schema import Config

Anchor = Literal["old", "rollout", "self"]
"""What a ratio divides by: the policy before the step, the one that sampled, or the current one without gradient."""
ClipLow = Annotated[float, Ge(0), Le(1)]
"""A ratio's floor is 1 minus it."""
ClipHigh = Annotated[float, Ge(0)]
"""A ratio's ceiling is 1 plus it."""
AboveOne = Annotated[float, Gt(1)]
"""A cap on ratios that leaves a ratio of 1 alone."""
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


def options_model(
    kind: str, name: str, function: Callable[..., Any], *, reserved: tuple[str, ...] = ()
) -> type[Config]:
    """Build the options class from the keyword-only parameters of `function`.

    Args:
        kind: what is registered, such as "policy loss"; for the error messages.
        name: under which name.
        function: its first parameter is data; every other one must be keyword-only with a default.
        reserved: words that no option may be called.

    Raises:
        ConfigError: a parameter may be passed by position, has no default or a reserved name.
    """
    first, *options = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {}
    for option in options:
        if option.kind is not option.KEYWORD_ONLY or option.default is option.empty:
            raise ConfigError(
                f"parameter {option.name!r} of {kind} {name!r} must be keyword-only with a default: "
                f"def {function.__name__}({first.name}, *, {option.name}=...)"
            )
        if option.name in reserved:
            raise ConfigError(
                f"{kind} {name!r} has an option called {option.name!r}; that word picks the {kind.split()[-1]} itself"
            )
        fields[option.name] = (_annotation(option.annotation, kind, function), option.default)
    return create_model(f"{name}_options", __base__=Config, **fields)


def _annotation(annotation: Any, kind: str, function: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    # Strings come from `from __future__ import annotations`; only options are evaluated, so that the annotations
    # of tensors may name types that are imported for type checking alone.
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError as error:
        raise ConfigError(
            f"an option of {kind} {function.__name__!r} is annotated {annotation!r}, but {error}; import the type "
            "outside of TYPE_CHECKING"
        ) from None
