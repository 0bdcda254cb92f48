"""What differs between two layouts, by how much, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.testing.evaluation import HEAD, HIDDEN, Result
from toolkit.testing.layout import Layout

ROUNDING = 8
"""In units of the dtype's epsilon: the rounding error of terms of size 1 that cancel. A quantity that is nearly 0 may
differ by this much."""
GRADIENT = 0.1
"""Size of the terms of a gradient."""
PROPORTIONAL = 1e-4
"""Relative; a gradient this close to a multiple of the reference is called that multiple."""


class LayoutError(AssertionError):
    """A loss or a loop depends on the layout. `findings` has every difference."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.findings)


@dataclass(frozen=True)
class Finding:
    """One quantity of one layout that differs from the reference."""

    layout: Layout
    quantity: str
    off: float
    """Largest difference, relative to the largest element of the reference; NaN where something is not finite."""
    factor: float | None
    """The result is the reference times this; None: it is not a multiple of the reference."""
    words: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.quantity}: {self.words}"


def compare(result: Result, known: Result, layout: Layout, rtol: float, rank: int = 0) -> list[Finding]:
    """Return what differs by more than `rtol` of the largest element, and by more than rounding of cancelled terms.

    `known` is the result of the reference; quantities that only one of the two has are skipped. The findings name the
    layout, and the process that computed `result`.
    """
    floor = min(1.0, ROUNDING * torch.finfo(known.gradients[HEAD].dtype).eps / rtol)
    ours, theirs = _quantities(result), _quantities(known)
    floors = {name: GRADIENT * floor if name in known.gradients else floor for name in theirs}
    common = [name for name in ours if name in theirs]
    differing = (_difference(layout, name, ours[name], theirs[name], floors[name], rtol, rank) for name in common)
    return [finding for finding in differing if finding is not None]


def _quantities(result: Result) -> dict[str, Tensor]:
    loss = {} if result.loss is None else {"loss": result.loss}
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in result.metrics.items()}
    return {**loss, **result.gradients, **{f"metric {name!r}": value for name, value in metrics.items()}}


def missing_metrics(result: Result, known: Result, layout: Layout, rank: int = 0) -> list[Finding]:
    """Return the metrics that the reference reports and this layout does not."""
    lost = [name for name in known.metrics if name not in result.metrics]
    return [Finding(layout, f"metric {name!r}", math.nan, None, "not reported", rank) for name in lost]


def _difference(
    layout: Layout, quantity: str, value: Tensor, known: Tensor, floor: float, rtol: float, rank: int
) -> Finding | None:
    ours, theirs = value.double().cpu(), known.double().cpu()
    if ours.shape != theirs.shape:
        words = f"of shape {list(ours.shape)} instead of {list(theirs.shape)}"
        return Finding(layout, quantity, math.nan, None, words, rank)
    if torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        return None
    if not bool(ours.isfinite().all()) or not bool(theirs.isfinite().all()):
        bad = ours[~ours.isfinite()]
        words = f"{float(bad[0])} instead of a number" if len(bad) else "a number instead of NaN or inf"
        return Finding(layout, quantity, math.nan, None, words, rank)
    scale = max(float(theirs.abs().max()), floor) if theirs.numel() else floor
    off = float((ours - theirs).abs().max()) / scale
    if off <= rtol:
        return None
    factor = _factor(ours, theirs)
    words = f"off by {off:.1e} of its largest element (allowed: {rtol:.0e})"
    if ours.dim() == 0:
        words = f"{float(ours):.6g} instead of {float(theirs):.6g}"
        if factor is not None and _is_plain(factor):
            words += f", {factor:.3f} times the reference"
    elif factor is not None:
        words = f"{factor:.3f} times the reference; {words}"
    return Finding(layout, quantity, off, factor, words, rank)


def _factor(ours: Tensor, theirs: Tensor) -> float | None:
    length = float(theirs.square().sum())
    if length == 0:
        return None
    factor = float((ours * theirs).sum()) / length
    is_multiple = float((ours - factor * theirs).abs().max()) <= PROPORTIONAL * float(ours.abs().max())
    return factor if is_multiple else None


