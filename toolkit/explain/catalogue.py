"""Everything that can be chosen, as a table: made from the registries and from the title lines of ``conf/``; no torch.

Nothing is repeated here, so ``python -m toolkit.explain --list`` and the tables of ``tutorials/reference/losses.md``
cannot drift from the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit.compose.overrides import PRESET
from toolkit.compose.schemas import conf_dir
from toolkit.explain.facts import AGGREGATIONS, KL_EQUATIONS, equation, title_of
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


def policy_losses() -> list[Entry]:
    """Return the registered policy losses with their formulas at the default options."""
    entries = []
    for name in policy_loss_names():
        loss = policy_loss(name)
        formula = equation(loss, loss.options({}))
        title = title_of(loss.function) if loss.alias_of is None else f"Another name for {loss.alias_of}"
        entries.append(Entry(f"policy_loss={name}", title, formula, loss.facts.source))
    return entries


def kl_terms() -> list[Entry]:
    """Return the choices of the KL term, with what each does in expectation."""
    entries = []
    for path in _files("kl"):
        settings = yaml.safe_load(path.read_text()) or {}
        estimator, gradient = settings.get("kl_loss_type"), settings.get("kl_gradient", "as_is")
        facts = ""
        if estimator in KL_NAMES:
            fact = GRADIENT_FACTS[KL_NAMES[estimator], gradient]
            unbiased = "unbiased" if fact.value_unbiased else "biased"
            facts = f"{KL_EQUATIONS[fact.estimator]}; value {unbiased}, expected gradient {fact.expected_gradient}"
        entries.append(Entry(f"kl={path.stem}", *_titled(path, facts)))
    return entries


def aggregations() -> list[Entry]:
    """Return the aggregations with the weight of one token."""
    words = {"length": "L", "positive_weight": "w+", "negative_weight": "w-"}
    return [
        Entry(f"aggregation={path.stem}", *_titled(path, f"weight {AGGREGATIONS[path.stem].weight.format_map(words)}"))
        for path in _files("aggregation")
    ]


def advantages() -> list[Entry]:
    """Return the registered advantage estimators."""
    return [
        Entry(
            f"advantage={name}",
            title_of(advantage(name).function),
            f"per {advantage(name).level}",
            advantage(name).source,
        )
        for name in advantage_names()
    ]


def presets() -> dict[str, list[Entry]]:
    """Return the losses of other projects, by project."""
    by_project: dict[str, list[Entry]] = {}
    for path in sorted(Path(conf_dir(), "loss", PRESET).glob("*/*.yaml")):
        entry = Entry(f"loss={PRESET}{path.parent.name}/{path.stem}", *_titled(path))
        by_project.setdefault(path.parent.name, []).append(entry)
    return by_project


def _sections() -> Iterator[tuple[str, list[Entry]]]:
    yield "Policy losses", policy_losses()
    yield "KL terms", kl_terms()
    yield "Aggregations", aggregations()
    yield "Advantages", advantages()
    for group, title in CHOICES:
        yield title, [Entry(f"{group}={path.stem}", *_titled(path)) for path in _files(group)]


# -------------------------------------------------------------------- as text


def listing() -> str:
    """Return everything that can be chosen as plain text: what selects it, its title, scope and papers."""
    parts = []
    for title, entries in _sections():
        rows = [(entry.override, _first(entry.title), _papers(entry.source)) for entry in entries]
        if title == "Policy losses":
            scopes = [policy_loss(entry.override.partition("=")[2]).scope for entry in entries]
            rows = [(row[0], f"[{scope}] {row[1]}", row[2]) for row, scope in zip(rows, scopes, strict=True)]
        parts.append(_table(title, rows))
    by_project = [
        (project, ", ".join(entry.override.rpartition("/")[2] for entry in entries), "")
        for project, entries in presets().items()
    ]
    parts.append(_table(f"Other projects' losses (loss={PRESET}<project>/<name>)", by_project))
    return "\n\n".join(parts)


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    rows = list(rows)
    width = max((len(row[0]) for row in rows), default=0) + 2
    lines = [f"  {name:<{width}}{text}" + (f" ({papers})" if papers else "") for name, text, papers in rows]
    return "\n".join([title, *lines])


# -------------------------------------------------------------------- as Markdown


def markdown() -> str:
    """Return the tables of the page: paper -> override -> equation, and the other choices in short."""
    lines = [
        "## Policy losses",
        "",
        "One token's policy loss, with default numbers; A: the advantage, sg(x): x without gradient.",
        "For details run `python -m toolkit.explain policy_loss=<name> ...`.",
        "",
        "| override | what it does | equation | source | aggregation of its paper |",
        "|---|---|---|---|---|",
    ]
    for entry in policy_losses():
        wanted = policy_loss(entry.override.partition("=")[2]).aggregation or "any"
        lines.append(_row(f"`{entry.override}`", entry.title, _code(entry.facts), entry.source, wanted))
    for title, entries in list(_sections())[1:]:
        lines += ["", f"## {title}", "", "| override | what it does | facts | source |", "|---|---|---|---|"]
        lines += [_row(f"`{e.override}`", e.title, e.facts, e.source) for e in entries]
    lines += ["", "## Other projects", "", f"| project (`loss={PRESET}<project>/<name>`) | names |", "|---|---|"]
    lines += [
        _row(project, ", ".join(f"`{entry.override.rpartition('/')[2]}`" for entry in entries))
        for project, entries in presets().items()
    ]
    return "\n".join(lines)


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


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") or "-" for cell in cells) + " |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


# -------------------------------------------------------------------- titles and sources


def _files(group: str) -> list[Path]:
    return sorted(Path(conf_dir(), group).glob("*.yaml"))


def _titled(path: Path, facts: str = "") -> tuple[str, str, str]:
    """Return title, facts and source of a file of ``conf/``: its comment before and after ``# Source:``."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    title, _, source = "\n".join(comment).partition("\nSource:")
    return " ".join(title.split()).rstrip("."), facts, " ".join(source.split()).rstrip(".")


def _first(title: str) -> str:
    """Return the first sentence."""
    return re.split(r"(?<!Dr)\. ", title)[0]


def _papers(source: str) -> str:
    return ", ".join(dict.fromkeys(re.findall(r"arXiv \d{4}\.\d{4,5}", source)))
