"""`token_view`: the tokens of completions, coloured by what happened to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.notebook.charts import View
from toolkit.notebook.extra import check_extra
from toolkit.notebook.token_model import ORDERS, TokenModel, group_label
from toolkit.notebook.token_picture import token_picture
from toolkit.notebook.token_records import SIGNALS, STATUS
from toolkit.notebook.token_source import records_from

check_extra()

import anywidget  # noqa: E402
import ipywidgets as widgets  # noqa: E402
import traitlets  # noqa: E402

from toolkit.notebook.chart_widget import ChartWidget  # noqa: E402
from toolkit.notebook.static_view import WithPicture  # noqa: E402

ALL = "(all)"
"""Value of a list that stands for no filter: ipywidgets shows None as nothing."""


def token_view(
    source: Any, *, color: str | None = None, decode: Callable[[int], str] | None = None, most: int | None = None
) -> TokenView:
    """Show completions, their tokens coloured by log-probability, ratio, advantage or what clipped them.

    Args:
        source: a run's folder or its ``samples.jsonl``, a Parquet file of TRL, a ``.jsonl`` file of verl or prime-rl, a
            folder of such files, items of a batch, or samples as mappings.
        color: a name in `SIGNALS` to begin with; None: the first that there is.
        decode: the text of a token id, for items, such as ``tokenizer.decode``; None: the number.
        most: completions, evenly chosen; None: all.

    Raises:
        DataError: the source is empty, or of a kind that is not known.
        ConfigError: the tokens do not have what `color` names.
    """
    model = TokenModel(records_from(source, decode=decode, most=most))
    if color is not None:
        known = model.signals()
        if color not in known:
            raise ConfigError(
                f"color={color!r} is not known of these tokens; choose {listed(known)}{did_you_mean(color, known)}"
            )
        model.signal = color
    return TokenView(model)


class TokenCanvas(anywidget.AnyWidget):
    """The tokens on a canvas; `data` is sent once, `view` says what is shown of it."""

    _esm = (files("toolkit.notebook") / "tokens.js").read_text(encoding="utf-8")
    data = traitlets.Unicode("[]").tag(sync=True)
    view = traitlets.Unicode("{}").tag(sync=True)


class TokenView(WithPicture):
    """The widget; `model` is its state."""

    def __init__(self, model: TokenModel) -> None:
        self.model = model
        self.canvas = TokenCanvas(data=json.dumps(model.as_data(), separators=(",", ":")), view=self._view())
        self.charts = ChartWidget()
        self._status = widgets.Label()
        self.charts.on_click(self._toggle_bin)
        super().__init__([*self._controls(), self.canvas, self.charts])
        self._draw()

    def picture(self) -> bytes:
        """Return the first completions as a PNG."""
        return token_picture(self.model)

    def summary(self) -> str:
        """Return how much is shown and by what it is coloured."""
        return f"{self.model.status()}, coloured by {SIGNALS.get(self.model.signal, 'nothing')}"

    def _charts(self) -> View:
        return self.model.charts()

    def _view(self) -> str:
        return json.dumps(self.model.as_view(), separators=(",", ":"))

    def _draw(self) -> None:
        self.canvas.view = self._view()
        self.charts.show(self._charts())
        self._status.value = self.model.status()

    def _set(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)
        self._draw()

    def _toggle_bin(self, key: str) -> None:
        if key:
            self._set("bins", self.model.bins ^ {int(key)})

    def _controls(self) -> list[widgets.Widget]:
        model = self.model
        signals = [(SIGNALS[name], name) for name in model.signals()] or [("nothing", "")]
        steps = [("all steps", ALL), *((f"step {step + 1}", step) for step in model.steps())]
        groups = list(dict.fromkeys(record.group for record in model.records if record.group))
        prompts = [("all prompts", ALL), *((group_label(group)[:40], group) for group in groups)]
        color = self._tied(
            widgets.Dropdown(options=signals, value=model.signal, description="colour by"), "signal", "360px"
        )
        search = widgets.Text(placeholder="text in prompt or completion", description="search", continuous_update=True)
        first = [color, self._tied(search, "text", "320px"), self._status]
        second = [
            self._tied(widgets.Dropdown(options=steps, value=ALL), "step", "130px"),
            self._tied(widgets.Dropdown(options=prompts, value=ALL), "group", "180px"),
            self._tied(widgets.Dropdown(options=list(ORDERS), value=model.order), "order", "190px"),
            self._tied(widgets.Checkbox(description="side by side", indent=False), "is_grouped", "120px"),
        ]
        if any(STATUS in record.tokens for record in model.records):
            box = widgets.Checkbox(description="only with clipped or rejected tokens", indent=False)
            second.append(self._tied(box, "only_marked", "270px"))
        wrap = {"flex_flow": "row wrap"}
        return [widgets.HBox(first, layout=wrap), widgets.HBox(second, layout=wrap)]

    def _tied(self, control: widgets.Widget, name: str, width: str) -> widgets.Widget:
        control.layout.width = width
        control.observe(lambda change: self._set(name, None if change["new"] == ALL else change["new"]), names="value")
        return control
