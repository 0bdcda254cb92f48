"""The load-balancing loss of a mixture of experts, computed as in the model's forward.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from toolkit.errors import warn_once


def wants_router_loss(lm: Any) -> bool:
    """Return whether the model's config asks for a router loss in training (`output_router_logits`)."""
    config = getattr(lm, "config", None)
    return bool(getattr(config, "output_router_logits", False)) and router_coef(lm) != 0


def router_coef(lm: Any) -> float:
    """Return the coefficient of the router loss in the model's forward."""
    coefficient = getattr(lm, "router_aux_loss_coef", None)
    return float(getattr(lm.config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient)


def router_loss(lm: Any, router_logits: Any, attention_mask: Tensor) -> Tensor:
    """Return the model's load-balancing loss of these tokens, not yet multiplied by its coefficient.

    Args:
        lm: the model, without PEFT's wrapper.
        router_logits: one [B T, experts] tensor for each layer, from the trunk.
        attention_mask: [B, T]; padding does not count.

    Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, by transformers' `load_balancing_loss_func`.
    """
    experts = getattr(lm, "num_experts", None) or getattr(lm.config, "num_local_experts", None)
    return balancing_loss_of(lm)(
        tuple(router_logits),
        experts or lm.config.num_experts,
        getattr(lm, "num_experts_per_tok", None) or lm.config.num_experts_per_tok,
        attention_mask,
    )


def balancing_loss_of(lm: Any) -> Any:
    """Return the load-balancing loss function of the model's module, None if it has none."""
    modules = [sys.modules.get(kind.__module__) for kind in type(lm).__mro__]
    return next((f for module in modules if (f := getattr(module, "load_balancing_loss_func", None)) is not None), None)


def warn_left_out(lm: Any) -> None:
    """Warn once that the router loss that the config asks for is not part of the loss."""
    warn_once(
        f"{type(lm).__name__}.config asks for a router loss (output_router_logits, coefficient {router_coef(lm)}), but "
        "it is skipped; pass auxiliary_weight to Policy.forward (toolkit.losses.auxiliary.auxiliary_weights), or set "
        "output_router_logits=False"
    )
