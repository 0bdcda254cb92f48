"""What becomes of every recorded case: the table of ``tests/golden/README.md`` is what the code counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.functional import (
    test_golden_advantages,
    test_golden_aggregation,
    test_golden_corrections,
    test_golden_kl,
)
from tests.golden_data import IS_SHIPPED, SHIPPED
from tests.losses import test_golden_policy_losses

KINDS: dict[str, Any] = {
    "policy_loss": test_golden_policy_losses,
    "kl": test_golden_kl,
    "aggregation": test_golden_aggregation,
    "is_correction": test_golden_corrections,
    "advantage": test_golden_advantages,
}
OUTCOMES = ("matched", "adjusted", "peer's error", "missing here", "not repeatable")


def counted() -> dict[str, list[int]]:
    """Return of each kind how many cases there are, and how many of each outcome."""
    table = {}
    for kind, module in KINDS.items():
        outcomes = Counter(module.outcome(case) for case in module.CASES)
        assert set(outcomes) <= set(OUTCOMES), outcomes
        table[kind] = [len(module.CASES), *(outcomes[name] for name in OUTCOMES)]
    return {**table, "all": [sum(column) for column in zip(*table.values(), strict=True)]}


def written() -> dict[str, list[int]]:
    """Return the table of the README."""
    rows = {}
    for line in (SHIPPED / "README.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        if name.strip("`") in (*KINDS, "all") and all(cell.isdigit() for cell in cells):
            rows[name.strip("`")] = [int(cell) for cell in cells]
    return rows


@pytest.mark.skipif(not IS_SHIPPED, reason="the table is of our own cases")
def test_the_table_of_the_readme_is_what_the_code_counts() -> None:
    assert written() == counted()
