"""Probability ratios that cannot overflow. N: selected tokens."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| in nats before exp (XTuner, verl and OpenRLHF use the same): e^20 = 4.9e8 is finite in fp32."""


def bounded_log_ratio(new_logprobs: Tensor, old_logprobs: Tensor, *, bound: float = MAX_LOG_RATIO) -> Tensor:
    """Return log pi_new - log pi_old clamped to [-bound, bound]; its gradient is exactly 0 outside.

    Clamping *before* exp keeps inf out of the graph: ``where(ok, exp(x), 0)`` would have a finite value and a NaN
    gradient.

    Args:
        new_logprobs: [N] in nats, fp32 or wider.
        old_logprobs: [N] in nats.
        bound: largest magnitude, in nats.

    Returns:
        [N] in nats.
    """
    return (new_logprobs - old_logprobs).clamp(-bound, bound)
