"""The table, the JSON file and the figure of a benchmark."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.bench.config import BenchConfig
from toolkit.bench.measure import Result
from toolkit.bench.problem import device_of
from toolkit.explain.tables import aligned, markdown_table
from toolkit.head.products import onednn_wins

MIB = 2**20
FLOORS = {"overhead": "the loss by hand", "model": "the trunk alone"}
"""What times are compared with, by `BenchConfig.cases`."""
COLUMNS = ("variant", "wall ms", "CPU ms", "x floor", "peak MiB", "error")


def time_kind(config: BenchConfig) -> str:
    """Return which time is compared: on a shared CPU, CPU seconds vary less; a GPU has only wall time."""
    return "wall" if device_of(config).type == "cuda" else "cpu"


def ratios(config: BenchConfig, results: Sequence[Result]) -> dict[str, float]:
    """Return the median time of each measured variant, by name, over that of the first."""
    kind = time_kind(config)
    medians = {result.name: statistics.median(getattr(result, kind)) for result in results if result.skipped is None}
    return {name: median / medians[results[0].name] for name, median in medians.items()}


def table(config: BenchConfig, results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return the rows of the table; the first holds the headings."""
    over_floor = ratios(config, results)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for result in results:
        if result.skipped is not None:
            continue
        errors = [error for name, error in (result.errors or {}).items() if name != "loss"]
        rows.append(
            (
                result.name,
                _milliseconds(result.wall),
                _milliseconds(result.cpu),
                f"{over_floor[result.name]:.2f}",
                "-" if result.peak_bytes is None else f"{result.peak_bytes / MIB:,.0f}",
                f"{max(errors):.1e}" if errors else "-",
            )
        )
    return rows


def print_table(config: BenchConfig, results: Sequence[Result]) -> None:
    """Print the table and an explanation of its columns."""
    skipped = [f"not measured: {result.name}: {result.skipped}" for result in results if result.skipped is not None]
    floor = FLOORS.get(config.cases, "three bare, preallocated products of the scored tokens")
    print(
        f"{_size(config)}, {config.ignored:.0%} ignored",
        aligned(table(config, results)),
        *skipped,
        f"x floor: median {time_kind(config)} time over {floor}. "
        "Times: median ± half the range of the middle half. Peak: over the inputs, returned gradients included. "
        "Error: larger relative error of the two gradients against float64, at a smaller shape.",
        sep="\n",
    )


def _size(config: BenchConfig) -> str:
    tokens, width, vocabulary = config.shape
    return f"N={tokens:,}, D={width:,}, V={vocabulary:,}, {config.dtype}"


def write(folder: Path, config: BenchConfig, loss: dict[str, Any], results: Sequence[Result]) -> list[Path]:
    """Write results.json, table.md and figure.png, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    over_floor = ratios(config, results)
    record = {
        "bench": config.model_dump(),
        "loss": loss,
        "environment": environment(config),
        "results": [{**vars(result), "ratio_to_floor": over_floor.get(result.name)} for result in results],
    }
    paths = [folder / "results.json", folder / "table.md", folder / "figure.png"]
    paths[0].write_text(json.dumps(record, indent=2) + "\n")
    paths[1].write_text(markdown_table(table(config, results), left=1) + "\n")
    _figure(paths[2], config, results)
    return paths


def environment(config: BenchConfig) -> dict[str, Any]:
    """Return the hardware and software that the numbers depend on."""
    device = device_of(config)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "onednn_for_fp32": onednn_wins(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _milliseconds(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds) * 1e3
    digits = 1 if middle >= 10 else 3
    if len(seconds) < 2:
        return f"{middle:,.{digits}f}"
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{middle:,.{digits}f} ± {(high - low) / 2 * 1e3:,.{digits}f}"


def _figure(path: Path, config: BenchConfig, results: Sequence[Result]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [result for result in results if result.skipped is None][::-1]
    over_floor = ratios(config, results)
    colours = ["#2c7fb8" if result.name.startswith("toolkit") else "#b0b0b0" for result in shown]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.42 * len(shown) + 1.4), sharey=True, layout="constrained")
    times = [over_floor[result.name] for result in shown]
    peaks = [(result.peak_bytes or 0) / MIB for result in shown]
    for axis, values, text in ((axes[0], times, "{:.2f}"), (axes[1], peaks, "{:,.0f}")):
        bars = axis.barh([result.name for result in shown], values, color=colours)
        labels = axis.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=9)
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].axvline(1, color="#444444", linewidth=0.8, linestyle=":", zorder=0)
    axes[0].set_xlabel(f"{'wall' if time_kind(config) == 'wall' else 'CPU'} time over {results[0].name}")
    axes[1].set_xlabel("peak memory over the inputs, MiB")
    figure.suptitle(f"Loss and gradients over the head: {_size(config)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
