"""Loading a user's own Python files and modules; no torch here."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from toolkit.errors import ConfigError, ToolkitError
from toolkit.functional.advantages import advantage_names
from toolkit.functional.policy.registry import policy_loss_names

_loaded: dict[Path, int] = {}
"""Files loaded in this process, with their time of change."""
_modules: dict[str, ModuleType] = {}
"""The module of each loaded file by the file's name without ``.py``: what its classes are called by in a YAML file."""


def load_plugins(plugins: Iterable[str]) -> None:
    """Import the user's files or modules; a file that has changed since is loaded again.

    Raises:
        ConfigError: there is no such file or module, or it fails while it is imported.
    """
    for plugin in plugins:
        advantage_names()
        policy_loss_names()  # built-in losses first: a plugin that takes one of their names is the one to complain of
        try:
            if plugin.endswith(".py"):
                _load_file(Path(plugin))
            else:
                _imported(plugin)
        except ToolkitError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == plugin:
                why = f"{error} (not a Python file, nor a module that can be imported from here)"
            else:
                why = why_it_failed(error)
            raise ConfigError(f"plugins: {plugin!r} cannot be loaded: {why}") from None


def why_it_failed(error: BaseException) -> str:
    """Say what was raised while a file of the user's was imported, and at which line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}:{place.lineno}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


def _load_file(given: Path) -> None:
    path = given.resolve()
    if not path.is_file():
        raise ConfigError(f"plugins: there is no file {str(given)!r} (looked for {path})")
    changed = path.stat().st_mtime_ns
    if _loaded.get(path) == changed:
        return
    # A name of its own: a plugin called random.py must neither hide nor be taken for the standard module.
    name = f"toolkit_plugin_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    _loaded[path] = changed
    _modules[path.stem] = module


class _FromSource(SourceFileLoader):
    """Compiles a file each time: compiled files are told apart by seconds and sizes, which an edit may leave alike."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def class_at(path: str) -> type:
    """Return the class that ``_target_: path`` names, also one of a plugin's file or of a file in the current folder.

    Args:
        path: ``package.module.Class``; ``my_file.Class`` for a class of the plugin ``my_file.py``.

    Raises:
        ImportError: there is no such module or class, or it is not a class.
    """
    module_name, _, name = path.rpartition(".")
    module = _modules.get(module_name) or _imported(module_name)
    target = getattr(module, name, None)
    if not isinstance(target, type):
        raise ImportError(f"{module_name} has no class {name!r}" if module_name else f"{name!r} names no module")
    return target


def _imported(name: str) -> ModuleType | None:
    """Import a module as ``python -m`` would: from the current folder, too, which a console script does not look in."""
    if not name:
        return None
    if os.getcwd() in sys.path or "" in sys.path:
        return importlib.import_module(name)
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())
