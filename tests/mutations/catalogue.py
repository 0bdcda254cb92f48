"""Every mutation: the lists of the parts of the package, joined; names are unique."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import tests.mutations.lists as lists
from tests.mutations.mutation import Mutation


def _all() -> Iterator[Mutation]:
    for module in pkgutil.iter_modules(lists.__path__):
        yield from importlib.import_module(f"{lists.__name__}.{module.name}").MUTATIONS


MUTATIONS = tuple(_all())
