"""Functions registered by name, each with typed options: what policy losses and advantage estimators share.

No torch here: the command line knows every name and option without loading it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.functional.options import is_same_source
from toolkit.schema import Config, located


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A registered function."""

    config_path: ClassVar[str]
    """Path of its options in a config, for messages."""

    name: str
    function: Callable[..., Any]
    options_model: type[Config]
    """Validates the keyword-only parameters of `function`."""

    def options(self, values: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
        """Validate `values` and fill in the defaults.

        Args:
            values: options by name.
            where: path to name in messages; None: `config_path`.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
        """
        with located(where or self.config_path):
            return self.options_model(**values).model_dump()


EntryT = TypeVar("EntryT", bound=Registered)


class Registry(Generic[EntryT]):
    """Registered functions of one kind, including those of a package, whose modules are imported on demand."""

    def __init__(self, kind: str, *, package: str, key: str, how: str) -> None:
        """Create an empty registry.

        Args:
            kind: what its functions are, such as "policy loss".
            package: dotted; its modules register the built-in ones.
            key: the setting that selects by name, such as "loss_type".
            how: a clause that says how to register a custom function.
        """
        self._kind, self._package, self._key, self._how = kind, package, key, how
        self.entries: dict[str, EntryT] = {}

    def add(self, entry: EntryT, *, overwrite: bool) -> None:
        """Register a function.

        Raises:
            ConfigError: another function has this name, and `overwrite` is False.
        """
        known = self.entries.get(entry.name)
        if known is not None and not overwrite and not is_same_source(known.function, entry.function):
            raise ConfigError(
                f"{self._kind} {entry.name!r} is already registered by {known.function.__module__}."
                f"{known.function.__name__}; choose another name, or pass overwrite=True"
            )
        self.entries[entry.name] = entry

    def get(self, name: str) -> EntryT:
        """Return the function called `name`.

        Raises:
            ConfigError: the name is unknown; the message lists the known ones.
        """
        if name in self.entries:  # called for every chunk; listing the modules takes longer
            return self.entries[name]
        names = self.names()
        if name not in names:
            from toolkit.peers import counterpart_value  # only a mistake needs it

            elsewhere = counterpart_value("advantage" if self._key == "advantage" else "policy_loss", name)
            article = "an" if self._kind[0] in "aeiou" else "a"
            if elsewhere is not None:
                raise ConfigError(f"{self._key}={name!r} is not {article} {self._kind}; {elsewhere}; {self._how}")
            hint = did_you_mean(str(name), names)
            raise ConfigError(
                f"{self._key}={name!r} is not {article} {self._kind}; choose {listed(names)}{hint}; {self._how}"
            )
        return self.entries[name]

    def names(self) -> list[str]:
        """Return all names, built-in ones included, sorted."""
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return sorted(self.entries)


def document_source(function: Callable[..., Any], source: str, differs: str = "") -> None:
    """Add the registered source to a docstring, so `help` shows it."""
    text = ". ".join(filter(None, (source, differs)))
    if text and function.__doc__:
        indents = [len(line) - len(line.lstrip()) for line in function.__doc__.splitlines()[1:] if line.strip()]
        indent = " " * min(indents, default=0)
        function.__doc__ = f"{function.__doc__.rstrip()}\n\n{indent}Source: {text}.\n{indent}"


def check_needs(who: str, needs: Sequence[str], known: Sequence[str], lacking: str) -> None:
    """Raise `ConfigError` if a function to register needs a field that does not exist."""
    unknown = next((need for need in needs if need not in known), None)
    if unknown is not None:
        raise ConfigError(f"{who} needs {unknown!r}, which {lacking}; choose {listed(known)}")
