"""The command line of ``toolkit-report``, and what a multirun does at its end."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from toolkit.errors import ConfigError, ToolkitError, stopping_on_error
from toolkit.report.comparison import compare
from toolkit.report.page import MOST_SAMPLES, page
from toolkit.report.runs import METRICS, read_runs
from toolkit.report.story import remarks
from toolkit.report.table import show

ONE, SEVERAL = "report.html", "comparison.html"
"""Files that are written where no other is named."""


def main() -> None:
    """Run the command line."""
    with stopping_on_error():
        arguments = _parser().parse_args()
        runs = read_runs(arguments.runs)
        default = runs[0].folder / ONE if len(runs) == 1 else Path(arguments.runs[0]) / SEVERAL
        path = arguments.output or (default if len(arguments.runs) == 1 else Path(SEVERAL))
        console = Console(highlight=False)
        if len(runs) == 1:
            for remark in remarks(runs[0]):
                console.print(remark.text, soft_wrap=True, markup=False)
        else:
            show(compare(runs), console)
        try:
            path.write_text(page(runs, most_samples=arguments.samples), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file with --output") from None
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="toolkit-report",
        description="Write one HTML page about a run, or one that compares several; it needs no network.",
        epilog="example: toolkit-report multirun/2026-11-30/10-00-00",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a run, or a folder with several")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help=f"default: {ONE} or {SEVERAL} in the folder")
    parser.add_argument(
        "--samples",
        type=_number,
        default=MOST_SAMPLES,
        metavar="N",
        help=f"most samples on the page, evenly chosen, or all (default: {MOST_SAMPLES})",
    )
    return parser


def _number(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return int(text)


def compare_sweep(folder: str) -> None:
    """Print the comparison of the runs in a folder and write its page; say why if there is none. Never raises."""
    if not any(Path(folder).glob(f"*/{METRICS}")):  # no job has come to a step
        return
    console = Console(highlight=False)
    try:
        runs = read_runs([folder])
        if len(runs) < 2:
            return
        path = Path(folder) / SEVERAL
        path.write_text(page(runs), encoding="utf-8")
        show(compare(runs), console)
        console.print(f"comparison of {len(runs)} runs: {path}", soft_wrap=True, markup=False)
    except (ToolkitError, OSError) as error:
        print(f"note: the runs are not compared: {error}", file=sys.stderr)
