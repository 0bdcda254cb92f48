"""Reward functions by name, file or dotted path, checked before any work; no torch here.

A reward is ``score(prompt, completion, **columns) -> float | dict[str, float] | None``, or batched with the parameters
``prompts`` and ``completions`` (lists) and a list as its result; either may be async. It gets only the keyword
arguments that its signature accepts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.tasks import builtin_rewards

BUILT_IN: dict[str, Callable[..., Any]] = {
    "exact_match": builtin_rewards.exact_match,
    "numeric": builtin_rewards.numeric,
    "regex": builtin_rewards.regex,
    "format": builtin_rewards.format,
    "length": builtin_rewards.length,
    "math_verify": builtin_rewards.math_verify,
}
"""Rewards that ``task.reward`` takes by name."""
OF_TASK = ("verifier", "coin_flip")
"""Rewards without a function: the verifier of the task, and a control that must not learn."""
OF_COMPLETION = ("num_tokens", "finished")
"""Arguments that say more of a completion: its tokens, and whether it ended by itself."""
_loaded: dict[tuple[Path, int], ModuleType] = {}
"""Files loaded in this process, by path and modification time in ns."""
_digests: dict[Path, str] = {}
"""Files loaded in this process -> a digest of what was in them."""
COMPLETIONS = (
    "response",
    "solution_str",
    "output",
    "generation",
    "generated",
    "text",
    "pred",
    "prediction",
    "solution",
)
"""What rewards of other projects call the completion."""
HOW = "a reward is def score(prompt, completion, **columns), with arguments handed over by name"


@dataclass(frozen=True)
class Reward:
    """One reward of a run."""

    spec: str
    """As it was written."""
    name: str
    """In metrics."""
    function: Callable[..., Any] | None = None
    """None: one of `OF_TASK`."""
    is_batched: bool = False
    is_async: bool = False
    accepts: frozenset[str] | None = None
    """Names of its arguments; None: any."""
    required: tuple[str, ...] = ()
    """Those without a default."""

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `values` that the function accepts."""
        return {name: value for name, value in values.items() if self.accepts is None or name in self.accepts}


def load_rewards(specs: Sequence[str], *, columns: Collection[str], settings: Collection[str] = ()) -> list[Reward]:
    """Load rewards and check that they can be called.

    Args:
        specs: names of built-in rewards, ``file.py:name``, ``package.module:name`` or ``package.module.name``.
        columns: names that the data has for them.
        settings: names that the task's settings add for built-in rewards.

    Raises:
        ConfigError: a reward cannot be found, loaded, or called with what there is.
    """
    if not specs:
        raise ConfigError(f"task.reward is empty; name one: {listed(BUILT_IN)}, or file.py:name")
    repeated = [spec for spec in specs if list(specs).count(spec) > 1]
    if repeated:
        raise ConfigError(f"task.reward names {repeated[0]!r} twice; give it a larger weight instead")
    functions = {spec: None if spec in OF_TASK else _function_of(spec) for spec in specs}
    names = _distinct_names(specs)
    return [_checked(spec, names[spec], functions[spec], columns, settings) for spec in specs]


def _distinct_names(specs: Sequence[str]) -> dict[str, str]:
    """Return a name of each reward for metrics: that of the function, with its file or module where two agree."""
    short = {spec: _split(spec)[1] or spec for spec in specs}
    by_module = {spec: f"{Path(_split(spec)[0]).stem.rpartition('.')[2]}.{short[spec]}" for spec in specs}
    chosen: dict[str, str] = {}
    for spec in specs:
        is_shared = list(short.values()).count(short[spec]) > 1
        still_shared = list(by_module.values()).count(by_module[spec]) > 1
        full = spec.replace("/", ".")
        chosen[spec] = short[spec] if not is_shared else full if still_shared else by_module[spec]
    return chosen


def _split(spec: str) -> tuple[str, str]:
    """Return the file or module of a reward and its name; both empty for a bare word."""
    if ":" in spec:
        module, _, name = spec.rpartition(":")
        return module, name
    if spec.endswith(".py"):
        return spec, ""
    module, _, name = spec.rpartition(".")
    return module, name if module else ""


def check_name(spec: str) -> None:
    """Raise if a reward has neither the name of a built-in one nor the form of a function.

    Raises:
        ConfigError: it has not.
    """
    names = [*BUILT_IN, *OF_TASK]
    if spec not in names and not _split(spec)[0]:
        raise ConfigError(
            f"task.reward={spec} is not a built-in reward{did_you_mean(spec, names)}; choose {listed(names)}, or name "
            "your function: task.reward=my_reward.py:score"
        )


