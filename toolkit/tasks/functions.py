"""A user's functions by file or dotted path, for rewards and environments; no torch here."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from toolkit.errors import ConfigError, a_type, did_you_mean, listed

_loaded: dict[tuple[Path, int], ModuleType] = {}
"""Files loaded in this process, by path and modification time in ns."""
_digests: dict[Path, str] = {}
"""Files loaded in this process -> a digest of what was in them."""


@dataclass(frozen=True)
class Kind:
    """What a function is for, in messages."""

    key: str
    """The setting that names it."""
    usual: str
    """A usual name of one."""
    how: str
    """How one is written."""
    may_be_class: bool = False


def split_spec(spec: str) -> tuple[str, str]:
    """Return the file or module of a function and its name; both empty for a bare word."""
    if ":" in spec:
        module, _, name = spec.rpartition(":")
        return module, name
    if spec.endswith(".py"):
        return spec, ""
    module, _, name = spec.rpartition(".")
    return module, name if module else ""


def load_function(spec: str, kind: Kind) -> Callable[..., Any]:
    """Return what ``file.py:name``, ``package.module:name`` or ``package.module.name`` names.

    Raises:
        ConfigError: it is not there, cannot be loaded, or cannot be called.
    """
    where, name = split_spec(spec)
    if not where.endswith(".py") and (set(where) & {"/", "\\", ":"} or where.startswith(".")):
        file = where.rstrip(":").removesuffix(".py")
        raise ConfigError(f"{kind.key}={spec}: {where!r} is not a module; for a file: {kind.key}={file}.py:{name}")
    module = _load_file(Path(where), spec, kind) if where.endswith(".py") else _import(where, spec, kind)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    if not name:
        example = functions[0] if functions else kind.usual
        raise ConfigError(f"{kind.key}={spec}: also name the function in it: {kind.key}={where}:{example}")
    if not hasattr(module, name):
        known = f"; it has {listed(functions, 'and')}" if functions else ""
        raise ConfigError(f"{kind.key}={spec}: {where} has no function {name!r}{did_you_mean(name, functions)}{known}")
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function) or (inspect.isclass(function) and not kind.may_be_class):
        raise ConfigError(f"{kind.key}={spec}: {name} is {a_type(function)}, not a function; {kind.how}")
    return function


def _load_file(path: Path, spec: str, kind: Kind) -> ModuleType:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(
            f"{kind.key}={spec}: there is no file {str(path)!r} (looked for {path.resolve()})"
            f"{did_you_mean(path.name, siblings)}"
        )
    path = path.resolve()
    version = path, path.stat().st_mtime_ns
    if version in _loaded:
        return _loaded[version]
    _digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"toolkit_user_{len(_loaded)}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its siblings, which it may import later
    sys.modules[name] = module
    _executed(lambda: module_spec.loader.exec_module(module), spec, kind)  # type: ignore[union-attr]
    _loaded[version] = module
    return module


def file_digests(specs: Sequence[str]) -> dict[str, str]:
    """Return the files among the modules of `specs`, as they are written, each with a digest of what was loaded."""
    files = dict.fromkeys(where for where, _ in map(split_spec, specs) if where.endswith(".py"))
    return {file: digest for file in files if (digest := _digests.get(Path(file).resolve())) is not None}


def _import(name: str, spec: str, kind: Kind) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # which a console script does not search
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ConfigError(
            f"{kind.key}={spec} cannot be loaded: there is no module {top!r}; for a function in a file write the "
            f"file: {kind.key}=path/to/{name.rpartition('.')[2]}.py:{split_spec(spec)[1]}"
        )
    return _executed(lambda: importlib.import_module(name), spec, kind)


def _executed(load: Callable[[], Any], spec: str, kind: Kind) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if Path(frame.filename).name == Path(split_spec(spec)[0]).name]
        frame = theirs[-1] if theirs and isinstance(error, SystemExit) else frames[-1]
        where = f"{frame.filename}:{frame.lineno}"
        if isinstance(error, SystemExit):
            where += "; put what belongs to a program under if __name__ == '__main__':"
        elif "attempted relative import" in str(error):
            where += "; the folder of the file is searched: write import name instead of from .name import"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        shown = "" if where.startswith("<frozen ") else f" ({where})"  # a module that is not there
        raise ConfigError(f"{kind.key}={spec} cannot be loaded: {type(error).__name__}: {error}{shown}") from None


def named_parameters(function: Callable[..., Any], spec: str, kind: Kind) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters that can be given by name, and whether others are accepted, too.

    Raises:
        ConfigError: the signature cannot be read, or has parameters that can only be given by position.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        raise ConfigError(
            f"{kind.key}={spec}: its signature cannot be read; wrap it in a function: {kind.how}"
        ) from None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if by_position:
        raise ConfigError(f"{kind.key}={spec}: {by_position[0]!r} can only be given by position; {kind.how}")
    return named, takes_any


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calls of a function are to be awaited."""
    called = getattr(function, "__call__", None)  # noqa: B004  (an object that is called)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def yields(function: Callable[..., Any]) -> bool:
    """Return whether a function is a generator."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def never_returns(function: Callable[..., Any]) -> bool:
    """Return whether the source of a function has no return with a value, and it does not end by raising."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):  # no source, or one that cannot be read by itself
        return False
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) or isinstance(tree.body[-1], ast.Raise):
        return False
    inside: list[ast.AST] = [*tree.body]
    while inside:
        node = inside.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            return False
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            inside += ast.iter_child_nodes(node)
    return True
