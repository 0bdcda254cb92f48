"""A diagnosis with the model: each fault is made again, and what then fits the sampler's values is the fault.

Legend: B rows, T tokens of a row, n tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.runner.diagnosis.arrays import CLOSER, SMALL
from toolkit.runner.diagnosis.outcome import Diagnosis

Logits = Callable[[Tensor], Tensor]
"""From the token ids [n] of one sequence to the logits [n, V] after each, at the temperature of the loss."""
MOST_ROWS = 16
"""Rows that are scored again."""
TEMPERATURES = tuple(step / 20 for step in range(6, 41))
"""Of the sampler over the loss's: 0.3 to 2."""
NUCLEI = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
TOP_KS = (2, 5, 10, 20, 40, 50, 64, 100)
MOST_RULED_OUT = 0.02
"""Share of the tokens that rounding moves out of a cut vocabulary."""
OFFSETS = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class Sequence:
    """One row: all its tokens, and the sampler's values of those that are compared."""

    ids: Tensor
    """[n] prompt and completion, without padding."""
    is_compared: Tensor
    """[n] bool, by token; never the first."""
    rollout: Tensor
    """The values of the compared tokens, in their order."""
    is_read: Tensor
    """[n] bool, the tokens that the trainer attended to."""


def sequences_of(ids: Tensor, attention: Tensor, rollout: Tensor, mask: Tensor) -> list[Sequence]:
    """Return the first rows as sequences, without padding, but with a prompt that the trainer did not attend to.

    Args:
        ids: [B, T].
        attention: [B, T], 1 at the tokens that the trainer read.
        rollout: [B, T] in nats, at position t of token t + 1.
        mask: [B, T] bool, the positions that are compared.
    """
    result = []
    for row in range(min(len(ids), MOST_ROWS)):
        chosen = mask[row] & rollout[row].isfinite()
        chosen[-1] = False
        compared, is_read = chosen.roll(1), attention[row].bool()
        if not bool(compared.any()):
            continue
        last = int((compared | is_read).nonzero()[-1])
        is_repeated = (ids[row] == ids[row, 0]) & ~is_read  # padding on the left is one token, a prompt is several
        start = int(is_repeated.long().cumprod(0).sum()) if len(ids[row]) > 1 and bool(is_repeated[:2].all()) else 0
        span = slice(start, last + 1)
        values = rollout[row][chosen].double()
        if bool(compared[start]):  # its first token has no context
            compared[start], values = False, values[1:]
        result.append(Sequence(ids[row, span], compared[span], values, is_read[span]))
    return result


def with_model(first: Diagnosis, sequences: list[Sequence], logits: Logits, begins: int | None) -> Diagnosis:
    """Tell apart what the arrays alone leave open.

    Args:
        first: the diagnosis from the arrays.
        sequences: some rows.
        logits: the model.
        begins: the token that begins every sequence; None: the first token of each.

    Returns:
        The fault that, made again, leaves the least difference; `first`, narrowed, if none leaves half of it.
    """
    if not sequences or (len(first.kinds) < 2 and not {*first.kinds} & {"temperature", "top_p", "tokenizer_offset"}):
        return first
    best: tuple[float, str, str] | None = None
    as_read = _difference(sequences, [_scores(one, logits(one.ids)) for one in sequences])  # with all tokens read
    for kind, words, values in _faults(sequences, logits, begins):
        left = _difference(sequences, values)
        if kind in ("temperature", "top_p") and left > CLOSER * as_read:
            continue  # the plain model is as close
        if best is None or left < best[0]:
            best = left, kind, words
    usual = first.mean_difference
    if best is not None and best[0] < CLOSER * usual:
        words = f"{best[2]} gives the sampler's values to {best[0]:.2g} nats; the trainer's differ by {usual:.2g}"
        return replace(first, kinds=(best[1],), because=words, unexplained=best[0])
    excluded = {"temperature", "top_p", "tokenizer_offset", "duplicated_bos", "prompt_missing"}
    rest = tuple(kind for kind in first.kinds if kind not in excluded)
    rest = rest or (("dtype_noise", "stale_weights") if usual <= SMALL else ("stale_weights",))
    shown = f"; the nearest fault, {best[2]}, leaves {best[0]:.2g} nats" if best is not None else ""
    words = f"{usual:.2g} nats on average, and no fault of text or sampling explains half of it"
    return replace(first, kinds=rest, because=words + shown)


