"""``python -m toolkit.check my_file.py:my_loss``: does a policy loss keep what every policy loss must keep?

Also ``my_module:my_loss``, or the name of a registered loss; ``eps=0.3`` after it sets an option.
"""

from __future__ import annotations

import argparse
import sys
import time

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.errors import ConfigError, ToolkitError, say_warnings_plainly


def main() -> None:
    """Run the command line."""
    say_warnings_plainly()
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="toolkit-check",
        description="Check a policy loss: shape, scope, gradients, options, precision, masks, micro-batches, chunks.",
        epilog="example: toolkit-check my_file.py:my_ppo eps=0.3",
    )
    parser.add_argument("loss", help="my_file.py:my_loss, my_module:my_loss, or the name of a registered loss")
    parser.add_argument("options", nargs="*", metavar="option=value", help="options of the loss; defaults for the rest")
    arguments = parser.parse_args()
    try:
        options = _options(arguments.options)
        from toolkit.conformance_suite import load_subject, report, run_suite  # loads torch

        subject = load_subject(arguments.loss, options)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    outcomes = run_suite(subject)
    print(report(subject, outcomes, time.perf_counter() - started))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise SystemExit(1)


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
