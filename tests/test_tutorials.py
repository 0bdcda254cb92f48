"""Every tutorial runs from the first cell to the last, and says what its stored outputs say."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

import toolkit
from tests.tutorial_outputs import MACHINE, WIDGET, differences, execute, is_close, merged, texts

TUTORIALS = sorted((Path(toolkit.__file__).parents[1] / "tutorials").glob("*.ipynb"))
FIRST, *LATER = TUTORIALS
OPTIONAL = {"toolkit.notebook": ("ipywidgets", "anywidget"), "peft": ("peft",), "trl": ("trl",)}
"""What a tutorial may import, and the packages that it then needs; without them its test is skipped."""

PATH_OF_MACHINE = re.compile(r"(?<![\w.])/(tmp|home|root|work|Users)/")


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def imports(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Yield the names of the modules that the code cells import."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield node.module or ""


def missing_packages(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the optional packages that a tutorial imports and that are not installed."""
    needed = {
        package
        for module in imports(notebook)
        for name, packages in OPTIONAL.items()
        if module == name or module.startswith(f"{name}.")
        for package in packages
    }
    return sorted(package for package in needed if find_spec(package) is None)


def test_there_are_tutorials() -> None:
    assert FIRST.stem == "101_first_loss"
    assert LATER


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path", [FIRST, *(pytest.param(p, marks=pytest.mark.slow) for p in LATER)], ids=lambda path: path.stem
)
def test_runs(path: Path, tmp_path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    if missing := missing_packages(stored):
        pytest.skip(f"needs {', '.join(missing)}")
    notebook = execute(path, tmp_path)
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    assert [each for each in data if "image/png" in each]
    assert not [each for each in data if WIDGET in each and "image/png" not in each]  # a picture stands in for a widget
    assert not differences(texts(stored), texts(notebook))


@pytest.mark.every_case
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_stored_outputs(path: Path) -> None:
    """A tutorial is stored with its outputs, pictures among them, and with nothing that only a kernel can show."""
    notebook = nbformat.read(path, as_version=4)
    outputs = outputs_of(notebook)
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if "data" in output and (WIDGET in output["data"] or not output["data"])]
    assert not [output for output in outputs if PATH_OF_MACHINE.search(repr(output))]
    assert path.stat().st_size < 600_000


def test_what_counts_as_the_same_output() -> None:
    assert is_close("moved 4.1% of 20,000", "moved  4.11% of 20,000")
    assert not is_close("moved 4.1%", "moved 5.1%")
    assert not is_close("moved 4.1%", "moves 4.1%")
    assert differences(["a\n1.0"], ["a\n1.0\n2.0"]) == ["'' is now '2.0'"]
    assert is_close("off by 0e+00", "off by 3e-16")
    assert not is_close("off by 0e+00", "off by 1e+00")


def test_a_cell_that_depends_on_the_machine_is_not_compared() -> None:
    cells = [nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="3 s\n")]) for _ in range(2)]
    cells[1].metadata.tags = [MACHINE]
    assert texts(nbformat.v4.new_notebook(cells=cells)) == ["3 s\n", ""]


def test_pieces_of_a_stream_are_one_output() -> None:
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    assert [output.text for output in merged(outputs)] == ["ab", "c", "d"]


def test_packages_are_found_from_the_imports() -> None:
    sources = "import os\nfrom toolkit.notebook.charts import x", "import peft.utils", "from toolkit import notebooks"
    found = [list(imports(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each)]))) for each in sources]
    assert found == [["os", "toolkit.notebook.charts"], ["peft.utils"], ["toolkit"]]


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from toolkit.notebook import token_view", ["anywidget", "ipywidgets"]),
        ("import peft", ["peft"]),
        ("import toolkit, torch", []),
    ],
)
def test_a_tutorial_without_its_packages_is_skipped(
    source: str, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_tutorials.find_spec", lambda name: None)
    assert missing_packages(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])) == missing
