"""The charts as a widget: one anywidget, fed with `View`s."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from toolkit.notebook.charts import View
from toolkit.notebook.extra import check_extra

check_extra()

import anywidget  # noqa: E402
import traitlets  # noqa: E402


class ChartWidget(anywidget.AnyWidget):
    """Draws a `View`; a click on a bar is reported by its key."""

    _esm = (files("toolkit.notebook") / "charts.js").read_text(encoding="utf-8")
    view = traitlets.Unicode(View().as_json()).tag(sync=True)
    """A `View` as JSON."""
    clicked = traitlets.List(["", 0]).tag(sync=True)
    """The key of the bar and how many clicks there were: a second click on the same bar is a change, too."""

    def show(self, view: View) -> None:
        """Replace what is on the screen."""
        self.view = view.as_json()

    def on_click(self, callback: Callable[[str], Any]) -> None:
        """Call `callback` with the key of every bar that is clicked."""
        self.observe(lambda change: callback(str(change["new"][0])), names="clicked")
