"""The package and its tests stay within what Python 3.11, 3.12 and 3.13 have in common, as far as 3.11 can tell."""

from __future__ import annotations

import ast
import importlib.metadata
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
REMOVED = """
aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib ossaudiodev
pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
"""
"""Modules of the standard library that 3.12 or 3.13 no longer has (PEP 594, "What's New in Python 3.12")."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", ["toolkit", "tests"])
def test_syntax_and_modules(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that 3.12 warns of
            tree = ast.parse(path.read_text(), str(path), feature_version=(3, 11))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not set(REMOVED.split()) & {name.partition(".")[0] for name in names}, path


def test_metadata() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    for version in VERSIONS:
        assert f"{version}.0" in supported
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


@pytest.mark.parametrize("extra", ["", "train"])
def test_dependencies_take_these_versions(extra: str) -> None:
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, listed):
        try:
            allowed = importlib.metadata.metadata(requirement.name).get("Requires-Python") or ""
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{requirement.name} is not installed")
        for version in VERSIONS:
            assert f"{version}.0" in SpecifierSet(allowed), requirement.name
