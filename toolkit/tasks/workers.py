"""Processes that call a reward or environment: a call that hangs or crashes ends its process, and a new one takes over.

No torch here. ``python -m toolkit.tasks.workers`` is such a process; it reads calls from a pipe and answers on it.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Literal

from toolkit.errors import ConfigError
from toolkit.tasks.calls import MOST_IN_A_ROW, Failure, checked_list, checked_value, raised, timed_out
from toolkit.tasks.environment import checked_reply, load_environment
from toolkit.tasks.rewards import load_rewards

Kind = Literal["reward", "environment"]
"""What a process calls."""
START_S = 120.0
"""Most seconds for a process to start and to import the reward."""
EXIT_S = 5.0
"""Most seconds that a process takes to exit after it has closed its pipe."""
POLL_S = 1.0
"""Seconds between two looks of a worker at whether its parent still lives."""


class Worker:
    """One process that calls one reward or environment."""

    def __init__(self, spec: str, columns: list[str], settings: list[str], kind: Kind) -> None:
        self._arguments = (spec, columns, settings, kind)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None

    def call(self, arguments: dict[str, Any], seconds: float) -> Any:
        """Return the checked result of a call, or a `Failure`; several for a batched reward."""
        try:
            self._start()
            self._pipe.send(arguments)
            if not self._pipe.poll(seconds):
                self.close()
                return timed_out(seconds)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_S)
            code = self._process.poll()
            self.close()
            return Failure(f"it ended its worker process with exit code {code}", costs_time=True)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return Failure(f"its arguments cannot be sent to a worker process: {error}")

    def _start(self) -> None:
        if self._process is not None:
            return
        self._pipe, other = multiprocessing.Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.tasks.workers", str(other.fileno()), str(os.getpid())],
            pass_fds=[other.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        other.close()
        self._pipe.send(self._arguments)
        ready = self._pipe.recv() if self._pipe.poll(START_S) else "it did not start in time"
        if ready is not None:
            self.close()
            raise ConfigError(str(ready))

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._process = None


class Workers:
    """Several processes that share the calls of one reward or environment."""

    def __init__(
        self, number: int, spec: str, columns: list[str], settings: list[str], *, kind: Kind = "reward"
    ) -> None:
        self._workers = [Worker(spec, columns, settings, kind) for _ in range(number)]

    def call_each(self, calls: list[dict[str, Any]], seconds: float) -> list[Any]:
        """Return the checked result of each call, or a `Failure`, in order.

        Raises:
            ConfigError: a process cannot load the reward.
        """
        waiting: SimpleQueue[tuple[int, dict[str, Any]] | None] = SimpleQueue()
        results: list[Any] = [None] * len(calls)
        errors: list[BaseException] = []
        costly: list[Failure] = []  # in a row
        for item in enumerate(calls):
            waiting.put(item)

        def work(worker: Worker) -> None:
            try:
                while (item := waiting.get()) is not None and not errors:
                    if len(costly) >= MOST_IN_A_ROW:
                        results[item[0]] = costly[-1]
                        continue
                    result = results[item[0]] = worker.call(item[1], seconds)
                    if isinstance(result, Failure) and result.costs_time:
                        costly.append(result)
                    else:
                        costly.clear()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            waiting.put(None)
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


def _answers(pipe: Any) -> Iterator[Any]:
    """Yield what this process answers: None once it is ready, then the result of each call."""
    spec, columns, settings, kind = pipe.recv()
    try:
        answer = _loaded(spec, columns, settings, kind)
    except ConfigError as error:
        yield str(error)
        return
    yield None
    while True:
        arguments = pipe.recv()
        try:
            yield answer(arguments)
        except Exception as error:  # the user's function may raise anything
            yield raised(error)


def _loaded(spec: str, columns: list[str], settings: list[str], kind: Kind) -> Callable[[dict[str, Any]], Any]:
    """Return what answers a call: the function, and the check of what it returns."""
    if kind == "environment":
        step = load_environment(spec, columns=columns)
        return lambda arguments: checked_reply(step.function(**arguments))
    (reward,) = load_rewards([spec], columns=columns, settings=settings)
    function = reward.function
    assert function is not None
    if reward.is_batched:
        return lambda arguments: checked_list(function(**arguments), len(arguments.get("completions", ())))
    return lambda arguments: checked_value(function(**arguments))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def main() -> None:
    """Serve calls until the other end of the pipe is closed."""
    pipe = multiprocessing.connection.Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    sys.stdout = sys.stderr  # what a reward prints is not a result
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        for answer in _answers(pipe):
            pipe.send(answer)


if __name__ == "__main__":
    main()
