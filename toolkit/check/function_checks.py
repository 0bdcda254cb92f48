"""Checks that call only the loss function, on a few made-up tokens. N: tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from toolkit.check.subject import Failed, NotApplicable, Subject, shown_value
from toolkit.errors import ConfigError
from toolkit.functional.purity_check import changes_inputs, changes_when_repeated, divides_by_number
from toolkit.functional.scope_check import SPREADS, check_scope, made_up_terms, tensors_of
from toolkit.functional.terms import PolicyTerms

USUAL = 0.3
"""Spread of log pi - log pi_old in nats after an ordinary update."""
SEQUENCE_ADVANTAGES = (1.0, -0.7, -1.5, 2.0)
"""Of the made-up sequences; each group has one of each sign."""
LOG_RATIOS = (25.0, 100.0)
"""Size of log ratios, in nats, as a stale policy or a very rare token gives; e^100 overflows fp32."""
SMALL_STEP, LARGE_STEP = 1e-6, 0.01
"""In nats: float32 resolves the small one at a ratio near 1, half precision does not."""
NUMBERS = (0.05, 0.1, 0.3, 0.5, 0.9, 1.5, 3.0, 8.0)
"""Values to try for a number without a default."""
VALUES_OF_OTHERS = 4
"""Values of each other option that are tried while one option is checked."""


def one_loss_for_each_token(s: Subject) -> None:
    """[N] tensors go in, [N] losses come out."""
    s(made_up_terms(USUAL))


def inputs_unchanged(s: Subject) -> None:
    """No tensor of `t` is changed in place."""
    _refuse(changes_inputs(s.loss, s.options))


def keeps_scope(s: Subject) -> None:
    """A token's loss depends on no more than `scope` says."""
    _refuse(divides_by_number(s.loss, s.options))
    check_scope(s.loss, s.options)
    if s.loss.scope == "batch":
        raise NotApplicable("scope='batch' lets a token's loss depend on everything in its micro-batch")


def repeatable(s: Subject) -> None:
    """The same tensors give the same losses, whatever the state of the random number generator."""
    _refuse(changes_when_repeated(s.loss, s.options))


def _refuse(why: str | None) -> None:
    if why is not None:
        raise Failed(why)


def gradient_sign(s: Subject) -> None:
    """At old == current, raising the log-probability of a good token lowers the loss, and of a bad one raises it."""
    terms = made_up_terms(USUAL)
    same, advantages = terms.logprobs.clone(), _of_sequences(terms)
    terms = replace(terms, old_logprobs=same, rollout_logprobs=same, advantages=advantages)
    _, grads = s(terms)
    if _ignores_advantages(s, terms):
        logprobs_needed = [need for need in s.loss.needs if need.endswith("logprobs") and need != "rollout_logprobs"]
        if logprobs_needed:
            raise NotApplicable(f"it learns from {logprobs_needed[0]} and does not read t.advantages")
        raise Failed(
            "neither loss nor gradient changes with t.advantages: all tokens are treated alike; use t.advantages, or "
            "declare what it learns from instead (needs=('teacher_logprobs',))"
        )
    for sign, what, wish in ((1, "A > 0", "lower"), (-1, "A < 0", "raise")):
        wrong = (advantages * sign > 0) & (grads * sign > 0)
        if bool(wrong.any()):
            raise Failed(
                f"raising the log-probability of a token with {what} should {wish} the loss, but its gradient is "
                f"{float(grads[wrong][0]):+.3g} where old and current policy agree; losses are minimised: is a minus "
                "sign missing, or are the policies swapped?"
            )
    if not bool((grads != 0).any()):
        raise Failed("no token has a gradient where old and current policy agree; is t.logprobs detached?")


def _ignores_advantages(s: Subject, terms: PolicyTerms) -> bool:
    first, *others = (s(replace(terms, advantages=factor * terms.advantages)) for factor in (1, -1, 2))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# -------------------------------------------------------------------- options


def options_matter(s: Subject) -> None:
    """Every option that is a number, a switch or a choice changes some token's loss or gradient."""
    if not s.options:
        raise NotApplicable("it has no options")
    probes = _probes()
    # The options of the subject first; some options are read only if another one (a switch, a bound) is changed.
    idle = {name: tried for name in s.options if (tried := list(_others(s, name)))}
    for context in _contexts(s):
        base = [s(terms, context) for terms in probes]
        idle = {
            name: tried
            for name, tried in idle.items()
            if not any(_differs(s, {**context, name: value}, probes, base) for value in tried)
        }
        if not idle:
            return
    name, tried = next(iter(idle.items()))
    values = ", ".join(map(shown_value, tried[:4]))
    raise Failed(
        f"option {name!r} changes neither loss nor gradient of any made-up token (tried {values} instead of "
        f"{shown_value(s.options[name])}): use it, or remove it, because tuning it does nothing"
        + (f"; the same holds for {', '.join(list(idle)[1:])}" if len(idle) > 1 else "")
    )


