"""New processes for one call, joined by gloo."""

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
"""How processes start; the toolkit's tests fork them from a process that has loaded torch."""
BUILT_IN = "toolkit."
PLUGIN = "toolkit_plugin_"
"""Prefix of the modules that `toolkit.compose.plugins` loads from files."""
NESTED = 97
"""Exit code of a new process that would start processes while it imports the script."""
PUT_UNDER_MAIN = (
    'new processes import the script again: put the call under `if __name__ == "__main__":`, in a file, with your '
    "loop or loss at its top level"
)


def run_processes(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """Call ``function(*args)`` in `world` new processes joined by gloo, and return the result of the first.

    `function` and everything in `args` must be importable in a new process.

    Args:
        world: number of processes.
        function: from the top level of a module.
        args: of `function`; they are pickled.
        timeout_s: seconds that a process waits for the others before it gives up.

    Raises:
        ConfigError: something cannot be sent to another process.
        ToolkitError: a process raised one; the class is the same.
        LaunchError: a process raised another error or died; the message quotes it.
    """
    check_can_start()
    losses = [loss for value in args if (loss := _user_loss(value)) is not None]
    sources = sorted({file for value in (*args, *(loss.function for loss in losses)) for file in _plugin_file(value)})
    registered = [
        (
            loss.name,
            loss.function,
            {"scope": loss.scope, "needs": loss.needs, "aggregation": loss.aggregation, "formula": loss.formula},
        )
        for loss in losses
    ]
    call = _pickled((function, args, registered))
    with tempfile.TemporaryDirectory() as folder:
        args = (world, folder, sources, call, timeout_s)
        started = mp.start_processes(_work, args=args, nprocs=world, join=False, start_method=START_METHOD)
        try:
            with _quiet():
                while not started.join():
                    pass
        except Exception as error:  # torch rewords whatever a process raised
            codes = [process.exitcode for process in started.processes]
            raise _failure(Path(folder), error, codes) from None
        return pickle.loads((Path(folder) / "result").read_bytes())


def check_can_start() -> None:
    """Raise unless new processes can start.

    Raises:
        ConfigError: they could not import the script that runs.
        SystemExit: this is a new process that imports the script; it ends silently, and its parent says why.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(NESTED)
    main = sys.modules["__main__"]
    source = getattr(main, "__file__", None)
    if source is not None and getattr(main, "__spec__", None) is None and not Path(source).exists():
        raise ConfigError(f"{PUT_UNDER_MAIN}; this one is {source}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's log of the processes that it ends because another one failed."""
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
        record = (type(error).__name__, str(error), traceback.format_exc(), isinstance(error, ToolkitError))
        (home / f"error-{rank}").write_bytes(pickle.dumps(record))
        sys.stderr = None  # the error is in the file; torch would print it again
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _failure(home: Path, error: Exception, codes: list[int | None]) -> Exception:
    """Return why the processes ended: a signal, a failed start, or the first error that a process wrote."""
    if NESTED in codes:
        return ConfigError(PUT_UNDER_MAIN)
    first = getattr(error, "error_index", 0)
    # torch ends the other processes with SIGTERM.
    killed = [number for number, code in enumerate(codes) if code is not None and code < 0 and code != -signal.SIGTERM]
    for number in [first, *killed]:
        sent = -(codes[number] or 0)
        if sent > 0:
            return LaunchError(f"process {number} was killed by signal {sent}{_name_of(sent)}")
    error_files = sorted(home.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if not error_files:
        what = f"process {first} ended with code {codes[first]}"
        if not (home / f"started-{first}").exists():
            return ConfigError(f"{what} before it called the function; {PUT_UNDER_MAIN}")
        return LaunchError(f"{what} without an error message")
    kind, message, trace, is_ours = pickle.loads(error_files[0].read_bytes())
    number = error_files[0].name.removeprefix("error-")
    if is_ours:
        same_error: Exception = getattr(errors, kind, LaunchError)(f"process {number}: {message}")
        return same_error
    hint = ""
    if "imed out" in message or "onnection closed" in message:
        hint = "; processes that wait for each other must call the same collectives in the same order"
    return LaunchError(f"process {number} raised {kind}: {message}{hint}\n{trace}")


def _name_of(sent: int) -> str:
    if sent == signal.SIGKILL:
        return " (SIGKILL, often because memory ran out)"
    return f" ({signal.Signals(sent).name})" if sent in set(signal.Signals) else ""


# -------------------------------------------------------------------- pickling


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle may raise anything
        raise ConfigError(
            f"this cannot be sent to another process: {error}. Define loops and losses at the top level of a module "
            "(no lambda, no function inside a function), or call this inside a process group (torchrun)"
        ) from None


def _unpickled(call: bytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    try:
        function, args, registered = pickle.loads(call)
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"a new process cannot import what it must run: {error}. Put loops and losses into a separate file "
            "(not a notebook cell), or call this inside a process group (torchrun)"
        ) from None
    for name, loss_function, options in registered:
        try:
            known = policy_loss(name)
        except ConfigError:
            known = None
        if known is None or known.function is not loss_function:
            register_policy_loss(name, **options, overwrite=True)(loss_function)
    return function, args


def _user_loss(value: Any) -> Any:
    """Return the user-defined policy loss of a config; None: it has none."""
    loss = value.policy if isinstance(value, BaseRLLossConfig) else None
    return None if loss is None or loss.function.__module__.startswith(BUILT_IN) else loss


def _plugin_file(value: Any) -> list[str]:
    """Return the plugin file that a new process must load before it can unpickle `value`, if there is one."""
    name = getattr(value, "__module__", None)
    return [str(sys.modules[name].__file__)] if isinstance(name, str) and name.startswith(PLUGIN) else []
