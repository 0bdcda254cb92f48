"""How token losses become one number: a weight for each token, and what the sum of weighted losses is divided by.

An aggregation gives every token an unnormalised weight and every micro-batch its share of one denominator; the shares
are added up over all micro-batches and ranks before the first forward. With n the number of scored tokens of a token's
sequence, N_p that of its prompt (all sequences of a group), L a constant:

===================  ===========  ============  =================================================================
name                 weight       denominator   the loss is then
===================  ===========  ============  =================================================================
token_mean           1            tokens        the mean over all tokens (DAPO)
token_sum            1            1             the sum over all tokens
seq_mean_token_mean  1 / n        sequences     the mean over sequences of their token means (GRPO)
seq_mean_token_sum   1            sequences     the mean over sequences of their token sums
constant             1 / L        sequences     the same over a fixed length (Dr. GRPO): no length bias
square               1 / sqrt(n)  sum of them   between token_mean and seq_mean_token_mean (XTuner)
prompt_mean          1 / N_p      prompts       the mean over prompts of the mean over their tokens
===================  ===========  ============  =================================================================

Sources: Shao et al. 2024, arXiv 2402.03300, eq. 3; Yu et al. 2025, arXiv 2503.14476, eq. 8; Liu et al. 2025,
arXiv 2503.20783, section 3.2; XTuner's ``loss_reduction`` (square). The aggregation ``per_component`` of a policy loss
is two terms, each a token_mean over a part of the tokens (`losses.term`).

Legend: B rows, T positions of a row, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from toolkit.functional.segments import segment_sum
from toolkit.metrics import wide_dtype

BY_TOKEN = ("token_mean", "token_sum", "prompt_mean")
"""Aggregations that do not depend on which sequence a token belongs to."""


@dataclass(frozen=True)
class Share:
    """One micro-batch under an aggregation."""

    weights: Tensor
    """[B, T] float64, 0 where nothing is scored."""
    count: Tensor
    """0-dim float64: what this micro-batch adds to the denominator."""
    is_sum: bool = False
    """Whether the weights stay undivided (token_sum)."""

    def divided(self, denominator: Tensor) -> Tensor:
        """Return the weights [B, T] over their `denominator` (0-dim); 0 where that is 0."""
        return self.weights * denominator.reciprocal().nan_to_num(posinf=0.0).to(self.weights.dtype)


def share(
    is_active: Tensor,
    ids: Tensor | None,
    aggregation: str,
    *,
    length: float | None = None,
    count_empty: bool = False,
    num_sequences: int | None = None,
    prompt_tokens: Tensor | None = None,
    num_prompts: int = 0,
) -> Share:
    """Return the unnormalised weights of a micro-batch and what it adds to the denominator.

    Args:
        is_active: bool, [1, T] or [B, T]; True where the position is scored.
        ids: int64, [1, T] or [B, T]; the sequence of each position, negative for none. None: see `BY_TOKEN`.
        aggregation: one of the table above.
        length: L of "constant", in tokens.
        count_empty: whether sequences without a scored token count where sequences are counted (peers differ).
        num_sequences: S, including empty ones; by default the number in `ids`.
        prompt_tokens: [1, T] or [B, T], the scored tokens of each position's prompt over the whole step; for
            "prompt_mean".
        num_prompts: prompts that this micro-batch counts; for "prompt_mean".
    """
    # fp64: a count above 2^24 would be rounded in fp32, above 256 in bf16.
    dtype = wide_dtype(is_active)
    active = is_active.to(dtype)
    if aggregation == "token_mean":
        return Share(active, active.sum())
    if aggregation == "token_sum":
        return Share(active, active.sum(), is_sum=True)
    if aggregation == "prompt_mean":
        assert prompt_tokens is not None
        return Share(active / prompt_tokens.clamp(min=1).to(dtype), active.new_tensor(float(num_prompts)))
    assert ids is not None
    lengths, counted = _lengths(active, ids)
    if count_empty and num_sequences is not None:
        counted = active.new_tensor(float(num_sequences))
    elif count_empty:
        counted = active.new_tensor(float(ids.max()) + 1 if ids.numel() else 0.0)
    if aggregation == "seq_mean_token_mean":
        return Share(active / lengths, counted)
    if aggregation == "seq_mean_token_sum":
        return Share(active, counted)
    if aggregation == "constant":
        assert length is not None
        return Share(active / length, counted)
    assert aggregation == "square", aggregation
    weights = active * lengths.rsqrt()
    return Share(weights, weights.sum())


def _lengths(active: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scored tokens of each position's sequence (at least 1), and the number of sequences with any."""
    flat = (ids + 1).reshape(-1)  # slot 0 collects positions outside of all sequences
    num_slots = int(flat.max()) + 1 if flat.numel() else 1
    lengths = segment_sum(active.reshape(-1), flat, num_slots)
    return lengths[flat].reshape(active.shape).clamp(min=1), (lengths[1:] > 0).sum().to(active.dtype)
