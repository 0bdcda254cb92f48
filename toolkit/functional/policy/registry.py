"""The registry of policy losses: one decorated function each, with its own typed hyper-parameters.

A policy loss is a function ``f(t, *, option=default, ...) -> [N] token losses``: no mask, no mean, no rank. What it
declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in losses import no torch, so the command line knows every option without loading it.
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
"""Fields that a loss may need besides log-probabilities, old log-probabilities and advantages."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Registered):
    """A registered policy loss."""

    config_path: ClassVar[str] = "policy_loss_cfg"

    scope: Scope
    needs: tuple[Need, ...] = ()
    """Fields that every item must have."""
    aggregation: str | None = None
    """The aggregation of its paper, where another one is known to be wrong or to change the loss."""
    formula: str = ""
    """One token's loss in plain characters, ``{option}`` standing for the value of an option. ``[a // b]`` reads a,
    or b where an option in a is None; ``[a]`` is then omitted. ``[<?flag>a // b]`` reads a where an option is true;
    `toolkit.explain.facts.filled` has all of it."""

    facts: LossFacts = NO_FACTS
    """What its formula does not show, and its source."""
    alias_of: str | None = None
    """The name of the loss that this is an alias of."""

    def fields_read(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the fields read besides log-probabilities, old ones and advantages: `needs`, and those of options."""
        divides = options.get("anchor") == "rollout" or options.get("use_rollout_weight")
        from_options = () if "rollout_logprobs" in self.needs or not divides else ("rollout_logprobs",)
        return (*self.needs, *from_options)


POLICY_LOSSES: Registry[PolicyLoss] = Registry(
    "policy loss",
    package="toolkit.functional.policy",
    key="loss_type",
    how="register your own with @toolkit.register_policy_loss",
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
        name: name to select it by.
        scope: "token" when one token's loss depends on that token alone: only then may the tokens be processed in
            chunks, each with its own backward. "sequence", "group" or "batch" when it uses statistics of other tokens
            (``t.segment_mean`` and related methods, or a mean over everything).
        needs: fields that every item must have, such as "ref_logprobs"; checked before the first forward.
        aggregation: the one of its paper; ``python -m toolkit.explain`` warns when another one is chosen.
        formula: one token's loss for ``explain``, e.g. ``"-min(r A, clip(r, 1 - {eps}, 1 + {eps}) A)"``.
        facts: what the formula does not show, and its source, for ``explain``, the tables and ``help``.
        aliases: other names of the same loss; marked as such wherever names are shown.
        overwrite: replace a loss of the same name instead of raising (use it when you re-run a notebook cell).

    Returns:
        A decorator that returns the function unchanged.

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
        ConfigError: the name is unknown; the message lists the known ones.
    """
    return POLICY_LOSSES.get(name)


def policy_loss_names() -> list[str]:
    """Return the names of all registered policy losses, built-in ones included, sorted."""
    return POLICY_LOSSES.names()
