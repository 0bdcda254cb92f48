"""Everything that can be chosen, as a table: made from the registries and from the title lines of ``conf/``; no torch.

Nothing is repeated here, so ``python -m toolkit.explain --list`` and the tables of ``tutorials/reference/losses.md``
cannot drift from the code.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit.compose.overrides import PRESET
from toolkit.compose.schemas import conf_dir
from toolkit.explain.facts import AGGREGATIONS, KL_EQUATIONS, equation, title_of
from toolkit.explain.tables import Rows, aligned, markdown_table
from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.kl_facts import GRADIENT_FACTS, KL_NAMES
from toolkit.functional.policy.registry import policy_loss, policy_loss_names

BEGIN, END = "<!-- losses:begin -->", "<!-- losses:end -->"
"""Markers before and after the generated part of a page."""
CHOICES = (("loss", "Losses"), ("correction", "Corrections of sampler and trainer"))
"""Groups of ``conf/`` whose tables need nothing but their files."""


@dataclass(frozen=True)
class Entry:
    """One line of a table."""

    override: str
    """What selects it on the command line."""
    title: str
    facts: str = ""
    """Scope, formula or other facts, in plain characters."""
    source: str = ""
    scope: str = ""
    """Of a policy loss."""
    aggregation: str = ""
    """Of its paper."""


def _policy_losses() -> Iterator[Entry]:
    """Yield the registered policy losses with their formulas at the default options."""
    for name in policy_loss_names():
        loss = policy_loss(name)
        formula = f"`{equation(loss, loss.options({}))}`"
        title = title_of(loss.function) if loss.alias_of is None else f"Another name for {loss.alias_of}"
        wanted = loss.aggregation or "any"
        yield Entry(f"policy_loss={name}", title, formula, loss.facts.source, loss.scope, wanted)


def _kl_terms() -> Iterator[Entry]:
    """Yield the choices of the KL term, with what each does in expectation."""
    for path in _files("kl"):
        settings = yaml.safe_load(path.read_text()) or {}
        estimator, gradient = settings.get("kl_loss_type"), settings.get("kl_gradient", "as_is")
        facts = ""
        if estimator in KL_NAMES:
            fact = GRADIENT_FACTS[KL_NAMES[estimator], gradient]
            unbiased = "unbiased" if fact.value_unbiased else "biased"
            facts = f"{KL_EQUATIONS[fact.estimator]}; value {unbiased}, expected gradient {fact.expected_gradient}"
        yield _of_file(path, facts)


def _aggregations() -> Iterator[Entry]:
    """Yield the aggregations with the weight of one token."""
    words = {"length": "L", "positive_weight": "w+", "negative_weight": "w-"}
    for path in _files("aggregation"):
        yield _of_file(path, f"weight {AGGREGATIONS[path.stem].weight.format_map(words)}")


def _advantages() -> Iterator[Entry]:
    for estimator in map(advantage, advantage_names()):
        facts = f"per {estimator.level}"
        yield Entry(f"advantage={estimator.name}", title_of(estimator.function), facts, estimator.source)


def _sections() -> dict[str, list[Entry]]:
    """Return the entries of each table, without other projects' losses."""
    return {
        "Policy losses": list(_policy_losses()),
        "KL terms": list(_kl_terms()),
        "Aggregations": list(_aggregations()),
        "Advantages": list(_advantages()),
        **{title: [_of_file(path) for path in _files(group)] for group, title in CHOICES},
    }


def _presets() -> dict[str, list[str]]:
    """Return the names of other projects' losses, by project."""
    by_project: dict[str, list[str]] = {}
    for path in sorted(Path(conf_dir(), "loss", PRESET).glob("*/*.yaml")):
        by_project.setdefault(path.parent.name, []).append(path.stem)
    return by_project


def _files(group: str) -> list[Path]:
    return sorted(Path(conf_dir(), group).glob("*.yaml"))


def _of_file(path: Path, facts: str = "") -> Entry:
    """Return the entry of a file of ``conf/``: title and source are its comment before and after ``# Source:``."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    title, _, source = "\n".join(comment).partition("\nSource:")
    title, source = (" ".join(text.split()).rstrip(".") for text in (title, source))
    return Entry(f"{path.parent.name}={path.stem}", title, facts, source)


# -------------------------------------------------------------------- as text


def listing() -> str:
    """Return everything that can be chosen as plain text: what selects it, its title, scope and source."""
    tables = {title: [(entry.override, _summary(entry)) for entry in entries] for title, entries in _sections().items()}
    presets = [(project, ", ".join(names)) for project, names in _presets().items()]
    tables[f"Other projects' losses (loss={PRESET}<project>/<name>)"] = presets
    return "\n\n".join(f"{title}\n{textwrap.indent(aligned(rows, left=2), '  ')}" for title, rows in tables.items())


def _summary(entry: Entry) -> str:
    source = entry.source.partition(";")[0]
    return (f"[{entry.scope}] " if entry.scope else "") + entry.title + (f" ({source})" if source else "")


def markdown() -> str:
    """Return the tables of the page: paper -> override -> equation, and the other choices in short."""
    losses, *others = _sections().items()
    lines = [
        "## Policy losses",
        "",
        "One token's policy loss, with default numbers; A: the advantage, sg(x): x without gradient.",
        "For details run `python -m toolkit.explain policy_loss=<name> ...`.",
    ]
    head = ("override", "what it does", "equation", "source", "aggregation of its paper")
    lines.append(_table([head, *((f"`{e.override}`", e.title, e.facts, e.source, e.aggregation) for e in losses[1])]))
    for title, entries in others:
        head_of_others = ("override", "what it does", "facts", "source")
        rows = [(f"`{e.override}`", e.title, e.facts, e.source) for e in entries]
        lines += [f"\n## {title}", _table([head_of_others, *rows])]
    presets = [(project, ", ".join(f"`{name}`" for name in names)) for project, names in _presets().items()]
    lines += ["\n## Other projects", _table([(f"project (`loss={PRESET}<project>/<name>`)", "names"), *presets])]
    return "\n".join(lines)


def _table(rows: Rows) -> str:
    return f"\n{markdown_table(rows, left=len(rows[0]))}"


def with_markdown(page: str) -> str:
    """Return the text of a page with its generated part updated.

    Raises:
        ValueError: it has no such part.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"it has no {BEGIN} ... {END} for the tables; add these two lines")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"
