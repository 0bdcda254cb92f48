"""One process fails, all end: really started, without a supervisor that would end them anyway."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.processes import START, free_port
from toolkit import GRPOLossConfig, RLLossContextInputItem, ToolkitError
from toolkit.training.failures import Failure, _is_of_communication, _message_of, stop_together

TIMEOUT = 300
"""Of the collectives; far more than any of these tests may take."""
SOON = 12.0
"""Seconds from the fault to the end of the last process, on a busy machine."""


def one_raises(rank: int) -> None:
    """A batch that only rank 1 finds wrong; the others are in the loss's own collective by then."""
    cfg = GRPOLossConfig()
    labels = torch.zeros(1, 3, dtype=torch.int64)
    item = RLLossContextInputItem(shifted_labels=labels, advantages=None if rank == 1 else torch.ones(1, 3))
    cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    dist.barrier()


def store_host_raises(rank: int) -> None:
    """Rank 0 holds the store, and the others are computing, not waiting."""
    if rank == 0:
        raise KeyError("no such prompt")
    time.sleep(60)


def one_is_killed(rank: int) -> None:
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


def store_host_is_killed(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        dist.all_reduce(torch.ones(1))
    time.sleep(60)


def all_raise(rank: int) -> None:
    raise ToolkitError("a mistake that every process sees")


def one_is_late(rank: int) -> None:
    if rank == 1:
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


def one_leaves(rank: int) -> None:
    if rank == 1:
        sys.exit(0)
    dist.all_reduce(torch.ones(1))


def all_is_well(rank: int) -> None:
    time.sleep(3.5 if rank == 0 else 0.0)  # the others must not seem to have vanished


def worker(rank: int, world: int, port: int, scenario: Callable[[int], None], timeout: float, log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        with stop_together(timeout):
            scenario(rank)
        dist.destroy_process_group()
    except ToolkitError as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def outcome(
    scenario: Callable[[int], None], folder: Path, world: int = 3, timeout: float = TIMEOUT, soon: float = SOON
) -> tuple[list[int | None], list[str]]:
    """Return the exit code and the words of every process; they must end soon."""
    port = free_port()
    logs = [folder / str(rank) for rank in range(world)]
    processes = [
        START.Process(target=worker, args=(rank, world, port, scenario, timeout, str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    processes[0].join(60)
    deadline = time.monotonic() + soon
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def said(words: str) -> list[str]:
    """Return our lines; torch may write warnings of its own around them."""
    return [line for line in words.splitlines() if line.startswith("error: ")]


@pytest.mark.dist
def test_one_process_raises(tmp_path: Path) -> None:
    codes, words = outcome(one_raises, tmp_path)
    assert codes == [1, 1, 1]
    assert words[1].startswith("error: ")
    assert "advantages" in words[1]
    message = words[1].removeprefix("error: ").splitlines()[0]
    assert words[0] == words[2] == f"error: rank 1 failed: {message}\n"


@pytest.mark.slow
@pytest.mark.dist
def test_the_process_with_the_store_raises(tmp_path: Path) -> None:
    codes, words = outcome(store_host_raises, tmp_path)
    assert codes == [1, 1, 1]
    assert "Traceback" in words[0]
    assert words[1] == words[2] == "error: rank 0 failed: KeyError: 'no such prompt'\n"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("scenario", "killed"), [(one_is_killed, 1), (store_host_is_killed, 0)])
def test_a_killed_process_ends_the_others(scenario: Callable[[int], None], killed: int, tmp_path: Path) -> None:
    codes, words = outcome(scenario, tmp_path)
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [1, 1]
    assert words.pop(killed) == ""
    for line in words:
        assert line.startswith(f"error: rank {killed} stopped answering: its process (pid ")
        assert f"timeout of {TIMEOUT} s" in line
        assert line.count("\n") == 1


@pytest.mark.dist
def test_a_mistake_of_all_is_said_once(tmp_path: Path) -> None:
    codes, words = outcome(all_raise, tmp_path)
    assert codes == [1, 1, 1]
    assert sorted(words) == ["", "", "error: a mistake that every process sees\n"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_process_that_comes_too_late(tmp_path: Path) -> None:
    codes, words = outcome(one_is_late, tmp_path, world=2, timeout=3)
    assert codes == [1, 1]
    for line in words:
        assert line.startswith("error: rank 0 timed out waiting for another process (3 s; set training.timeout_s")


@pytest.mark.dist
def test_a_process_that_leaves(tmp_path: Path) -> None:
    codes, words = outcome(one_leaves, tmp_path, world=2)
    assert codes[0] == 1
    assert words[0] == "error: rank 1 left the run with exit code 0\n"


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_without_faults_ends_quietly(tmp_path: Path) -> None:
    codes, words = outcome(all_is_well, tmp_path)
    assert codes == [0, 0, 0]
    assert words == ["", "", ""]


def test_one_process_alone_is_left_alone() -> None:
    with pytest.raises(KeyError, match="mine"), stop_together(1):
        raise KeyError("mine")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234"), True),
        (dist.DistBackendError("NCCL error"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ToolkitError("the back-end is gloo"), False),
        (KeyError("socket"), False),
    ],
)
def test_what_only_follows_from_another_process(error: BaseException, expected: bool) -> None:
    assert _is_of_communication(error) is expected


def test_words_for_the_others() -> None:
    assert _message_of(ValueError("bad\nsecond line"), 3) == "rank 3 failed: ValueError: bad"
    assert _message_of(ToolkitError("told"), 0) == "rank 0 failed: told"
    assert _message_of(KeyboardInterrupt(), 1) == "rank 1 was interrupted"
    assert Failure(1, "x").code == 1
