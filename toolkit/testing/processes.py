"""Processes of one's own, joined by gloo, for as long as one call lasts."""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from toolkit import errors
from toolkit.compose.plugins import load_plugins
from toolkit.errors import ConfigError, LaunchError, ToolkitError
from toolkit.functional.policy.registry import policy_loss, register_policy_loss
from toolkit.losses.config.policy import BaseRLLossConfig

START_METHOD = "spawn"
"""How processes start; our own tests fork them from one that has loaded torch."""
BUILT_IN = "toolkit."
PLUGIN = "toolkit_plugin_"
"""Beginning of the names of modules that `toolkit.compose.plugins` made of files."""
NESTED = 97
"""Exit code of a new process that came to start processes itself, while it imported the script."""
PUT_UNDER_MAIN = (
    'new processes import the script again: put the call under `if __name__ == "__main__":`, in a file (a loop or loss '
    "of your own at its top level)"
)


def run_processes(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """Call ``function(*args)`` in `world` new processes joined by gloo, and return what the first of them returned.

    The processes start afresh: `function`, and everything in `args`, must be importable there.

    Args:
        world: processes.
        function: of the top level of a module.
        args: for it; they are pickled.
        timeout_s: seconds that a process waits for the others before it gives up.

    Raises:
        ConfigError: something cannot be sent to another process.
        ToolkitError: a process raised one; of the same class.
        LaunchError: a process raised another error or died; the message has its words.
    """
    check_can_start()
    sources = sorted({source for value in args for source in _plugin_files(value)})
    registered = [found for value in args for found in _registered(value)]
    call = _pickled((function, args, registered))
    with tempfile.TemporaryDirectory() as folder:
        args = (world, folder, sources, call, timeout_s)
        started = mp.start_processes(_work, args=args, nprocs=world, join=False, start_method=START_METHOD)
        try:
            with _quiet():
                while not started.join():
                    pass
        except Exception as error:  # whatever a process raised, torch tells it in words of its own
            codes = [own.exitcode for own in started.processes]
            raise _told(Path(folder), error, codes) from None
        return pickle.loads((Path(folder) / "result").read_bytes())


def check_can_start() -> None:
    """Raise unless new processes would come to their work.

    Raises:
        ConfigError: they could not import the script that runs.
        SystemExit: this is such a process, which imports it: it ends without a word, and the first one tells why.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(NESTED)
    main = sys.modules["__main__"]
    source = getattr(main, "__file__", None)
    if source is not None and getattr(main, "__spec__", None) is None and not Path(source).exists():
        raise ConfigError(f"{PUT_UNDER_MAIN}; this one is {source}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's lines on processes that it ends because another one failed."""
    log = logging.getLogger("torch.multiprocessing.spawn")
    kept = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(kept)


def _work(rank: int, world: int, folder: str, sources: list[str], call: bytes, timeout_s: float) -> None:
    torch.set_num_threads(1)
    home = Path(folder)
    (home / f"started-{rank}").touch()
    try:
        load_plugins(sources)
        function, args = _unpickled(call)
        store = dist.FileStore(str(home / "store"), world)
        wait = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
        result = function(*args)
        if rank == 0:
            (home / "result").write_bytes(pickle.dumps(result))
    except Exception as error:
        words = (type(error).__name__, str(error), traceback.format_exc(), isinstance(error, ToolkitError))
        (home / f"error-{rank}").write_bytes(pickle.dumps(words))
        sys.stderr = None  # the words are in the file; torch would print them again
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _told(home: Path, error: Exception, codes: list[int | None]) -> Exception:
    """Return why the processes ended: a signal, a start that failed, or the first error that one left behind."""
    if NESTED in codes:
        return ConfigError(PUT_UNDER_MAIN)
    first = getattr(error, "error_index", 0)
    # SIGTERM is how torch ends those that outlive the first one.
    killed = [own for own, code in enumerate(codes) if code is not None and code < 0 and code != -signal.SIGTERM]
    for number in [first, *killed]:
        sent = -(codes[number] or 0)
        if sent > 0:
            return LaunchError(f"process {number} was killed by signal {sent}{_name_of(sent)}")
    left = sorted(home.glob("error-*"), key=lambda own: own.stat().st_mtime_ns)
    if not left:
        what = f"process {first} ended with code {codes[first]}"
        if not (home / f"started-{first}").exists():
            return ConfigError(f"{what} before its work; {PUT_UNDER_MAIN}")
        return LaunchError(f"{what} and without a word")
    kind, message, trace, is_ours = pickle.loads(left[0].read_bytes())
    number = left[0].name.removeprefix("error-")
    if is_ours:
        own: Exception = getattr(errors, kind, LaunchError)(f"process {number}: {message}")
        return own
    hint = ""
    if "imed out" in message or "onnection closed" in message:
        hint = "; processes that wait for each other must call the same collectives in the same order"
    return LaunchError(f"process {number} raised {kind}: {message}{hint}\n{trace}")


def _name_of(sent: int) -> str:
    if sent == signal.SIGKILL:
        return " (SIGKILL, often because memory ran out)"
    known = {int(own): own.name for own in signal.Signals}
    return f" ({known[sent]})" if sent in known else ""


# -------------------------------------------------------------------- what travels


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises what it likes
        raise ConfigError(
            f"this cannot be sent to another process: {error}. Define loops and losses at the top level of a module "
            "(no lambda, no function inside a function), or call this inside a process group of your own (torchrun)"
        ) from None


def _unpickled(call: bytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    try:
        function, args, registered = pickle.loads(call)
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"a new process cannot import what it is to run: {error}. Put loops and losses into a file of their own "
            "(not a notebook cell), or call this inside a process group of your own (torchrun)"
        ) from None
    for name, loss_function, options in registered:
        try:
            known = policy_loss(name)
        except ConfigError:
            known = None
        if known is None or known.function is not loss_function:
            register_policy_loss(name, **options, overwrite=True)(loss_function)
    return function, args


def _own_loss(value: Any) -> Any:
    """Return the policy loss of a config, unless it comes with this package."""
    loss = value.policy if isinstance(value, BaseRLLossConfig) else None
    return None if loss is None or loss.function.__module__.startswith(BUILT_IN) else loss


def _registered(value: Any) -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    loss = _own_loss(value)
    if loss is None:
        return []
    options = {"scope": loss.scope, "needs": loss.needs, "aggregation": loss.aggregation, "formula": loss.formula}
    return [(loss.name, loss.function, options)]


def _plugin_files(value: Any) -> list[str]:
    """Return the files that a new process must load under our name before it can find what is in them."""
    loss = _own_loss(value)
    owners = [getattr(value, "__module__", ""), loss.function.__module__ if loss is not None else ""]
    modules = [sys.modules[own] for own in owners if isinstance(own, str) and own.startswith(PLUGIN)]
    return [str(own.__file__) for own in modules]
