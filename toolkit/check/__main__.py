"""``python -m toolkit.check my_file.py:my_loss``: does a policy loss follow the rules for all policy losses?

Also ``my_module:my_loss``, or the name of a registered loss; ``eps=0.3`` after it sets an option. ``--distributed 2``
checks instead that two processes give the gradient of one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.errors import ConfigError, ToolkitError, first_line, print_text, say_warnings_plainly

if TYPE_CHECKING:
    from toolkit.check.suite import Outcome

MOST_PROCESSES = 16
"""Each takes about 300 MB; more would show nothing new."""


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line."""

    def error(self, message: str) -> NoReturn:
        _stop(message)


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    started = time.perf_counter()
    parser = _Parser(
        prog="toolkit-check",
        description="Check a policy loss: shape, scope, gradients, options, precision, masks, micro-batches, chunks.",
        epilog="examples: toolkit-check my_file.py:my_ppo eps=0.3; toolkit-check --distributed 2 my_file.py:my_ppo",
    )
    parser.add_argument(
        "loss", nargs="?", help="my_file.py:my_loss, my_module:my_loss, or the name of a registered loss"
    )
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the loss; defaults for the rest")
    parser.add_argument(
        "--distributed",
        metavar="N",
        help="start N processes (gloo) and check that loss, gradients and metrics equal those of one process, for "
        "several numbers of micro-batches, packed rows and sequence-parallel shards; without a loss: cross-entropy, "
        "OREAL and one policy loss of each scope",
    )
    arguments = parser.parse_args()
    if arguments.loss is None and arguments.distributed is None:
        _stop("name a policy loss: toolkit-check my_file.py:my_loss (then option=value for each option to change)")
    try:
        options = _options(arguments.options)
        _check_source(arguments.loss)
        if arguments.distributed is not None:
            title, outcomes = _distributed(_processes(arguments.distributed), arguments.loss, options)
        else:
            from toolkit.check.suite import load_subject, run_suite, title_of  # loads torch

            subject = load_subject(arguments.loss, options)
            title, outcomes = title_of(subject), run_suite(subject)
    except ToolkitError as error:
        _stop(str(error))
    from toolkit.check.suite import report_of

    print_text(report_of(title, outcomes, time.perf_counter() - started))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise SystemExit(1)


def _check_source(what: str | None) -> None:
    """Raise if a named file does not exist or is not valid Python, before torch is loaded."""
    source = (what or "").rpartition(":")[0]
    if not source.endswith(".py"):
        return
    path = Path(source).resolve()
    if not path.is_file():
        raise ConfigError(f"file {source!r} does not exist (looked for {path})")
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        raise ConfigError(f"{source!r} is not valid Python: {getattr(error, 'msg', error)} ({where})") from None


def _processes(number: str) -> int:
    if not number.isdecimal() or not 2 <= int(number) <= MOST_PROCESSES:
        raise ConfigError(
            f"--distributed {number}: give the number of processes, 2 to {MOST_PROCESSES}, before the loss: "
            "toolkit-check --distributed 2 my_file.py:my_loss"
        )
    return int(number)


def _distributed(processes: int, what: str | None, options: dict[str, object]) -> tuple[str, list[Outcome]]:
    from toolkit.check.process_checks import run_spread
    from toolkit.check.suite import load_subject, title_of

    title = "losses of every scope" if what is None else title_of(load_subject(what, options))
    return f"{title}, {processes} processes", run_spread(processes, what, options)


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1) from None


def _options(assignments: list[str]) -> dict[str, object]:
    for assignment in assignments:
        if "=" not in assignment:
            raise ConfigError(f"{assignment!r} is not an option of the loss; write option=value, such as eps=0.3")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(assignments))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(assignments)}: {first_line(error)}") from None
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


if __name__ == "__main__":
    main()
