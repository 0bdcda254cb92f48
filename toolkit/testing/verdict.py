"""What differs between two layouts, by how much, and what the pattern says of the cause."""

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
"""In units of the dtype's epsilon, what terms of size 1 leave where they cancel: a quantity that is nearly 0 cannot be
known better, and is held to this alone."""
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
    """One quantity of one layout that is not what the reference gives."""

    layout: Layout
    quantity: str
    off: float
    """Largest difference, relative to the largest element of the reference; NaN where something is not finite."""
    factor: float | None
    """The reference times this is what was found; None: no number does it."""
    words: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.quantity}: {self.words}"


def compare(found: Result, known: Result, layout: Layout, rtol: float, rank: int = 0) -> list[Finding]:
    """Return what differs by more than `rtol` of the largest element, and by more than cancelled terms leave behind.

    Args:
        found: of the layout.
        known: of the reference; quantities that only one of both has are left out.
        layout: to be named.
        rtol: relative tolerance.
        rank: the process that saw it.
    """
    floor = min(1.0, ROUNDING * torch.finfo(known.gradients[HEAD].dtype).eps / rtol)
    pairs: list[tuple[str, Tensor, Tensor, float]] = []
    if found.loss is not None and known.loss is not None:
        pairs.append(("loss", found.loss, known.loss, floor))
    pairs += [(name, found.gradients[name], known.gradients[name], GRADIENT * floor) for name in known.gradients]
    for name, value in found.metrics.items():
        if name in known.metrics:
            ours, theirs = (torch.tensor(own, dtype=torch.float64) for own in (value, known.metrics[name]))
            pairs.append((f"metric {name!r}", ours, theirs, floor))
    differing = (_difference(layout, *pair, rtol, rank) for pair in pairs)
    return [finding for finding in differing if finding is not None]


def missing_metrics(found: Result, known: Result, layout: Layout, rank: int = 0) -> list[Finding]:
    """Return the metrics that the reference has and this layout has not."""
    lost = [name for name in known.metrics if name not in found.metrics]
    return [Finding(layout, f"metric {name!r}", math.nan, None, "not reported", rank) for name in lost]


def _difference(
    layout: Layout, quantity: str, found: Tensor, known: Tensor, floor: float, rtol: float, rank: int
) -> Finding | None:
    ours, theirs = found.double().cpu(), known.double().cpu()
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
    """Whether it is a small whole number or one over it, as wrong counts give."""
    return any(abs(own - round(own)) < PROPORTIONAL and 0 < round(own) <= 64 for own in (factor, 1 / (factor or 1)))


# -------------------------------------------------------------------- words


