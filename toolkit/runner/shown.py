"""How a runner, its loss and its results show in text and in HTML."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.display import html_table, html_text
from toolkit.explain.facts import equation
from toolkit.explain.formula import explain_loss
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.schema import changed_fields


@dataclass(frozen=True)
class Explanation:
    """What a loss computes, in words; ``print`` it, or let a notebook show it."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_text("", self.text)


def explanation_of(loss_cfg: BaseLossConfig) -> Explanation:
    """Return what `toolkit-explain` says of a loss."""
    return Explanation(explain_loss(loss_cfg))


def formula_of(loss_cfg: BaseLossConfig) -> str:
    """Return the formula of a policy loss with its numbers; empty for others."""
    if not isinstance(loss_cfg, BaseRLLossConfig) or loss_cfg.candidates is not None:
        return ""
    return f"{loss_cfg.policy.name}: {equation(loss_cfg.policy, loss_cfg.policy_options)}"


def runner_text(loss_cfg: BaseLossConfig) -> str:
    """Return the class of the loss, what differs from its defaults, and the formula, as text."""
    changed = changed_fields(loss_cfg)
    lines = [f"  {name}={value!r} (default {default!r})" for name, value, default in changed]
    formula = formula_of(loss_cfg)
    lines += [f"  {formula}"] if formula else []
    return "\n".join([f"LossRunner({type(loss_cfg).__name__}", *(lines or ["  all settings at their defaults"]), ")"])


def runner_html(loss_cfg: BaseLossConfig) -> str:
    """Return the same as HTML."""
    rows = [(name, repr(value), repr(default)) for name, value, default in changed_fields(loss_cfg)]
    header = ("setting", "value", "default") if rows else ()
    note = "" if rows else "All settings at their defaults. "
    return html_table(f"LossRunner: {type(loss_cfg).__name__}", header, rows, note=f"{note}{formula_of(loss_cfg)}")
