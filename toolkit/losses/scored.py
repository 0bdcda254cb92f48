"""Losses that read only log-probabilities (and entropies), so they run in every pass of the head.

Legend: B rows, T positions of a row, N scored tokens, n of them in one call, D hidden width, V vocabulary,
K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.head import HeadPlan, TokenScores, explain, fused_loss
from toolkit.head.options import Entropy, HeadOptions
from toolkit.head.plan import Scope
from toolkit.head.scores import eager_scores, logit_copies
from toolkit.head.vocabulary import vocab_group
from toolkit.losses.context import BaseLossContext, merge_extras
from toolkit.losses.kwargs import BaseLossKwargs
from toolkit.losses.step.builder import ItemT
from toolkit.metrics import Metric

SMALL_LOGITS = 2**20
"""Bytes of a micro-batch's fp32 logits up to which ``mode="chunk"`` computes all of them at once, as eager mode does,
if they are one chunk: chunks would save no memory, and a call takes half the time."""


class ScoredLossContext(BaseLossContext[ItemT]):
    """Base of losses of log-probabilities. Subclass it and define `token_losses`; `loss_fn` follows from it.

    In chunk mode the head then takes 3 matrix products instead of whatever autograd makes of `loss_fn`. It skips
    ignored tokens in all of them, and tokens without a gradient in the last two.
    """

    def token_losses(self, scores: TokenScores, loss_kwargs: Any) -> Tensor | Mapping[str, Tensor]:
        """Return the values of n scored tokens, [n] unreduced, or a mapping of these by the name of their term.

        Args:
            scores: log-probabilities [n] with gradient, and entropies [n] if `entropy` asks for them.
            loss_kwargs: the kwargs of these tokens, per-token fields [n].
        """
        raise ConfigError(f"{type(self).__name__} computes nothing yet: define token_losses(scores, loss_kwargs)")

    def metrics_of(self, scores: TokenScores, loss_kwargs: Any) -> dict[str, Metric]:
        """Return metrics of these tokens besides the loss and its terms; none by default."""
        return {}

    def loss_from_scores(self, scores: TokenScores, loss_kwargs: Any) -> tuple[Tensor, Any]:
        """Return the loss of n tokens, 0-dim, and metrics; override it only for a loss that is not a sum of terms."""
        loss, metrics = self.summed(self.token_losses(scores, loss_kwargs), loss_kwargs)
        return loss, {**self.metrics_of(scores, loss_kwargs), **metrics}

    @property
    def scope(self) -> Scope:
        """What one token's loss depends on: itself ("token"), its "sequence" or the "batch"."""
        return "token"

    @property
    def entropy(self) -> Entropy:
        """Which entropies `token_losses` needs: False, "metric" (without gradient) or True."""
        return False

    def scored_labels(self) -> Tensor:
        """Return the labels [B, T], with `ignore_idx` wherever a token need not be scored."""
        return self.loss_kwargs.shifted_labels

    def sequence_ids(self) -> Tensor | None:
        """Return the sequence of each position, [B, T], for a loss of scope "sequence"."""
        return None

    def candidate_ids(self, loss_kwargs: Any) -> Tensor | Literal["all"] | None:
        """Return the tokens that `token_losses` needs scored besides the labels; the head then takes the general path.

        Args:
            loss_kwargs: the kwargs of n tokens.

        Returns:
            [n, K], negative for none; "all" for the whole vocabulary; None: no others.
        """
        return None

    def _forward(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> tuple[Tensor, Any]:
        if self.loss_cfg.mode == "eager" or self._is_general:
            return super()._forward(hidden_states, head_weight, head_bias)
        self._check(hidden_states, head_weight, head_bias)
        if self._is_small(head_weight):
            return self._checked(self.loss_fn(hidden_states, head_weight, head_bias, self.loss_kwargs))

        def loss_of(scores: TokenScores, positions: Tensor) -> tuple[Tensor, Any]:
            return self._with_graph(self.loss_from_scores(scores, self.loss_kwargs.take(positions)), scores.logprobs)

        options = self._head_options()
        loss, extras = fused_loss(loss_of, hidden_states, head_weight, self.scored_labels(), head_bias, **options)
        return loss, merge_extras(extras)

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: BaseLossKwargs
    ) -> tuple[Tensor, Any]:
        """Return the loss of these positions, 0-dim, from the logits of all scored ones, under plain autograd.

        `hidden_states` are [..., T, D], `head_weight` is [V, D], `head_bias` [V].
        """
        labels = self.scored_labels() if loss_kwargs is self.loss_kwargs else loss_kwargs.shifted_labels
        flat = labels.reshape(-1)
        positions = (flat != self.loss_cfg.ignore_idx).nonzero().squeeze(-1)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, positions)
        taken = loss_kwargs.take(positions)
        scores = eager_scores(
            hidden,
            head_weight,
            taken.shifted_labels,
            head_bias,
            self.transform,
            entropy=self.entropy,
            candidate_ids=self.candidate_ids(taken),
        )
        return self.loss_from_scores(scores, taken)

    def _chunk_plan(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> HeadPlan:
        if self._is_general:
            return super()._chunk_plan(hidden_states, head_weight, head_bias)
        if self._is_small(head_weight):
            why = f"the logits of this micro-batch are one chunk of at most {SMALL_LOGITS // 2**20} MiB: all at once"
            return self._eager_plan(why, hidden_states, head_weight, head_bias)
        return explain(hidden_states, head_weight, self.scored_labels(), head_bias, **self._head_options())

    def _logit_copies(self, *, has_gradient: bool) -> int:
        if type(self).loss_fn is not ScoredLossContext.loss_fn:
            return super()._logit_copies(has_gradient=has_gradient)
        candidates = self.candidate_ids(self.loss_kwargs)
        return logit_copies(self.transform, self.entropy, candidates, has_gradient=has_gradient)

    def _is_small(self, head_weight: Tensor) -> bool:
        """Whether all logits at once are small; counts every position, to avoid waiting for the device."""
        positions, size = self.loss_kwargs.shifted_labels.numel(), self.loss_cfg.chunk_size
        is_one_chunk = size == "auto" or positions <= size
        is_little = positions * head_weight.shape[0] * 4 <= SMALL_LOGITS
        return is_one_chunk and is_little and not vocab_group(head_weight).is_split

    @property
    def _is_general(self) -> bool:
        """Whether a subclass overrides `loss_fn` or needs candidates; autograd then computes the gradient."""
        return type(self).loss_fn is not ScoredLossContext.loss_fn or self.candidate_ids(self.loss_kwargs) is not None

    def _head_options(self) -> dict[str, Any]:
        ids = self.sequence_ids() if self.scope == "sequence" else None
        options: HeadOptions = self.loss_cfg.head_options
        return {"scope": self.scope, "sequence_ids": ids, "options": options, "entropy": self.entropy}
