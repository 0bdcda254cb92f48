"""What to install for the widgets; nothing else of the package needs ipywidgets or anywidget."""

from __future__ import annotations

from importlib.util import find_spec

INSTALL = 'pip install "rl-loss-toolkit[notebook]"'


class MissingExtra(ImportError):
    """The widgets are used without the packages that draw them."""


def check_extra() -> None:
    """Raise if a package of the extra ``notebook`` is missing.

    Raises:
        MissingExtra: with the command that installs it.
    """
    missing = [name for name in ("ipywidgets", "anywidget", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"toolkit.notebook needs {' and '.join(missing)}: {INSTALL}")
