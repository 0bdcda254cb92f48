"""Loss configs, items, kwargs and contexts, which join functional, head and calibration in the paper's order.

Helpers for custom loops load on first use, because configs must be readable before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.losses.auxiliary import auxiliary_weights
    from toolkit.losses.packing import in_order, pack, plan_rows, unpack

_MODULES = {"auxiliary_weights": "auxiliary", **dict.fromkeys(("in_order", "pack", "plan_rows", "unpack"), "packing")}

__all__ = ["auxiliary_weights", "in_order", "pack", "plan_rows", "unpack"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'toolkit.losses' has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolkit.losses.{_MODULES[name]}"), name)
