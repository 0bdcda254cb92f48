"""Outputs of a tutorial as they are stored: no state of widgets, which only a running kernel has.

``python -m tests.tutorial_outputs FILE`` runs a tutorial and stores its outputs. A cell whose text depends on the
machine (times, measured memory, process numbers) has the tag ``machine``: its text is stored, but not compared.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE = "machine"
"""The tag of a cell whose text depends on the machine."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
CELL = re.compile(r"\S*/ipykernel_\d+/\d+\.py")
"""The file of a cell in a warning: a path of the machine that ran it."""
CLOSE = 0.02
"""Share by which a number may differ on another machine."""


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources, store_widget_state=False
    ).execute()
    return notebook


def store(path: Path) -> None:
    """Run a tutorial and write it back with its outputs, as a forge can show them."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(path, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = merged(cell.outputs)
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)
                if "text" in output:
                    output["text"] = CELL.sub("cell", output["text"])
                if "execution_count" in output:
                    output["execution_count"] = None
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


def merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs of a cell with neighbouring pieces of one stream as a single one."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        if result and output.output_type == "stream" and output.name == result[-1].get("name"):
            result[-1]["text"] += output.text
        else:
            result.append(output)
    return result


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the text of every code cell's outputs; empty for a cell whose text depends on the machine."""
    return [
        ""
        if MACHINE in cell.metadata.get("tags", [])
        else "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
            # Not those of figures, whose text is their size, nor warnings.
            if output.output_type != "display_data" and output.get("name") != "stderr"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def differences(stored: list[str], now: list[str]) -> list[str]:
    """Return the lines whose words differ, or whose numbers differ by more than `CLOSE`."""
    lines = [(a, b) for one, other in zip(stored, now, strict=True) for a, b in zip_lines(one, other)]
    return [f"{a!r} is now {b!r}" for a, b in lines if not is_close(a, b)]


def zip_lines(one: str, other: str) -> list[tuple[str, str]]:
    """Pair the lines of two texts; a missing one is empty."""
    first, second = one.splitlines(), other.splitlines()
    longest = max(len(first), len(second))
    return [
        (first[index] if index < len(first) else "", second[index] if index < len(second) else "")
        for index in range(longest)
    ]


def is_close(one: str, other: str) -> bool:
    """Whether two lines have the same words and nearly the same numbers."""
    if NUMBER.sub("#", one).split() != NUMBER.sub("#", other).split():
        return False
    pairs = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=True)
    return all(abs(a - b) <= CLOSE * max(1.0, abs(a)) for a, b in pairs)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        store(Path(argument))