def _is_plain(factor: float) -> bool:
    """Whether it is a small integer or one over a small integer, as wrong counts give."""
    candidates = (factor, 1 / (factor or 1))
    return any(abs(number - round(number)) < PROPORTIONAL and 0 < round(number) <= 64 for number in candidates)


# -------------------------------------------------------------------- report


def verdict(what: str, findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    """Return the report of a failure of the loss `what`, given at least one finding and all layouts that ran."""
    first = min(findings, key=lambda finding: layouts.index(finding.layout)).layout
    same_layout = [finding for finding in findings if finding.layout == first]
    shown: dict[str, Finding] = {}
    for finding in same_layout:
        shown.setdefault(finding.quantity, finding)
    lines = [f"{what}: the result depends on the layout (the reference is one process and one batch)"]
    lines.append(f"  layout: {first}")
    for finding in sorted(shown.values(), key=lambda f: (f.quantity != HEAD, "gradient" not in f.quantity)):
        ranks = {other.rank for other in same_layout if other.quantity == finding.quantity}
        where = f" (process {finding.rank} alone)" if first.processes > 1 and len(ranks) == 1 else ""
        lines.append(f"  {finding}{where}")
    failing = {finding.layout for finding in findings}
    lines.append(f"  {len(failing)} of {len(layouts)} layouts differ")
    lines.append(f"  likely cause: {likely_cause(findings, layouts)}")
    return "\n".join(lines)


COUNTS: tuple[tuple[str, Callable[[Layout], int], str, str], ...] = (
    (
        "the number of processes",
        lambda layout: layout.processes,
        "gradients are added over processes although the weights already contain that factor; let the back-end average "
        "them, or set gradient_reduction='sum' in the loss's config",
        "something divides by the number of processes a second time: gradient_reduction='sum' under a back-end that "
        "averages, or a loop that divides the loss",
    ),
    (
        "the number of micro-batches",
        lambda layout: layout.micro_batches,
        "the loss is multiplied by the number of accumulation steps; losses of this toolkit only need adding up",
        "something divides by the number of accumulation steps; losses of this toolkit add up over micro-batches, so "
        "set gradient accumulation of the back-end to 1 and do not divide the loss",
    ),
    (
        "the number of shards of a sequence",
        lambda layout: layout.sequence_parallel,
        "a sequence is counted once for each sequence-parallel process that shares it: gradients are also "
        "summed over the mesh, or each shard is treated as a complete sequence",
        "the denominator counts a sequence once for each sequence-parallel process that shares it; count it on one",
    ),
)
"""Numbers that may be a factor, and the cause if gradients are multiplied or divided by them."""
COUNTED_ALONE = (
    "something is counted by each process for itself; count over all of them before the first forward "
    "(build_batches_loss_kwargs does it, called once for the step)"
)
NOT_EXCHANGED = (
    "gradients are not exchanged over processes (those of the hidden states, which need no exchange, are right): use "
    "the wrapper (DDP, FSDP), or part.reduce_gradients()"
)
ONLY: tuple[tuple[Callable[[Layout], bool], str], ...] = (
    (
        lambda layout: layout.mode == "chunk",
        "only chunks differ: the loss of a token depends on tokens of other chunks; register the policy loss with the "
        "scope that it needs",
    ),
    (
        lambda layout: layout.is_packed,
        "only packed rows differ: sequences in one row are not separated; take their boundaries from cu_seq_lens",
    ),
    (
        lambda layout: layout.sequence_parallel > 1,
        "only sequence parallelism differs: statistics of a sequence are computed on each shard, or each shard counts "
        "the sequence; gather per-token values over sp_mesh first",
    ),
    (
        lambda layout: layout.micro_batches > 1,
        "only several micro-batches differ: each is normalised by its tokens alone (a mean of means); count over "
        "the whole step, with one build_batches_loss_kwargs for all of them",
    ),
    (
        lambda layout: layout.processes > 1,
        f"only several processes differ: {COUNTED_ALONE}",
    ),
    (
        lambda layout: layout.slots > 1,
        "only a batch that is cut differs: something is normalised by the size of one micro-batch or process; count "
        "over the whole step and all processes",
    ),
)


def likely_cause(findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    """Return the cause that explains all findings."""
    if any(math.isnan(finding.off) and "metric" not in finding.quantity for finding in findings):
        return (
            "NaN or inf, or values where there should be none: something reads positions that are not scored, or "
            "divides by a count that is 0 in an empty micro-batch"
        )
    gradients = [finding for finding in findings if "gradient" in finding.quantity]
    if not gradients:  # NaN is then the mean of a micro-batch or process without tokens
        return _cause_of_numbers(findings, layouts)
    if all(finding.factor is not None and abs(finding.factor) < PROPORTIONAL for finding in gradients):
        return _cause_of_nothing(gradients, layouts)
    causes = _causes_of({layout: _factor_of_head(gradients, layout) for layout in layouts})
    if causes:
        return "; or ".join(causes)
    failing = {finding.layout for finding in gradients}
    several = {layout for layout in layouts if layout.processes > 1}
    if failing == several and HIDDEN not in {finding.quantity for finding in gradients}:
        return NOT_EXCHANGED
    cause = _only_where(failing, layouts)
    if cause is not None:
        return cause
    if all(layout.processes > 1 for layout in layouts):
        return f"every layout with several processes differs: {COUNTED_ALONE}"
    return "even the simplest layout differs: the loop does not compute the same as the loss's context"


def _factor_of_head(gradients: Sequence[Finding], layout: Layout) -> float | None:
    """Return the factor of the head's gradient in a layout; None: no single factor, or processes disagree."""
    known = [finding.factor for finding in gradients if finding.quantity == HEAD and finding.layout == layout]
    first = known[0] if known else 1.0
    if first is None or any(factor is None or abs(factor - first) > PROPORTIONAL for factor in known):
        return None
    return first


def _cause_of_nothing(gradients: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    where = sorted({finding.quantity.removeprefix("gradient of ") for finding in gradients})
    is_all = {HIDDEN, HEAD} <= {finding.quantity for finding in gradients}
    failing = {finding.layout for finding in gradients}
    words = "" if is_all else f" at {' and '.join(where)}"
    words += f" in {len(failing)} of {len(layouts)} layouts" if len(failing) < len(layouts) else ""
    return f"no gradient arrives{words}: backward was not called, or the leaf was replaced"


def _causes_of(factors: dict[Layout, float | None]) -> list[str]:
    known = [factor for factor in factors.values() if factor is not None]
    if len(known) < len(factors) or all(abs(factor - 1) < PROPORTIONAL for factor in known):
        return []
    if any(abs(factor) < PROPORTIONAL for factor in known):
        return []  # in some layout no gradient arrived
    causes = []
    for name, number, multiplied, divided in COUNTS:
        numbers = [number(layout) for layout in factors]
        factor_is = f"{known[0]:.3f} is" if len(set(numbers)) == 1 else "the factor is"
        for power, named, why in ((1, name, multiplied), (-1, f"one over {name}", divided)):
            pairs = zip(known, numbers, strict=True)
            if all(abs(factor / number**power - 1) < PROPORTIONAL for factor, number in pairs):
                causes.append(f"{factor_is} {named}: {why}")
    if all(abs(factor / known[0] - 1) < PROPORTIONAL for factor in known):
        causes.append(
            f"gradients are {known[0]:.3f} times what they should be in every layout that was tried: the loop (or a "
            "leftover loss scale) multiplies the loss"
        )
    return causes


def _cause_of_numbers(findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    names = sorted({finding.quantity for finding in findings})
    what = "the reported loss is" if names == ["loss"] else f"{', '.join(names)}: what is reported is"
    ranks = {finding.rank for finding in findings}
    is_spread = len(ranks) > 1 or any(layout.processes > 1 for layout in layouts)
    part, how = (
        ("process", "and reduce them over all processes") if is_spread else ("micro-batch", "over micro-batches")
    )
    return (
        f"gradients agree, but {what} that of one {part}, or a mean of means; merge toolkit.metrics (a Mean keeps "
        f"numerator and denominator) {how}"
    )


def _only_where(failing: set[Layout], layouts: Sequence[Layout]) -> str | None:
    for applies, cause in ONLY:
        has_others = any(not applies(layout) for layout in layouts)
        if has_others and all(applies(layout) for layout in failing):
            return cause
    return None
