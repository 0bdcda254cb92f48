"""The registry of policy losses: one decorated function each, with its own typed hyper-parameters.

A policy loss is a function ``f(t, *, option=default, ...) -> [N] token losses``: no mask, no mean, no rank. What it
declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in losses import no torch, so that the command line knows every option without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from toolkit.errors import ConfigError, listed
from toolkit.functional.options import options_model
from toolkit.functional.policy.facts import NO_FACTS, LossFacts
from toolkit.functional.registry import Registered, Registry, check_needs, document_source

Scope = Literal["token", "sequence", "group", "batch"]
"""What one token's loss depends on: itself, its sequence, its group (a prompt's sequences), or the whole step."""
Need = Literal["ref_logprobs", "rollout_logprobs", "teacher_logprobs", "entropies"]
"""What a loss may need beside log-probabilities, old log-probabilities and advantages."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Registered):
    """A registered policy loss."""

    place: ClassVar[str] = "policy_loss_cfg"

    scope: Scope
    needs: tuple[Need, ...] = ()
    """What every item must have for it."""
    aggregation: str | None = None
    """The aggregation of its paper, where another one is known to be wrong or to change what it does."""
    formula: str = ""
    """One token's loss in plain characters, ``{option}`` standing for the value of an option. ``[a // b]`` reads a,
    or b where an option in a is None; ``[a]`` is then left out. ``[<?flag>a // b]`` reads a where an option is true;
    `toolkit.explain.facts.filled` has all of it."""

    facts: LossFacts = NO_FACTS
    """What its formula does not show, and its source."""
    alias_of: str | None = None
    """The name of the same loss that this one is another name of."""

    def fields_read(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what it reads beside log-probabilities, old ones and advantages: `needs`, and what options ask for."""
        divides = options.get("anchor") == "rollout" or options.get("use_rollout_weight")
        own = () if "rollout_logprobs" in self.needs or not divides else ("rollout_logprobs",)
        return (*self.needs, *own)


POLICY_LOSSES: Registry[PolicyLoss] = Registry(
    "policy loss",
    package="toolkit.functional.policy",
    key="loss_type",
    how="a loss of your own is registered with @toolkit.register_policy_loss",
)


def register_policy_loss(
    name: str,
    *,
    scope: Scope = "token",
    needs: tuple[Need, ...] = (),
    aggregation: str | None = None,
    formula: str = "",
    facts: LossFacts | None = None,
    aliases: tuple[str, ...] = (),
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
        facts: what the formula does not show, and its source, for ``explain``, the tables and ``help``.
        aliases: other names of the same loss; marked as such wherever names are shown.
        overwrite: replace a loss of the same name instead of refusing (use it when you re-run a notebook cell).

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ConfigError: the name is taken by another function, the scope is unknown, or a parameter of the function
            has no default or may be passed by position.
    """
    if scope not in get_args(Scope):
        raise ConfigError(f"scope={scope!r} of policy loss {name!r} is unknown; choose {listed(get_args(Scope))}")
    check_needs(f"policy loss {name!r}", needs, get_args(Need), "no item has")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        known = NO_FACTS if facts is None else facts
        document_source(function, known.source, known.differs)
        loss = PolicyLoss(
            name=name,
            function=function,
            options_model=options_model("policy loss", name, function, reserved=("loss_type",)),
            scope=scope,
            needs=needs,
            aggregation=aggregation,
            formula=formula,
            facts=known,
        )
        POLICY_LOSSES.add(loss, overwrite=overwrite)
        for alias in aliases:
            POLICY_LOSSES.add(replace(loss, name=alias, alias_of=name), overwrite=overwrite)
        return function

    return decorate


def policy_loss(name: str) -> PolicyLoss:
    """Return the registered policy loss called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    return POLICY_LOSSES.get(name)


def policy_loss_names() -> list[str]:
    """Return the names of all registered policy losses, built-in ones included, sorted."""
    return POLICY_LOSSES.names()
