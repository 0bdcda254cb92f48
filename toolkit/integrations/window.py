"""The metrics of an optimizer step under the names of a trainer and under ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolkit.distributed import reduce_metrics
from toolkit.metrics import Metric, merge_metrics, to_floats


def named_metrics(window: Sequence[dict[str, Metric]], theirs: Mapping[str, str]) -> dict[str, float]:
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
