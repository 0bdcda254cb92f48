"""The loss to check: loaded from a user's file or the registry, and called on copies of tensors."""

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
from toolkit.functional.declared_fields import declared, error_location, fields_declared, tensors_of, undeclared
from toolkit.functional.policy.registry import PolicyLoss, policy_loss, policy_loss_names, register_policy_loss
from toolkit.functional.scope_check import check_token_losses
from toolkit.functional.terms import PolicyTerms

__all__ = ["Failed", "NotApplicable", "Subject", "error_location", "fields_declared", "load_subject", "tensors_of"]


class Failed(Exception):
    """A check did not pass; the message says what is wrong and what to do."""


class NotApplicable(Exception):
    """A check does not apply to this loss; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A registered policy loss and complete options."""

    loss: PolicyLoss
    options: Mapping[str, Any]

    def __call__(self, terms: PolicyTerms, options: Mapping[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Return token losses and the gradient of their sum, [N] each; the loss gets copies of `terms`."""
        copies: dict[str, Any] = {name: value.clone() for name, value in tensors_of(terms)}
        leaf = copies["logprobs"].detach().requires_grad_()
        with torch.enable_grad():
            copies["logprobs"] = leaf * 1  # not a leaf, so an in-place change is noticed instead of raising
            chosen = self.options if options is None else options
            copied = replace(terms, reported={}, reported_means={}, **copies)
            try:
                values = self.loss.function(self.declared(copied, chosen), **chosen)
            except Exception:  # the user's function may raise anything
                words = undeclared(self.loss, chosen, terms)
                if words:
                    raise Failed(words) from None
                raise
            check_token_losses(values, leaf, self.loss.name)
            total = values.sum()
        if not total.requires_grad:
            return values.detach(), torch.zeros_like(leaf)
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0]
        return values.detach(), torch.zeros_like(leaf) if gradient is None else gradient

    def declared(self, terms: PolicyTerms, options: Mapping[str, Any] | None = None) -> PolicyTerms:
        """Return `terms` with only the fields that the loss declares."""
        return declared(self.loss, self.options if options is None else options, terms)


def load_subject(what: str, options: Mapping[str, Any] | None = None) -> Subject:
    """Return the loss that `what` names, registered or not.

    Args:
        what: ``my_file.py:my_loss``, ``my_module:my_loss``, or the name of a registered loss.
        options: of that loss; defaults for the rest.

    Raises:
        ConfigError: there is no such file, function or loss, or an option is wrong.
    """
    source, colon, name = what.rpartition(":")
    if not colon and what.endswith(".py"):
        raise ConfigError(f"{what!r} names a file; also name the function in it: {what}:my_loss")
    loss = _from_source(source, name) if colon else policy_loss(what)
    return Subject(loss, loss.options(options or {}, where=loss.name))


def _from_source(source: str, name: str) -> PolicyLoss:
    load_plugins([source])
    module = _module(source)
    function = getattr(module, name, None)
    losses = [policy_loss(known_name) for known_name in policy_loss_names()]
    for loss in losses:
        is_this = loss.function is function or (function is None and loss.name == name)
        if is_this and loss.function.__module__ == module.__name__:
            return loss
    if not callable(function):
        names = [key for key, value in vars(module).items() if _is_defined_in(value, module)]
        have = f"it has {listed(names, 'and')}" if names else "it has no functions"
        raise ConfigError(f"{source} has no function {name!r}; {have}{did_you_mean(name, names)}")
    register_policy_loss(name)(function)  # not decorated: register it under its name for this check
    return policy_loss(name)


def _is_defined_in(value: Any, module: ModuleType) -> bool:
    is_function: Callable[[Any], bool] = callable
    return is_function(value) and getattr(value, "__module__", None) == module.__name__


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return sys.modules[source]
    path = str(Path(source).resolve())
    return next(module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == path)
