"""Check which fields of `PolicyTerms` a policy loss reads: undeclared ones may be missing in training.

Legend: N selected tokens.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from toolkit.functional.policy.registry import Need, PolicyLoss
from toolkit.functional.scope_check import made_up_terms
from toolkit.functional.terms import PolicyTerms


def fields_declared(loss: PolicyLoss, options: Mapping[str, Any]) -> set[str]:
    """Return the optional fields of `PolicyTerms` that a loss always gets, by ``needs``, its options and its scope."""
    names = set(loss.fields_read(options))
    if loss.scope != "token":
        names.add("positions")
    if loss.scope in ("group", "batch"):
        names.add("group_ids")
    return names


OPTIONAL = (*get_args(Need), "group_ids", "positions")
"""Fields of `PolicyTerms` that a loss gets only if it declares them."""


def declared(
    loss: PolicyLoss, options: Mapping[str, Any], terms: PolicyTerms, also: tuple[str, ...] = ()
) -> PolicyTerms:
    """Return `terms` without the fields that `loss` does not declare, except those named in `also`."""
    kept = fields_declared(loss, options).union(also)
    missing: dict[str, Any] = {name: None for name in OPTIONAL if name not in kept}
    return replace(terms, reported={}, reported_means={}, **missing)


def undeclared(loss: PolicyLoss, options: Mapping[str, Any], terms: PolicyTerms | None = None) -> str | None:
    """Return a message on fields that `loss` needs but does not declare; None without any, or if it always fails."""
    terms = made_up_terms(0.3) if terms is None else terms

    def works(*also: str) -> bool:
        copies: dict[str, Any] = {name: value.clone() for name, value in tensors_of(terms)}
        try:
            loss.function(declared(loss, options, replace(terms, **copies), also), **options)
        except Exception:  # the user's function may raise anything
            return False
        return True

    if works() or not works(*OPTIONAL):
        return None
    names = [name for name in OPTIONAL if not works(*(other for other in OPTIONAL if other != name))]
    needs = [name for name in names if name in get_args(Need)]
    declare = f"needs={(*loss.needs, *needs)!r}" if needs else ""
    if "group_ids" in names or ("positions" in names and loss.scope == "token"):
        scope = "group" if "group_ids" in names else "sequence"
        declare += f"{', ' if declare else ''}scope={scope!r}"
    if not names:
        return None
    pronoun = "it" if len(names) == 1 else "them"
    return (
        f"it reads {' and '.join(f't.{name}' for name in names)} without declaring {pronoun}; "
        f"write @register_policy_loss({loss.name!r}, {declare})"
    )


def error_location(error: Exception, loss: PolicyLoss) -> str:
    """Return the file and line of the loss that raised, in parentheses; empty if unknown."""
    path = loss.function.__code__.co_filename if hasattr(loss.function, "__code__") else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" ({Path(path).name}:{lines[-1]})" if lines else ""


def has_gradient(loss: PolicyLoss, options: Mapping[str, Any]) -> bool:
    """Return whether the losses depend on t.logprobs at all, as autograd sees it."""
    terms = declared(loss, options, made_up_terms(0.3))
    with torch.enable_grad():
        values = loss.function(replace(terms, logprobs=terms.logprobs.requires_grad_() * 1), **options)
    return isinstance(values, Tensor) and values.requires_grad


def tensors_of(terms: PolicyTerms) -> list[tuple[str, Tensor]]:
    """Return the tensors of `terms` by name, [N] each."""
    values = [(field.name, getattr(terms, field.name)) for field in fields(terms)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]
