"""From hidden states to log-probabilities, without ever holding the logits of all tokens at once.

Independent of RL, configs and ranks; a loss does not see which pass computes its scores. `token_logprobs` works in any
training loop; `fused_loss` computes a loss with the head in 3 matrix products; `explain` gives the cost of either.

They are loaded when first used, because configs read `HeadOptions` before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.head.options import HeadOptions

if TYPE_CHECKING:
    from toolkit.head.engine import explain, fused_loss, token_logprobs
    from toolkit.head.plan import HeadPlan
    from toolkit.head.scores import TokenScores

_ENGINE = dict.fromkeys(("explain", "fused_loss", "token_logprobs"), "engine")
_MODULES = {"HeadPlan": "plan", "TokenScores": "scores", **_ENGINE}

__all__ = ["HeadOptions", "HeadPlan", "TokenScores", "explain", "fused_loss", "token_logprobs"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'toolkit.head' has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolkit.head.{_MODULES[name]}"), name)
