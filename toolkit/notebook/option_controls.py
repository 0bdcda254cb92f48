"""Controls as ipywidgets, one for each option of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.errors import ConfigError
from toolkit.notebook.controls import Control
from toolkit.notebook.extra import check_extra

check_extra()

import ipywidgets as widgets  # noqa: E402

STYLE = {"description_width": "118px"}
WIDE = {"width": "330px"}
NONE = "(none)"
"""Value of a list that stands for None, which ipywidgets shows as nothing."""
OFF_WIDTH = {"width": "56px"}


def control_widget(control: Control, value: Any, on_change: Callable[[Any], None]) -> widgets.Widget:
    """Return the widget of a control, showing `value`; `on_change` gets every new value."""
    if not control.is_optional or control.kind in ("choice", "text"):
        made = _plain(control, value)
        made.observe(lambda change: on_change(_read(control, change["new"])), names="value")
        return made
    made = _plain(control, control.start if value is None else value)
    made.layout.width = "268px"
    made.disabled = value is None
    is_on = widgets.Checkbox(
        value=value is not None,
        description="on",
        indent=False,
        layout=OFF_WIDTH,
        tooltip=f"{control.name}: off is None",
    )

    def changed(_: Any) -> None:
        made.disabled = not is_on.value
        on_change(_read(control, made.value) if is_on.value else None)

    made.observe(changed, names="value")
    is_on.observe(changed, names="value")
    return widgets.HBox([made, is_on])


def _plain(control: Control, value: Any) -> widgets.Widget:
    common = {
        "description": control.name,
        "tooltip": control.meaning or control.name,
        "style": STYLE,
        "layout": WIDE,
    }
    if control.kind == "choice":
        choices = [(str(each), each) for each in control.choices]
        choices += [("none", NONE)] if control.is_optional else []
        return widgets.Dropdown(options=choices, value=NONE if value is None else value, **common)
    if control.kind == "switch":
        return widgets.Checkbox(value=bool(value), indent=True, **common)
    if control.kind == "text":
        return widgets.Text(value="" if value is None else str(value), continuous_update=False, **common)
    ends = {"min": min(control.low, value), "max": max(control.high, value), "step": control.step}
    if control.kind == "integer":
        integers = {name: int(number) for name, number in ends.items()}
        return widgets.IntSlider(value=int(value), **integers, **common)
    return widgets.FloatSlider(value=value, **ends, readout_format=_format(control.step), **common)


def _format(step: float) -> str:
    digits = max(0, len(f"{step:.10f}".rstrip("0").partition(".")[2]))
    return f".{digits}f"


def _read(control: Control, value: Any) -> Any:
    if control.kind == "choice":
        return None if value == NONE else value
    if control.kind == "text":
        return control.parsed(value)
    return round(value, 10) if isinstance(value, float) else value


def lengths_from(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "8, 32, 128".

    Raises:
        ConfigError: a part is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"lengths={text!r} must be whole numbers such as 8, 32, 128") from None
