"""Whether log-probabilities or labels fit a neighbouring position better than their own.

Legend: B rows, T positions of a row, D hidden width, V vocabulary, n positions that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.head.logits import LogitTransform
from toolkit.head.scores import wide_logits

COMPARED = 256
"""Positions whose neighbours are compared: their logits of a vocabulary of 150,000 take 300 MB."""
FEWEST = 4
"""Positions below which log-probabilities may fit a neighbour by chance."""
FEWEST_LABELS = 16
"""Positions below which labels may fit a neighbour by chance."""
MORE_LIKELY = 1.0
"""Nats by which the labels of a neighbour must be more likely, ..."""
STANDARD_ERRORS = 5.0
"""... and in times of the standard error of this difference."""
ROUNDING = 0.02
"""Nats; what bf16 changes."""
CLOSER = 0.5
"""A neighbour fits better if it is off by less than this part: where the policy differs, both are off."""
NEIGHBOURS = {
    "by_token": "fit the position before: value t seems to be of token t. They must be of the token that each position "
    "predicts, token t + 1: shift them by RLLossContextInputItem.from_unshifted",
    "too_far": "fit the position after: they seem to be shifted twice. Value t must be of token t + 1",
    "hidden_ahead": "fit the hidden states one position later: hidden_states[:, 1:] was passed where all of them, or "
    "hidden_states[:, :-1], belong to these labels",
    "hidden_behind": "fit the hidden states one position earlier; position t must have the state that predicts token "
    "t + 1",
    "labels_ahead": "fit the label of the position before: the labels seem to be shifted twice. The runner shifts "
    "input_ids, so give all of them, not input_ids[:, 1:]; shifted_labels have token t + 1 at position t",
    "labels_behind": "fit the label of the position after: the labels seem not to be shifted. shifted_labels have "
    "token t + 1 at position t; the runner shifts input_ids instead",
}
"""How log-probabilities can be off by one position, and what to say."""
LABELS = {
    "ahead": "the labels seem to be shifted twice. The runner shifts input_ids, so give all of them, not "
    "input_ids[:, 1:]; shifted_labels have token t + 1 at position t. (A model that was never trained may also repeat "
    "its input)",
    "behind": "the labels seem not to be shifted, or hidden_states[:, 1:] was passed. shifted_labels have token t + 1 "
    "at position t, which hidden_states[:, t] predicts; the runner shifts input_ids instead",
}
"""How labels can be off by one position, and what to say."""


@torch.no_grad()
def better_neighbour(
    values: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    hidden_states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
) -> tuple[str, float, float] | None:
    """Return which of `NEIGHBOURS` log-probabilities fit better, with both mean differences in nats; None: none.

    Args:
        values: [B, T] log-probabilities in nats, NaN where nothing is compared.
        labels: [B, T] shifted.
        transform: of the logits.
        hidden_states: [B, T, D].
        head_weight: [V, D].
        head_bias: [V] or None.
    """
    is_scored = values.isfinite()
    here = _pairs(is_scored)
    if len(here) < FEWEST:
        return None
    value, after = values.reshape(-1), here + 1
    score = _Scores(labels, transform, hidden_states, head_weight, head_bias).of
    at = score(here, here)
    pairs = {
        "": (value[here], at),
        "by_token": (value[after], at),
        "too_far": (value[here], score(after, after)),
        "hidden_ahead": (value[after], score(here, after)),
        "hidden_behind": (value[here], score(after, here)),
        "labels_ahead": (value[after], score(after, here)),
        "labels_behind": (value[here], score(here, after)),
    }
    off = torch.stack([(one - other).abs().mean() for one, other in pairs.values()]).tolist()
    by_name = dict(zip(pairs, off, strict=True))
    usual = by_name.pop("")
    best = min(by_name, key=lambda name: by_name[name])
    return (best, usual, by_name[best]) if usual > ROUNDING and by_name[best] < CLOSER * usual else None


@torch.no_grad()
def better_labels(
    labels: Tensor,
    ignore_idx: int,
    transform: LogitTransform,
    hidden_states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
) -> tuple[str, float, float] | None:
    """Return which of `LABELS` is much more likely, with both mean log-probabilities in nats; None: none.

    Args:
        labels: [B, T] shifted.
        ignore_idx: label of positions without one.
        transform: of the logits.
        hidden_states: [B, T, D].
        head_weight: [V, D].
        head_bias: [V] or None.
    """
    here = _pairs(labels != ignore_idx)
    if len(here) < FEWEST_LABELS:
        return None
    after, score = here + 1, _Scores(labels, transform, hidden_states, head_weight, head_bias).of
    pairs = {
        "ahead": (score(here, here), score(after, here)),
        "behind": (score(after, after), score(here, after)),
    }
    figures = []
    for usual, other in pairs.values():
        gain = other - usual
        bound = (STANDARD_ERRORS * gain.std() / len(here) ** 0.5).clamp(min=MORE_LIKELY)
        figures.append(torch.stack([usual.mean(), other.mean(), gain.mean() - bound]))
    for name, (usual_mean, other_mean, excess) in zip(pairs, torch.stack(figures).tolist(), strict=True):
        if excess > 0:
            return name, usual_mean, other_mean
    return None


def _pairs(is_scored: Tensor) -> Tensor:
    """Return the flat positions [n] that are scored, [B, T] bool, with the one behind them: the first `COMPARED`."""
    follows = is_scored[..., :-1] & is_scored[..., 1:]
    return torch.nn.functional.pad(follows, (0, 1)).reshape(-1).nonzero().squeeze(-1)[:COMPARED]


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities of labels by the hidden states of any positions; shapes as in `better_neighbour`."""

    labels: Tensor
    transform: LogitTransform
    hidden_states: Tensor
    head_weight: Tensor
    head_bias: Tensor | None

    def of(self, position: Tensor, label_position: Tensor) -> Tensor:
        """Return the log-probabilities [n] of the labels there by the states at `position`, [n] each."""
        states = self.hidden_states.reshape(-1, self.hidden_states.shape[-1])[position]
        logits = self.transform(wide_logits(states, self.head_weight, self.head_bias))
        labels = self.labels.reshape(-1)[label_position]
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
