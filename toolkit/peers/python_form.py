"""Overrides as Python writes them: ``kl=k3`` is ``use_kl_loss=True, kl_loss_type='k3'``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

VALUE, COMPUTED = "{}", "..."
"""Stand in an override for the value of the word, and for one that must be computed from it."""
LOSS_GROUPS = ("loss", "policy_loss")
"""Groups whose names other projects keep in one list."""
KL_GRADIENTS = ("straight_through", "score_corrected", "is_corrected")
"""Ends of the choices of ``kl`` that set ``kl_gradient``."""


def in_python(way: str) -> str:
    """Return overrides as keyword arguments of a loss config; what these cannot express goes through `LossRunner`."""
    pairs = pairs_of(way)
    policy: dict[str, str] = {}
    aggregation: dict[str, str] = {}
    fields: dict[str, str] = {}
    for key, value in pairs:
        part, _, option = key.partition(".")
        if key == "policy_loss":
            policy["loss_type"] = value
        elif part == "policy_loss":
            policy[option] = value
        elif key == "kl" and not value.endswith("_in_reward"):
            fields |= _kl_fields(value)
        elif key == "aggregation":
            aggregation["name"] = value
        elif key.startswith("loss.aggregation."):
            aggregation[key.removeprefix("loss.aggregation.")] = value
        elif key == "mode" or (part == "loss" and option and "." not in option):
            fields[option or key] = value
        elif part in ("loss", "correction", "++loss") and all(_is_of_loss(each) for each, _ in pairs):
            overrides = ", ".join(repr(token) for token in shlex.split(way))
            return f"LossRunner.from_overrides([{overrides}]).loss_cfg"
        else:
            return f"on the command line {way}"
    parts = []
    if policy:
        parts.append(f"policy_loss_cfg={_dict({'loss_type': 'vanilla'} | policy)}")
    if aggregation:
        name = aggregation.get("name", "token_mean")
        parts.append(f"aggregation={literal(name) if len(aggregation) == 1 else _dict(aggregation)}")
    return ", ".join([*parts, *(f"{name}={literal(value)}" for name, value in fields.items())])


def as_options(way: str) -> str:
    """Return overrides of the chosen policy loss as its options; others as `in_python` does."""
    pairs = [(key.removeprefix("policy_loss."), value) for key, value in pairs_of(way)]
    if all(key.startswith("policy_loss.") for key, _ in pairs_of(way)):
        return ", ".join(f"{key}={literal(value)}" for key, value in pairs)
    return in_python(way)


def _is_of_loss(key: str) -> bool:
    return key.removeprefix("++").partition(".")[0] in (*LOSS_GROUPS, "kl", "aggregation", "correction", "mode")


def _kl_fields(choice: str) -> dict[str, str]:
    """Return the fields that a choice of ``kl`` sets."""
    if choice == "none":
        return {"use_kl_loss": "false"}
    gradient = next((each for each in KL_GRADIENTS if choice.endswith(f"_{each}")), None)
    fields = {"use_kl_loss": "true", "kl_loss_type": choice.removesuffix(f"_{gradient}")}
    return fields if gradient is None else {**fields, "kl_gradient": gradient}


def pairs_of(way: str) -> list[tuple[str, str]]:
    """Return keys and values of overrides."""
    return [(token.partition("=")[0], token.partition("=")[2]) for token in shlex.split(way)]


def _dict(values: Mapping[str, str]) -> str:
    return f"dict({', '.join(f'{name}={literal(value)}' for name, value in values.items())})"


def literal(value: str) -> str:
    """Return the value of an override as Python writes it."""
    if value in ("true", "false", "null"):
        return {"true": "True", "false": "False", "null": "None"}[value]
    is_plain = value == COMPUTED or value in ("True", "False", "None") or value.startswith("[")
    return value if is_plain or _is_number(value) else repr(value)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
