"""Check that a policy loss keeps its declared scope: on a few made-up tokens, in a millisecond, before it is used.

Also which fields of `PolicyTerms` it reads: undeclared ones may be missing in training.

A loss that declares scope "token" but reads other tokens gives one gradient in eager mode and another in chunks,
without an error: in chunks of 4 tokens the gradient of GSPO has been seen to change its sign.

Legend: N tokens.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.functional.policy.registry import Need, PolicyLoss, Scope, policy_loss
from toolkit.functional.terms import PolicyTerms, UnknownField

LENGTHS = (3, 5, 1, 4)
"""Tokens of the made-up sequences."""
GROUPS = (0, 0, 1, 1)
"""The group of each of them."""
UNEQUAL = (0.6, 0.3, 2.0, 1.5)
"""The spread of each of them, relative."""
SPREADS = (0.01, 0.3, 1.0, 3.0, 15.0)
"""Of log pi - log pi_old in nats: a statistic with a threshold must cross it in one of them."""
READS = {
    "sequence": "other tokens of its sequence",
    "group": "other sequences of its group",
    "batch": "all tokens of the batch",
}
"""What a token's loss depends on besides what the scope before allows."""
TOLERANCE = 1e-9
"""Relative; the check runs in float64."""
OPTIONAL = (*get_args(Need), "group_ids", "positions")
"""Fields of `PolicyTerms` that a loss gets only if it declares them."""
_passed: set[tuple[Any, ...]] = set()


def check_policy_loss(name: str, **options: Any) -> None:
    """Check that the policy loss `name` of a token (or sequence) does not depend on tokens outside of its scope.

    Raises:
        ConfigError: the values or gradients differ; the message names the scope that would be right.
    """
    loss = policy_loss(name)
    check_scope(loss, loss.options(options))


def check_scope(loss: PolicyLoss, options: Mapping[str, Any]) -> None:
    """Check `loss` with complete `options` once; later calls with the same arguments return at once.

    Raises:
        ConfigError: it uses more than its scope allows.
    """
    key = key_of(loss, options)
    if key in _passed:
        return
    scopes = get_args(Scope)
    for number in reversed(range(scopes.index(loss.scope), scopes.index("batch"))):
        if not _is_local(loss, options, scopes[number]):
            needed = scopes[number + 1]
            raise ConfigError(
                f"policy loss {loss.name!r} is registered with scope={loss.scope!r}, but a token's loss changes with "
                f"{READS[needed]}; in chunks its gradient would be wrong. Register it with "
                f"@register_policy_loss({loss.name!r}, scope={needed!r})"
            )
    _passed.add(key)


def check_gradient(loss: PolicyLoss, options: Mapping[str, Any]) -> None:
    """Check that autograd can differentiate `loss` with complete `options`; later calls return at once.

    Raises:
        ConfigError: it returns what does not depend on t.logprobs.
    """
    key = (*key_of(loss, options), "gradient")
    if key not in _passed and not has_gradient(loss, options):
        raise ConfigError(
            f"policy loss {loss.name!r} has no gradient: what it returns does not depend on t.logprobs"
            f"{_defined_at(loss)}; leave out torch.no_grad(), .detach(), .data, .item(), .tolist() and numpy on the "
            "way from t.logprobs to the result"
        )
    _passed.add(key)


def is_zero_without_advantage(loss: PolicyLoss, options: Mapping[str, Any]) -> bool:
    """Return whether tokens with advantage 0 have loss and gradient exactly 0, so they can be skipped."""
    key = (*key_of(loss, options), "zero")
    if key not in _passed:
        for spread in SPREADS:
            terms = made_up_terms(spread)
            idle = replace(terms, advantages=torch.zeros_like(terms.advantages))
            if any(bool(values.any()) for values in values_and_grads(loss, options, idle)):
                return False
        _passed.add(key)
    return True