def _contexts(s: Subject) -> Iterator[dict[str, Any]]:
    yield dict(s.options)
    for other in s.options:
        yield from ({**s.options, other: value} for value in list(_others(s, other))[:VALUES_OF_OTHERS])


def _probes() -> list[PolicyTerms]:
    """Return tokens near and far from the old policy, with small, large and per-sequence advantages."""
    probes = []
    for spread in SPREADS:
        terms = made_up_terms(spread)
        of_sequences = _of_sequences(terms)
        choices = (terms.advantages, 5 * terms.advantages, of_sequences)
        probes += [replace(terms, advantages=advantages) for advantages in choices]
    return probes


def _of_sequences(terms: PolicyTerms) -> Tensor:
    assert terms.sequence_ids is not None
    return torch.tensor(SEQUENCE_ADVANTAGES, dtype=terms.logprobs.dtype)[terms.sequence_ids]


def _differs(
    s: Subject, options: Mapping[str, Any], probes: list[PolicyTerms], base: list[tuple[Tensor, Tensor]]
) -> bool:
    return any(
        not torch.equal(ours, theirs)
        for terms, known in zip(probes, base, strict=True)
        for ours, theirs in zip(s(terms, options), known, strict=True)
    )


def _others(s: Subject, name: str) -> Iterator[Any]:
    """Return other values that the option allows."""
    value = s.options[name]
    for candidate in _candidates(value, s.loss.options_model.model_fields[name].annotation):
        try:
            checked = s.loss.options({**s.options, name: candidate})[name]
        except ConfigError:
            continue
        if checked != value:
            yield checked


def _candidates(value: Any, annotation: Any) -> list[Any]:
    choices = _choices(annotation)
    if choices:
        return choices
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value + 2, value + 5, 2 * value, value - 1]
    if isinstance(value, float):
        return [value * 2, value / 2, value + 0.1, value * 10, value / 10, *NUMBERS]
    return [*NUMBERS, 1, 2] if value is None else []


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


# -------------------------------------------------------------------- numbers


def finite(s: Subject) -> None:
    """No token gives NaN or inf, in value or gradient, however far apart the policies are."""
    base = made_up_terms(USUAL)
    count = len(base.logprobs)
    alternating = torch.tensor([1.0, -1.0]).repeat(count)[:count]
    signs = {"+": torch.ones(count), "-": -torch.ones(count), "+-": alternating}
    for size, (shift_name, shift), (sign_name, sign) in product(
        LOG_RATIOS, signs.items(), [*signs.items(), ("0", torch.zeros(count))]
    ):
        # Both log-probabilities stay below 0: the smaller one is `size` further down.
        apart = -0.01 - size * (shift < 0)
        others = apart - size * shift
        names = [name for name, _ in tensors_of(base) if name.endswith("_logprobs")]
        tensors: dict[str, Any] = dict.fromkeys(names, others)
        terms = replace(base, logprobs=apart, advantages=2 * sign, entropies=torch.ones(count), **tensors)
        for what, values in zip(("loss", "gradient"), s(terms), strict=True):
            broken = ~values.isfinite()
            if bool(broken.any()):
                raise Failed(
                    f"the {what} is {float(values[broken][0])} in float32 for log ratios of {shift_name}{size:g} nats "
                    f"with A of sign {sign_name}; take ratios from t.ratio() or t.bounded(x).exp(), which clamp "
                    "before exp, and select with .where instead of multiplying by a mask (inf x 0 is NaN)"
                )


def precision(s: Subject) -> None:
    """fp32 log-probabilities give losses in fp32 or wider, without rounding to half precision inside."""
    wide = made_up_terms(USUAL)
    floats: dict[str, Any] = {name: value.float() for name, value in tensors_of(wide) if value.is_floating_point()}
    for what, values in zip(("losses", "gradients"), s(replace(wide, **floats)), strict=True):
        if values.dtype not in (torch.float32, torch.float64):
            raise Failed(f"float32 tensors give {what} in {values.dtype}; compute in float32: remove the conversion")
    # After rounding, a small step does not change the losses of tokens that a large step changes.
    start, small, large = (s(replace(wide, logprobs=wide.logprobs + step))[0] for step in (0.0, SMALL_STEP, LARGE_STEP))
    moved = start != large
    stuck = moved & (start == small)
    if int(stuck.sum()) > int(moved.sum()) / 2:
        raise Failed(
            f"its losses do not change with a step of {SMALL_STEP:g} nats in the log-probabilities, as after rounding "
            "to half precision; remove .half(), .bfloat16() and similar calls"
        )
