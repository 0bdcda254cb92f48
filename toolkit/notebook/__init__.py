"""Widgets for notebooks: a loss to look at, tokens of completions, a run as it goes, a batch and its weights.

Names are loaded when first used: the models behind the widgets need neither ipywidgets nor anywidget.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.notebook.batch_widget import batch_view as batch_view
    from toolkit.notebook.explorer import loss_explorer as loss_explorer
    from toolkit.notebook.token_widget import token_view as token_view
    from toolkit.notebook.watcher import watch as watch

_MODULES = {
    "batch_view": "batch_widget",
    "loss_explorer": "explorer",
    "token_view": "token_widget",
    "watch": "watcher",
}
__all__ = ["batch_view", "loss_explorer", "token_view", "watch"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"toolkit.notebook.{_MODULES[name]}"), name)
