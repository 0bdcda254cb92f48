"""Loss configs, items, kwargs and contexts: functional, head and calibration joined in the order of the paper.

Helpers for loops of one's own are loaded when first used, for configs must be readable before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.losses.auxiliary import auxiliary_weights
    from toolkit.losses.packing import in_order, pack, plan_rows, unpack

_HOMES = {
    "auxiliary_weights": "auxiliary",
    "in_order": "packing",
    "pack": "packing",
    "plan_rows": "packing",
    "unpack": "packing",
}

__all__ = ["auxiliary_weights", "in_order", "pack", "plan_rows", "unpack"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit.losses' has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolkit.losses.{_HOMES[name]}"), name)
