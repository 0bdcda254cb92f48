"""Processes for tests: forked from one that has loaded torch and our packages, which takes seconds.

What is forked has run nothing yet, so it starts as a new process would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(function: Callable[..., None], args: tuple[Any, ...], processes: int) -> None:
    """Run ``function(rank, *args)`` in processes that know nothing of each other; an error in one is raised here."""
    mp.start_processes(function, args=args, nprocs=processes, start_method="forkserver")


def run_processes(world: int, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(rank, world, *args)`` in `world` processes joined by gloo; an assertion in one fails the test."""
    start(_in_group, (world, free_port(), function, args), world)


def _in_group(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    _end_with_parent()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(rank, world, *args)
    finally:
        torch.distributed.destroy_process_group()


def run_module(
    module: str,
    *arguments: str,
    cwd: str | os.PathLike[str] = ".",
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Do what ``python -m module arguments`` does, but for loading torch; the environment is that of this process.

    Args:
        module: such as ``toolkit.train``.
        arguments: of the command line.
        cwd: the folder that it runs in.
        env: the whole environment, as for `subprocess.run`.
        timeout: seconds.
    """
    command = (sys.executable, "-m", module, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start_module(module, *arguments, cwd=cwd, env=env, streams=streams)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess(command, process.exitcode or 0, out, err)


def start_module(
    module: str,
    *arguments: str,
    streams: Sequence[Path],
    cwd: str | os.PathLike[str] = ".",
    env: Mapping[str, str] | None = None,
) -> Any:
    """Start what `run_module` runs and return the process; `streams`: files for its stdout and stderr."""
    process = START.Process(
        target=_as_main, args=(module, list(arguments), str(cwd), dict(env or os.environ), list(map(str, streams)))
    )
    process.start()
    return process


def _as_main(module: str, arguments: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = [module, *arguments]
    _end_with_parent()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """End when the tests are killed; what forked this process is not what started it, and lives on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
