"""A loss called once on made-up tokens before any work."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.distributed import rank
from toolkit.errors import ConfigError, ToolkitError, described
from toolkit.functional.scope_check import error_location, fields_declared, undeclared
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.samples import sample_fields


def rehearse(loss_cfg: BaseLossConfig) -> None:
    """Call a loss once on two made-up tokens, so bugs in your loss surface before the warm-up."""
    if isinstance(loss_cfg, CELossConfig):
        return
    policy = (loss_cfg.policy, loss_cfg.policy_options) if isinstance(loss_cfg, BaseRLLossConfig) else None
    name = f"policy loss {policy[0].name!r}" if policy else f"loss {type(loss_cfg).__name__}"
    try:
        _rehearse(loss_cfg)
    except Exception as error:  # the user's function or context may raise anything
        reason = undeclared(*policy) if policy else None
        if reason is None and isinstance(error, ToolkitError):
            raise
        location = error_location(error, policy[0]) if policy else ""
        reason = reason or f"it raised {described(error)}{location}"
        raise ConfigError(f"{name}: {reason}") from (None if policy else error)


def _rehearse(loss_cfg: BaseLossConfig) -> None:
    """Run forward and backward with the declared fields only: others that it reads may be missing later."""
    wanted = {"old_logprobs", "rollout_logprobs", "group_ids"}  # a custom loss: all that the trainer makes
    if isinstance(loss_cfg, BaseRLLossConfig):
        declared = fields_declared(loss_cfg.policy, loss_cfg.policy_options)
        wanted = {"old_logprobs", *loss_cfg.required_fields, *declared}
    if loss_cfg.needs_current(num_parts=2):  # the trainer computes them, too
        wanted.add("current_logprobs")
    logprobs = torch.full((1, 2), -1.0)
    draw = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = sample_fields(RLLossContextInputItem, logprobs, draw=draw, names=wanted - {"advantages"})
    if "group_ids" in fields:
        fields["group_ids"] += rank()  # they are numbered over all processes
    labels, advantages = torch.tensor([[0, 1]]), torch.tensor([1.0, -1.0])
    item = RLLossContextInputItem(shifted_labels=labels, advantages=advantages, **fields)
    hidden, weight = torch.zeros(1, 2, 2, requires_grad=True), torch.eye(2)
    context = loss_cfg.loss_ctx_cls
    batches_kwargs = context.build_batches_loss_kwargs([item], loss_cfg)
    context(loss_cfg, batches_kwargs[0]).forward(hidden, weight)[0].backward()
