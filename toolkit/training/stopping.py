"""Signals that ask a run to stop: all processes leave the loop after the same step."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch

from toolkit.distributed import reduce_metrics
from toolkit.metrics import Max

REPEATED_S = 5.0
"""Seconds in which the same signal again is the same request: launchers pass on what the process got itself."""


class Killed(KeyboardInterrupt):
    """A second request to stop, by the signal with this number: at once, without a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = exit_code(number)


class StopFlag:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the loop reads between steps; a later one kills.

    The same signal within `REPEATED_S` seconds of the first one is the same request. A context manager that restores
    the earlier handlers. Only the main thread may set handlers.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.signal = 0
        """Number of the signal that `agreed` has found on any process, SIGTERM before Ctrl-C; 0: none."""
        self._received = 0
        self._last: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_repeated = now - self._last.get(number, -math.inf) < REPEATED_S
        self._last.setdefault(number, now)
        if self.is_set and not is_repeated:
            signal.signal(number, signal.SIG_DFL)
            raise Killed(number)
        self.is_set, self._received = True, max(self._received, number)

    def agreed(self) -> bool:
        """Return whether any process received a signal; all must leave the loop after the same step."""
        # A signal may come during the exchange: its handler writes to another attribute.
        asked = Max.of(torch.tensor([float(self._received)]))
        self.signal = int(reduce_metrics({"stop": asked})["stop"].value())
        return self.signal > 0


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal ended, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number
