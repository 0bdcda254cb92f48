"""Every deliberate breakage of the package is noticed by the tests that are named for it."""

from __future__ import annotations

import pytest

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import LineGone, Mutation
from tests.mutations.runner import ROOT, run_all

FEWEST = 80


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) >= FEWEST
    assert len(set(names)) == len(names)


@pytest.mark.every_case
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_line_is_still_there(mutation: Mutation) -> None:
    assert mutation.apply(ROOT) != (ROOT / mutation.file).read_text()
    for test in mutation.tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test


def test_a_line_that_is_gone_or_ambiguous_is_an_error(tmp_path) -> None:
    (tmp_path / "one.py").write_text("if a:\n    x = 1\ny = 2\nif b:\n    x = 1\n")

    def mutation(line: str, after: str = "") -> Mutation:
        return Mutation(name="n", file="one.py", line=line, becomes="x = 2", tests=(), after=after)

    assert mutation("y = 2").apply(tmp_path) == "if a:\n    x = 1\nx = 2\nif b:\n    x = 1\n"
    assert mutation("x = 1", after="if b:").apply(tmp_path) == "if a:\n    x = 1\ny = 2\nif b:\n    x = 2\n"
    for line, after in (("x = 1", ""), ("z = 1", ""), ("y = 2", "if b:"), ("x = 1", "if c:")):
        with pytest.raises(LineGone):
            mutation(line, after).apply(tmp_path)


@pytest.mark.slow
def test_every_mutation_is_caught() -> None:
    missed = [verdict for verdict in run_all(MUTATIONS) if verdict.status != "caught"]
    assert not missed, "\n".join(f"{one.mutation.name}: {one.status} {one.by}" for one in missed)
