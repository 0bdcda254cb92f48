"""The registry of advantage estimators: one decorated function each, with its own typed options.

An estimator is a function ``f(r, *, option=default, ...)`` from `RewardTerms` to one advantage per sequence [S] or per
token [S, T]. What it declares in its signature becomes its validated options, its Hydra schema and its documentation.

This module and the built-in estimators import no torch, so the command line knows every option without loading it.
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
"""Fields of `RewardTerms` that an estimator may need besides rewards and groups."""


@dataclass(frozen=True, kw_only=True)
class Advantage(Registered):
    """A registered advantage estimator."""

    config_path: ClassVar[str] = "advantage"

    level: AdvantageLevel
    """One advantage per sequence, [S], or per token, [S, T]."""
    needs: tuple[AdvantageNeed, ...] = ()
    """Fields of `RewardTerms` that must be set."""
    source: str = ""
    """Paper with its equation, or the project that it comes from, and where the code differs."""
    within_group: bool = True
    """Whether it compares the sequences of a group: one that is alone in its group then learns nothing."""

    def compute(self, terms: RewardTerms, **options: Any) -> Tensor:
        """Return the advantages, [S] or [S, T] as `level` says; omitted options have their defaults.

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
    how="register your own with @register_advantage of toolkit.functional.advantages",
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
        name: name to select it by.
        level: "sequence" when it returns [S], "token" when it returns [S, T].
        needs: fields of `RewardTerms` that it reads besides rewards and groups; a run without them raises before it
            starts.
        within_group: whether it compares the sequences of a group; groups of one sequence then raise.
        source: paper with its equation, and where the code differs; for ``explain``, the tables and ``help``.
        overwrite: replace an estimator of the same name instead of raising (when you re-run a notebook cell).

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ConfigError: the name is taken by another function, the level or a need is unknown, or a parameter of the
            function has no default or may be passed by position.
    """
    if level not in get_args(AdvantageLevel):
        choices = listed(get_args(AdvantageLevel))
        raise ConfigError(f"level={level!r} of advantage {name!r} is unknown; choose {choices}")
    check_needs(f"advantage {name!r}", needs, get_args(AdvantageNeed), "RewardTerms does not have")

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
        ConfigError: the name is unknown; the message lists the known ones.
    """
    return ADVANTAGES.get(name)


def advantage_names() -> list[str]:
    """Return the names of all registered advantage estimators, built-in ones included, sorted."""
    return ADVANTAGES.names()
