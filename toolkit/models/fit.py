"""Find the scale and soft cap between two tensors of logits, for the error message of the start-up check.

Legend: V vocabulary, ``...`` any axes of tokens.
"""

from __future__ import annotations

from torch import Tensor

from toolkit.head.logits import LogitTransform

_ROUNDS = 6
"""Each narrows the search for the cap tenfold, from a range of 1 to 100."""
_POINTS = 41


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of the logits `ours` and `theirs`, [..., V] each, over the largest of `theirs`."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def fitted_transform(raw: Tensor, theirs: Tensor, tolerance: float) -> LogitTransform | None:
    """Return the scale and soft cap that turn `raw` into `theirs`, or None if no pair does.

    A scale is a least-squares fit. Under a cap c the fit is that of ``c atanh(theirs / c)``, which is linear in `raw`
    for the right c, so only c is searched. Rounded to 4 digits, because people choose these settings.

    Args:
        raw: [..., V] logits of the head, not transformed.
        theirs: [..., V] logits of the model.
        tolerance: the largest difference that rounding explains, as `difference` measures it.
    """
    raw, theirs = raw.double(), theirs.double()
    scale = _slope(raw, theirs)
    if difference(raw * scale, theirs) <= tolerance:
        return LogitTransform(_rounded(scale))
    largest = float(theirs.abs().max())
    low, high = largest * (1 + 1e-7), largest * 100
    for _ in range(_ROUNDS):
        caps = [low * (high / low) ** (step / (_POINTS - 1)) for step in range(_POINTS)]
        fits = [LogitTransform(_slope(raw, cap * (theirs / cap).atanh()), cap) for cap in caps]
        errors = [difference(fit(raw), theirs) for fit in fits]
        best = min(range(_POINTS), key=errors.__getitem__)
        low, high = caps[max(best - 2, 0)], caps[min(best + 2, _POINTS - 1)]
    if errors[best] > tolerance:
        return None
    return LogitTransform(_rounded(fits[best].scale), _rounded(caps[best]))


def _slope(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x * x).sum().clamp(min=1e-30))


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
