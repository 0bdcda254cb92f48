"""Disks that are full and folders that cannot be written: one line, nothing half-written, the last checkpoint named."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

pytest.importorskip("reasoning_gym")

from tests.processes import run_module
from tests.test_mixed_precision import trainer_with
from tests.training.made_up import a_checkpoint
from tests.training.test_output_dir import ENV
from toolkit import ConfigError, ToolkitError
from toolkit.training import checkpoint, export, output_dir
from toolkit.training.config import TrainingConfig
from toolkit.training.disk import shown_size, write_atomically
from toolkit.training.disk_errors import in_one_line
from toolkit.training.output_dir import claim, release
from toolkit.training.saved import newest, position

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TINY = [
    *("debug=smoke", "warmup.steps=1", "training.steps=2", "task.num_heldout=2", "model.hidden_size=16"),
    *("model.num_layers=1", "rollout.prompts_per_step=1", "rollout.group_size=2"),
]


def fails(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount file systems of a given size, where the system permits it."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk_{size}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("mounting is not permitted")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_is_the_earlier_one_or_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(FULL))
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "22")
    assert path.read_text() == "1"
    write_atomically(path, "333")
    assert path.read_text() == "333"
    assert [path] == list(tmp_path.iterdir())


def test_sizes() -> None:
    assert [shown_size(number) for number in (0, 1023, 1536, 1 << 20, 5 << 30)] == [
        *("0 bytes", "1023 bytes", "1.5 KiB", "1 MiB", "5 GiB")
    ]


def test_what_is_said_of_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError) as caught, in_one_line(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert re.fullmatch(
        rf"{tmp_path} cannot be written: No space left on device \([\d.]+ \w+ free\); no checkpoint was written "
        rf"before; make room, then continue: the same overrides and training\.resume={tmp_path}",
        str(caught.value),
    )
    a_checkpoint(tmp_path / "checkpoint", 7)
    file = tmp_path / "metrics.jsonl"
    for error in (
        OSError(errno.EROFS, "Read-only file system", str(file)),
        SafetensorError("Error while serializing: I/O error: Read-only file system (os error 30)"),
    ):
        with pytest.raises(ToolkitError) as caught, in_one_line(tmp_path):
            raise error
        said = str(caught.value)
        assert said.startswith(f"{file if isinstance(error, OSError) else tmp_path} cannot be written: Read-only file")
        assert f"the last whole checkpoint is {tmp_path}/checkpoint (main step 7); make the folder writable" in said
    for other in (OSError(errno.ENOSPC, "No space", "/elsewhere/x"), OSError(errno.EPIPE, "pipe"), ValueError("x")):
        with pytest.raises(type(other)), in_one_line(tmp_path):
            raise other


@pytest.mark.slow
@pytest.mark.parametrize("where", ["save_weights", "save_optimizer_state", "random_states", "flush_tree"])
def test_a_disk_that_fills_up_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    trainer = trainer_with(None, "loss=ce")
    phase = trainer.main_phase()
    checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
    phase.next_step = 5
    for module, name, step in ((checkpoint, where, 0), (export, "flush_tree", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails(FULL))
            with pytest.raises(ToolkitError, match=rf"\(main step {step}\); make room"), in_one_line(tmp_path):
                checkpoint.save_checkpoint(tmp_path, trainer, phase, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_room_is_measured_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = a_checkpoint(tmp_path / "a" / "checkpoint", padding="x" * 3_000_000)
    for free, resume, needs in ((500_000, None, "a run needs 1 MiB"), (2 << 20, str(earlier), "checkpoint needs 2.86")):
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
            with pytest.raises(ConfigError, match=rf"hydra\.run\.dir=.*/b has .* free, and .*{needs}.*; make room, or"):
                claim(str(tmp_path / "b"), TrainingConfig(resume=resume))
    trainer = trainer_with(None, "kl=k2")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(ConfigError, match=r"has 1000 bytes free, and a checkpoint needs "):
            checkpoint.check_room_for(tmp_path, trainer)
    checkpoint.save_checkpoint(tmp_path, trainer, trainer.main_phase(), {})
    written = sum(
        file.stat().st_size for file in (tmp_path / "checkpoint").iterdir() if file.suffix == ".safetensors"
    )  # without moments: no step was made
    needed: list[int] = []
    monkeypatch.setattr(checkpoint, "check_room", lambda _, size, what: needed.append(size))
    checkpoint.check_room_for(tmp_path, trainer)
    assert needed[0] == pytest.approx(2 * written, rel=0.1)  # as many moments as weights, here twice: the reference's


def test_the_lock_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output_dir, "_sign", fails(FULL))
        with pytest.raises(ConfigError, match=r"cannot be created or written: No space left on device"):
            claim(str(tmp_path), TrainingConfig())
    claim(str(tmp_path), TrainingConfig())  # the lock was released
    release(str(tmp_path))


@pytest.mark.slow
def test_the_command_on_a_full_disk_and_in_a_read_only_folder(small_disk: Callable[[str], Path]) -> None:
    code = (
        "import sys, toolkit.train as t\ntry: t.main()\nexcept SystemExit: sys.exit(5 if 'torch' in sys.modules else 1)"
    )
    full, read_only = small_disk("64k"), small_disk("4m")
    (full / "x").write_bytes(b"x" * 4096)
    subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
    for folder, named, said in (
        (full, True, r"has 60 KiB free, and a run needs 1 MiB; make room, or give a folder on another disk"),
        (read_only, True, r"cannot be created or written: Read-only file system"),
        (read_only, False, r"hydra\.run\.dir=outputs/.* cannot be created or written: Read-only file system"),
    ):
        words = [*TINY, *([f"hydra.run.dir={folder}/a"] if named else [])]
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=folder, env=ENV, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert re.fullmatch(rf"error: .*{said}\n", done.stderr)


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("3m") / "a"
    words = [*TINY, f"hydra.run.dir={folder}", "training.checkpoint_every=1"]
    assert run_module("toolkit.train", *words, env=ENV).returncode == 0
    before = position(folder / "checkpoint")
    with (folder.parent / "x").open("wb") as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        file.write(b"x" * (free - (1 << 20) - 65_536))  # the run may start, as it needs 1 MiB
    words = [word.replace("training.steps=2", "training.steps=9") for word in words]
    done = run_module("toolkit.train", *words, "training.resume=auto", "training.keep_last=9", env=ENV)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .* cannot be written: No space left on device \(.* free\); the last whole checkpoint is .*/checkpoint "
        r"\(main step \d\); make room, then continue: toolkit-train .*\n",
        done.stderr,
    )
    found, lacking = newest(folder)
    assert found is not None
    assert position(found) > before
    assert lacking == []
    assert not list(folder.glob("*.writing"))
    (folder.parent / "x").unlink()
    done = run_module("toolkit.train", *words, "training.resume=auto", env=ENV)
    assert done.returncode == 0, done.stderr
