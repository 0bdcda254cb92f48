"""Every tutorial runs from the first cell to the last; those with outputs say what a run says now."""

from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

import toolkit
from tests.tutorial_outputs import WIDGET, differences, execute, is_close, texts

TUTORIALS = sorted((Path(toolkit.__file__).parents[1] / "tutorials").glob("*.ipynb"))
FIRST, *LATER = TUTORIALS
WITH_OUTPUTS = ("103_what_each_policy_loss_does",)
"""Tutorials that are stored with outputs, so a forge shows them: ``python -m tests.tutorial_outputs FILE``."""
NEEDS_WIDGETS = WITH_OUTPUTS


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path", [FIRST, *(pytest.param(p, marks=pytest.mark.slow) for p in LATER)], ids=lambda path: path.stem
)
def test_runs(path: Path, tmp_path: Path) -> None:
    if path.stem in NEEDS_WIDGETS and (find_spec("ipywidgets") is None or find_spec("anywidget") is None):
        pytest.skip("needs the extra notebook")
    notebook = execute(path, tmp_path)
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert figures
    if path.stem in WITH_OUTPUTS:
        assert not differences(texts(nbformat.read(path, as_version=4)), texts(notebook))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_stored_outputs(path: Path) -> None:
    """A tutorial has the outputs of all its cells or none; a picture stands in for every widget."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert bool(outputs) == (path.stem in WITH_OUTPUTS)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if WIDGET in output.get("data", {})]
    assert not [output for output in outputs if "data" in output and "image/png" not in output["data"]]
    assert path.stat().st_size < 600_000


def test_what_counts_as_the_same_output() -> None:
    assert is_close("moved 4.1% of 20,000", "moved  4.11% of 20,000")
    assert not is_close("moved 4.1%", "moved 5.1%")
    assert not is_close("moved 4.1%", "moves 4.1%")
    assert differences(["a\n1.0"], ["a\n1.0\n2.0"]) == ["'' is now '2.0'"]
