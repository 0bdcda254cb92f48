"""Every tensor that a public function takes or returns has its shape in the docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import toolkit

ROOT = Path(toolkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
SHAPE = re.compile(r"\[|\b0-dim|\bscalar|\bany shape")


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        is_overload = isinstance(node, ast.FunctionDef) and "overload" in map(ast.unparse, node.decorator_list)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not is_overload:
            yield node


def is_tensor(annotation: ast.expr | None) -> bool:
    text = "" if annotation is None else ast.unparse(annotation)
    return re.search(r"\bTensor\b", text) is not None and "Callable" not in text


def without_shape(source: str) -> list[str]:
    """Return arguments and results of tensors that a docstring does not give a shape."""
    missing = []
    for function in public_functions(ast.parse(source).body):
        doc = ast.get_docstring(function) or ""
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        for name in [argument.arg for argument in arguments if is_tensor(argument.annotation)]:
            entry = re.search(rf"^\s*{name}: (.*?)(?=^\s*\w+: |^\s*$|\Z)", doc, re.MULTILINE | re.DOTALL)
            in_sentence = re.search(rf"`{name}`[^.]*\[|\[[^\]]*\][^.]*`{name}`", doc)
            if not (entry and SHAPE.search(entry[1])) and not in_sentence and "as in `" not in doc:
                missing.append(f"{function.lineno} {function.name}({name})")
        if is_tensor(function.returns) and not SHAPE.search(doc):
            missing.append(
                f"{function.lineno} {function.name} -> {ast.unparse(function.returns or ast.Constant(None))}"
            )
    return missing


@pytest.mark.every_case
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_tensor_has_a_shape(path: Path) -> None:
    assert not without_shape(path.read_text())


def test_every_alias_of_a_tensor_has_a_shape() -> None:
    """A function whose result is such an alias does not repeat it."""
    aliases = [
        match for path in FILES for match in re.findall(r'^(\w+): TypeAlias = "Tensor"\n(.*)', path.read_text(), re.M)
    ]
    assert len(aliases) == 3
    assert [name for name, doc in aliases if not SHAPE.search(doc)] == []


def test_a_missing_shape_is_found() -> None:
    doc = "Return what `a` [N] gives.\n\n    Args:\n        b: values.\n    "
    source = f'def f(a: Tensor, b: Tensor) -> Tensor:\n    """{doc}"""'
    assert without_shape(source) == ["1 f(b)"]
    assert without_shape("def f(a: int) -> Tensor: ...") == ["1 f -> Tensor"]
