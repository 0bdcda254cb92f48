"""If one process fails, all end at once and print its error.

Otherwise a process that raises leaves the others in a collective that nobody will complete; they wait for minutes and
then report a closed connection. Here the process that fails puts its message into the store through which the processes
met, and a thread in each of the others reads it every second. That thread also notices when a process of the same
machine has vanished (SIGKILL, out of memory), which leaves no message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from toolkit.distributed import all_gather_objects, rank, world_size
from toolkit.errors import LaunchError, ToolkitError, first_line
from toolkit.training.startup import INTERRUPTED

DEFAULT_TIMEOUT = 600
"""Seconds that a collective waits for the slowest process."""
POLL = 1.0
"""Seconds between two reads of the store."""
GRACE = 4.0
"""Seconds that a process whose connection broke waits for the cause."""
LINGER = 5.0
"""Most seconds that a failed process waits until the others have read its message: the store may be in it."""
FAILED, KNOWN, DONE, ALL_DONE, LEFT = "failed", "known", "done", "all_done", "left"
_OF_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket|process group", re.IGNORECASE
)
_uses = itertools.count()


class Failure(NamedTuple):
    """Why the run ends."""

    rank: int
    message: str
    code: int = 1
    """Exit code of every process."""


@contextlib.contextmanager
def stop_together(timeout_s: float = DEFAULT_TIMEOUT) -> Iterator[None]:
    """End all processes when one of them fails; a context manager around everything that they do together.

    The process that raised sees its exception unchanged. The others print one line, ``error: rank 1 failed: ...``, and
    exit with code 1, whatever they are doing. A single process is not affected.

    Args:
        timeout_s: timeout of the process group in seconds; for the message.

    Raises:
        LaunchError: a collective failed because of another process; names it and quotes its message.
    """
    if world_size() == 1:
        yield
        return
    watch = _Watch(timeout_s)
    watch.thread.start()
    is_main = threading.current_thread() is threading.main_thread()  # no other may set signal handlers
    if is_main:
        watch.before = signal.signal(signal.SIGTERM, watch.on_terminate) or signal.SIG_DFL
    try:
        yield
        watch.wait_for_all()
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        watch.stopped.set()
        if is_main:
            signal.signal(signal.SIGTERM, watch.before)


class _Watch:
    """What one process knows of the others, and the thread that watches them."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.rank, self.world = rank(), world_size()
        self._server = _get_default_store()  # kept: on rank 0 this object may hold the store itself
        prefix = f"toolkit/faults/{next(_uses)}"
        self._store, self._store_of_thread = (dist.PrefixStore(prefix, _clone(self._server)) for _ in range(2))
        processes = all_gather_objects((_machine(), os.getpid()))
        self._neighbours = {
            other: pid for other, (machine, pid) in enumerate(processes) if machine == _machine() and other != self.rank
        }
        self._lock, self._is_claimed = threading.RLock(), False  # a signal may come while the main thread holds it
        self.before: Any = signal.SIG_DFL
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="toolkit-faults", daemon=True)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self.stopped.wait(POLL):
            failure = self._look(self._store_of_thread)
            # At the end of a run the others may end a moment before this thread is stopped.
            if failure is None or self.stopped.wait(0 if self._is_reported(failure) else POLL) or not self._claim():
                continue
            self._end(failure)

    def _end(self, failure: Failure) -> None:
        _say(failure.message if failure.code >= INTERRUPTED else f"error: {failure.message}")
        self._linger()
        os._exit(failure.code)  # the main thread may be inside a collective that never returns

    def _look(self, store: dist.Store) -> Failure | None:
        """Return why the run must end; report it to the others if they cannot know."""
        if not self._has_store():
            return Failure(0, self._vanished(0))
        try:
            if store.check([FAILED]):
                return Failure(*json.loads(store.get(FAILED)))
            gone = self._gone()
            if gone is None or store.check([ALL_DONE]):
                return None
            return self._report(store, Failure(gone, self._vanished(gone)))
        except (RuntimeError, ValueError):
            gone = self._gone() or 0
            return Failure(gone, self._vanished(gone))

    def _gone(self) -> int | None:
        """Return a process of this machine that has ended."""
        return next((other for other, pid in self._neighbours.items() if _is_gone(pid)), None)

    def _has_store(self) -> bool:
        """Whether the store still answers: torch logs pages about one that has ended with its process."""
        is_in_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun keeps it elsewhere
        return not (is_in_rank_0 and 0 in self._neighbours and _is_gone(self._neighbours[0]))

    def _report(self, store: dist.Store, failure: Failure) -> Failure:
        """Report `failure` to all; return the first one that any process reported."""
        return Failure(*json.loads(store.compare_set(FAILED, "", json.dumps(failure))))

    def _is_reported(self, failure: Failure) -> bool:
        return failure.rank not in self._neighbours or not _is_gone(self._neighbours[failure.rank])

    def _vanished(self, gone: int) -> str:
        pid = f" (pid {self._neighbours[gone]})" if gone in self._neighbours else ""
        return (
            f"rank {gone} stopped answering: its process{pid} was killed (signal or out of memory); not waiting "
            f"for the timeout of {self.timeout_s:g} s"
        )

    def _claim(self) -> bool:
        """Whether the caller is the first of two threads to claim that it ends this process."""
        with self._lock:
            is_first = not self._is_claimed
            self._is_claimed = True
        return is_first

    # ---------------------------------------------------------------- the main thread

    def on_terminate(self, number: int, frame: types.FrameType | None) -> None:
        """Print the cause when a launcher ends this process because another one has ended."""
        if self._is_claimed:  # about to end, with its message
            return
        failure = self._look(self._store)
        if failure is not None and self._claim():
            self._end(failure)
        signal.signal(number, self.before)
        signal.raise_signal(number)

    def wait_for_all(self) -> None:
        """Return when every process is done; the store stays until all know."""
        try:
            if self._store.add(DONE, 1) == self.world:
                self._store.set(ALL_DONE, "1")
            self._store.wait([ALL_DONE], timedelta(seconds=self.timeout_s))
            self._leave(self.world)
        except RuntimeError as error:
            raise dist.DistError(f"waiting for the other processes to finish: {first_line(error)}") from None

    def fail(self, error: BaseException) -> None:
        """Report to the others; return if `error` comes from this process and should be raised.

        Raises:
            LaunchError: `error` is a consequence of another process's failure.
            SystemExit: another process reports the same error already.
        """
        if not self._claim():
            time.sleep(GRACE + LINGER)  # the thread is about to end this process
        code = getattr(error, "code", INTERRUPTED) if isinstance(error, KeyboardInterrupt) else 1
        local_failure = Failure(self.rank, _message_of(error, self.rank), code)
        is_broken = _is_of_communication(error)
        is_consequence = is_broken or getattr(error, "is_from_elsewhere", False)
        failure = self._wait_for_cause() if is_consequence else None
        if failure is None:
            if is_broken:
                local_failure = Failure(self.rank, self._broken(error))
            with contextlib.suppress(RuntimeError, ValueError):
                failure = self._report(self._store, local_failure) if self._has_store() else None
        failure = failure or local_failure
        self._linger()
        if is_broken or (is_consequence and failure is not local_failure):
            error = LaunchError(failure.message)
            error.is_reported = True
            raise error from None
        if isinstance(error, ToolkitError):
            error.is_reported = True
        reasons = {each.message.partition(":")[2] for each in (failure, local_failure)}
        if isinstance(error, ToolkitError) and failure.rank != self.rank and len(reasons) == 1:
            raise SystemExit(failure.code) from None

    def _wait_for_cause(self) -> Failure | None:
        """Wait a moment for the cause of a broken connection; return it if another process reports it."""
        deadline = time.monotonic() + GRACE
        while (failure := self._look(self._store)) is None and time.monotonic() < deadline:
            time.sleep(POLL / 10)
        return failure

    def _broken(self, error: BaseException) -> str:
        return (
            f"rank {self.rank} timed out waiting for another process ({self.timeout_s:g} s; set training.timeout_s to "
            f"wait longer), or lost its connection: {first_line(error)}"
        )

    def _linger(self) -> None:
        """Wait until all live processes know of the failure: a launcher ends them when the first one exits."""
        with contextlib.suppress(RuntimeError, ValueError):
            if self._has_store():
                left = self.world - sum(map(_is_gone, self._neighbours.values()))
                self._count(KNOWN, left)
                self._leave(left)

    def _leave(self, left: int) -> None:
        """Stop using the store; rank 0, which may hold it, waits until the others have stopped, too."""
        self.stopped.set()
        if threading.current_thread() is not self.thread:
            self.thread.join(POLL)
        if self.rank == 0:
            self._count(LEFT, left)
        else:
            self._store.add(LEFT, 1)

    def _count(self, key: str, wanted: int) -> None:
        """Count this process and wait, but not for long, until `wanted` processes have been counted."""
        deadline = time.monotonic() + LINGER
        number = self._store.add(key, 1)
        while number < wanted and time.monotonic() < deadline:
            time.sleep(POLL / 20)
            number = self._store.add(key, 0)


def _clone(store: Any) -> dist.Store:
    """Return a separate connection: one connection serves one thread at a time; torch before 2.8 cannot."""
    return store.clone() if hasattr(store, "clone") else store


def _machine() -> tuple[str, str]:
    """Return a key that is the same for processes that see each other's process ids."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not collected it yet."""
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return False
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _is_of_communication(error: BaseException) -> bool:
    """Whether an exception says only that a collective failed."""
    if isinstance(error, dist.DistError):
        return True
    is_plain = isinstance(error, (RuntimeError, ConnectionError, TimeoutError)) and not isinstance(error, ToolkitError)
    return is_plain and _OF_COMMUNICATION.search(str(error)) is not None


def _message_of(error: BaseException, failed_rank: int) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"rank {failed_rank} was interrupted"
    if isinstance(error, SystemExit):
        return f"rank {failed_rank} left the run with exit code {error.code}"
    kind = "" if isinstance(error, ToolkitError) else f"{type(error).__name__}: "
    return f"rank {failed_rank} failed: {kind}{first_line(error)}"


def _say(text: str) -> None:
    """Print a separate line, even while a progress bar is drawn."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # the bar had hidden the cursor
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
