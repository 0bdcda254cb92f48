"""A mistake of all processes is said once, and one that a launcher ends says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.training.test_failures import outcome, said
from toolkit import train
from toolkit.errors import ConfigError


def test_the_main_process_speaks_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = ConfigError("told")
    told.is_reported = True
    waited: list[float] = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for number, error in (("0", ConfigError("all")), ("3", ConfigError("one")), ("3", told)):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit, match="1"):
            train._stop(error)
    assert waited == [train.PATIENCE + 1]  # a launcher ends it in this time, if the main process is wrong, too
    assert capsys.readouterr().err == "error: all\nerror: one\nerror: told\n"


def launcher_ends_the_others(rank: int) -> None:
    """As torchrun does, which sees a death sooner than the thread that looks every second."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def ended_from_outside(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.dist
def test_a_process_that_is_ended_for_another_says_why(tmp_path: Path) -> None:
    codes, words = outcome(launcher_ends_the_others, tmp_path, world=2)
    assert codes == [1, -signal.SIGKILL]
    (line,) = said(words[0])
    assert line.startswith("error: rank 1 stopped answering: its process (pid ")


@pytest.mark.slow
@pytest.mark.dist
def test_a_process_that_is_ended_for_nothing_ends(tmp_path: Path) -> None:
    codes, words = outcome(ended_from_outside, tmp_path, world=2)
    assert codes == [1, -signal.SIGTERM]
    assert words[1] == ""
    assert said(words[0])
