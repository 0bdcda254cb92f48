"""Loading plugins, the Python files and modules of a user; no torch here."""

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

from toolkit.errors import ConfigError, ToolkitError, did_you_mean
from toolkit.functional.advantages import advantage_names
from toolkit.functional.policy.registry import policy_loss_names

_loaded: dict[Path, int] = {}
"""Files loaded in this process, with their modification times in ns."""
_modules: dict[str, ModuleType] = {}
"""Modules of the loaded files by file name without ``.py``, as YAML files refer to their classes."""


def load_plugins(plugins: Iterable[str]) -> list[ModuleType]:
    """Import plugin files or modules and return them; a file that has changed since it was loaded is loaded again.

    Raises:
        ConfigError: a file or module does not exist, or its import fails.
    """
    modules = []
    for plugin in plugins:
        advantage_names()
        policy_loss_names()  # built-in losses first, so a name that a plugin repeats is reported for the plugin
        try:
            modules.append(_load_file(Path(plugin)) if plugin.endswith(".py") else _imported(plugin))
        except ToolkitError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == plugin:
                why = f"{error} (neither a Python file nor a module that can be imported)"
            else:
                why = why_it_failed(error)
            raise ConfigError(f"plugins: {plugin!r} cannot be loaded: {why}") from None
    return modules


def why_it_failed(error: BaseException) -> str:
    """Say what the import of a user's file raised, and at which line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


def _load_file(file: Path) -> ModuleType:
    path = file.resolve()
    if not path.is_file():
        raise ConfigError(f"plugins: file {str(file)!r} does not exist (looked for {path})")
    changed = path.stat().st_mtime_ns
    # A unique name: a plugin called random.py must not collide with the standard module.
    name = f"toolkit_plugin_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if _loaded.get(path) == changed:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    _loaded[path] = changed
    _modules[path.stem] = module
    return module


class _FromSource(SourceFileLoader):
    """Compiles a file each time: cached bytecode is matched by seconds and size, and an edit may change neither."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def class_at(path: str) -> type:
    """Return the class that ``_target_: path`` names; it may be in a plugin's file or in the current folder.

    Args:
        path: ``package.module.Class``; ``my_file.Class`` for a class of the plugin ``my_file.py``.

    Raises:
        ImportError: the module does not exist, or does not have such a class.
    """
    module_name, _, name = path.rpartition(".")
    module = _modules.get(module_name) or (_imported(module_name) if module_name else None)
    target = getattr(module, name, None)
    if not isinstance(target, type):
        if module is None:
            raise ImportError(f"{name!r} does not name a module; write package.module.{name}")
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ImportError(f"{module_name} has no class {name!r}{did_you_mean(name, classes)}")
    return target


def _imported(name: str) -> ModuleType:
    """Import a module as ``python -m`` would: also from the current folder, which a console script does not search."""
    if os.getcwd() in sys.path or "" in sys.path:
        return importlib.import_module(name)
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())
