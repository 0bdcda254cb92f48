"""The registry of policy losses: one decorated function each, with its own typed hyper-parameters.

A policy loss is a function ``f(t, *, option=default, ...) -> [N] token losses``: no mask, no mean, no rank. What it
declares in its signature becomes its validated options, its Hydra schema and its documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from toolkit.functional.names import check_choice, check_name, check_needs
from toolkit.functional.policy.facts import NO_FACTS, LossFacts
from toolkit.functional.registry import Registered, Registry

if TYPE_CHECKING:
    from torch import Tensor

TokenLosses: TypeAlias = "Tensor"
"""[N] the loss of each selected token, to minimise, not yet weighted."""

Scope = Literal["token", "sequence", "group", "batch"]
"""What one token's loss depends on: itself, its sequence, its group (a prompt's sequences), or the whole step."""
Need = Literal["ref_logprobs", "rollout_logprobs", "teacher_logprobs", "entropies"]
"""Fields that a loss may need besides log-probabilities, old log-probabilities and advantages."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Registered):
    """A registered policy loss; `register_policy_loss` describes its fields."""

    config_path: ClassVar[str] = "policy_loss_cfg"

    scope: Scope
    needs: tuple[Need, ...] = ()
    aggregation: str | None = None
    formula: str = ""
    facts: LossFacts = NO_FACTS

    def fields_read(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the fields read besides log-probabilities, old ones and advantages: `needs`, and those of options."""
        divides = options.get("anchor") == "rollout" or options.get("use_rollout_weight")
        from_options = () if "rollout_logprobs" in self.needs or not divides else ("rollout_logprobs",)
        return (*self.needs, *from_options)


POLICY_LOSSES = Registry(
    kind="policy loss",
    entry=PolicyLoss,
    package="toolkit.functional.policy",
    key="loss_type",
    usage="write GRPOLossConfig(policy_loss_cfg=dict(loss_type={!r}, {}))",
    how="toolkit.register_policy_loss",
    reserved=("loss_type",),
)
policy_loss = POLICY_LOSSES.get
policy_loss_names = POLICY_LOSSES.names


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
        aggregation: the one of its paper, where another one is known to be wrong or to change the loss;
            ``python -m toolkit.explain`` warns when another one is chosen.
        formula: one token's loss in plain characters, ``{option}`` standing for the value of an option, e.g.
            ``"-min(r A, clip(r, 1 - {eps}, 1 + {eps}) A)"``. ``[a // b]`` reads a, or b where an option in a is None;
            ``[a]`` is then omitted. ``[<?flag>a // b]`` reads a where an option is true; `toolkit.explain.facts.filled`
            has all of it.
        facts: what the formula does not show, and its source, for ``explain``, the tables and ``help``.
        aliases: other names of the same loss; marked as such wherever names are shown.
        overwrite: replace a loss of the same name instead of raising (use it when you re-run a notebook cell).

    Returns:
        A decorator that returns the function, with formula, options and source added to its docstring.

    Raises:
        ConfigError: the name is taken by another function, the scope is unknown, or a parameter of the function
            has no default or may be passed by position.
    """
    check_name(name, "register_policy_loss")
    check_needs(needs)
    check_choice(scope, get_args(Scope), f"scope={scope!r} of policy loss {name!r} is unknown")
    for need in needs:
        check_choice(need, get_args(Need), f"policy loss {name!r} needs {need!r}, which no item has")
    known = NO_FACTS if facts is None else facts
    return POLICY_LOSSES.decorator(
        name,
        documented={
            "takes": f"the tensors of the selected tokens, [N]{''.join(f'; needs {need}' for need in needs)}.",
            "returns": "[N] losses to minimise, not yet weighted",
            "facts": in_words({"Loss": formula, "Ratio": known.ratio, "Gradient": known.gradient}),
            "source": ". ".join(filter(None, (known.source, known.differs))),
        },
        aliases=aliases,
        overwrite=overwrite,
        scope=scope,
        needs=needs,
        aggregation=aggregation,
        formula=formula,
        facts=known,
    )


def in_words(facts: Mapping[str, str]) -> str:
    """Return a line for each fact, with the names of options instead of their values, and conditions in words."""
    text = "\n".join(f"{name}: {fact}" for name, fact in facts.items() if fact).replace(" // ", " else ")
    text = re.sub(r"<!(.*?)>", r"unless \1: ", re.sub(r"<\?(.*?)>", r"if \1: ", text))
    return re.sub(r"[{}]", "", text)
