"""A diagnosis from the arrays alone: what can be undone is undone and compared; the rest has a signature.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.runner.arguments import as_tensor
from toolkit.runner.diagnosis.outcome import Diagnosis
from toolkit.runner.diagnosis.pair import FEWEST, Pair, pair_of
from toolkit.runner.diagnosis.positions import missing_values, row_order

USUAL = 0.03
"""Nats, mean difference of a healthy pair: bf16 against fp32 gives 0.01 to 0.02."""
CLOSER = 0.5
"""A fault explains a pair if undoing it leaves less than this part of the difference."""
ONE_SIDED = 0.05
"""Share of the difference where the sampler is below the trainer, under a cut vocabulary: rounding only."""
MOST_OF_A_CUT = math.log(2)
"""Nats, difference of a sampler that kept half of the probability."""
BY_VALUE = 0.35
"""Share of the variance of the difference that the value explains under another temperature."""
UNRELATED = 0.25
"""Correlation of the log-probabilities of different tokens in the same places."""
SMALL = 0.15
"""Nats, largest mean difference that rounding of weights to 8 bits makes."""
MOST = 0.9
"""Share of the values of a side that are positive, where these cannot be log-probabilities."""
SMALLEST = 1e-4
"""Nats, above which a value is not a rounded 0."""
LAGS = (-3, -2, -1, 1, 2, 3)


def diagnose(
    rollout_logprobs: Any,
    trainer_logprobs: Any,
    mask: Any = None,
    ids: Any = None,
    *,
    vocab_size: int | None = None,
) -> Diagnosis:
    """Say why a sampler's log-probabilities differ from a trainer's.

    Reads the arrays as they are, before an item would refuse them. From the arrays alone other weights, a duplicated
    BOS and a missing prompt look alike, so a set is returned; `LossRunner.diagnose` with the model tells them apart.

    Args:
        rollout_logprobs: [B, T] in nats, as the sampler reported them.
        trainer_logprobs: [B, T] in nats, of the same tokens in the same places, by the trainer.
        mask: [B, T], 1 at the tokens to compare, such as completions; None: where both are finite.
        ids: [B, T] the token that each value is of.
        vocab_size: V; None: from the largest of `ids`, or not used.

    Returns:
        The kind, or the kinds that the evidence allows, and the statistic that decided.

    Raises:
        DataError: the shapes differ, the mask is none, or nothing is compared.
    """
    pair = pair_of(rollout_logprobs, trainer_logprobs, mask)
    if not bool((pair.mask & pair.rollout.isfinite()).any()):
        raise DataError(_why_nothing(pair))
    size = vocab_size if vocab_size is not None else _smallest_size(ids)
    for rule in (_positive, _rows_and_lags, _missing):
        outcome = rule(pair)
        if outcome is not None:
            return outcome
    return _by_signature(pair, size)


def result(
    pair: Pair, kinds: tuple[str, ...], because: str, unexplained: float = math.nan, **numbers: float
) -> Diagnosis:
    """Return the diagnosis of a pair."""
    finite = pair.without(~pair.rollout.isfinite())
    tokens = int(finite.mask.sum())
    return Diagnosis(kinds, because, finite.mean_difference, tokens, unexplained, numbers, pair.dropped)


def _smallest_size(ids: Any) -> int | None:
    if ids is None:
        return None
    values = as_tensor("ids", ids, torch.device("cpu"))
    if not isinstance(values, Tensor) or values.is_floating_point() or not values.numel():
        raise DataError("ids are not token ids; give integers [B, T], the token that each value is of")
    return int(values.max()) + 1


def _why_nothing(pair: Pair) -> str:
    """Return the error message for a pair of which nothing is compared."""
    if not pair.dropped:
        return "mask leaves nothing to compare; give 1 on the tokens whose log-probabilities both arrays hold"
    sides = {"rollout_logprobs": pair.rollout, "trainer_logprobs": pair.trainer}
    wrong = [name for name, values in sides.items() if not bool(values.isfinite().any())]
    where = f"all values of {' and '.join(wrong)}" if wrong else "all values to compare, on one side or the other,"
    return f"{where} are NaN or infinite; give one finite log-probability for each token"


def _positive(pair: Pair) -> Diagnosis | None:
    """Find a side whose values are positive: negative log-likelihoods, or probabilities."""
    known = pair.without(~pair.rollout.isfinite())
    sides = {"sampler": known.r, "trainer": known.t}
    wrong = [name for name, values in sides.items() if _is_positive(values)]
    if not wrong:
        return None
    left = {"negated": _left(sides, wrong, torch.neg)}
    share = min(float(((sides[name] > 0) & (sides[name] <= 1)).double().mean()) for name in wrong)
    if share >= MOST:
        left["probabilities"] = _left(sides, wrong, lambda values: values.clamp(min=1e-30).log())
    kinds = tuple(sorted(left, key=lambda kind: left[kind]))
    if len(wrong) == 1:  # the other side tells which
        kinds = kinds[:1]
    whose = " and of the ".join(f"{name}'s" for name in wrong)
    words = f"{share:.0%} of the {whose} values lie in (0, 1], where log-probabilities are negative"
    if "negated" in kinds:
        share = min(float((sides[name] >= 0).double().mean()) for name in wrong)
        words = f"{share:.0%} of the {whose} values are not negative: negative log-likelihoods: change the sign"
        words += "; or probabilities: take the logarithm" if len(kinds) > 1 else ""
    return result(pair, kinds, words, left[kinds[0]], share_positive=share)


def _is_positive(values: Tensor) -> bool:
    """Whether nearly all of `values` [n] that are not 0 are positive."""
    others = values[values.abs() > SMALLEST]
    return len(others) > 0 and float((others > 0).double().mean()) >= MOST


def _left(sides: dict[str, Tensor], wrong: list[str], change: Callable[[Tensor], Tensor]) -> float:
    """Return the mean difference in nats after `change` of the sides that are `wrong`."""
    r, t = (change(values) if name in wrong else values for name, values in sides.items())
    return float((r - t).abs().mean())


def _rows_and_lags(pair: Pair) -> Diagnosis | None:
    """Find values of a neighbouring token, or of another row."""
    known = pair.without(missing_values(pair, USUAL))
    usual = known.mean_difference
    if usual <= USUAL or len(known.r) < FEWEST:
        return None
    lags = {lag: known.at_lag(lag) for lag in LAGS}
    best = min(lags, key=lambda lag: lags[lag])
    if lags[best] < CLOSER * usual:
        words = f"values fit the token {abs(best)} {'later' if best > 0 else 'earlier'} to {lags[best]:.2g} nats"
        return result(pair, ("shifted",), f"{words}, their token to {usual:.2g}", lags[best], lag=best)
    order = row_order(known, USUAL)
    if order is None:
        return None
    moved, left = order
    shown = ", ".join(f"{row} -> {source}" for row, source in list(moved.items())[:4])
    words = f"{len(moved)} rows fit another row ({shown}) to {left:.2g} nats"
    return result(pair, ("swapped_rows",), words, left, moved_rows=len(moved))


def _missing(pair: Pair) -> Diagnosis | None:
    """Find values without a probability at the ends of rows: of an end token, or of padding."""
    is_missing = missing_values(pair, USUAL)
    if not bool(is_missing.any()):
        return None
    rest = pair.without(is_missing)
    if (
        rest.mean_difference > CLOSER * pair.without(~pair.rollout.isfinite()).mean_difference
        and rest.mean_difference > USUAL
    ):
        return None
    lengths = is_missing.sum(-1)
    longest, rows = int(lengths.max()), int((lengths > 0).sum())
    words = f"in {rows} of {len(lengths)} rows the last values (up to {longest}) are constant, without a probability"
    kinds = ("padding_scored",) if longest > 1 else ("dropped_eos",)
    return result(pair, kinds, words, rest.mean_difference, rows=rows, longest=longest)


def _by_signature(pair: Pair, size: int | None) -> Diagnosis:
    known = pair.without(~pair.rollout.isfinite())
    numbers = {
        "mean_difference": known.mean_difference, "correlation": known.correlation, "share_below": known.share_below,
        "explained_by_value": known.explained_by_value, "slope": known.slope, "early_over_late": known.early_over_late,
        "mean_rollout": float(known.r.mean()) if len(known.r) else math.nan,
        "mean_trainer": float(known.t.mean()) if len(known.t) else math.nan,
    }  # fmt: skip
    kinds, words = next(_signatures(known, numbers, size))
    return result(pair, kinds, words, **numbers)


def _signatures(pair: Pair, at: dict[str, float], size: int | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what fits, the most certain first."""
    usual = at["mean_difference"]
    for dtype in (torch.bfloat16, torch.float16):
        if pair.on_grid(dtype) and usual <= SMALL:
            yield ("dtype_noise",), f"every value of the sampler is a {str(dtype).removeprefix('torch.')} number"
    if usual <= USUAL or len(pair.r) < FEWEST:
        few = f"; only {len(pair.r)} values" if len(pair.r) < FEWEST else ""
        yield (), f"they differ by {usual:.2g} nats on average (up to {USUAL:g} is usual){few}"
    largest = float((pair.r - pair.t).quantile(0.995)) if len(pair.r) < 1_000_000 else math.nan
    if at["share_below"] < ONE_SIDED and largest <= MOST_OF_A_CUT:
        kept = math.exp(-largest)
        words = f"the sampler is above the trainer everywhere ({at['share_below']:.1%} of the difference is below)"
        yield ("top_p",), f"{words}, by at most {largest:.2g} nats: it kept {kept:.2f} of the probability or more"
    is_worse = size is None or at["mean_trainer"] < -math.log(size)
    if at["correlation"] < UNRELATED and at["mean_rollout"] - at["mean_trainer"] > 1 and is_worse:
        words = f"correlation {at['correlation']:.2f}, and the trainer gives its tokens {at['mean_trainer']:.2g} nats"
        uniform = f", less than a uniform guess over {size:,} tokens" if size is not None else ""
        yield ("tokenizer_offset", "prompt_missing"), words + uniform
    if at["explained_by_value"] > BY_VALUE and at["correlation"] > 1 - 2 * UNRELATED:
        words = (
            f"the value explains {at['explained_by_value']:.0%} of the difference (slope {at['slope']:.2f}, near the "
        )
        yield ("temperature",), words + "sampler's temperature over the trainer's)"
    words = f"differences on both sides ({at['share_below']:.0%} below), {usual:.2g} nats"
    if usual <= SMALL:
        yield (
            ("dtype_noise", "stale_weights", "duplicated_bos"),
            words + " on average, with no pattern in value or place",
        )
    kinds = ("stale_weights", "duplicated_bos", "prompt_missing")
    yield kinds, words + " on average: the context or the weights differ; give the model to tell which"
