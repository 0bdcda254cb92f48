"""Applies mutations to copies of the repository and runs the tests named for each, several at a time.

Each mutation has a process of its own, forked from one that has loaded torch and the other packages but nothing of
ours: starting Python and loading torch would take longer than most of the tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Literal

from tests.mutations.mutation import LineGone, Mutation

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("toolkit", "conf", "tests", "tutorials", "pyproject.toml", "README.md")
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "pytest",
    "hypothesis",
    "hydra",
    "pydantic",
    "accelerate",
    "transformers",
]
TIMEOUT_S = 180.0
"""Seconds after which the tests of one mutation are stopped; a test that only hangs has not caught anything."""
Status = Literal["caught", "survived", "error"]


@dataclass(frozen=True)
class Verdict:
    """What became of one mutation."""

    mutation: Mutation
    status: Status
    by: str
    """The first test that failed; of an error what went wrong."""
    seconds: float


def run_all(
    mutations: Sequence[Mutation], *, jobs: int = 2, say: Callable[[Verdict], None] = lambda verdict: None
) -> list[Verdict]:
    """Try every mutation; those with the same test file one after the other.

    Args:
        mutations: which.
        jobs: how many at a time.
        say: called with each verdict as it comes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copies.put(_copy(Path(folder, str(number))))

        def one(mutation: Mutation) -> Verdict:
            copy = copies.get()
            try:
                verdict = _try(mutation, copy, context)
            finally:
                copies.put(copy)
            say(verdict)
            return verdict

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, sorted(mutations, key=lambda mutation: mutation.tests)))


def _copy(target: Path) -> Path:
    """Copy what the tests need, bytecode included: a mutation changes one file of it."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    for path in target.rglob("toolkit/**/*.py"):
        py_compile.compile(str(path), doraise=True)
    return target


def _try(mutation: Mutation, copy: Path, context: Any) -> Verdict:
    started = time.perf_counter()
    try:
        with _applied(mutation, copy):
            status, by = _run_tests(mutation.tests, copy, context)
    except (LineGone, SyntaxError, OSError) as error:
        status, by = "error", f"{type(error).__name__}: {error}"
    return Verdict(mutation, status, by, time.perf_counter() - started)


@contextlib.contextmanager
def _applied(mutation: Mutation, copy: Path) -> Iterator[None]:
    path = copy / mutation.file
    before, after = path.read_text(), mutation.apply(copy)
    if after == before:
        raise LineGone(f"{mutation.name} changes nothing")
    if path.suffix == ".py":
        compile(after, mutation.file, "exec")  # a breakage that does not even parse would be caught by anything
    try:
        # Bytecode is recognised by size and whole seconds, which the two texts may share.
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            cached.unlink()
        path.write_text(after)
        yield
    finally:
        path.write_text(before)


def _run_tests(tests: Sequence[str], copy: Path, context: Any) -> tuple[Status, str]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(list(tests), str(copy), sender))
    process.start()
    sender.close()
    try:
        answered = receiver.poll(TIMEOUT_S)
        return receiver.recv() if answered else ("error", f"the tests took more than {TIMEOUT_S:g} s")
    except EOFError:
        return "error", "the process that ran the tests died"
    finally:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever the tests left running
        process.join()


class _FirstFailure:
    """A plugin of pytest that remembers the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (not even collected)"


def _in_child(tests: list[str], copy: str, sender: Any) -> None:
    os.setsid()
    os.chdir(copy)
    for name, value in (("PYTHONPATH", copy), ("PYTHONDONTWRITEBYTECODE", "1"), ("OMP_NUM_THREADS", "1")):
        os.environ[name] = value
    sys.dont_write_bytecode = True
    sys.path[:] = [copy, *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "toolkit")]:
        del sys.modules[name]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        import pytest
        import torch

        torch.set_num_threads(1)
        first = _FirstFailure()
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--strict-markers"]
        code = int(pytest.main([*options, *tests], plugins=[first]))
    if code == pytest.ExitCode.OK:
        sender.send(("survived", ""))
    elif code == pytest.ExitCode.TESTS_FAILED or (code == pytest.ExitCode.INTERRUPTED and first.name):
        sender.send(("caught", first.name))
    else:
        sender.send(("error", f"pytest ended with {code!r}: are the tests still called {', '.join(tests)}?"))
    sender.close()
    os._exit(0)
