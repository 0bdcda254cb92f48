"""The registry of policy losses: one decorated function each, with its own typed hyper-parameters.

A policy loss is a function ``f(t, *, option=default, ...) -> [N] token losses``: no mask, no mean, no rank. What it
declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in losses import no torch, so that the command line knows every option without loading it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.functional.options import is_same_source, options_model
from toolkit.schema import Config, located

Scope = Literal["token", "sequence", "group", "batch"]
"""What one token's loss depends on: itself, its sequence, its group (a prompt's sequences), or the whole step."""
Need = Literal["ref_logprobs", "rollout_logprobs", "teacher_logprobs", "entropies"]
"""What a loss may need beside log-probabilities, old log-probabilities and advantages."""


@dataclass(frozen=True)
class PolicyLoss:
    """A registered policy loss."""

    name: str
    function: Callable[..., Any]
    scope: Scope
    options_model: type[Config]
    """Validates the keyword-only parameters of `function`."""
    needs: tuple[Need, ...] = ()
    """What every item must have for it."""
    aggregation: str | None = None
    """The aggregation of its paper, where another one is known to be wrong or to change what it does."""
    formula: str = ""
    """One token's loss in plain characters, ``{option}`` standing for the value of an option. ``[a // b]`` reads a,
    or b where an option in a is None; ``[a]`` is then left out. ``[<?flag>a // b]`` reads a where an option is true;
    `toolkit.losses.facts.filled` has all of it."""

    def options(self, given: Mapping[str, Any], where: str = "policy_loss_cfg") -> dict[str, Any]:
        """Validate `given` and fill in the defaults.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
        """
        with located(where):
            return self.options_model(**given).model_dump()


_LOSSES: dict[str, PolicyLoss] = {}


def register_policy_loss(
    name: str,
    *,
    scope: Scope = "token",
    needs: tuple[Need, ...] = (),
    aggregation: str | None = None,
    formula: str = "",
    overwrite: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function selectable as ``policy_loss=<name>`` and ``policy_loss_cfg=dict(loss_type="<name>")``.

    Args:
        name: how it is picked.
        scope: "token" when one token's loss depends on that token alone: only then may the tokens be processed in
            chunks, each with its own backward. "sequence", "group" or "batch" when it uses statistics of other tokens
            (``t.segment_mean`` and its kin, or a mean over everything).
        needs: what every item must have for it, such as "ref_logprobs"; checked before the first forward.
        aggregation: the one of its paper; ``python -m toolkit.explain`` warns when another one is chosen.
        formula: one token's loss for ``explain``, e.g. ``"-min(r A, clip(r, 1 - {eps}, 1 + {eps}) A)"``.
        overwrite: replace a loss of the same name instead of refusing (use it when you re-run a notebook cell).

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ConfigError: the name is taken by another function, the scope is unknown, or a parameter of the function
            has no default or may be passed by position.
    """
    if scope not in get_args(Scope):
        raise ConfigError(f"scope={scope!r} of policy loss {name!r} is unknown; choose {listed(get_args(Scope))}")
    unknown = [need for need in needs if need not in get_args(Need)]
    if unknown:
        raise ConfigError(
            f"policy loss {name!r} needs {unknown[0]!r}, which no item has; choose {listed(get_args(Need))}"
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _LOSSES.get(name)
        if known is not None and not overwrite and not is_same_source(known.function, function):
            raise ConfigError(
                f"policy loss {name!r} is already registered by {known.function.__module__}.{known.function.__name__}; "
                "choose another name, or pass overwrite=True"
            )
        options = options_model("policy loss", name, function, reserved=("loss_type",))
        _LOSSES[name] = PolicyLoss(name, function, scope, options, needs, aggregation, formula)
        return function

    return decorate


def policy_loss(name: str) -> PolicyLoss:
    """Return the registered policy loss called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name in _LOSSES:  # it is asked for in every chunk; listing the modules takes longer
        return _LOSSES[name]
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
