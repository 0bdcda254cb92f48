"""Checkpoints in a folder: which are complete, which one continues the run, which are kept; no model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.made_up import a_checkpoint
from toolkit import ConfigError
from toolkit.training import saved
from toolkit.training.config import TrainingConfig
from toolkit.training.metrics_file import read_rows
from toolkit.training.saved import damage, make_current, newest, position


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int, keep_last: int = 1, phase: str = "main") -> None:
    a_checkpoint(folder / "checkpoint.writing", step, phase)
    make_current(folder, keep_last)


def test_a_checkpoint_is_complete_or_says_what_it_lacks(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path / "checkpoint", 3)
    state, manifest = folder / "state.json", folder / "manifest.json"
    assert damage(folder) is None
    text = state.read_text()
    for wrong in ("", "{}", "[]", text[:-1], text + " "):
        state.write_text(wrong)
        assert damage(folder) == f"{state} has {len(wrong)} of {len(text)} bytes"
    state.unlink()
    assert damage(folder) == f"{state} is missing"
    for wrong_bytes in (
        b"",
        b"{}",
        b"[]",
        b"\x80\xff",
        b'{"phase": "main"}',
        b'{"phase": 1, "next_step": 1, "files": {}}',
    ):
        manifest.write_bytes(wrong_bytes)
        assert damage(folder) == f"{manifest} cannot be read"
    manifest.unlink()
    assert str(damage(folder)).startswith(f"{manifest} is missing (an earlier version, or")


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 9):
        save(tmp_path, step, keep_last=3, phase="warmup")
    for step in (1, 3, 10):
        save(tmp_path, step, keep_last=3)
    assert names(tmp_path) == ["checkpoint", "checkpoint-main-1", "checkpoint-main-3"]
    assert position(tmp_path / "checkpoint") == (1, 10)
    save(tmp_path, 10, keep_last=3)  # the end of a run comes right after a checkpoint
    assert names(tmp_path) == ["checkpoint", "checkpoint-main-1", "checkpoint-main-3"]
    save(tmp_path, 2, keep_last=3)  # continued from step 1 by hand: what came after is another run
    assert names(tmp_path) == ["checkpoint", "checkpoint-main-1"]
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["checkpoint"]
    (tmp_path / "checkpoint/state.json").write_text("")
    save(tmp_path, 5, keep_last=2)  # what is damaged is not kept
    assert names(tmp_path) == ["checkpoint"]


def test_what_continues_a_run(tmp_path: Path) -> None:
    assert newest(tmp_path) == newest(tmp_path / "nowhere") == (None, [])
    order = ["checkpoint-best", "checkpoint-warmup-9", "checkpoint-main-2", "checkpoint-main-10"]
    order += ["checkpoint.old", "checkpoint", "checkpoint.writing"]
    for name in order:
        folder = a_checkpoint(tmp_path / name)
        assert newest(tmp_path) == (folder, [])
        assert newest(folder) == (folder, [])
    for name in ("checkpoint.writing", "checkpoint.old"):  # what a crash leaves is no damage
        (tmp_path / name / "manifest.json").unlink()
        assert newest(tmp_path) == (tmp_path / "checkpoint", [])
    (tmp_path / "checkpoint/state.json").write_text("{}")
    folder, lacking = newest(tmp_path)
    assert folder == tmp_path / "checkpoint-main-10"
    assert [text.partition(" has")[0] for text in lacking] == [str(tmp_path / "checkpoint/state.json")]


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("interrupted", [True, False], ids=["only_old", "whole"])
def test_a_crash_anywhere_leaves_the_new_one_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, interrupted: bool
) -> None:
    """Death before each change of the disk, beginning from what a death before has left."""

    def dies_after(number: int) -> Callable[[], None]:
        left = iter(range(number))

        def count() -> None:
            if next(left, None) is None:
                raise SystemExit

        return count

    for number in range(12):
        folder = tmp_path / str(number)
        a_checkpoint(folder / ("checkpoint.old" if interrupted else "checkpoint"), 4)
        a_checkpoint(folder / "checkpoint.writing", 5)
        alive = dies_after(number)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "unlink"), (saved.shutil, "rmtree"), (Path, "unlink")):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, real=real, alive=alive, **k: (alive(), real(*a, **k))[1])
            try:
                make_current(folder, keep_last)
            except SystemExit:
                done = False
            else:
                done = True
        found, lacking = newest(folder)
        assert found is not None
        assert position(found) == (1, 5)
        assert lacking == []
        save(folder, 6, keep_last)
        assert position(folder / "checkpoint") == (1, 6)
        if done:
            break
    assert done
    assert number > 1


def test_a_removal_that_did_not_end_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_checkpoint(tmp_path / "checkpoint-main-1")
    monkeypatch.setattr(saved.shutil, "rmtree", lambda *_, **__: None)
    saved.remove(folder)
    assert newest(tmp_path) == (None, [])


def test_a_number_of_checkpoints_without_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"training\.keep_last=2 has no effect with one checkpoint, at the end; set"):
        TrainingConfig(keep_last=2)
    assert TrainingConfig(keep_last=2, checkpoint_every=1).keep_last == 2


def test_a_log_that_was_cut(tmp_path: Path) -> None:
    log, row = tmp_path / "metrics.jsonl", b'{"phase": "main", "step": 0}'
    for end in (b"", b"\n"):
        log.write_bytes(row + b"\n" + row + end)
        assert len(read_rows(log)) == 2
    for number, end in enumerate((b'{"pha', b"{}", b"\x80", b"[]\n", b"\x00\x00\n")):
        log = tmp_path / f"{number}.jsonl"
        log.write_bytes(row + b"\n" + end)
        with pytest.warns(UserWarning, match=r"jsonl: the last line was cut, so it is dropped"):
            assert len(read_rows(log)) == 1
    log.write_bytes(b'{"pha\n' + row + b"\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*4\.jsonl cannot be read \(.*\); repair or remove the file"):
        read_rows(log)
