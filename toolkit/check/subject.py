"""The loss to check: loaded from a user's file or the registry, and called on copies of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.compose.plugins import load_plugins
from toolkit.errors import ConfigError, did_you_mean, listed, nearest
from toolkit.functional.policy.registry import PolicyLoss, policy_loss, policy_loss_names, register_policy_loss
from toolkit.functional.scope_check import call_loss, check_token_losses, declared, tensors_of, undeclared
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.base import BaseLossConfig


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
                values = call_loss(self.loss, self.declared(copied, chosen), chosen)
            except ConfigError as error:
                raise Failed(str(error)) from None
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

    def __str__(self) -> str:
        options = ", ".join(f"{name}={shown_value(value)}" for name, value in self.options.items()) or "no options"
        return f"{self.loss.name} (scope {self.loss.scope}; {options})"

    def declared(self, terms: PolicyTerms, options: Mapping[str, Any] | None = None) -> PolicyTerms:
        """Return `terms` with only the fields that the loss declares."""
        return declared(self.loss, self.options if options is None else options, terms)


def shown_value(value: Any) -> str:
    """Return the value of an option for a message: 0.3, not 0.30000000000000004."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
        names = _registered_in(what) or ["my_loss"]
        raise ConfigError(f"{what!r} names a file; also name the function in it: {what}:{names[0]}")
    if not colon and "=" in what:
        raise ConfigError(f"{what!r} is an override; toolkit-check takes the name alone: {what.partition('=')[2]}")
    if not colon and what not in policy_loss_names() and nearest(what, policy_loss_names()) is None:
        raise ConfigError(
            f"{what!r} is not a policy loss (toolkit-explain --list shows all); for a function of yours, name its "
            f"file: {source_of(what)}"
        )
    loss = _from_source(source, name) if colon else policy_loss(what)
    return Subject(loss, loss.options(options or {}, where=loss.name))


def source_of(what: str) -> str:
    """Return how to name a function: ``my_loss.softclip`` is ``my_loss.py:softclip`` where there is such a file."""
    module, _, name = what.rpartition(".")
    path = Path(*module.split(".")).with_suffix(".py") if module else None
    return f"{path}:{name}" if path is not None and path.is_file() else f"my_file.py:{what}"


def _registered_in(file: str) -> list[str]:
    """Return the names of the functions of a file that are policy losses; none if it cannot be read."""
    try:
        (module,) = load_plugins([file])
    except ConfigError:
        return []
    losses = {policy_loss(name).function for name in policy_loss_names()}
    return [name for name, value in vars(module).items() if callable(value) and value in losses]


def _about_class(source: str, name: str, kind: type) -> str:
    """Return the error message for a class where a policy loss, a function, is expected."""
    if not issubclass(kind, BaseLossConfig):
        return f"{source}:{name} is a class; a policy loss is a function of PolicyTerms that returns [N] losses"
    return (
        f"{source}:{name} is a loss config, and toolkit.check takes a policy loss, a function; for a config write a "
        f"test that calls toolkit.testing.assert_layout_invariant({name}(...)), which compares every layout of a batch"
    )


def _from_source(source: str, name: str) -> PolicyLoss:
    (module,) = load_plugins([source])
    function = getattr(module, name, None)
    losses = [policy_loss(known_name) for known_name in policy_loss_names()]
    for loss in losses:
        is_this = loss.function is function or (function is None and loss.name == name)
        if is_this and loss.function.__module__ == module.__name__:
            return loss
    if not callable(function):
        functions = {key: value for key, value in vars(module).items() if callable(value)}
        names = [key for key, value in functions.items() if getattr(value, "__module__", None) == module.__name__]
        have = f"it has {listed(names, 'and')}" if names else "it has no functions"
        raise ConfigError(f"{source} has no function {name!r}; {have}{did_you_mean(name, names)}")
    if isinstance(function, type):
        raise ConfigError(_about_class(source, name, function))
    register_policy_loss(name)(function)  # not decorated: register it under its name for this check
    return policy_loss(name)
