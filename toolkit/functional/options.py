"""Turn the signature of a registered function into a validated options model; no torch here.

A type that several functions use carries the description of its options. A function's own ``Args:`` adds to it, e.g.
where its default comes from.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from annotated_types import DocInfo, Ge, Gt, Le
from pydantic import ConfigDict, Field, create_model

from toolkit.errors import ConfigError, a_type
from toolkit.schema import Config

Anchor = Annotated[Literal["old", "rollout", "self"], DocInfo("what the ratio divides by")]
"""The policy before the step, the one that sampled, or the current one without gradient."""
ClipLow = Annotated[float, Ge(0), Le(1), DocInfo("the ratio's floor is 1 - cliprange_low")]
ClipHigh = Annotated[float, Ge(0), DocInfo("the ratio's ceiling is 1 + cliprange_high")]
AboveOne = Annotated[float, Gt(1)]
"""A cap on ratios that does not change a ratio of 1."""
DualClip = Annotated[AboveOne, DocInfo("bound of the dual clip where A < 0; None: no dual clip")]
AverageAdvantages = Annotated[
    bool, DocInfo("whether A is the mean of the sequence's (AReaL); without effect where they are equal")
]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
SquareCoef = Annotated[NotNegative, DocInfo("factor of (log r)^2, without a half")]
Fraction = Annotated[float, Ge(0), Le(1)]


class _Options(Config):
    """Base of all options. Descriptions are passed explicitly, because looking them up in the source is slow."""

    model_config = ConfigDict(use_attribute_docstrings=False)


def options_model(kind: str, name: str, function: Callable[..., Any], *, reserved: tuple[str, ...]) -> type[Config]:
    """Build the options class from the keyword-only parameters of `function`.

    Args:
        kind: what is registered, such as "policy loss"; for the error messages.
        name: its registered name.
        function: its first parameter is data; all others must be keyword-only with a default.
        reserved: names that no option may have.

    Raises:
        ConfigError: it is not a function of one argument, or a parameter may be passed by position, has no default or a
            reserved name.
    """
    if not callable(function):
        raise ConfigError(f"{kind} {name!r} must be a function, not {a_type(function)}")
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise ConfigError(f"{kind} {name!r} takes no arguments; its first one gets the tensors: def {name}(t)")
    first, *options = parameters
    fields: dict[str, Any] = {}
    _, meanings, _ = docstring_parts(function)
    for option in options:
        if option.kind is not option.KEYWORD_ONLY or option.default is option.empty:
            names = [each.name for each in parameters if each.default is each.empty]
            if kind == "policy loss" and len(_of_a_batch(names)) > 1:
                raise ConfigError(
                    f"{kind} {name!r} takes {', '.join(names)}, but it gets one argument with all tensors; write "
                    f"def {function.__name__}(t), and inside it {', '.join(_of_a_batch(names))}"
                )
            raise ConfigError(
                f"parameter {option.name!r} of {kind} {name!r} must be keyword-only with a default: "
                f"def {function.__name__}({first.name}, *, {option.name}=...)"
            )
        if option.name in reserved:
            raise ConfigError(
                f"{kind} {name!r} has an option called {option.name!r}; that name selects the {kind.split()[-1]} itself"
            )
        annotation = _annotation(option.annotation, kind, function)
        meaning = "; ".join(filter(None, (_meaning(annotation), meanings.get(option.name))))
        sentence = f"{meaning[:1].upper()}{meaning[1:].rstrip('.')}." if meaning else None
        described = Field(option.default, description=sentence)
        fields[option.name] = (annotation, described)
    return create_model(f"{name}_options", __base__=_Options, **fields)


def _of_a_batch(names: list[str]) -> list[str]:
    """Return what ``t`` has for parameters that other projects give to a policy loss: ``old_log_prob``."""
    from toolkit.peers.batch_fields import BATCH, NAMES  # only a mistake needs it

    fields = [
        name if name in (*BATCH, "logprobs") else next(iter(NAMES[name].ours), None)
        for name in names
        if name in NAMES or name in (*BATCH, "logprobs")
    ]
    return [f"t.{field}" for field in fields if field is not None and field != "loss_mask"]


def is_same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are the same one of a file that was loaded twice: reloaded, or as module and as plugin."""
    if one.__qualname__ != other.__qualname__:
        return False
    files = [getattr(getattr(function, "__code__", None), "co_filename", "<unknown>") for function in (one, other)]
    is_same_file = os.path.realpath(files[0]) == os.path.realpath(files[1]) and not files[0].startswith("<")
    return one.__module__ == other.__module__ or is_same_file


def docstring_parts(function: Callable[..., Any]) -> tuple[str, dict[str, str], str]:
    """Return what stands before the section ``Args:`` of a docstring, its arguments by name, and what stands after.

    An argument starts a line one level deeper than ``Args:``; its continuation lines are indented further.
    """
    before, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    meanings: dict[str, str] = {}
    depth, name = None, ""
    lines = section.splitlines()
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            return before, meanings, "\n".join(lines[number:])
        depth = indent if depth is None else depth
        head, colon, rest = line.strip().partition(": ")
        if indent == depth and colon:
            name = head
            meanings[name] = rest
        elif name and line.strip():
            meanings[name] += f" {line.strip()}"
    return before, meanings, ""


def _annotation(annotation: Any, kind: str, function: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    # Strings come from `from __future__ import annotations`; only options are evaluated, so annotations of
    # tensors may use types that are imported only for type checking.
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError as error:
        raise ConfigError(
            f"an option of {kind} {function.__name__!r} is annotated {annotation!r}, but {error}; import the type "
            "outside of TYPE_CHECKING"
        ) from None


def _meaning(annotation: Any) -> str:
    """Return the description that a type carries, also inside a union, the outermost one; empty if it carries none."""
    parts = reversed(get_args(annotation))
    texts = (part.documentation if isinstance(part, DocInfo) else _meaning(part) for part in parts)
    return next(filter(None, texts), "")
