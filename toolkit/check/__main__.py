"""``python -m toolkit.check my_file.py:my_loss``: does a policy loss follow the rules for all policy losses?

Also ``my_module:my_loss``, or the name of a registered loss; ``eps=0.3`` after it sets an option. ``--distributed 2``
checks instead that two processes give the gradient of one.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from toolkit.check.outcome import report_of
from toolkit.compose.plugins import load_plugins
from toolkit.errors import ConfigError, first_line, print_text, say_warnings_plainly, stopping_on_error

MOST_PROCESSES = 16
"""Each takes about 300 MB; more would show nothing new."""


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line."""

    def error(self, message: str) -> NoReturn:
        dashed = re.search(r"unrecognized arguments:.* --?(\w[\w-]*)[= ]?(\S*)", message)
        hint = f"; an option of the loss has no dashes: {dashed[1]}={dashed[2] or '...'}" if dashed else ""
        raise SystemExit(f"error: {message}{hint}")


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
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
    with stopping_on_error():
        if arguments.loss is None and arguments.distributed is None:
            raise ConfigError(
                "name a policy loss: toolkit-check my_file.py:my_loss (then option=value for each option to change)"
            )
        options = _options(arguments.options)
        source = (arguments.loss or "").rpartition(":")[0]
        load_plugins([source] if source.endswith(".py") else [])  # before torch, if it can be loaded at all
        number = None if arguments.distributed is None else _processes(arguments.distributed)
        from toolkit.check.subject import load_subject  # loads torch

        subject = None if arguments.loss is None else load_subject(arguments.loss, options)
        title = "losses of every scope" if subject is None else str(subject)
        if number is not None:
            from toolkit.check.process_checks import run_spread

            started = time.perf_counter()  # of the checks, not of the imports
            title, outcomes = f"{title}, {number} processes", run_spread(number, arguments.loss, options)
        else:
            from toolkit.check.suite import run_suite

            assert subject is not None
            started = time.perf_counter()
            outcomes = run_suite(subject)
    print_text(report_of(title, outcomes, time.perf_counter() - started))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise SystemExit(1)


def _processes(number: str) -> int:
    if not number.isdecimal() or not 2 <= int(number) <= MOST_PROCESSES:
        raise ConfigError(
            f"--distributed {number}: give the number of processes, 2 to {MOST_PROCESSES}, before the loss: "
            "toolkit-check --distributed 2 my_file.py:my_loss"
        )
    return int(number)


def _options(assignments: list[str]) -> dict[str, object]:
    for assignment in assignments:
        if "=" not in assignment:
            raise ConfigError(f"{assignment!r} is not an option of the loss; write option=value, such as eps=0.3")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(assignments))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(assignments)}: {first_line(error)}; write option=value, e.g. eps=0.3") from None
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


if __name__ == "__main__":
    main()
