"""The input of an advantage estimator: one bundle of rewards, and the statistics that estimators share.

S: sequences (completions), T: positions of a row, K: rewards of one sequence. A group is the sequences of one prompt;
it may have any size, and its members any position.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type
from toolkit.metrics import wide_dtype

Level = Literal["group", "batch"]
PER_TOKEN = ("mask", "token_rewards", "values", "logprobs", "sum_pi_squared")
"""Fields with a value for each token."""
Spread = Literal["sample", "population", "leave_one_out"]
ROUNDING = 1e-10
"""Part of a sum of squares below which the rest after leaving one out is rounding, in float64."""


@dataclass(frozen=True, kw_only=True)
class RewardTerms:
    """The rewards of a batch of sequences, and what some estimators also need."""

    rewards: Tensor
    """[S] one reward per sequence; NaN or inf: it could not be computed. Such a sequence gets advantage 0 and is
    skipped in all statistics."""
    group_ids: Tensor
    """[S] int64, any numbers; equal numbers form a group."""
    lengths: Tensor | None = None
    """[S] scored tokens of each sequence; those of `mask` by default."""
    mask: Tensor | None = None
    """[S, T] bool, True where a token is scored; may have holes (tool output between two turns)."""
    token_rewards: Tensor | None = None
    """[S, T] reward of each token; by default the last scored token has the reward. Ignored where masked."""
    values: Tensor | None = None
    """[S, T] a critic's estimate of the return from each token on."""
    logprobs: Tensor | None = None
    """[S, T] log-probability of each token under the policy that sampled it, in nats."""
    sum_pi_squared: Tensor | None = None
    """[S, T] sum of the squared probabilities of the whole vocabulary at each token."""
    rewards_multi: Tensor | None = None
    """[S, K] several rewards of each sequence."""
    reward_weights: Tensor | None = None
    """[K] weight of each of them; 1 by default."""
    greedy_rewards: Tensor | None = None
    """[S] reward of the greedy completion of the same prompt."""
    baselines: Tensor | None = None
    """[S] a running baseline from earlier batches, equal within a group."""
    input_lengths: Tensor | None = None
    """[S] tokens that were read, not written: the prompt and tool output."""
    num_turns: Tensor | None = None
    """[S] turns of each sequence."""

    def __post_init__(self) -> None:
        for name, what in (
            ("rewards", "one reward of each sequence"),
            ("group_ids", "one integer for each sequence, the same for all completions of one prompt"),
        ):
            if not isinstance(getattr(self, name), Tensor):
                kind = a_type(getattr(self, name))
                raise DataError(f"RewardTerms.{name} is {kind}; it must be a tensor [S]: {what}")
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None or field.name == "reward_weights":
                continue
            shape = "[S, T]" if field.name in PER_TOKEN else "[S, K]" if field.name == "rewards_multi" else "[S]"
            if values.dim() != len(shape.split(",")) or len(values) != len(self.rewards):
                raise DataError(
                    f"RewardTerms.{field.name} has shape {list(values.shape)} beside rewards of shape "
                    f"{list(self.rewards.shape)}; it must be {shape}, and rewards [S], for the same S sequences"
                )

    def require(self, name: str) -> Tensor:
        """Return the field called `name`: [S], [S, T], [S, K] or [K].

        Raises:
            DataError: it is None.
        """
        value = getattr(self, name)
        if name == "lengths" and value is None and self.mask is not None:
            return self.mask.sum(-1)
        if value is None:
            raise DataError(f"RewardTerms.{name} is missing; this estimator needs it: RewardTerms({name}=..., ...)")
        return value

    # ------------------------------------------------------------------ one number per sequence

    @cached_property
    def wide(self) -> torch.dtype:
        """The dtype of statistics: rewards are few, so float64 costs nothing."""
        return wide_dtype(self.rewards)

    @cached_property
    def known(self) -> Tensor:
        """[S] bool, whether the reward could be computed."""
        return self.rewards.isfinite()

    @cached_property
    def filled(self) -> Tensor:
        """[S] rewards, wide, 0 where not known."""
        return self.rewards.to(self.wide).where(self.known, 0.0)

    @cached_property
    def _groups(self) -> Tensor:
        return torch.unique(self.group_ids, return_inverse=True)[1]

    @cached_property
    def index_in_group(self) -> Tensor:
        """[S] int64, the index of each sequence within its group, in batch order."""
        order = self._groups.argsort(stable=True)
        positions = torch.arange(len(order), device=order.device)
        is_first = torch.ones_like(order, dtype=torch.bool)
        is_first[1:] = self._groups[order][1:] != self._groups[order][:-1]
        start = positions.where(is_first, 0).cummax(0).values if len(order) else positions
        return torch.empty_like(order).scatter(0, order, positions - start)

    def with_rewards(self, rewards: Tensor) -> RewardTerms:
        """Return the bundle with other `rewards` [S]; rewards that are unknown here stay unknown."""
        return replace(self, rewards=rewards.where(self.known, float("nan")))

    def _index(self, level: Level) -> Tensor:
        return self._groups if level == "group" else torch.zeros_like(self._groups)

    def total(self, values: Tensor, level: Level = "group") -> Tensor:
        """Return for each sequence the sum of `values` ([S] or [S, T]) over its group or the batch, same shape."""
        index = self._index(level)
        return torch.zeros_like(values).index_add(0, index, values)[index]

    def largest(self, values: Tensor, level: Level = "group") -> Tensor:
        """Return for each sequence the largest of `values` [S] in its group, or in the batch."""
        index = self._index(level)
        return torch.full_like(values, float("-inf")).scatter_reduce(0, index, values, "amax")[index]

    def largest_other(self, values: Tensor) -> Tensor:
        """Return for each sequence the largest of `values` [S] among the others of its group; -inf when alone."""
        best = self.largest(values)
        is_best = values == best
        second = self.largest(values.masked_fill(is_best, float("-inf")))
        return second.where(is_best & (self.total(is_best.to(self.wide)) == 1), best)

    def count(self, level: Level = "group") -> Tensor:
        """Return for each sequence how many rewards of its group, or of the batch, are known, [S]."""
        return self.total(self.known.to(self.wide), level)

    @cached_property
    def is_alone(self) -> Tensor:
        """[S] bool, whether no other sequence of its group has a known reward."""
        return self.known & (self.count() < 2)

    def mean(self, level: Level = "group", weights: Tensor | None = None) -> Tensor:
        """Return for each sequence the mean of the known rewards of its group, or of the batch, [S].

        `weights` [S] are not negative; equal ones by default.
        """
        weights = self.known.to(self.wide) if weights is None else weights.to(self.wide).where(self.known, 0.0)
        total = self.total(weights, level)
        return self.total(weights * self.filled, level) / total.masked_fill(total == 0, 1)

    def varies(self, level: Level = "group") -> Tensor:
        """Return for each sequence whether the known rewards of its group, or of the batch, differ, [S] bool."""
        highest, lowest = (self.largest(x.where(self.known, float("-inf")), level) for x in (self.filled, -self.filled))
        return highest > -lowest

    def centred(self, level: Level = "group", weights: Tensor | None = None) -> Tensor:
        """Return reward - mean, [S]: exactly 0 if unknown or all are equal; `weights` [S] are those of the mean."""
        # The mean of equal numbers may differ from them by rounding, which must not become an advantage.
        return (self.filled - self.mean(level, weights)).where(self.known & self.varies(level), 0.0)

    def residual(self, level: Literal["group", "batch", "none"] = "group", *, leave_one_out: bool = False) -> Tensor:
        """Return reward - baseline, [S]: the mean of the group, of the batch (of the others in it), or 0."""
        if level == "none":
            return self.filled
        # The distance to the mean of the others is n / (n - 1) times that to the mean of all.
        count = self.count(level)
        factor = count / (count - 1).clamp(min=1) if leave_one_out else 1
        return self.centred(level) * factor

    def spread(self, kind: Spread, level: Level = "group", residual: Tensor | None = None) -> Tensor:
        """Return the standard deviation of the rewards around a sequence, [S], not negative; 0 where there is none.

        Args:
            kind: "sample" divides by n - 1, "population" by n, "leave_one_out" is the sample deviation of the others.
            level: of the group or of the batch.
            residual: [S] take ``sqrt(sum residual^2 / ...)`` of these instead of the rewards around their mean.
        """
        centred = self.centred(level) if residual is None else residual
        count = self.count(level)
        squares = self.total(centred.square(), level)
        if kind != "leave_one_out":
            return (squares / (count - int(kind == "sample")).clamp(min=1)).sqrt()
        others = squares - centred.square() * count / (count - 1).clamp(min=1)
        others = others.where(others > ROUNDING * squares, 0.0)
        return (others / (count - 2).clamp(min=1)).sqrt()

    # ------------------------------------------------------------------ one number per token

    @cached_property
    def inside(self) -> Tensor:
        """[S, T] bool, True up to the last scored token: the scored tokens and the holes between them."""
        return self.require("mask").flip(-1).cummax(-1).values.flip(-1)

    def at(self, where: Tensor, name: str) -> Tensor:
        """Return the field `name` [S, T], wide, 0 where `where` [S, T] is False."""
        return self.require(name).to(self.wide).where(where, 0.0)

    def complete(self, where: Tensor, *names: str) -> Tensor:
        """Return which sequences have a known reward and only finite numbers at `where` [S, T] in fields `names`."""
        is_complete = self.known
        for values in [self.token_rewards, *map(self.require, names)]:
            if values is not None:
                is_complete = is_complete & (values.isfinite() | ~where).all(-1)
        return is_complete

    def rewards_at(self, where: Tensor) -> Tensor:
        """Return the reward of each token, [S, T], wide, 0 where `where` [S, T] is False; see `token_rewards`."""
        if self.token_rewards is not None:
            return self.at(where, "token_rewards")
        mask = self.require("mask")
        is_last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        return self.filled.unsqueeze(-1).where(is_last, 0.0)

    def whiten(
        self,
        values: Tensor,
        weights: Tensor,
        *,
        std: Literal["sample", "population"],
        eps: float,
        eps_to: Literal["variance", "std"],
    ) -> Tensor:
        """Return ``(values - mean) / deviation`` over the whole batch; exactly 0 when all values are equal.

        Args:
            values: [S] or [S, T]; finite.
            weights: [S] or [S, T] as `values`, the weight of each: 1 or 0, or the tokens of a sequence.
            std: divide the sum of squares by their number minus 1, or by their number.
            eps: added to the variance, or to its root.
            eps_to: to which of the two.
        """
        weights = weights.to(self.wide)
        number = weights.sum()
        centred = values - (weights * values).sum() / number.clamp(min=1)
        variance = (weights * centred.square()).sum() / (number - int(std == "sample")).clamp(min=1)
        divisor = (variance + eps).sqrt() if eps_to == "variance" else variance.sqrt() + eps
        counted = weights > 0
        if not values.numel():
            return values
        highest = values.masked_fill(~counted, float("-inf")).amax()
        lowest = values.masked_fill(~counted, float("inf")).amin()
        return (centred / divisor).where(counted & (highest > lowest), 0.0)

    # ------------------------------------------------------------------ results

    def result(self, advantages: Tensor, where: Tensor | None = None) -> Tensor:
        """Return `advantages` [S] or [S, T] in the dtype of the rewards (fp32 or wider), finite, 0 where not `where`.

        `where` is bool, [S] or [S, T]; by default the sequences with a known reward.
        """
        dtype = torch.promote_types(self.rewards.dtype, torch.float32)
        bound = torch.finfo(dtype).max
        where = self.known if where is None else where
        return advantages.where(where & ~advantages.isnan(), 0.0).clamp(-bound, bound).to(dtype)
