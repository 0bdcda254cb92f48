"""``python -m toolkit.check my_file.py:my_loss``: does a policy loss keep what every policy loss must keep?

Also ``my_module:my_loss``, or the name of a registered loss; ``eps=0.3`` after it sets an option.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.errors import ConfigError, ToolkitError, say_warnings_plainly


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        _stop(message)


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    started = time.perf_counter()
    parser = _Parser(
        prog="toolkit-check",
        description="Check a policy loss: shape, scope, gradients, options, precision, masks, micro-batches, chunks.",
        epilog="example: toolkit-check my_file.py:my_ppo eps=0.3",
    )
    parser.add_argument(
        "loss", nargs="?", help="my_file.py:my_loss, my_module:my_loss, or the name of a registered loss"
    )
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the loss; defaults for the rest")
    arguments = parser.parse_args()
    if arguments.loss is None:
        _stop("name a policy loss: toolkit-check my_file.py:my_loss (then option=value for each option to change)")
    try:
        options = _options(arguments.options)
        from toolkit.conformance_suite import load_subject, report, run_suite  # loads torch

        subject = load_subject(arguments.loss, options)
    except ToolkitError as error:
        _stop(str(error))
    outcomes = run_suite(subject)
    _say(report(subject, outcomes, time.perf_counter() - started))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise SystemExit(1)


def _say(text: str) -> None:
    """Print; whoever reads may stop early, as ``head`` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1) from None


def _options(given: list[str]) -> dict[str, object]:
    for word in given:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not an option of the loss; write option=value, such as eps=0.3")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(given)}: {str(error).splitlines()[0]}") from None
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


if __name__ == "__main__":
    main()