def verdict(what: str, findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    """Return the report of a failure.

    Args:
        what: the loss, in words.
        findings: at least one.
        layouts: all that were tried.
    """
    first = min(findings, key=lambda own: layouts.index(own.layout)).layout
    own = [finding for finding in findings if finding.layout == first]
    shown: dict[str, Finding] = {}
    for finding in own:
        shown.setdefault(finding.quantity, finding)
    lines = [f"{what} gives something else in another layout than in one process and one batch"]
    lines.append(f"  layout: {first}")
    for finding in sorted(shown.values(), key=lambda f: (f.quantity != HEAD, "gradient" not in f.quantity)):
        where = f" (process {finding.rank} alone)" if _is_of_one(finding, own) else ""
        lines.append(f"  {finding}{where}")
    failing = {finding.layout for finding in findings}
    lines.append(f"  {len(failing)} of {len(layouts)} layouts differ")
    lines.append(f"  likely cause: {likely_cause(findings, layouts)}")
    return "\n".join(lines)


def _is_of_one(finding: Finding, same_layout: Sequence[Finding]) -> bool:
    ranks = {other.rank for other in same_layout if other.quantity == finding.quantity}
    return finding.layout.processes > 1 and len(ranks) == 1


COUNTS: tuple[tuple[str, Callable[[Layout], float], str], ...] = (
    (
        "the number of processes",
        lambda own: own.processes,
        "gradients are added over processes although the weights already hold that factor; let the back-end average "
        "them, or set gradient_reduction='sum' in the loss's config",
    ),
    (
        "one over the number of processes",
        lambda own: 1 / own.processes,
        "something divides by the number of processes a second time: gradient_reduction='sum' under a back-end that "
        "averages, or a loop that divides the loss",
    ),
    (
        "the number of micro-batches",
        lambda own: own.micro_batches,
        "the loss is multiplied by the number of accumulation steps; calibrated losses simply add up",
    ),
    (
        "one over the number of micro-batches",
        lambda own: 1 / own.micro_batches,
        "something divides by the number of accumulation steps; calibrated losses add up over micro-batches, so set "
        "gradient accumulation of the back-end to 1 and do not divide the loss",
    ),
    (
        "the number of shards of a sequence",
        lambda own: own.sequence_parallel,
        "a sequence is counted once for each sequence-parallel process that shares it: gradients are summed over the "
        "mesh besides, or each shard takes itself for a whole sequence",
    ),
    (
        "one over the number of shards of a sequence",
        lambda own: 1 / own.sequence_parallel,
        "the denominator counts a sequence once for each sequence-parallel process that shares it; count it on one",
    ),
)
"""What a factor may be, and what then went wrong."""
NOT_EXCHANGED = (
    "gradients are not exchanged over processes (those of the hidden states, which each process has for itself, are "
    "right): use the wrapper (DDP, FSDP), or part.reduce_gradients()"
)
ONLY: tuple[tuple[Callable[[Layout], bool], str], ...] = (
    (
        lambda own: own.mode == "chunk",
        "only chunks differ: the loss of a token looks at tokens of other chunks; register the policy loss with the "
        "scope that it needs",
    ),
    (
        lambda own: own.is_packed,
        "only packed rows differ: sequences side by side are not told apart; take their boundaries from cu_seq_lens",
    ),
    (
        lambda own: own.sequence_parallel > 1,
        "only sequence parallelism differs: statistics of a sequence are taken of its shards, or a sequence is counted "
        "by each of them; gather per-token values over sp_mesh first",
    ),
    (
        lambda own: own.micro_batches > 1,
        "only several micro-batches differ: each is normalised by what it holds itself (a mean of means); count over "
        "the whole step, with one build_batches_loss_kwargs for all of them",
    ),
    (
        lambda own: own.processes > 1,
        "only several processes differ: something is counted by each process for itself; count over all of them before "
        "the first forward (build_batches_loss_kwargs does it, called once for the step)",
    ),
    (
        lambda own: own.slots > 1,
        "only a batch that is cut differs: something is normalised by what one micro-batch or one process holds; count "
        "over the whole step and all processes",
    ),
)


def likely_cause(findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    """Return what explains all findings together."""
    if any(math.isnan(finding.off) and "metric" not in finding.quantity for finding in findings):
        return (
            "NaN or inf, or values where there should be none: something reads positions that are not scored, or "
            "divides by a count that is 0 in a micro-batch without work"
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
    several = {own for own in layouts if own.processes > 1}
    if failing == several and HIDDEN not in {finding.quantity for finding in gradients}:
        return NOT_EXCHANGED
    cause = _only_where(failing, layouts)
    if cause is not None:
        return cause
    if all(own.processes > 1 for own in layouts):
        return (
            "every layout with several processes differs: something is counted by each process for itself; count over "
            "all of them before the first forward (build_batches_loss_kwargs does it, called once for the step)"
        )
    return "even the plainest layout differs: the loop computes something else than the loss's context does"


def _factor_of_head(gradients: Sequence[Finding], layout: Layout) -> float | None:
    """Return what the head's gradient is multiplied with in a layout; None: no number, or another on each process."""
    known = [own.factor for own in gradients if own.quantity == HEAD and own.layout == layout]
    first = known[0] if known else 1.0
    if first is None or any(own is None or abs(own - first) > PROPORTIONAL for own in known):
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
        return []  # nothing arrived, somewhere
    causes = [
        f"{known[0]:.3f} is {name}: {why}" if len(set(map(expected, factors))) == 1 else f"the factor is {name}: {why}"
        for name, expected, why in COUNTS
        if all(abs(own / expected(layout) - 1) < PROPORTIONAL for layout, own in zip(factors, known, strict=True))
    ]
    if all(abs(factor / known[0] - 1) < PROPORTIONAL for factor in known):
        causes.append(
            f"gradients are {known[0]:.3f} times what they should be in every layout that was tried: the loop (or a "
            "loss scale that was left in) multiplies the loss"
        )
    return causes


def _cause_of_numbers(findings: Sequence[Finding], layouts: Sequence[Layout]) -> str:
    names = sorted({finding.quantity for finding in findings})
    what = "the reported loss is" if names == ["loss"] else f"{', '.join(names)}: what is reported is"
    ranks = {finding.rank for finding in findings}
    if len(ranks) > 1 or any(own.processes > 1 for own in layouts):
        return (
            f"gradients agree, but {what} that of one process, or a mean of means; merge toolkit.metrics (a Mean keeps "
            "numerator and denominator) and reduce them over all processes"
        )
    return (
        f"gradients agree, but {what} that of one micro-batch, or a mean of means; merge toolkit.metrics (a Mean keeps "
        "numerator and denominator) over micro-batches"
    )


def _only_where(failing: set[Layout], layouts: Sequence[Layout]) -> str | None:
    for is_such, cause in ONLY:
        has_others = any(not is_such(own) for own in layouts)
        if has_others and all(is_such(own) for own in failing):
            return cause
    return None
