"""The input of a policy loss: one bundle of per-token tensors of the selected tokens.

N: selected tokens (every scored position of a micro-batch, masked ones already removed), S: sequences, G: groups
(the completions of one prompt), U: turns (runs of scored tokens inside a sequence).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError, did_you_mean, listed
from toolkit.functional.names import MAX_LOG_RATIO
from toolkit.functional.options import Anchor
from toolkit.functional.ratios import bounded
from toolkit.functional.segments import segment_mean, segment_sum, suffix_sum
from toolkit.metrics import Max, Mean, Metric, Min, without_graph
from toolkit.peers.batch_fields import counterpart_field

ANCHORS: tuple[str, ...] = get_args(get_args(Anchor)[0])
LogRatioRange = tuple[float | None, float | None]
KINDS: dict[str, type[Mean] | type[Min] | type[Max]] = {"mean": Mean, "min": Min, "max": Max}


METHODS = ("ratio", "log_ratio", "sequence_ratio", "segment_mean", "segment_sum", "report")
"""Those of `PolicyTerms` that most losses use."""


class UnknownField(ConfigError, AttributeError):
    """A policy loss reads what `PolicyTerms` does not have."""


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """The tensors of a policy loss, scored tokens only; masked positions are already removed."""

    logprobs: Tensor
    """[N] log pi_theta of the sampled tokens, in nats, fp32 or wider, with gradient."""
    old_logprobs: Tensor
    """[N] the same under the policy before this optimizer step (or a detached copy: on-policy)."""
    advantages: Tensor
    """[N] advantage of each token."""
    ref_logprobs: Tensor | None = None
    """[N] under the reference policy, if there is one."""
    rollout_logprobs: Tensor | None = None
    """[N] as reported by the sampler, if it reports them."""
    teacher_logprobs: Tensor | None = None
    """[N] under a teacher, if there is one."""
    entropies: Tensor | None = None
    """[N] entropy of the policy at each token, without gradient, if the loss asks for it."""
    sequence_ids: Tensor | None = None
    """[N] int64, the sequence of each token; None for a loss of scope "token"."""
    num_sequences: int = 0
    turn_ids: Tensor | None = None
    """[N] int64, the turn of each token, never shared by two sequences."""
    num_turns: int = 0
    group_ids: Tensor | None = None
    """[N] int64, the group of each token; set for losses of scope "group" and "batch"."""
    num_groups: int = 0
    positions: Tensor | None = None
    """[N] int64, position of each token in its row: the distance of two tokens with unscored ones between them."""
    log_ratio_range: LogRatioRange = (-MAX_LOG_RATIO, MAX_LOG_RATIO)
    """Bounds of every log ratio in nats, before exp; the gradient is 0 outside. None: no bound."""
    reported: dict[str, Metric] = field(default_factory=dict)
    """Metrics that the policy loss reported, except means over all N tokens; `reports` has all of them."""
    reported_means: dict[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    """[N] each, without gradient: reported with their mean over all N tokens, and summed together; see `means`."""
    _differences: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """[N] log pi_theta - log pi_anchor by anchor, without gradient and bound; only read, never handed to a loss."""

    def _missing(self, name: str) -> Any:
        """Raise for what this bundle does not have; the message names the nearest field and lists all.

        Raises:
            UnknownField: always; it is an ``AttributeError``, too, so ``hasattr`` works.
        """
        if name.startswith("__"):  # a protocol of Python, such as copying
            raise AttributeError(name)
        names = [field.name for field in fields(self) if field.type == "Tensor" or "Tensor |" in str(field.type)]
        if "mask" in name:
            hint = "; masked tokens are removed before the loss is called, and the mean is taken afterwards"
        else:
            elsewhere = counterpart_field(name, names, "t.{}")
            hint = did_you_mean(name, [*names, *METHODS]) if elsewhere is None else f"; {elsewhere}"
        raise UnknownField(
            f"t.{name} is not a field of PolicyTerms{hint}; it has: {', '.join(names)}; and methods such as "
            f"{', '.join(f'{method}()' for method in METHODS)}"
        )

    if not TYPE_CHECKING:  # type checkers report unknown fields themselves
        __getattr__ = _missing

    def report(
        self, name: str, values: Tensor | float | Callable[[], Tensor], kind: Literal["mean", "min", "max"] = "mean"
    ) -> None:
        """Report the mean (or smallest, or largest) of `values` [n] (or a number) over the step as metric `name`.

        A function that returns `values` [N] is called when the mean is read; until then what it uses is kept, with its
        graph if it has one.
        """
        if callable(values) and kind == "mean":
            self.reported_means[name] = values
            return
        if callable(values):
            values = values()
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values, dtype=self.logprobs.dtype, device=self.logprobs.device)
        if kind == "mean" and values.shape == self.logprobs.shape:
            self.reported_means[name] = without_graph(values)
        else:
            self.reported[name] = KINDS[kind].of(values)

    def means(self) -> dict[str, Tensor]:
        """Return the values [N] that are reported with their mean over all N tokens, by name."""
        return {
            name: without_graph(values()) if callable(values) else values
            for name, values in self.reported_means.items()
        }

    def reports(self) -> dict[str, Metric]:
        """Return the metrics that the policy loss reported."""
        return {**Mean.of_each(self.means()), **self.reported}

    def without_graph(self) -> PolicyTerms:
        """Return the same tensors without gradient, and what was reported so far."""
        copy = object.__new__(type(self))  # as `replace` does in a tenth of the time
        copy.__dict__.update(self.__dict__, logprobs=without_graph(self.logprobs))
        return copy

    # ------------------------------------------------------------------ ratios

    def anchor_logprobs(self, anchor: Anchor = "old") -> Tensor:
        """Return what a ratio divides by, [N]: "old", "rollout", or "self" (the current ones, without gradient).

        Raises:
            ConfigError: `anchor` is another one.
            DataError: `anchor` is "rollout" and `rollout_logprobs` is None.
        """
        if anchor not in ANCHORS:
            raise ConfigError(_unknown_anchor(anchor))
        if anchor == "self":
            return self.logprobs.detach()
        return self.old_logprobs if anchor == "old" else self.require("rollout_logprobs")

    def log_ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return log pi_theta - log pi_anchor, bounded, [N]."""
        difference = self.logprobs - self.anchor_logprobs(anchor)
        self._differences[anchor] = difference.detach()
        return self.bounded(difference)

    def reported_difference(self, anchor: Anchor = "old") -> Tensor:
        """Return log pi_theta - log pi_anchor for metrics, [N]: no gradient, no bound; not to be changed in place."""
        if anchor not in self._differences:
            self._differences[anchor] = without_graph(self.logprobs) - self.anchor_logprobs(anchor)
        return self._differences[anchor]

    def ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return pi_theta / pi_anchor, bounded, [N]."""
        return self.log_ratio(anchor).exp()

    def sequence_log_ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return the mean log ratio of each token's sequence, bounded, [N]."""
        return self.bounded(self.segment_mean(self.logprobs - self.anchor_logprobs(anchor)))

    def sequence_ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return the geometric mean of the ratios of each token's sequence, bounded, [N]."""
        return self.sequence_log_ratio(anchor).exp()

    def turn_ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return the geometric mean of the ratios of each token's turn, bounded, [N]."""
        return self.bounded(self.turn_mean(self.logprobs - self.anchor_logprobs(anchor))).exp()

    def product_ratio(self, anchor: Anchor = "old") -> Tensor:
        """Return the product of the ratios of each token's sequence, bounded, [N]."""
        return self.bounded(self.segment_sum(self.logprobs - self.anchor_logprobs(anchor))).exp()

    def bounded(self, log_ratio: Tensor) -> Tensor:
        """Return `log_ratio` [N] inside `log_ratio_range`, safe to exp."""
        return bounded(log_ratio, *self.log_ratio_range)

    # ------------------------------------------------------------------ statistics of other tokens

    def segment_sum(self, values: Tensor) -> Tensor:
        """Sum `values` [N] over each token's sequence, returned per token, [N]."""
        ids = self._ids("sequence")
        return segment_sum(values, ids, self.num_sequences)[ids]

    def segment_mean(self, values: Tensor) -> Tensor:
        """Average `values` [N] over each token's sequence, returned per token, [N]."""
        ids = self._ids("sequence")
        return segment_mean(values, ids, self.num_sequences)[ids]

    def suffix_sum(self, values: Tensor, discount: float = 1.0) -> Tensor:
        """Sum `values` [N] from each token to the end of its sequence, each `discount` a position less, [N]."""
        return suffix_sum(values, self._ids("sequence"), discount, self.positions)

    def turn_mean(self, values: Tensor) -> Tensor:
        """Average `values` [N] over each token's turn, returned per token, [N]."""
        self._ids("sequence")
        if self.turn_ids is None:
            raise DataError("this policy loss uses turns, but PolicyTerms.turn_ids is missing")
        return segment_mean(values, self.turn_ids, self.num_turns)[self.turn_ids]

    def group_sum_of_sequences(self, values: Tensor) -> Tensor:
        """Sum over the sequences of each token's group, returned per token, [N].

        Args:
            values: [N], the same for all tokens of a sequence.
        """
        ids, groups = self._ids("sequence"), self._ids("group")
        # One token stands for its sequence: the others would count it again.
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[1:] = ids[1:] != ids[:-1]
        return segment_sum(values.where(is_first, 0.0), groups, self.num_groups)[groups]

    def group_max(self, values: Tensor) -> Tensor:
        """Return the largest of `values` [N] in each token's group, without gradient, [N]."""
        groups = self._ids("group")
        lowest = values.new_full((self.num_groups,), float("-inf"))
        return lowest.scatter_reduce(0, groups, values.detach(), "amax")[groups]

    def selected_at_random(self, is_eligible: Tensor, count: int, seed: int) -> Tensor:
        """Pick `count` of the tokens `is_eligible` [N], [N] bool: the same for the same tokens and seed on every rank.

        The advantages' bits are mixed into the seed (as integers, whose sum does not depend on its order), because with
        the seed alone every step would pick the same positions. Hashed, because the generator reads 32 bits of its seed
        and the low bits of a rounded number are 0.
        """
        content = int(self.advantages.double().view(torch.int64).sum())
        digest = hashlib.blake2b(f"{seed} {content}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        keys = torch.rand(len(is_eligible), generator=generator, dtype=torch.float64).to(is_eligible.device)
        keys = keys.where(is_eligible, 2.0)
        chosen = torch.zeros_like(is_eligible)
        chosen[keys.argsort(stable=True)[:count]] = True
        return chosen & is_eligible

    def require(self, name: str) -> Tensor:
        """Return an optional field of this bundle, [N].

        Raises:
            DataError: it is None.
        """
        values = getattr(self, name)
        if not isinstance(values, Tensor):
            raise DataError(f"this loss needs {name}, which the items do not have; give one for each scored token")
        return values

    def _ids(self, scope: Literal["sequence", "group"]) -> Tensor:
        ids = self.sequence_ids if scope == "sequence" else self.group_ids
        if ids is None:
            what = {"sequence": "whole sequences", "group": "whole groups"}[scope]
            raise ConfigError(
                f"this policy loss uses statistics of {what} but is registered with a narrower scope; "
                f"register it with @register_policy_loss(name, scope={scope!r})"
            )
        return ids


def _unknown_anchor(anchor: object) -> str:
    """Return the error message for what no ratio divides by."""
    others = {"ref": "ref_logprobs", "reference": "ref_logprobs", "teacher": "teacher_logprobs"}
    name = others.get(str(anchor).removesuffix("_logprobs"))
    what = f"anchor={anchor!r} of a ratio is unknown; choose {listed(ANCHORS)}"
    if name is not None:
        return f"{what}; the log ratio to {name} is t.logprobs - t.require({name!r})"
    return what + did_you_mean(str(anchor), ANCHORS)
