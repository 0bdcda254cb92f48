"""The loss that is checked: found in a user's file or among the registered ones, and called on copies of tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from toolkit.compose.plugins import load_plugins
from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.functional.declared_fields import declared, fields_declared, place_of, tensors_of, undeclared
from toolkit.functional.policy.registry import PolicyLoss, policy_loss, policy_loss_names, register_policy_loss
from toolkit.functional.scope_check import check_token_losses
from toolkit.functional.terms import PolicyTerms

__all__ = ["Failed", "NotApplicable", "Subject", "fields_declared", "load_subject", "place_of", "tensors_of"]


class Failed(Exception):
    """A check did not pass; the message says what was seen and what to do."""


class NotApplicable(Exception):
    """A check does not apply to this loss; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A registered policy loss and complete options."""

    loss: PolicyLoss
    options: Mapping[str, Any]

    def __call__(self, terms: PolicyTerms, options: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Return token losses and the gradient of their sum, [N] each; `terms` are copied, whatever the loss does."""
        copies: dict[str, Any] = {name: value.clone() for name, value in tensors_of(terms)}
        leaf = copies["logprobs"].detach().requires_grad_()
        with torch.enable_grad():
            copies["logprobs"] = leaf * 1  # a function of the leaf: an in-place change of it is seen, not refused
            chosen = self.options if options is None else options
            given = replace(terms, reported={}, reported_means={}, **copies)
            try:
                values = self.loss.function(self.declared(given, chosen), **chosen)
            except Exception:  # the user's function may raise anything
                words = undeclared(self.loss, chosen, terms)
                if words:
                    raise Failed(words) from None
                raise
            check_token_losses(values, leaf, self.loss.name)
            total = values.sum()
        if not total.requires_grad:
            return values.detach(), torch.zeros_like(leaf)
        found = torch.autograd.grad(total, leaf, allow_unused=True)[0]
        return values.detach(), torch.zeros_like(leaf) if found is None else found

    def declared(self, terms: PolicyTerms, options: Mapping[str, Any] | None = None) -> PolicyTerms:
        """Return `terms` with no more than the loss asks for."""
        return declared(self.loss, self.options if options is None else options, terms)


def load_subject(what: str, options: Mapping[str, Any] | None = None) -> Subject:
    """Return the loss that `what` names, registered or not.

    Args:
        what: ``my_file.py:my_loss``, ``my_module:my_loss``, or the name of a registered loss.
        options: of that loss; defaults for the rest.

    Raises:
        ConfigError: there is no such file, function or loss, or an option is wrong.
    """
    source, found, name = what.rpartition(":")
    if not found and what.endswith(".py"):
        raise ConfigError(f"{what!r} names a file; name the function in it, too: {what}:my_loss")
    loss = _from_source(source, name) if found else policy_loss(what)
    return Subject(loss, loss.options(options or {}, where=loss.name))


def _from_source(source: str, name: str) -> PolicyLoss:
    load_plugins([source])
    module = _module(source)
    function = getattr(module, name, None)
    losses = [policy_loss(own) for own in policy_loss_names()]
    for loss in losses:
        is_this = loss.function is function or (function is None and loss.name == name)
        if is_this and loss.function.__module__ == module.__name__:
            return loss
    if not callable(function):
        own = [key for key, value in vars(module).items() if _is_own(value, module)]
        have = f"it has {listed(own, 'and')}" if own else "it has no functions"
        raise ConfigError(f"{source} has no function {name!r}; {have}{did_you_mean(name, own)}")
    register_policy_loss(name)(function)  # undecorated: under its own name, for this check
    return policy_loss(name)


def _is_own(value: Any, module: ModuleType) -> bool:
    is_function: Callable[[Any], bool] = callable
    return is_function(value) and getattr(value, "__module__", None) == module.__name__


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return sys.modules[source]
    path = str(Path(source).resolve())
    return next(own for own in list(sys.modules.values()) if getattr(own, "__file__", None) == path)