def _function_of(spec: str) -> Callable[..., Any]:
    if spec == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError('task.reward=math_verify needs the package math-verify: pip install "rl-loss-toolkit[math]"')
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    check_name(spec)
    where, name = _split(spec)
    if not where.endswith(".py") and (set(where) & {"/", "\\", ":"} or where.startswith(".")):
        file = where.rstrip(":").removesuffix(".py")
        raise ConfigError(f"task.reward={spec}: {where!r} is not a module; for a file: task.reward={file}.py:{name}")
    module = _load_file(Path(where), spec) if where.endswith(".py") else _import(where, spec)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    if not name:
        example = functions[0] if functions else "score"
        raise ConfigError(f"task.reward={spec}: also name the function in it: task.reward={where}:{example}")
    if not hasattr(module, name):
        known = f"; it has {listed(functions, 'and')}" if functions else ""
        raise ConfigError(f"task.reward={spec}: {where} has no function {name!r}{did_you_mean(name, functions)}{known}")
    function = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(f"task.reward={spec}: {name} is a {type(function).__name__}, not a function; {HOW}")
    return function


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError(
            f"task.reward={spec}: there is no file {str(path)!r} (looked for {path.resolve()})"
            f"{did_you_mean(path.name, siblings)}"
        )
    path = path.resolve()
    version = path, path.stat().st_mtime_ns
    if version in _loaded:
        return _loaded[version]
    _digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"toolkit_reward_{len(_loaded)}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its siblings, which it may import later
    sys.modules[name] = module
    _executed(lambda: module_spec.loader.exec_module(module), spec)  # type: ignore[union-attr]
    _loaded[version] = module
    return module


def file_digests(specs: Sequence[str]) -> dict[str, str]:
    """Return the files among the modules of rewards, as they are written, each with a digest of what was loaded."""
    files = dict.fromkeys(where for where, _ in map(_split, specs) if where.endswith(".py"))
    return {file: digest for file in files if (digest := _digests.get(Path(file).resolve())) is not None}


def _import(name: str, spec: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # which a console script does not search
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ConfigError(
            f"task.reward={spec} cannot be loaded: there is no module {top!r}; for a function in a file write the "
            f"file: task.reward=path/to/{name.rpartition('.')[2]}.py:{_split(spec)[1]}"
        )
    return _executed(lambda: importlib.import_module(name), spec)


def _executed(load: Callable[[], Any], spec: str) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if Path(frame.filename).name == Path(_split(spec)[0]).name]
        frame = theirs[-1] if theirs and isinstance(error, SystemExit) else frames[-1]
        where = f"{frame.filename}:{frame.lineno}"
        if isinstance(error, SystemExit):
            where += "; put what belongs to a program under if __name__ == '__main__':"
        elif "attempted relative import" in str(error):
            where += "; the folder of the file is searched: write import name instead of from .name import"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        shown = "" if where.startswith("<frozen ") else f" ({where})"  # a module that is not there
        raise ConfigError(f"task.reward={spec} cannot be loaded: {type(error).__name__}: {error}{shown}") from None


def _checked(
    spec: str,
    name: str,
    function: Callable[..., Any] | None,
    columns: Collection[str],
    settings: Collection[str],
) -> Reward:
    if function is None:
        return Reward(spec, name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        raise ConfigError(f"task.reward={spec}: its signature cannot be read; wrap it in a function: {HOW}") from None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if by_position:
        raise ConfigError(f"task.reward={spec}: {by_position[0]!r} can only be given by position; {HOW}")
    is_batched = bool({"prompts", "completions"} & set(named))
    text = ("prompts", "completions") if is_batched else ("prompt", "completion")
    if text[1] not in named and not takes_any and spec not in BUILT_IN:
        likely = next((other for other in COMPLETIONS if other in named), None)
        remedy = f"; call {likely!r} {text[1]!r}, or wrap it" if likely else ""
        raise ConfigError(
            f"task.reward={spec} does not take the completion: its parameters are {listed(named or ['none'], 'and')}"
            f"{remedy}; {HOW}"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"task.reward={spec} yields; a reward returns a number, so write return")
    if _never_returns(function):
        raise ConfigError(f"task.reward={spec} has no return, so every reward would be None; write return")
    available = [*text, *OF_COMPLETION, *columns, *settings]
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in available]
    if missing and is_batched and f"{missing[0]}s" in text:
        raise ConfigError(
            f"task.reward={spec} takes {listed([text[1], missing[0]], 'and')}; a reward takes 'prompt' and "
            "'completion', or for all completions at once 'prompts' and 'completions'"
        )
    if missing:
        shown = [column for column in columns if column not in text]
        data = f"the data has {listed(shown, 'and')}" if shown else "the data has no other column"
        how = builtin_rewards.NEEDS.get(missing[0], "") if spec in BUILT_IN else ""
        raise ConfigError(
            f"task.reward={spec} needs {missing[0]!r}, which is not a column{did_you_mean(missing[0], shown)}; {data}, "
            f"and every reward can take {listed([*text, *OF_COMPLETION], 'and')}{how}"
        )
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (an object that is called)
    )
    accepts = None if takes_any else frozenset(named)
    required = tuple(p.name for p in named.values() if p.default is p.empty)
    return Reward(spec, name, function, is_batched, is_async, accepts, required)


def _never_returns(function: Callable[..., Any]) -> bool:
    """Whether the source of a function has no return with a value, and it does not end by raising."""
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
