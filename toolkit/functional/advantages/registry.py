"""The registry of advantage estimators: one decorated function each, with its own typed options.

An estimator is a function ``f(r, *, option=default, ...)`` from `RewardTerms` to one advantage per sequence [S] or per
token [S, T]. What it declares in its signature becomes its validated options, its Hydra schema and its documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeAlias, get_args

from toolkit.errors import DataError, a_type
from toolkit.functional.names import check_choice, check_name, check_needs
from toolkit.functional.registry import Registered, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

SequenceAdvantages: TypeAlias = "Tensor"
"""[S] the advantage of each sequence."""
TokenAdvantages: TypeAlias = "Tensor"
"""[S, T] the advantage of each token, 0 where masked."""
AdvantageLevel = Literal["sequence", "token"]
AdvantageNeed = Literal[
    "lengths", "mask", "token_rewards", "values", "logprobs", "sum_pi_squared", "rewards_multi", "greedy_rewards",
    "baselines", "input_lengths", "num_turns",
]  # fmt: skip
"""Fields of `RewardTerms` that an estimator may need besides rewards and groups."""


HOW = (
    "write advantage({!r}).compute(RewardTerms(rewards=..., group_ids=...)), both [S], with RewardTerms of "
    "toolkit.functional.rewards"
)
"""How advantages are computed, for messages."""


@dataclass(frozen=True, kw_only=True)
class Advantage(Registered):
    """A registered advantage estimator; `register_advantage` describes its fields."""

    config_path: ClassVar[str] = "advantage"

    level: AdvantageLevel
    needs: tuple[AdvantageNeed, ...] = ()
    source: str = ""
    within_group: bool = True

    def compute(self, terms: RewardTerms, **options: Any) -> Tensor:
        """Return the advantages, [S] or [S, T] as `level` says; omitted options have their defaults.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
            DataError: `terms` lacks a field that the estimator needs.
        """
        from toolkit.functional.rewards import RewardTerms  # loads torch

        if not isinstance(terms, RewardTerms):
            raise DataError(f"advantage {self.name!r} got {a_type(terms)}; {HOW.format(self.name)}")
        for need in self.needs:
            if getattr(terms, need) is None and not (need == "lengths" and terms.mask is not None):
                raise DataError(f"advantage {self.name!r} needs {need}; give RewardTerms({need}=...)")
        return self.function(terms, **self.options(options))

    def __call__(self, *args: Any, **options: Any) -> NoReturn:
        """Raise: an estimator is registered options and a function, and `compute` checks what it gets."""
        raise DataError(f"advantage {self.name!r} is not called itself; {HOW.format(self.name)}")


ADVANTAGES = Registry(
    kind="advantage estimator",
    entry=Advantage,
    package="toolkit.functional.advantages",
    key="advantage",
    usage="options go to compute: write advantage({!r}).compute(RewardTerms(...), {})",
    how="register_advantage of toolkit.functional.advantages",
    reserved=("estimator", "options"),
)
advantage = ADVANTAGES.get
advantage_names = ADVANTAGES.names


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
        source: paper with its equation, or the project that it comes from, and where the code differs; for
            ``explain``, the tables and ``help``.
        overwrite: replace an estimator of the same name instead of raising (when you re-run a notebook cell).

    Returns:
        A decorator that returns the function, with options and source added to its docstring.

    Raises:
        ConfigError: the name is taken by another function, the level or a need is unknown, or a parameter of the
            function has no default or may be passed by position.
    """
    check_name(name, "register_advantage")
    check_needs(needs)
    check_choice(level, get_args(AdvantageLevel), f"level={level!r} of advantage {name!r} is unknown")
    for need in needs:
        problem = f"advantage {name!r} needs {need!r}, which RewardTerms does not have"
        check_choice(need, get_args(AdvantageNeed), problem)
    return ADVANTAGES.decorator(
        name,
        documented={
            "takes": f"the rewards, [S]{''.join(f'; needs {need}' for need in needs)}.",
            "returns": "[S] advantages" if level == "sequence" else "[S, T] advantages, 0 where masked",
            "facts": "",
            "source": source,
        },
        overwrite=overwrite,
        level=level,
        needs=needs,
        within_group=within_group,
        source=source,
    )
