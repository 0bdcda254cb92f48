"""The registry of advantage estimators: one decorated function each, with its own typed options.

An estimator is a function ``f(r, *, option=default, ...)`` from `RewardTerms` to one advantage per sequence [S] or per
token [S, T]. What it declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in estimators import no torch, so that the command line knows every option without loading it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from toolkit.errors import ConfigError, DataError, listed
from toolkit.functional.options import options_model
from toolkit.functional.registry import Registered, Registry, check_needs, document_source

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

AdvantageLevel = Literal["sequence", "token"]
AdvantageNeed = Literal[
    "lengths", "mask", "token_rewards", "values", "logprobs", "sum_pi_squared", "rewards_multi", "greedy_rewards",
    "baselines", "input_lengths", "num_turns",
]  # fmt: skip
"""What an estimator may need of `RewardTerms` beside rewards and groups."""


@dataclass(frozen=True, kw_only=True)
class Advantage(Registered):
    """A registered advantage estimator."""

    place: ClassVar[str] = "advantage"

    level: AdvantageLevel
    """One advantage per sequence, [S], or per token, [S, T]."""
    needs: tuple[AdvantageNeed, ...] = ()
    """Fields of `RewardTerms` that must be there."""
    source: str = ""
    """Paper with its equation, or the project that it comes from, and where the code differs."""
    within_group: bool = True
    """It compares the sequences of a group: one that is alone in its group learns nothing."""

    def compute(self, terms: RewardTerms, **options: Any) -> Tensor:
        """Return the advantages, [S] or [S, T] as `level` says; options left out have their defaults.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
            DataError: `terms` lacks a field that the estimator needs.
        """
        for need in self.needs:
            if getattr(terms, need) is None and not (need == "lengths" and terms.mask is not None):
                raise DataError(f"advantage {self.name!r} needs {need}; give RewardTerms({need}=...)")
        return self.function(terms, **self.options(options))


ADVANTAGES: Registry[Advantage] = Registry(
    "advantage estimator",
    package="toolkit.functional.advantages",
    key="advantage",
    how="one of your own is registered with @register_advantage of toolkit.functional.advantages",
)


def register_advantage(
    name: str,
    *,
    level: AdvantageLevel = "sequence",
    needs: tuple[AdvantageNeed, ...] = (),
    within_group: bool = True,
    source: str = "",
    overwrite: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function selectable as ``advantage=<name>``.

    Args:
        name: how it is picked.
        level: "sequence" when it returns [S], "token" when it returns [S, T].
        needs: fields of `RewardTerms` that it reads beside rewards and groups; a run that has not got them is refused
            before it starts.
        within_group: whether a group of one sequence leaves nothing to compare; groups of one are then refused.
        source: paper with its equation, and where the code differs; for ``explain``, the tables and ``help``.
        overwrite: replace an estimator of the same name instead of refusing (when you re-run a notebook cell).

    Returns:
        A decorator that gives the function back unchanged.

    Raises:
        ConfigError: the name is taken by another function, the level or a need is unknown, or a parameter of the
            function has no default or may be passed by position.
    """
    if level not in get_args(AdvantageLevel):
        choices = listed(get_args(AdvantageLevel))
        raise ConfigError(f"level={level!r} of advantage {name!r} is unknown; choose {choices}")
    check_needs(f"advantage {name!r}", needs, get_args(AdvantageNeed), "RewardTerms has not got")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        document_source(function, source)
        estimator = Advantage(
            name=name,
            function=function,
            options_model=options_model("advantage estimator", name, function, reserved=("estimator", "options")),
            level=level,
            needs=needs,
            within_group=within_group,
            source=source,
        )
        ADVANTAGES.add(estimator, overwrite=overwrite)
        return function

    return decorate


def advantage(name: str) -> Advantage:
    """Return the registered advantage estimator called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    return ADVANTAGES.get(name)


def advantage_names() -> list[str]:
    """Return the names of all registered advantage estimators, built-in ones included, sorted."""
    return ADVANTAGES.names()
