"""Functions registered by name, each with typed options: what policy losses and advantage estimators share.

No torch here: the command line knows every name and option without loading it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.functional.options import docstring_parts, is_same_source, options_model
from toolkit.schema import Config, located

WRAP: dict[str, Any] = {"width": 100, "break_on_hyphens": False}
"""How lines are added to a docstring."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A registered function."""

    config_path: ClassVar[str]
    """Path of its options in a config, for messages."""

    name: str
    function: Callable[..., Any]
    options_model: type[Config]
    """Validates the keyword-only parameters of `function`."""
    alias_of: str | None = None
    """The name of the function that this is an alias of."""

    def options(self, values: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
        """Validate `values` and fill in the defaults; messages name the path `where`, by default `config_path`.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
        """
        with located(where or self.config_path):
            return self.options_model(**values).model_dump()

    def document(self, *, takes: str, returns: str, facts: str, source: str) -> None:
        """Complete the docstring of the function, where it has one, for `help`.

        What it takes first and what it returns is added if it does not say so itself; an empty text is skipped.
        """
        if not self.function.__doc__:
            return
        data, *_ = inspect.signature(self.function).parameters
        before, meanings, after = docstring_parts(self.function)
        described = {name: field.description or "" for name, field in self.options_model.model_fields.items()}
        arguments = {data: meanings.get(data, takes), **described}
        texts = (textwrap.fill(f"{name}: {text}", **WRAP, subsequent_indent="    ") for name, text in arguments.items())
        parts = (
            before.rstrip(),
            "\n".join(textwrap.fill(fact, **WRAP) for fact in facts.splitlines()),
            "Args:\n" + textwrap.indent("\n".join(texts), "    "),
            "" if "Returns:" in before + after else f"Returns:\n    {returns}.",
            after.rstrip(),
            f"Source: {source}." if source else "",
        )
        self.function.__doc__ = "\n\n".join(filter(None, parts)) + "\n"


EntryT = TypeVar("EntryT", bound=Registered)


@dataclass(kw_only=True)
class Registry(Generic[EntryT]):
    """Registered functions of one kind, including those of a package, whose modules are imported on demand."""

    kind: str
    """What the functions are, such as "policy loss"."""
    entry: type[EntryT]
    package: str
    """Dotted; its modules register the built-in functions."""
    key: str
    """The setting that selects by name, such as "loss_type"."""
    how: str
    """The decorator that registers a custom function."""
    usage: str
    """Where options go, with a name and options to fill in; for a message."""
    reserved: tuple[str, ...]
    """Names that no option may have."""
    entries: dict[str, EntryT] = field(default_factory=dict)

    def decorator(
        self,
        name: str,
        *,
        documented: Mapping[str, str],
        aliases: tuple[str, ...] = (),
        overwrite: bool,
        **declared: Any,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a function and completes its docstring.

        `documented` are the arguments of `Registered.document`, `declared` the other fields of the entry.
        """

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            model = options_model(self.kind, name, function, reserved=self.reserved)
            entry = self.entry(name=name, function=function, options_model=model, **declared)
            entry.document(**documented)
            for each in (entry, *(replace(entry, name=alias, alias_of=name) for alias in aliases)):
                self.add(each, overwrite=overwrite)
            return function

        return decorate

    def add(self, entry: EntryT, *, overwrite: bool) -> None:
        """Register an entry.

        Raises:
            ConfigError: another function has this name, and `overwrite` is False.
        """
        known = self.entries.get(entry.name)
        if known is not None and not overwrite and not is_same_source(known.function, entry.function):
            raise ConfigError(
                f"{self.kind} {entry.name!r} is already registered by {known.function.__module__}."
                f"{known.function.__name__}; choose another name, or pass overwrite=True"
            )
        self.entries[entry.name] = entry

    def get(self, name: str, **options: Any) -> EntryT:
        """Return the function called `name`.

        Args:
            name: of the function.
            options: raises; they are set where the function is used.

        Raises:
            ConfigError: the name is unknown; the message lists the known ones.
        """
        if options:
            pairs = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise ConfigError(f"{self.kind} {name!r} is looked up by its name alone; {self.usage.format(name, pairs)}")
        if name in self.entries:  # called for every chunk; listing the modules takes longer
            return self.entries[name]
        names = self.names()
        if name not in names:
            from toolkit.peers import counterpart_value  # only a mistake needs it

            article = "an" if self.kind[0] in "aeiou" else "a"
            custom = f"register your own with @{self.how} in a file that plugins=[file.py] loads"
            elsewhere = counterpart_value("advantage" if self.key == "advantage" else "policy_loss", name)
            if elsewhere is not None:
                raise ConfigError(f"{self.key}={name!r} is not {article} {self.kind}; {elsewhere}; {custom}")
            hint = did_you_mean(str(name), names)
            raise ConfigError(
                f"{self.key}={name!r} is not {article} {self.kind}; choose {listed(names)}{hint}; {custom}"
            )
        return self.entries[name]

    def names(self) -> list[str]:
        """Return all names, built-in ones included, sorted."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self.entries)