def key_of(loss: PolicyLoss, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a loss with its options."""
    return (loss.name, loss.function, loss.scope, repr(sorted(options.items())))


def check_token_losses(token_losses: object, logprobs: Tensor, name: str) -> None:
    """Check that a policy loss returned one number for each token of `logprobs` [N].

    Raises:
        DataError: it returned something else, such as a mean.
    """
    result = type(token_losses).__name__
    if isinstance(token_losses, Tensor):
        if token_losses.shape == logprobs.shape and token_losses.is_floating_point():
            return
        result = f"{list(token_losses.shape)} {token_losses.dtype}"
    raise DataError(
        f"policy loss {name!r} returned {result}; it must return one loss for each of the {len(logprobs)} selected "
        "tokens, a floating-point tensor, without a mean or a sum: loss.aggregation chooses how they are averaged"
    )


def call_loss(loss: PolicyLoss, terms: PolicyTerms, options: Mapping[str, Any]) -> Any:
    """Return what a policy loss returns; where it fails in a way that is typical for a first loss, say why.

    Raises:
        ConfigError: it reads a field that it does not declare or that does not exist, calls numpy, or uses a method of
            `terms` as a tensor.
    """
    try:
        return loss.function(terms, **options)
    except UnknownField as error:
        raise ConfigError(f"policy loss {loss.name!r}{error_location(error, loss)}: {error}") from None
    except ToolkitError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        why = _why_it_failed(str(error), loss, options)
        if why is None:
            raise
        raise ConfigError(f"policy loss {loss.name!r}{error_location(error, loss)}: {why}") from error


def _why_it_failed(message: str, loss: PolicyLoss, options: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a loss that raised this `message`; None if it is not a typical mistake."""
    if "cannot assign to field" in message:
        name = message.rpartition("'")[0].rpartition("'")[2]
        return (
            f"it assigns t.{name}, but other terms of the loss also read it; give the result another name "
            f"({name} = t.{name} / 2, not t.{name} /= 2)"
        )
    if "'method'" in message:
        return "a method is used like a tensor; write its parentheses, e.g. t.ratio() instead of t.ratio"
    if "numpy()" in message:
        return "numpy has no gradient; use operations of torch on t.logprobs"
    if "'PolicyTerms' object" in message:
        return "t is not a dict or a tensor; its fields are attributes, e.g. t.logprobs"
    return undeclared(loss, options)


def _is_local(loss: PolicyLoss, options: Mapping[str, Any], scope: str) -> bool:
    """Return whether each sequence (or token) has the same values and gradients alone as among the others."""
    for spread in SPREADS:
        terms = made_up_terms(spread)
        full = values_and_grads(loss, options, terms)
        labels = torch.arange(len(terms.logprobs)) if scope == "token" else terms.require(f"{scope}_ids")
        for label in labels.unique():
            rows = (labels == label).nonzero().squeeze(1)
            part = values_and_grads(loss, options, _part(terms, rows))
            for among, alone in zip(full, part, strict=True):
                if not torch.allclose(among[rows], alone, rtol=TOLERANCE, atol=TOLERANCE):
                    return False
    return True


def values_and_grads(loss: PolicyLoss, options: Mapping[str, Any], terms: PolicyTerms) -> tuple[Tensor, Tensor]:
    """Return the token losses and the gradient of a weighted sum of them, [N] each."""
    with torch.enable_grad():
        logprobs = terms.logprobs.detach().requires_grad_()
        values = call_loss(loss, replace(terms, logprobs=logprobs, reported={}, reported_means={}), options)
        check_token_losses(values, logprobs, loss.name)
        # Unequal weights that travel with their token: neighbours cannot cancel by accident.
        total = (values * (1 + terms.old_logprobs.square())).sum()
    grads = torch.autograd.grad(total, logprobs, allow_unused=True)[0] if total.requires_grad else None
    return values.detach(), torch.zeros_like(logprobs) if grads is None else grads


def _part(terms: PolicyTerms, rows: Tensor) -> PolicyTerms:
    """Return the tokens at `rows`."""
    tensors: dict[str, Any] = {name: value.index_select(0, rows) for name, value in tensors_of(terms)}
    # As in a micro-batch that holds only these tokens.
    numbers: dict[str, Any] = {
        f"num_{what}s": int(tensors[f"{what}_ids"].max()) + 1
        for what in ("sequence", "turn", "group")
        if f"{what}_ids" in tensors
    }
    return replace(terms, **tensors, **numbers)


def made_up_terms(spread: float) -> PolicyTerms:
    """Return made-up tokens with ratios of about exp(spread), unequal in each sequence, advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    count = sum(LENGTHS)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(count, dtype=torch.float64, generator=generator)

    lengths = torch.tensor(LENGTHS)
    logprobs = -2 + noise(0.3)
    unequal = torch.tensor(UNEQUAL, dtype=torch.float64).repeat_interleave(lengths)
    sequences = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
    # In every sequence of 3 or more tokens, the last two form a second turn.
    old, advantages = logprobs + noise(spread) * unequal, noise(1.0)
    others: dict[str, Any] = {
        name: logprobs + noise(spread) * unequal for name in get_args(Need) if name != "entropies"
    }
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    turns = 2 * sequences + ((positions >= lengths[sequences] - 2) & (lengths[sequences] > 2))
    return PolicyTerms(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=advantages,
        **others,
        entropies=noise(1.0).abs(),
        sequence_ids=sequences,
        num_sequences=len(LENGTHS),
        turn_ids=turns,
        num_turns=2 * len(LENGTHS),
        group_ids=torch.tensor(GROUPS)[sequences],
        num_groups=max(GROUPS) + 1,
        positions=positions,
    )


def tensors_of(terms: PolicyTerms) -> list[tuple[str, Tensor]]:
    """Return the tensors of `terms` by name, [N] each."""
    values = [(field.name, getattr(terms, field.name)) for field in fields(terms)]
    return [(name, value) for name, value in values if isinstance(value, Tensor)]


def fields_declared(loss: PolicyLoss, options: Mapping[str, Any]) -> set[str]:
    """Return the optional fields of `PolicyTerms` that a loss always gets, by ``needs``, its options and its scope."""
    names = set(loss.fields_read(options))
    if loss.scope != "token":
        names.add("positions")
    if loss.scope in ("group", "batch"):
        names.add("group_ids")
    return names


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


def _defined_at(loss: PolicyLoss) -> str:
    """Return the file and line where a loss is defined, in parentheses; empty if unknown."""
    code = getattr(loss.function, "__code__", None)
    return "" if code is None else f" ({Path(code.co_filename).name}:{code.co_firstlineno})"


def has_gradient(loss: PolicyLoss, options: Mapping[str, Any]) -> bool:
    """Return whether the losses depend on t.logprobs at all, as autograd sees it; True if they are not tensors."""
    terms = made_up_terms(0.3)
    with torch.enable_grad():
        values = call_loss(loss, replace(terms, logprobs=terms.logprobs.requires_grad_() * 1), options)
    return not isinstance(values, Tensor) or values.requires_grad
