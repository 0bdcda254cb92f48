"""Progress bars of transformers, which would fill log files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def without_bars(*, is_wanted_on_terminals: bool = False) -> Iterator[None]:
    """Show no progress bars inside; with `is_wanted_on_terminals` only where there is no terminal."""
    was_enabled = logging.is_progress_bar_enabled()
    if not (is_wanted_on_terminals and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
