"""Names and sentences of the package are plain: stand-ins for a real name, and figures of speech, count zero."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import toolkit

ROOT = Path(toolkit.__file__).parents[1]
FILES = sorted((ROOT / "toolkit").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tutorials").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
STAND_INS = {"own", "found", "given", "told", "whole", "place", "places"}
"""Parts of a name that say nothing of the thing that it names."""
PHRASES = {
    r"\bso that\b": "so",
    r"\b(one|user|class|rank|file|loss|run)'s own\b|\bof (its|your|their|our|my) own\b": "its, your, a custom ...",
    r"\bha(s|ve) not got\b": "does not have",
    r"\bkin\b": "related ...",
    r"\bmend(s|ed)?\b": "fix",
    r"(?<!there\s)\b(is|are) no (?!longer\b|more\b)": "is not a, does not have",
    r", for (they|there|it (is|has|would|takes|was))\b": "because",
    r"\bcensus\b|\bin vain\b|\bfor want of\b|\bsays so\b|\bfate\b|\bthe like\b": "the usual word",
    r"\benters? no\b": "is skipped",
}


def text_of(path: Path, kind: str = "code") -> str:
    """Return the text of a file, or that of a notebook's cells, ``code`` or ``markdown``."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)


def named_in(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a file names: variables, arguments, attributes, functions, classes."""
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@pytest.mark.every_case
@pytest.mark.parametrize("path", [*FILES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_say_what_a_thing_is(path: Path) -> None:
    assert not [f"{line}: {name}" for line, name in named_in(path) if STAND_INS & {*name.lower().split("_")}]


@pytest.mark.every_case
@pytest.mark.parametrize("path", [*FILES, *PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sentences_are_plain(path: Path) -> None:
    text = text_of(path, "markdown") + (text_of(path) if path.suffix == ".ipynb" else "")
    text = re.sub(r"<!-- (\w+):begin -->.*<!-- \1:end -->", "", text, flags=re.DOTALL)  # titles of conf/
    hits = [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} (write: {instead})"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(phrase.replace(" ", r"\s+"), text, flags=re.IGNORECASE)
    ]
    assert not hits


def test_what_is_counted_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f(given):\n    own_rank = [place for place in given]\n    self.is_told = own_rank\n")
    names = {name for _, name in named_in(path) if STAND_INS & {*name.lower().split("_")}}
    assert names == {"given", "own_rank", "place", "is_told"}
