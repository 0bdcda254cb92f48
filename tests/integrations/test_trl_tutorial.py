"""The tutorial on TRL's trainer from the first cell to the last; skipped where trl is not installed (see .ci/peers)."""

from __future__ import annotations

from pathlib import Path

import pytest

import toolkit

TUTORIAL = Path(toolkit.__file__).parents[1] / "tutorials" / "404_our_loss_in_your_trainer.ipynb"


@pytest.mark.slow
@pytest.mark.notebook
def test_the_tutorial_runs_and_says_what_it_said(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    from tests.tutorial_outputs import differences, execute, texts

    stored = nbformat.read(TUTORIAL, as_version=4)
    now = execute(TUTORIAL, tmp_path)  # its assertions raise here
    fixed = [
        index
        for index, cell in enumerate(cell for cell in stored.cells if cell.cell_type == "code")
        if "machine" not in cell.metadata.get("tags", [])
    ]
    before, after = texts(stored), texts(now)
    assert not differences([before[index] for index in fixed], [after[index] for index in fixed])
