"""Test your loss and your training loop: does any layout of the batch change the gradient?

`assert_layout_invariant` spreads one step over micro-batches, processes, sequence-parallel shards and packed rows, and
compares loss, gradients and metrics with those of one process and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from toolkit.distributed import all_gather_objects, rank, world_size
from toolkit.errors import ConfigError
from toolkit.head.options import is_count
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.samples import Batch, random_batch
from toolkit.testing.evaluation import (
    REFERENCE,
    Loop,
    Result,
    evaluate,
    in_mode,
    reference,
    toolkit_loop,
    with_current,
)
from toolkit.testing.layout import Layout, Part, counts_empty, layouts_of
from toolkit.testing.processes import check_can_start, run_processes
from toolkit.testing.verdict import Finding, LayoutError, compare, missing_metrics, verdict

__all__ = [
    "Batch",
    "Finding",
    "Layout",
    "LayoutError",
    "Part",
    "assert_layout_invariant",
    "differences",
    "random_batch",
    "toolkit_loop",
]

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Relative to the largest element."""
COUNTS = "integers of at least 1, such as (1, 2)"


def assert_layout_invariant(
    loss_cfg: BaseLossConfig,
    batch: Batch | None = None,
    *,
    loop: Loop | None = None,
    processes: int | None = None,
    micro_batches: int | Iterable[int] = (1, 2, 4),
    sequence_parallel: int | Iterable[int] = (1, 2),
    packed: bool | Iterable[bool] = (False, True),
    modes: str | Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
    rtol: float | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Assert that the loss, gradients and metrics of a step are the same in every layout.

    The reference is one process with one padded batch in eager mode, through the context of the loss. Every combination
    of the layouts below is then run through `loop` and compared: the loss, the gradients of hidden states, head and
    bias, and every metric that both report.

    Args:
        loss_cfg: any loss config, including one of a class that you wrote.
        batch: the step; None: `random_batch` with empty rows, sequences of one token and holes.
        loop: your training loop, ``loop(part) -> (loss, metrics)``, see `Part`; None: `toolkit_loop`, the loop that the
            documentation shows, which tests only the loss.
        processes: number of processes that share the step. None: the current world size. More than one are started for
            this call and joined by gloo (which takes some seconds), unless the caller is already in a process group;
            one process is tried first.
        micro_batches: of each process, one number or several; some stay without a sequence.
        sequence_parallel: processes that share a sequence; numbers that do not divide `processes` are skipped.
        packed: padded rows, packed rows or both.
        modes: of the loss; None: eager, and chunk if the loss supports it.
        dtype: of hidden states, head and fields: float64, or float32.
        rtol: allowed difference relative to the largest element; None: 1e-12 in float64, 1e-6 in float32.
        timeout_s: seconds that a process waits for the others before it gives up.

    Raises:
        LayoutError: (an AssertionError) something differs; the message names the layout, the quantity, the factor and
            the likely cause.
        ConfigError: the settings contradict each other, or something cannot be sent to other processes.
    """
    _check_objects(loss_cfg, batch, loop)
    together = world_size()
    number = together if processes is None else _several("processes", (processes,), is_count, COUNTS)[0]
    if together > 1 and number != together:
        raise ConfigError(f"processes={number} differs from the {together} processes of this group; leave it out")
    if rtol is None and dtype not in TOLERANCES:
        raise ConfigError(f"dtype={dtype} has no default tolerance; use float64 or float32, or pass rtol")
    allowed = TOLERANCES[dtype] if rtol is None else rtol
    batch = (random_batch(loss_cfg) if batch is None else batch).with_dtype(dtype)
    numbers = _several("micro_batches", micro_batches, is_count, COUNTS)
    shards = _several("sequence_parallel", sequence_parallel, is_count, COUNTS)
    flags = _several("packed", packed, lambda flag: isinstance(flag, bool), "True, False or both: (False, True)")
    chosen = _modes(loss_cfg) if modes is None else modes
    chosen = _several(
        "modes", chosen, lambda mode: isinstance(mode, str), "'eager', 'chunk' or both: ('eager', 'chunk')"
    )
    for mode in chosen:
        in_mode(loss_cfg, mode)  # raises if the loss cannot be computed in it
    if number > together:
        check_can_start()
    _check_is_something(batch, loss_cfg)
    tried: list[Layout] = []
    # One process first: a difference there has a simpler cause and needs no new processes.
    for world in (1, number) if number > together else (number,):
        layouts = layouts_of(world, numbers, shards, flags, chosen)
        if counts_empty(loss_cfg):  # a micro-batch without a sequence would count as one
            layouts = [layout for layout in layouts if layout.slots <= len(batch.row_lengths)]
        findings = _differences_in(
            world, loss_cfg, batch, layouts, loop, allowed, is_last=world == number, timeout_s=timeout_s
        )
        if findings is None:
            continue
        tried += layouts
        if findings:
            raise LayoutError(verdict(_in_words(loss_cfg), findings, tried), findings)
    if not tried:
        raise ConfigError(
            f"no layout is left to compare: none of sequence_parallel={shards} divides processes={number}, or each "
            "layout has more micro-batches than there are sequences; change one of them"
        )


def _differences_in(world: int, *arguments: Any, is_last: bool, timeout_s: float) -> list[Finding] | None:
    """Return the differences among `world` processes, started for it if need be; None: the loop needs a group."""
    if world > world_size():
        return run_processes(world, differences, *arguments, timeout_s=timeout_s)
    try:
        return differences(*arguments)
    except ValueError as error:
        if is_last or "process group" not in str(error):
            raise
        return None


def differences(
    loss_cfg: BaseLossConfig,
    batch: Batch,
    layouts: Sequence[Layout],
    loop: Loop | None = None,
    rtol: float = TOLERANCES[torch.float64],
    *,
    compared_with: Layout = REFERENCE,
) -> list[Finding]:
    """Return all differences from the reference that any process saw; all processes must call it.

    Args:
        loss_cfg: of the loss.
        batch: the step.
        layouts: each for the current number of processes.
        loop: your training loop, see `assert_layout_invariant`; None: `toolkit_loop`, which must report every metric.
        rtol: relative tolerance.
        compared_with: layout of the reference, for one process.
    """
    batch = with_current(batch, loss_cfg)
    known = reference(batch, loss_cfg, compared_with)
    findings: list[Finding] = []
    first: Result | None = None
    for layout in layouts:
        try:
            result = evaluate(batch, loss_cfg, layout, loop or toolkit_loop)
        except Exception as error:
            error.add_note(f"in the layout: {layout}")
            raise
        first = result if first is None else first
        # Metrics that only the caller's loop reports are compared with those of its first layout.
        known_metrics = {**first.metrics, **known.metrics}
        findings += compare(result, Result(known.loss, known.gradients, known_metrics), layout, rtol, rank())
        findings += missing_metrics(result, known, layout, rank()) if loop is None else []
    return [finding for rank_findings in all_gather_objects(findings) for finding in rank_findings]


def _check_is_something(batch: Batch, cfg: BaseLossConfig) -> None:
    gradients = reference(with_current(batch, cfg), cfg).gradients.values()
    if not any(bool((gradient != 0).any()) for gradient in gradients):
        raise ConfigError("all gradients of this batch are 0, so there is nothing to compare; pass another batch")


def _modes(cfg: BaseLossConfig) -> list[str]:
    try:
        in_mode(cfg, "chunk")
    except ConfigError:
        return ["eager"]
    return ["eager", "chunk"]


def _in_words(cfg: BaseLossConfig) -> str:
    words = [f"policy loss {cfg.policy.name!r}"] if isinstance(cfg, BaseRLLossConfig) else []
    aggregation = getattr(cfg, "aggregation", None)
    words += [f"aggregation {aggregation.name}"] if aggregation is not None else []
    return f"{type(cfg).__name__}({', '.join(words)})" if words else type(cfg).__name__


# -------------------------------------------------------------------- arguments


def _check_objects(loss_cfg: Any, batch: Any, loop: Any) -> None:
    """Raise unless they are a config, a batch or None, and a function or None."""
    if not isinstance(loss_cfg, BaseLossConfig):
        raise ConfigError(
            f"loss_cfg={_short(loss_cfg)} is not a loss config; pass e.g. "
            "GRPOLossConfig(policy_loss_cfg={'loss_type': 'gspo'}) or CELossConfig()"
        )
    if batch is not None and not isinstance(batch, Batch):
        raise ConfigError(
            f"batch={_short(batch)} is not a toolkit.testing.Batch; make one with random_batch(loss_cfg) or omit it"
        )
    if loop is not None and not callable(loop):
        raise ConfigError(f"loop={_short(loop)} is not callable; pass a function, loop(part) -> (loss, metrics)")


def _several(name: str, value: Any, is_valid: Callable[[Any], bool], wanted: str) -> tuple[Any, ...]:
    """Return a setting as a tuple, given one value or several; if there is none or one is not valid, raise."""
    is_one = isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable)
    values = (value,) if is_one else tuple(value)
    if not values or not all(map(is_valid, values)):
        raise ConfigError(f"{name}={values} must be {wanted}")
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
