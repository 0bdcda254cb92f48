"""The registry of policy losses: one decorated function each, with its own typed hyper-parameters.

A policy loss is a function ``f(t, *, option=default, ...) -> [N] token losses``: no mask, no mean, no rank. What it
declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in losses import no torch, so that the command line knows every option without loading it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import create_model

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.schema import Config, located

Scope = Literal["token", "sequence", "batch"]
"""What one token's loss depends on: itself, its whole sequence, or the whole micro-batch."""


@dataclass(frozen=True)
class PolicyLoss:
    """A registered policy loss."""

    name: str
    function: Callable[..., Any]
    scope: Scope
    options_model: type[Config]
    """Validates the keyword-only parameters of `function`."""

    def options(self, given: Mapping[str, Any], where: str = "policy_loss_cfg") -> dict[str, Any]:
        """Validate `given` and fill in the defaults.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
        """
        with located(where):
            return self.options_model(**given).model_dump()


_LOSSES: dict[str, PolicyLoss] = {}


def register_policy_loss(
    name: str, *, scope: Scope = "token", overwrite: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function selectable as ``policy_loss=<name>`` and ``policy_loss_cfg=dict(loss_type="<name>")``.

    Args:
        name: how it is picked.
        scope: "token" when one token's loss depends on that token alone: only then may the tokens be processed in
            chunks, each with its own backward. "sequence" or "batch" when it uses statistics of other tokens
            (``t.segment_mean`` and its kin, or a mean over everything).
        overwrite: replace a loss of the same name instead of refusing (use it when you re-run a notebook cell).

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ConfigError: the name is taken by another function, the scope is unknown, or a parameter of the function
            has no default or may be passed by position.
    """
    if scope not in get_args(Scope):
        raise ConfigError(f"scope={scope!r} of policy loss {name!r} is unknown; choose {listed(get_args(Scope))}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _LOSSES.get(name)
        same_source = known is not None and (
            (known.function.__module__, known.function.__qualname__) == (function.__module__, function.__qualname__)
        )
        if known is not None and not overwrite and not same_source:
            raise ConfigError(
                f"policy loss {name!r} is already registered by {known.function.__module__}.{known.function.__name__}; "
                "choose another name, or pass overwrite=True"
            )
        _LOSSES[name] = PolicyLoss(name, function, scope, _options_model(name, function))
        return function

    return decorate


def policy_loss(name: str) -> PolicyLoss:
    """Return the registered policy loss called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    names = policy_loss_names()
    if name not in names:
        raise ConfigError(
            f"loss_type={name!r} is not a policy loss; choose {listed(names)}{did_you_mean(str(name), names)}; "
            "a loss of your own is registered with @toolkit.register_policy_loss"
        )
    return _LOSSES[name]


def policy_loss_names() -> list[str]:
    """Return the names of all registered policy losses, built-in ones included, sorted."""
    package = importlib.import_module("toolkit.functional.policy")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_LOSSES)


def _options_model(name: str, function: Callable[..., Any]) -> type[Config]:
    """Build the options class from the keyword-only parameters of `function`."""
    _, *options = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {}
    for option in options:
        if option.kind is not option.KEYWORD_ONLY or option.default is option.empty:
            raise ConfigError(
                f"parameter {option.name!r} of policy loss {name!r} must be keyword-only with a default: "
                f"def {function.__name__}(t, *, {option.name}=...)"
            )
        if option.name == "loss_type":
            raise ConfigError(f"policy loss {name!r} has an option called 'loss_type'; that word picks the loss itself")
        fields[option.name] = (_annotation(option.annotation, function), option.default)
    return create_model(f"{name}_options", __base__=Config, **fields)


def _annotation(annotation: Any, function: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    # Strings come from `from __future__ import annotations`; only options are evaluated, so that the annotations
    # of tensors may name types that are imported for type checking alone.
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError as error:
        raise ConfigError(
            f"an option of policy loss {function.__name__!r} is annotated {annotation!r}, but {error}; import the type "
            "outside of TYPE_CHECKING"
        ) from None
