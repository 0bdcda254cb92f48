"""Check that a policy loss is a function of its tensors, before it is used: on a few made-up tokens, in milliseconds.

It must not change them in place, draw random numbers, return NaN, or divide by the number of tokens: each of these
gives another loss in chunks or micro-batches, and what follows from it looks like a wrong scope.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from toolkit.errors import ConfigError
from toolkit.functional.policy.registry import PolicyLoss
from toolkit.functional.scope_check import (
    SPREADS,
    call_loss,
    check_token_losses,
    key_of,
    made_up_terms,
    tensors_of,
    values_and_grads,
)
from toolkit.functional.terms import PolicyTerms

USUAL = 0.3
"""Spread of log pi - log pi_old in nats after an ordinary update."""
_passed: set[tuple[Any, ...]] = set()


def check_purity(loss: PolicyLoss, options: Mapping[str, Any]) -> None:
    """Check `loss` with complete `options` once; later calls with the same arguments return at once.

    Raises:
        ConfigError: it is not a function of its tensors alone, or divides by their number.
    """
    key = key_of(loss, options)
    if key in _passed:
        return
    with torch.random.fork_rng(devices=[]):  # what a run draws afterwards must not depend on whether this was the first
        why = (
            changes_inputs(loss, options)
            or changes_when_repeated(loss, options)  # first: NaN and random numbers look like any other fault
            or divides_by_number(loss, options)
        )
    if why is not None:
        raise ConfigError(f"policy loss {loss.name!r}: {why}")
    _passed.add(key)


def changes_inputs(loss: PolicyLoss, options: Mapping[str, Any]) -> str | None:
    """Say which tensor a loss changes in place; None if it changes none."""
    terms = made_up_terms(USUAL)
    # Not a leaf, so a change in place is noticed here instead of raising in torch.
    with torch.enable_grad():
        terms = replace(terms, logprobs=terms.logprobs.clone().requires_grad_() * 1)
        before = {name: (value.detach().clone(), value._version) for name, value in tensors_of(terms)}
        values = call_loss(loss, replace(terms, reported={}, reported_means={}), options)
    check_token_losses(values, terms.logprobs, loss.name)
    for name, value in tensors_of(terms):
        if value._version != before[name][1] or not torch.equal(value.detach(), before[name][0]):
            return CHANGED.format(name)
    return None


CHANGED = (
    "it changes t.{} in place, but other terms of the loss and the next chunk also read it; use the form without the "
    "underscore (x = x.clamp(...), not x.clamp_(...); x = x * 2, not x *= 2)"
)


def changes_when_repeated(loss: PolicyLoss, options: Mapping[str, Any]) -> str | None:
    """Say that a loss gives NaN, or other values when it is called again; None if it does neither."""
    for spread in SPREADS:
        terms = made_up_terms(spread)
        first = values_and_grads(loss, options, terms)
        for what, values in zip(("loss", "gradient"), first, strict=True):
            if bool(values.isnan().any()):
                return (
                    f"the {what} is NaN at {int(values.isnan().sum())} of {len(values)} made-up tokens with log ratios "
                    f"of about {spread:g} nats; clamp what log and sqrt are taken of (advantages are negative, too), "
                    "and select with .where instead of multiplying by 0"
                )
        if not all(torch.equal(a, b) for a, b in zip(first, values_and_grads(loss, options, terms), strict=True)):
            return (
                "two calls with the same tensors give different losses; draw random tokens with "
                "t.selected_at_random(is_eligible, count, seed), and keep no state between calls"
            )
    return None


def divides_by_number(loss: PolicyLoss, options: Mapping[str, Any]) -> str | None:
    """Say that a loss divides by the number of tokens: all its values halve if there are twice as many."""
    for spread in SPREADS:
        terms = made_up_terms(spread)
        number = len(terms.logprobs)
        once, _ = values_and_grads(loss, options, terms)
        twice, _ = values_and_grads(loss, options, _twice(terms))
        if not bool(once.any()) or not torch.allclose(2 * twice[:number], once, rtol=1e-9, atol=0):
            return None
    return (
        "its values halve when there are twice as many tokens, so it divides by their number; return one loss for each "
        "token without / len(t.logprobs) or .mean(): loss.aggregation averages them, over all micro-batches and ranks"
    )


def _twice(terms: PolicyTerms) -> PolicyTerms:
    """Return the tokens, then the same ones as other sequences of other groups."""
    later = {"sequence_ids": terms.num_sequences, "turn_ids": terms.num_turns, "group_ids": terms.num_groups}
    tensors: dict[str, Any] = {
        name: torch.cat([value, value + later.get(name, 0)]) for name, value in tensors_of(terms)
    }
    numbers: dict[str, Any] = {name: 2 * getattr(terms, name) for name in ("num_sequences", "num_turns", "num_groups")}
    return replace(terms, **tensors, **numbers)
