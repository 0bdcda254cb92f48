"""Names that configs need before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from toolkit.errors import ConfigError, did_you_mean, listed

Aggregation = Literal[
    "token_mean",
    "token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "constant",
    "square",
    "prompt_mean",
    "per_component",
]
PER_SEQUENCE = ("seq_mean_token_mean", "seq_mean_token_sum", "constant")
"""Aggregations that divide by the number of sequences."""
KLEstimator = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
"""Estimators of KL(policy || reference); kl = k1, mse = k2 and low_var_kl = k3."""
KLTerm = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "top_k", "full"]
"""Estimators, and the exact divergences over K candidates or the whole vocabulary."""
EXACT_KL = ("top_k", "full")
"""Exact KL terms, which need no estimate."""
KLDirection = Literal["reverse", "forward", "jensen_shannon"]
"""KL(policy || reference), KL(reference || policy), or half of each against their even mixture."""
KLTail = Literal["drop", "one_bucket"]
"""How the probability outside of the candidates is treated."""
KLGradient = Literal["as_is", "straight_through", "score_corrected", "is_corrected"]
"""What flows back through the KL term."""
KLRatioLevel = Literal["token", "sequence"]
"""Whose ratio multiplies a KL term: the token's, or the geometric mean of its sequence's."""
MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| in nats before exp (XTuner, verl and OpenRLHF use the same): e^20 = 4.9e8 is finite in fp32."""


_NAME = re.compile(r"[\w.-]+")


def check_needs(needs: object) -> None:
    """Raise `ConfigError` if what a function needs is a single name instead of a tuple of names."""
    if isinstance(needs, str):
        raise ConfigError(f"needs={needs!r} is a string; write a tuple: needs=({needs!r},)")


def check_choice(value: str, allowed: Collection[str], problem: str) -> None:
    """Raise `ConfigError` if `value` is not one of `allowed`; its message is `problem` and what to choose."""
    if value not in allowed:
        raise ConfigError(f"{problem}; choose {listed(allowed)}{did_you_mean(str(value), allowed)}")


def check_name(name: object, decorator: str) -> None:
    """Raise `ConfigError` if the name to register a function by is the function: ``@decorator`` without a call."""
    if isinstance(name, str):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"@{decorator}({name!r}): the name is chosen on the command line, so it may have letters, digits, _, . "
                "and - only"
            )
        return
    called = getattr(name, "__name__", "my_loss")
    raise ConfigError(
        f"@{decorator} needs the name to select the function by, and nothing is registered without it; write "
        f"@{decorator}({called!r}) above def {called}(...)"
    )