def _faults(sequences: list[Sequence], logits: Logits, begins: int | None) -> Iterator[tuple[str, str, list[Tensor]]]:
    """Yield kind, description and the values of each sequence under a fault."""
    plain = [logits(one.ids) for one in sequences]
    for temperature in TEMPERATURES:
        if temperature != 1:
            values = [_scores(one, z / temperature) for one, z in zip(sequences, plain, strict=True)]
            yield "temperature", f"temperature {temperature:g} times that of the loss", values
    for p in NUCLEI:
        yield "top_p", f"top-p {p:g}", [_scores(one, nucleus(z, p)) for one, z in zip(sequences, plain, strict=True)]
    for k in TOP_KS:
        if k < plain[0].shape[-1]:
            yield "top_p", f"top-k {k}", [_scores(one, _top(z, k)) for one, z in zip(sequences, plain, strict=True)]
    del plain
    size = None
    for ids, words in _texts(sequences, begins):
        scored = [logits(text) for text in ids]
        size = scored[0].shape[-1]
        values = [_scores(one, z[max(0, len(z) - len(one.ids)) :]) for one, z in zip(sequences, scored, strict=True)]
        yield "duplicated_bos", words, values
    if any(not bool(one.is_read.all()) for one in sequences):
        yield "prompt_missing", "a forward over the tokens that attention_mask leaves out, too,", [
            _scores(one, logits(one.ids)) for one in sequences
        ]  # fmt: skip
    for keeps_first in (True, False):
        values = [_without_prompt(one, logits, keeps_first=keeps_first) for one in sequences]
        yield "prompt_missing", "a forward without the prompt", values
    for offset in OFFSETS:
        size = size or logits(sequences[0].ids[:1]).shape[-1]
        values = []
        for one in sequences:
            other = (one.ids + offset) % size
            values.append(_scores(replace(one, ids=other), logits(other)))
        yield "tokenizer_offset", f"token ids {offset:+d}", values


def _texts(sequences: list[Sequence], begins: int | None) -> Iterator[tuple[list[Tensor], str]]:
    first = [one.ids[:1] if begins is None else torch.full_like(one.ids[:1], begins) for one in sequences]
    yield [torch.cat([start, one.ids]) for start, one in zip(first, sequences, strict=True)], "one more first token"
    if all(len(one.ids) > 2 and one.ids[0] == one.ids[1] for one in sequences):
        yield [one.ids[1:] for one in sequences], "one first token less"


def _without_prompt(one: Sequence, logits: Logits, *, keeps_first: bool) -> Tensor:
    """Return the values under a model that reads the completion alone; NaN for its first token without a context."""
    start = int(one.is_compared.nonzero()[0])
    completion = one.ids[start:]
    context = one.ids[:1] if keeps_first else completion[:0]
    ids = torch.cat([context, completion])
    scores = torch.nn.functional.pad(_by_token(ids, logits(ids)), (1, 0), value=float("nan"))
    return scores[len(context) :][one.is_compared[start:]]


def nucleus(logits: Tensor, p: float) -> Tensor:
    """Return `logits` [n, V], -inf outside the fewest tokens whose probabilities sum to at least `p`."""
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    is_cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered >= p)
    return logits.masked_fill(is_cut, float("-inf"))


def _top(logits: Tensor, k: int) -> Tensor:
    return logits.masked_fill(logits < logits.topk(k, -1).values[:, -1:], float("-inf"))


def _by_token(ids: Tensor, logits: Tensor) -> Tensor:
    """Return the log-probability of each token but the first, [n - 1]."""
    return logits[:-1].float().log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1).double()


def _scores(one: Sequence, logits: Tensor) -> Tensor:
    """Return the log-probabilities of the compared tokens; NaN where `logits` [n, V] (or one row less) has none."""
    ids = one.ids[len(one.ids) - len(logits) :]
    scores = torch.nn.functional.pad(_by_token(ids, logits), (len(one.ids) - len(ids) + 1, 0), value=float("nan"))
    return scores[one.is_compared]


def _difference(sequences: list[Sequence], values: list[Tensor]) -> float:
    """Return the mean difference in nats from the sampler's values; inf if the fault rules out many tokens."""
    pairs = zip(sequences, values, strict=True)
    joined = torch.cat([(one.rollout.to(scores.device) - scores)[~scores.isnan()].abs() for one, scores in pairs])
    is_possible = joined.isfinite()
    if not bool(is_possible.any()) or float((~is_possible).double().mean()) > MOST_RULED_OUT:
        return float("inf")
    return float(joined[is_possible].mean())
