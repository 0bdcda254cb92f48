"""Measure time (interleaved, in one process), memory (one process for each variant), accuracy (smaller shape)."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from toolkit.bench.config import BenchConfig
from toolkit.bench.problem import Problem, Step, changed, device_of
from toolkit.bench.variants import Variant, toolkit_step, variants
from toolkit.compose.plugins import load_plugins
from toolkit.errors import described
from toolkit.head.allocator import keep_freed_memory
from toolkit.losses.config.base import BaseLossConfig

SMALL = (256, 64, 2048)
"""The largest shape at which accuracy is measured."""


@dataclass
class Result:
    """Measurements of a variant; lists have one entry for each round."""

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    """Without the inputs, with the returned gradients."""
    errors: dict[str, float] | None = None
    """Relative errors of loss and gradients against float64."""
    skipped: str | None = None
    """Why it was not measured."""


def measure_all(config: BenchConfig, loss_cfg: BaseLossConfig, plugins: Sequence[str] = ()) -> list[Result]:
    """Measure every variant; new processes load the `plugins` first."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    chosen = variants(config, loss_cfg)
    results = {variant.name: Result(variant.name, skipped=variant.why_not) for variant in chosen}
    running = [variant for variant in chosen if variant.why_not is None]
    if config.accuracy:
        _say("accuracy")
        _measure_accuracy(config, loss_cfg, running, results)
        torch.compiler.reset()  # code that a peer compiled for the small shape may not fit the large one
        running = [variant for variant in running if results[variant.name].skipped is None]
    if config.keep_memory:
        keep_freed_memory()
    if config.memory:
        for variant in running:
            _say(f"memory of {variant.name}")
            results[variant.name].peak_bytes = _peak_of(config, loss_cfg, plugins, variant.name)
    _measure_time(config, running, results)
    return list(results.values())


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _measure_time(config: BenchConfig, running: Sequence[Variant], results: dict[str, Result]) -> None:
    built: list[tuple[str, Problem, Step]] = []
    for variant in running:
        _say(f"warm-up of {variant.name}")
        with _noting_failure(results[variant.name], is_ours=variant.is_ours):
            problem = variant.problem()
            step = variant.build(problem)
            _timed(problem, step)
            built.append((variant.name, problem, step))
    for number in range(1, config.rounds + 1):
        _say(f"time, round {number} of {config.rounds}")
        for name, problem, step in built:
            wall, cpu = _timed(problem, step)
            results[name].wall.append(wall)
            results[name].cpu.append(cpu)


@contextlib.contextmanager
def _noting_failure(result: Result, *, is_ours: bool) -> Iterator[None]:
    """Let a peer fail alone: its error goes into its result, and the others are measured."""
    try:
        yield
    except Exception as error:
        if is_ours:
            raise
        result.skipped = f"failed: {described(error)}"


def _timed(problem: Problem, step: Step) -> tuple[float, float]:
    """Return wall and CPU seconds of one call."""
    is_gpu = problem.hidden.device.type == "cuda"
    problem.clear()
    if is_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if is_gpu:
        torch.cuda.synchronize()
    taken = time.perf_counter() - wall, time.process_time() - cpu
    problem.clear()
    return taken


def _measure_accuracy(
    config: BenchConfig, loss_cfg: BaseLossConfig, running: Sequence[Variant], results: dict[str, Result]
) -> None:
    """Compare with the loss in float64, under plain autograd, over the same numbers."""
    small = _smaller(config)
    wanted = {variant.name for variant in running if variant.has_gradients}
    for variant in variants(small, loss_cfg):
        if variant.name not in wanted:
            continue
        problem, result = variant.problem(), results[variant.name]
        with _noting_failure(result, is_ours=variant.is_ours):
            loss, grads = _loss_and_grads(problem, variant.build(problem))
        if result.skipped is not None:
            continue
        exact = replace(
            problem,
            hidden=problem.hidden.detach().double().requires_grad_(),
            weight=problem.weight.detach().double().requires_grad_(problem.weight.requires_grad),
        )
        exact_loss, exact_grads = _loss_and_grads(exact, toolkit_step(exact, mode="eager"))
        result.errors = {
            "loss": abs(float(loss) / float(exact_loss) - 1),
            **{name: float((grads[name].double() - want).norm() / want.norm()) for name, want in exact_grads.items()},
        }


def _loss_and_grads(problem: Problem, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    problem.clear()
    loss = step()
    assert loss is not None
    grads = {"hidden": problem.hidden.grad, "weight": problem.weight.grad}
    problem.clear()
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


def _smaller(config: BenchConfig) -> BenchConfig:
    length = min(config.sequence_length, SMALL[0])
    tokens = max(length, min(config.shape[0], SMALL[0]) // length * length)
    chunk = config.chunk_size if config.chunk_size == "auto" else max(1, config.chunk_size * tokens // config.shape[0])
    shape = (tokens, *map(min, config.shape[1:], SMALL[1:]))
    return changed(config, shape=shape, sequence_length=length, chunk_size=chunk)


def _peak_of(config: BenchConfig, loss_cfg: BaseLossConfig, plugins: Sequence[str], name: str) -> int | None:
    """Measure in a new process, where no other variant has compiled or allocated anything."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=load_plugins, initargs=(plugins,)) as pool:
        try:
            return pool.submit(_peak_of_call, config, loss_cfg, name).result()
        except Exception:
            print(f"memory of {name} could not be measured:\n{traceback.format_exc()}", file=sys.stderr)
            return None


def _peak_of_call(config: BenchConfig, loss_cfg: BaseLossConfig, name: str) -> int:
    """Return the peak bytes of a call without its inputs, in this process.

    On a CPU the peak of the resident memory, so allocations inside libraries count too; a first call, which compiles,
    is not measured. On a GPU the peak of PyTorch's allocator.
    """
    (variant,) = [variant for variant in variants(config, loss_cfg) if variant.name == name]
    problem = variant.problem()
    step = variant.build(problem)
    step()
    problem.clear()
    gc.collect()
    before = _reset_peak(device_of(config))
    step()
    is_gpu = problem.hidden.device.type == "cuda"
    return (torch.cuda.max_memory_allocated() if is_gpu else _status("VmHWM")) - before


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _release_freed_memory()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak
    return _status("VmRSS")


def _status(key: str) -> int:
    """Return a field of /proc/self/status in bytes; on systems without it the maximal resident size."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _release_freed_memory() -> None:
    """Let the C library return freed memory to the system, so the next call does not reuse it unnoticed."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not glibc
