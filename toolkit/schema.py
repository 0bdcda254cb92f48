"""The base of every config: frozen, keyword-only, validated at construction, with errors that say what to do.

Imports no torch: the command line checks a whole configuration with these classes before torch is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticUserError,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_jsonable_python

from toolkit.display import html_table
from toolkit.errors import ConfigError, ToolkitError, a_type, did_you_mean, listed, nearest

_where: ContextVar[str | None] = ContextVar("where", default=None)
MAX_SHOWN = 60
"""Characters of a wrong value in a message."""


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Set the path (an override prefix such as ``loss``) that error messages raised inside start with."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


PLAIN = (bool, int, float, str, dict, set, type(None))
"""Types of values that pydantic lets a class body have without a type, so `Model` can say what to write."""


class Model(BaseModel):
    """A pydantic model whose validation errors are `ToolkitError`: what, where, allowed, next step."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, ignored_types=PLAIN
    )
    error_class: ClassVar[type[ToolkitError]] = ConfigError

    def __new__(cls, /, *args: Any, **values: Any) -> Self:
        """Raise if values have no names; `__init__` is not asked, because its signature is shown to users."""
        if args:
            raise cls.error_class(
                f"{cls.__name__} takes keyword arguments only; write {cls.__name__}({cls.by_name(args[0])})"
            )
        return super().__new__(cls)

    @classmethod
    def by_name(cls, value: Any) -> str:
        """Return the arguments to write, for a message, instead of a `value` without a name."""
        return "**{...}" if isinstance(value, dict) else f"{next(iter(cls.model_fields), 'field')}=..., ..."

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raise if a value in the body of a class has no type, because it would be no setting."""
        inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
        typed = {*inspect.get_annotations(cls), *inherited}
        for name, value in vars(cls).items():
            if isinstance(value, PLAIN) and not name.startswith("_") and name not in typed:
                kind, shown = "float | None" if value is None else type(value).__name__, _shown(value)
                raise ConfigError(
                    f"class {cls.__name__}: {name} = {shown} has no type; write {name}: {kind} = {shown} for a "
                    f"setting, or {name}: ClassVar[{kind}] = {shown} for a constant"
                )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            readable = self.error_class(explain(type(self), error))
            readable.report = (type(self), error, _where.get())
            raise readable from None
        except PydanticUserError as error:  # a type of the class does not exist
            raise ConfigError(f"class {type(self).__name__}: {str(error).splitlines()[0]}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if self.model_config.get("frozen"):
            raise self.error_class(
                f"{type(self).__name__}.{name} cannot be assigned: a {type(self).__name__} is immutable; "
                "create a new one with the value you want"
            )
        super().__setattr__(name, value)


class FrozenDict(dict[str, Any]):
    """An immutable dict; unlike ``MappingProxyType`` it can be copied, pickled and hashed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("configs are immutable; create a new one with the values you want")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset((key, repr(value)) for key, value in self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self


# A property of a config that is computed once: the fields that it depends on never change.
if TYPE_CHECKING:
    answer = property  # type checkers let it override another property
else:
    answer = functools.cached_property


class Config(Model):
    """Base of every config. A docstring below each field gives its meaning, unit and the source of its default."""

    model_config = ConfigDict(frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads True as 1 where a number is expected.
        annotation: Any = cls.model_fields[str(info.field_name)].annotation
        if _holds_boolean(value) and _takes_only_numbers(annotation):
            raise ValueError("a boolean is not a number")
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed; the new values are not checked."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields:
            del copied.__dict__[name]  # an answer
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        fields = type(self).model_fields
        return {**state, "__dict__": {key: value for key, value in state["__dict__"].items() if key in fields}}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return every field with its default; required fields read ``???`` (Hydra's mark for missing)."""
        return {
            name: "???" if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in cls.model_fields.items()
        }

    def _repr_html_(self) -> str:
        changed = changed_fields(self)
        header = ("setting", "value", "default") if changed else ()
        others = len(type(self).model_fields) - len({name.partition(".")[0] for name, *_ in changed})
        rows = [(name, repr(value), repr(default)) for name, value, default in changed]
        return html_table(type(self).__name__, header, rows, note=f"{others} settings are at their defaults")


def changed_fields(config: Config) -> list[tuple[str, Any, Any]]:
    """Return name, value and default of each setting that differs from its default; options of a mapping one by one."""
    model, result = type(config), list[tuple[str, Any, Any]]()
    required = {name: getattr(config, name) for name, field in model.model_fields.items() if field.is_required()}
    defaults = model(**required)
    for name in model.model_fields:
        value, default = getattr(config, name), getattr(defaults, name)
        if name in required:
            result.append((name, value, "(required)"))
        elif isinstance(value, Mapping) and isinstance(default, Mapping) and value.keys() == default.keys():
            result += [(f"{name}.{key}", value[key], default[key]) for key in value if value[key] != default[key]]
        elif value != default and _plain(value) != _plain(default):
            result.append((name, value, default))
    return result


def _plain(value: Any) -> Any:
    """Return a config as its settings and a sequence as a tuple, to compare a checked value with a default."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_boolean, value)))


@functools.cache
def _takes_only_numbers(annotation: Any) -> bool:
    """Whether a field of this type takes numbers, also inside a union or a list, but no booleans."""
    types = set(_types_in(annotation))
    return not types.isdisjoint({int, float}) and types.isdisjoint({bool, Any, object})


def _types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type and those that it is made of; the choices of a Literal are values, not types."""
    yield annotation
    for part in () if get_origin(annotation) is Literal else get_args(annotation):
        yield from _types_in(part)


def checked_chunk_size(value: Any) -> Any:
    """Return a valid chunk size unchanged: tokens above 0, "auto", or None where a field allows that."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_count or value == "auto" or value is None:
        return value
    raise ValueError("it must be a number of tokens above 0, or 'auto'")


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """Turn pydantic's report into one line per error."""
    where = _where.get()
    errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] == "missing")
    return "\n".join(_explain_one(model, where, dict(item)) for item in errors)


def _explain_one(model: type[BaseModel], where: str | None, item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    path = f"{where}.{key}" if where and key else key or where or model.__name__
    owner = where or model.__name__
    context = item.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ToolkitError):
        return _explain_inner(cause, where, path)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        fields = list(model.model_fields)
        kind = "setting" if issubclass(model, Config) else "field"
        elsewhere = _word_of_a_peer(key, value, fields, where) if kind == "setting" else _field_of_a_peer(key, fields)
        if elsewhere is not None:
            return f"{path} is not a {kind} of {owner}; {elsewhere}"
        return f"{path} is not a {kind} of {owner}{did_you_mean(key, fields)}; it has: {', '.join(fields)}"
    in_tuple = _explain_tuple(model, where, item)
    if in_tuple is not None:
        return in_tuple
    if item["type"] == "missing":
        how = f"; set it: {path}=..." if where else ""
        return f"{path} is missing: {model.__name__} needs a value for it{how}"
    if item["type"] == "literal_error":
        options = _literal_options(model, key)
        best = _nearest_choice(str(value), list(map(str, options)))
        hint = f" (did you mean {best!r}?)" if best else ""
        hint += f"; try: {path}={best}" if best and where else ""
        hint = _name_of_a_peer(path, value) or hint
        return f"{path}={_shown(value)} is not one of the choices; choose {listed(options)}{hint}"
    if item["type"] == "is_instance_of" and context.get("class") == "Tensor":
        return f"{path} is {a_type(value)}; it must be a tensor: torch.as_tensor(...)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_type" and where and type(value) in (int, float):
        message += f"; quote it: \"{path}='{value}'\""
    return f"{path}={_shown(value)} is not allowed: {message[:1].lower()}{message[1:]}"


def _explain_tuple(model: type[BaseModel], where: str | None, item: dict[str, Any]) -> str | None:
    """Say what a list should look like that is none, or that is too short or too long; None for another error."""
    name, *inside = item["loc"] or ("",)
    is_length = item["type"] in ("too_long", "too_short") or (item["type"] == "missing" and bool(inside))
    field = model.model_fields.get(str(name))
    if field is None or not (item["type"] in ("tuple_type", "list_type") or is_length):
        return None
    value, default = item.get("input"), field.get_default(call_default_factory=True)
    path = f"{where}.{name}" if where else str(name)
    numbers = list(default) if isinstance(default, (tuple, list)) and default else ["..."]
    spelled = f"[{','.join(map(str, numbers))}]" if where else repr(numbers)
    length = f" of {len(numbers)}" if is_length and default else ""
    return f"{path}={_shown(value)} is not allowed: it must be a list{length}; write {path}={spelled}"


def _explain_inner(cause: ToolkitError, where: str | None, path: str) -> str:
    """Repeat the error of a nested config, now that the path to it is known."""
    model, error, reported_where = cause.report or (None, None, None)
    if model is None or reported_where != where:
        return str(cause)  # it has no path to add, or its message already has one
    with located(path):
        return explain(model, error)


def _word_of_a_peer(key: str, value: Any, fields: list[str], where: str | None) -> str | None:
    """Say what a setting of another project is called here; None if no project has it."""
    from toolkit import peers  # only a mistake needs it

    section = (where or "").partition(".")[0]
    if section == "loss":  # of the command line
        return peers.counterpart(key, str(value))
    if where == "policy_loss":
        return peers.counterpart(f"{where}.{key}", str(value), [f"{where}.{field}" for field in fields])
    is_option = (where or "").rpartition(".")[2] in ("policy_loss", "policy_loss_cfg")
    return peers.counterpart_keyword(key, value, fields, is_option=is_option)


def _field_of_a_peer(key: str, fields: list[str]) -> str | None:
    """Say what a field of a batch of another project is called here; None if no project has it."""
    from toolkit.peers.batch_fields import counterpart_field

    return counterpart_field(key, fields)


def _name_of_a_peer(path: str, value: Any) -> str | None:
    """Say, as a hint after the choices, what the name of a KL or an aggregation in another project is here."""
    from toolkit import peers

    field = path.removesuffix(".name").rpartition(".")[2]
    hint = peers.counterpart_value("kl" if field == "kl_loss_type" else field, value)
    return hint and f"; {hint}"


def _nearest_choice(word: str, options: list[str]) -> str | None:
    """Return the choice that starts with `word`, else one that contains it, else the one spelled most like it."""
    for matches in ([o for o in options if o.startswith(word)], [o for o in options if word in o]):
        if matches and len(word) > 2:
            return matches[0]
    return nearest(word, options)


def _shown(value: Any) -> str:
    """Return a value for a message: long ones are cut, other objects show their type."""
    is_plain = isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))
    text = repr(value if is_plain else type(value).__name__)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _literal_options(model: type[BaseModel], key: str) -> list[Any]:
    """Return the choices of a Literal field, also in a union with None."""
    pending, options = [model.model_fields[key.split(".")[0]].annotation], []
    while pending:
        annotation = pending.pop(0)
        if get_origin(annotation) is Literal:
            options += list(get_args(annotation))
        else:
            pending += list(get_args(annotation))
    return options or ["another value"]
