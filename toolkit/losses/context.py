"""The base of every loss: kwargs of one micro-batch in, a loss and metrics out, at once or in chunks.

Legend: B rows, T positions of a row, D hidden width, V vocabulary, n tokens of one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from toolkit.distributed import counted_with, counting_as_before
from toolkit.errors import ConfigError, DataError
from toolkit.head.chunked import chunked_loss
from toolkit.head.cost import PassName
from toolkit.head.inputs import Needs, check_head
from toolkit.head.logits import LogitTransform
from toolkit.head.passes import checked_loss
from toolkit.head.plan import HeadPlan, Scope, auto_chunk, autograd_plan, equal_chunks
from toolkit.head.scores import wide_logits
from toolkit.head.vocabulary import local_part, replicated, vocab_group
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.term import LossTerm
from toolkit.losses.kwargs import BaseLossKwargs
from toolkit.losses.record import PerToken
from toolkit.losses.step.builder import ItemT, KwargsBuilder
from toolkit.losses.summation import has_weight, term_sums, total
from toolkit.metrics import DeferredMetrics, Metric, Sum, merge_metrics, metrics_in, wide_dtype


class BaseLossContext(KwargsBuilder[ItemT]):
    """A config and the kwargs of one micro-batch: call `forward` with hidden states and head.

    A custom loss lists its terms in its config and returns their values here, unreduced:

    * `losses_from_logits` for values of whole distributions, or `token_losses` of a `ScoredLossContext` for values of
      log-probabilities and entropies: the base then handles counting, ranks, shards, packing, chunks and metrics;
    * `loss_fn` for anything else: it returns a *sum* over tokens of weight times value (`summed` makes it).
    """

    has_vocabulary: ClassVar[bool] = True
    """Whether the head scores tokens, so labels must be among its rows; False for a value head, [1, D]."""

    loss_cfg: Any
    loss_kwargs: Any

    def __init__(self, loss_cfg: BaseLossConfig, loss_kwargs: BaseLossKwargs) -> None:
        if not isinstance(loss_cfg, BaseLossConfig):
            raise ConfigError(
                f"{type(self).__name__} takes a loss config, then the kwargs of a micro-batch, but the first is a "
                f"{type(loss_cfg).__name__}"
            )
        self.loss_cfg = loss_cfg
        self.loss_kwargs = loss_kwargs

    def losses_from_logits(self, logits: Tensor, loss_kwargs: Any) -> Tensor | Mapping[str, Tensor]:
        """Return the values of n scored tokens, [n] unreduced, or a mapping of these by the name of their term.

        Args:
            logits: [n, V] fp32 or wider; scaled, capped and divided by the temperature as the config says.
            loss_kwargs: the kwargs of these tokens; per-token fields [n], labels in ``shifted_labels``.
        """
        raise ConfigError(
            f"{type(self).__name__} computes nothing yet: define losses_from_logits(logits, loss_kwargs), loss_fn, or "
            "token_losses(scores, loss_kwargs) of a ScoredLossContext"
        )

    def summed(
        self, values: Tensor | Mapping[str, Tensor], loss_kwargs: Any, importance: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return ``sum over terms of coef * sum over tokens of weight * value``, and metrics.

        Args:
            values: [n] unreduced for each term by its name; for a single term, the tensor alone.
            loss_kwargs: the kwargs of these tokens.
            importance: [n] factor of the terms with ``use_correction``; None: that of the kwargs.

        Raises:
            DataError: values of a term are missing or not one for each token.
        """
        owner = type(self).__name__
        by_name = {self.terms[0].name: values} if isinstance(values, Tensor) else values
        if not isinstance(by_name, Mapping):
            raise DataError(
                f"{owner} returned {type(values).__name__} for its values; return a tensor [n], or a dict of one "
                f"tensor per term ({', '.join(term.name for term in self.terms)})"
            )
        sums = term_sums(self.terms, by_name, loss_kwargs, importance, owner=owner)
        loss, metrics = total(self.terms, sums, self.loss_cfg.gradient_reduction)
        number = loss.new_full((), float(loss_kwargs.shifted_labels.numel()), dtype=wide_dtype(loss))
        return loss, {"active_tokens": Sum(number), **metrics}

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of the config."""
        terms: tuple[LossTerm, ...] = self.loss_cfg.checked_terms
        return terms

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Return the loss of these positions, 0-dim, and anything else (metrics by name are merged, None is fine).

        By default it is `summed` over `losses_from_logits` of the scored ones. In chunk mode it is called once per
        chunk of the scored tokens, as one row with the kwargs of these tokens, and the results are added; see `scope`
        for losses where that is wrong. A loss of log-probabilities only should be a `ScoredLossContext`.

        Args:
            hidden_states: [..., T, D], with T positions as in `loss_kwargs`.
            head_weight: [V, D].
            head_bias: [V] or None.
            loss_kwargs: kwargs of these positions.

        Raises:
            DataError: the vocabulary is split over ranks, so each rank has only part of the logits.
        """
        weight, bias, vocab = local_part(head_weight, head_bias)
        if vocab.is_split:
            raise DataError(
                f"{type(self).__name__} takes logits of the whole vocabulary, but it is split over ranks; gather the "
                "head, or compute the loss from log-probabilities (token_losses of a ScoredLossContext)"
            )
        scored = (loss_kwargs.shifted_labels != self.loss_cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1)
        hidden = replicated(hidden_states).reshape(-1, hidden_states.shape[-1]).index_select(0, scored)
        taken = loss_kwargs.take(scored)
        return self.summed(self.losses_from_logits(self.transform(wide_logits(hidden, weight, bias)), taken), taken)

    @property
    def transform(self) -> LogitTransform:
        """The change of logits before the softmax that the config asks for."""
        return LogitTransform(self.loss_cfg.logit_scale, self.loss_cfg.softcap, self.loss_cfg.temperature)

    @property
    def scope(self) -> Scope:
        """What one token's loss depends on: itself ("token"), its "sequence" or the "batch"; only "token" is cut."""
        return "token"

    def forward(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return the loss of this micro-batch and its metrics.

        The loss is calibrated: summed over the micro-batches of a step and *averaged* over ranks, it is the loss of
        the whole batch. Its gradient is right under a back-end that averages gradients (DDP, FSDP); for one that sums,
        set ``gradient_reduction="sum"`` in the config.

        Args:
            hidden_states: [1, T, D] or [B, T, D], the last hidden states; those of ignored positions may be anything.
            head_weight: [V, D].
            head_bias: [V], optional.

        Returns:
            A scalar (fp32, float64 for float64 hidden states) with a live graph, and what else `loss_fn` returned: for
            the losses of this package mergeable metrics by name; those of policy losses are computed when one is read.

        Raises:
            DataError: shapes do not match, or a label is outside the vocabulary.
        """
        with self._counting():
            return self._forward(hidden_states, head_weight, head_bias)

    def _forward(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> tuple[Tensor, Any]:
        self._check(hidden_states, head_weight, head_bias)
        if self.loss_cfg.mode == "eager" or self.scope != "token":
            return self._checked(self.loss_fn(hidden_states, head_weight, head_bias, self.loss_kwargs))
        positions = self._scored_positions()
        spans = equal_chunks(0, len(positions), self._general_chunk(head_weight))
        pieces = [positions[span] for span in spans] or [positions]
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, positions).unsqueeze(0)

        def piece_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, Any]:
            piece = self.loss_kwargs.take(pieces[index], as_row=True)
            return self._with_graph(self.loss_fn(hidden, weight, bias, piece), hidden, weight)

        loss, extras = chunked_loss(piece_loss, flat, head_weight, head_bias, [len(piece) for piece in pieces])
        return loss, merge_extras(extras)

    def num_learning(self) -> Tensor:
        """Return how many tokens this micro-batch can learn from, a 0-dim tensor; 0 everywhere: the step is empty.

        Counts tokens with a weight in some term whose coefficient is not 0; tokens that a correction rejected have
        none in the policy's.
        """
        is_scored = self.loss_kwargs.shifted_labels != self.loss_cfg.ignore_idx
        if self.loss_kwargs.loss_weight is not None:
            is_scored = is_scored & has_weight(self.terms, self.loss_kwargs)
        return is_scored.sum()

    def explain(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None) -> HeadPlan:
        """Return the pass of the head that `forward` would take with these tensors, why, and its cost; ``print`` it.

        `hidden_states` are [B, T, D], `head_weight` is [V, D], `head_bias` [V].

        Costs are those of the head; for the eager and the general path they are estimates, because there the loss may
        do anything with the logits.

        Raises:
            DataError: as `forward`.
        """
        self._check(hidden_states, head_weight, head_bias)
        if self.loss_cfg.mode == "chunk":
            return self._chunk_plan(hidden_states, head_weight, head_bias)
        why = "mode is eager: the logits of all scored tokens at once"
        return self._eager_plan(why, hidden_states, head_weight, head_bias)

    def _eager_plan(self, why: str, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> HeadPlan:
        tokens = len(self._scored_positions())
        return self._autograd_plan("eager", why, hidden_states, head_weight, head_bias, [slice(0, tokens)])

    def _chunk_plan(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> HeadPlan:
        name = type(self).__name__
        if self.scope != "token":
            why = f"{name}.loss_fn takes the logits of a whole {self.scope}, so it cannot be cut"
            spans = [slice(0, self.loss_kwargs.shifted_labels.numel())]
            return self._autograd_plan("eager", why, hidden_states, head_weight, head_bias, spans)
        why = f"{name} computes its loss_fn from hidden states and head, so each chunk is differentiated by autograd"
        spans = equal_chunks(0, len(self._scored_positions()), self._general_chunk(head_weight))
        return self._autograd_plan("general", why, hidden_states, head_weight, head_bias, spans)

    def _autograd_plan(
        self, name: PassName, why: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, spans: Sequence[slice]
    ) -> HeadPlan:
        copies = self._logit_copies(has_gradient=bool(Needs.of(hidden, weight, bias)))
        return autograd_plan(name, why, hidden, weight, bias, spans, copies=copies)

    def _logit_copies(self, *, has_gradient: bool) -> int:
        """Return how many tensors of the size of the logits are alive at once: log-softmax, a gather, gradients."""
        return 2 + has_gradient

    def _general_chunk(self, head_weight: Tensor) -> int:
        size = self.loss_cfg.chunk_size
        return auto_chunk(head_weight.shape[0], head_weight.dtype, head_weight.device) if size == "auto" else size

    def _scored_positions(self) -> Tensor:
        """Return the positions of the scored tokens; if there are none, the first position, as a loss needs one."""
        labels = self.loss_kwargs.shifted_labels.reshape(-1)
        positions = (labels != self.loss_cfg.ignore_idx).nonzero().squeeze(-1)
        return positions if len(positions) else labels.new_zeros(min(1, len(labels)))

    def _checked(self, result: Any) -> tuple[Tensor, Any]:
        return checked_loss(result, f"{type(self).__name__}.loss_fn")

    def _with_graph(self, result: Any, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Return the checked `result` of a chunk; its gradient is taken here, so nobody else would miss it.

        Raises:
            DataError: some of the `inputs` require a gradient, [...] each, and the loss has none.
        """
        loss, extra = self._checked(result)
        if torch.is_grad_enabled() and not loss.requires_grad and any(each.requires_grad for each in inputs):
            raise DataError(
                f"{type(self).__name__} returned values without gradient, although hidden states or head require one; "
                "leave out .detach(), .item(), .data and numpy"
            )
        return loss, extra

    def _counting(self) -> AbstractContextManager[None]:
        """Count as when the kwargs were built."""
        built = getattr(self.loss_kwargs, "built", None)
        return counting_as_before(None if built is None else built.counted)

    def _check(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
        if not isinstance(self.loss_kwargs, BaseLossKwargs):
            raise DataError(
                f"{type(self).__name__} got {type(self.loss_kwargs).__name__} for its kwargs; build them first"
            )
        labels, ignore_idx = self.loss_kwargs.shifted_labels, self.loss_cfg.ignore_idx
        largest = self.loss_kwargs.check_still(self.loss_cfg.step_settings)
        is_inside = not self.has_vocabulary or (largest is not None and largest < head_weight.shape[0])
        check_head(
            hidden_states,
            head_weight,
            labels,
            head_bias,
            ignore_idx=ignore_idx,
            labels_name="shifted_labels",
            is_inside=is_inside,
        )
        check_counted_once(vocab_group(head_weight).group)
        if largest is None:
            self._check_shapes()

    def _check_shapes(self) -> None:
        labels = self.loss_kwargs.shifted_labels
        for name, value in self.loss_kwargs.tensors():
            mark = self.loss_kwargs.layout(name) if self.loss_kwargs.is_per_token(name) else None
            if isinstance(mark, PerToken) and mark.positions(value) != labels.shape:
                raise DataError(
                    f"{type(self.loss_kwargs).__name__}.{name} has shape {list(value.shape)}, but shifted_labels has "
                    f"{list(labels.shape)}; a per-token field has one value for each position"
                )


def check_counted_once(group: Any) -> None:
    """Raise if ranks that share a vocabulary (`group`; None: no ranks do) count the same tokens.

    Raises:
        DataError: they do; the message shows how to count each token once.
    """
    shared = counted_with(group) if group is not None else 0
    if shared > 1:
        raise DataError(
            f"{shared} ranks share the head's vocabulary, and each counts the same tokens; build the kwargs, run the "
            "loss and reduce metrics inside `with toolkit.distributed.counting_over(group)`, with the group of ranks "
            'that hold other tokens, such as mesh["dp"].get_group() of a mesh of ("dp", "tp"). If FSDP sharded the '
            "head, it was not gathered: call the loss inside the wrapped model's forward"
        )


def merge_extras(extras: list[Any]) -> Any:
    """Merge metrics by name; anything else a chunk returned (such as its logits) is dropped."""
    if extras and all(isinstance(extra, DeferredMetrics) for extra in extras):
        return DeferredMetrics(lambda: merge_metrics(extras))
    return merge_metrics(map(metrics_in, extras)) or None
