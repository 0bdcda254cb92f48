"""A loss computed inside the forward of the model that a trainer wraps.

DDP and FSDP hook the forward of what they wrap, and gather weights there. So the model gets one more argument,
``toolkit_loss``; without it, the forward is the usual one.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from toolkit.head.adapters import find_head
from toolkit.models.policy import AnyLossConfig, Policy, check_head


def fitted_loss(lm: Any, loss_cfg: AnyLossConfig) -> AnyLossConfig:
    """Return `loss_cfg` with the scale and soft cap of the logits of `lm`, compared with its logits on a few tokens.

    Raises:
        ConfigError: the model has no trunk and head that a loss can use, or another scale than the loss.
    """
    policy = Policy(lm)
    check_head(policy, lm.get_input_embeddings().weight.shape[0])
    return policy.fitted(loss_cfg)


def accept_loss(lm: Any) -> None:
    """Let ``lm(..., toolkit_loss=context)`` return loss and metrics of that context instead of logits.

    `lm` is a causal language model without PEFT's wrapper, which passes the argument on. Trunk and head are looked up
    in each call, because PEFT and FSDP replace them.
    """
    usual = lm.forward

    @functools.wraps(type(lm).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, toolkit_loss: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if toolkit_loss is None:
            return usual(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        head = find_head(self)
        output = head.trunk(*args, **{**kwargs, "use_cache": False})
        return toolkit_loss.forward(*head.inputs(output.last_hidden_state))

    lm.forward = types.MethodType(forward, lm)
