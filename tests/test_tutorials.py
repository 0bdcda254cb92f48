"""Every tutorial runs from the first cell to the last, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import toolkit

TUTORIALS = sorted((Path(toolkit.__file__).parents[1] / "tutorials").glob("*.ipynb"))
FIRST, *LATER = TUTORIALS


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path", [FIRST, *(pytest.param(p, marks=pytest.mark.slow) for p in LATER)], ids=lambda path: path.stem
)
def test_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert figures


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
