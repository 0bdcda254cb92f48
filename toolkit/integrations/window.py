"""The micro-batches of an optimizer step in a trainer that generates for several steps: its arguments, its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.distributed import reduce_metrics
from toolkit.errors import ConfigError
from toolkit.metrics import Metrics, merge_metrics, to_floats


def check_accumulation(args: Any) -> None:
    """Check that all micro-batches of an optimizer step are generated before it begins.

    Args:
        args: of the trainer, a ``GRPOConfig`` or ``RLOOConfig``.

    Raises:
        ConfigError: some would be generated later.
    """
    generated = args.steps_per_generation * args.num_iterations
    if generated % args.gradient_accumulation_steps:
        raise ConfigError(
            f"steps_per_generation x num_iterations = {generated} must be a multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: the loss counts all tokens of an optimizer step before its first "
            "forward"
        )


def named_metrics(window: Sequence[Metrics], theirs: Mapping[str, str]) -> dict[str, float]:
    """Return the metrics of all micro-batches and ranks, once as the trainer calls them and once as ``toolkit/<name>``.

    Args:
        window: of each micro-batch of the step.
        theirs: what the trainer calls a metric of ours, by our name.
    """
    metrics = to_floats(reduce_metrics(merge_metrics(window)))
    named = {name: metrics[ours] for ours, name in theirs.items() if ours in metrics}
    if {"clip_fraction_low", "clip_fraction_high"} <= metrics.keys():
        named["clip_ratio/region_mean"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    return {**named, **{f"toolkit/{name}": value for name, value in metrics.items()}}
