"""One self-contained HTML page of one or several runs: no network, no file beside it."""

from __future__ import annotations

import contextlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from string import Template
from typing import Any

from omegaconf import OmegaConf

from toolkit.errors import ToolkitError, first_line, warn_once
from toolkit.report.comparison import Choice, Comparison, compare
from toolkit.report.runs import CONFIG, Run
from toolkit.report.samples import read_samples
from toolkit.report.story import remarks

SCHEMA = 1
"""Version of the data in the page."""
MOST_SAMPLES = 2000
"""Samples on a page by default; of more, evenly chosen ones."""
EVALUATION = "evaluation"
PHASES = {"main": "main phase", "warmup": "warm-up", "evaluation": "held-out examples"}
MAIN = {
    "reward": "mean reward",
    "accuracy": "held-out accuracy",
    "nll": "negative log-likelihood, nats",
    "entropy": "policy entropy, nats",
    "clip_fraction_low": "clipped below, fraction of tokens",
    "clip_fraction_high": "clipped above, fraction of tokens",
    "kl_old": "KL to the old policy, nats",
    "kl_ref": "KL to the reference, nats",
    "grad_norm": "gradient norm before clipping",
    "completion_tokens": "tokens of a completion",
    "truncated": "completions cut off, fraction",
    "uniform_groups": "groups with equal rewards, fraction",
    "tokens_per_second": "tokens a second",
    "lr": "learning rate",
}
"""Metric -> its label, of those shown at once and in this order; the others unfold."""
SAFE_END = "<\\/"
"""What JSON writes "</" as, which would end the script element that the data is in."""
NO_METRIC = {"phase", "step", "schema", "index"}
"""Keys of a line that are not measured."""


def page(runs: Sequence[Run], *, most_samples: int | None = MOST_SAMPLES) -> str:
    """Return the page of these runs.

    Args:
        runs: at least one.
        most_samples: on the page, over all runs; None: all.
    """
    comparison = compare(runs)
    sampled, samples = read_samples(runs, most_samples)
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs, {len(comparison.choices)} choices"
    data = {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "measure": comparison.measure,
        "phases": [phase for name in PHASES if (phase := _phase(name, runs))["metrics"]],
        "choices": [_choice(choice, index, comparison, runs) for index, choice in enumerate(comparison.choices)],
        "differing": list(comparison.differing),
        "runs": [_run(run) for run in runs],
        "sampled": sampled,
        "samples": samples,
        "versions": _versions(),
    }
    folder = files("toolkit.report")
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", SAFE_END)
    # The data is put in last: it may hold a "$".
    body = Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), script=(folder / "page.js").read_text(encoding="utf-8"), data="\0"
    )
    return body.replace("\0", text)


def _run(run: Run) -> dict[str, Any]:
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for row in run.rows:
        into = curves.setdefault(str(row.get("phase")), {})
        for name, value in row.items():
            if name not in NO_METRIC and isinstance(value, (int, float)) and math.isfinite(value):
                into.setdefault(name, []).append([row["step"] + (row["phase"] != EVALUATION), value])
    path = run.folder / CONFIG
    return {
        "name": run.name,
        "folder": str(run.folder),
        "seed": run.seed,
        "curves": curves,
        "remarks": [vars(remark) for remark in remarks(run)],
        "config": path.read_text(encoding="utf-8") if path.is_file() else "no config.yaml",
    }


def _phase(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the metrics of a phase that any run has measured, the most telling first."""
    rows = [row for run in runs for row in run.rows if row.get("phase") == name]
    measured_names = dict.fromkeys(
        key for row in rows for key, value in row.items() if value is not None and key not in NO_METRIC
    )
    main = [key for key in MAIN if key in measured_names]
    metrics = [{"name": key, "label": MAIN[key], "main": True} for key in main]
    metrics += [{"name": key, "label": key, "main": False} for key in measured_names if key not in MAIN]
    return {"name": name, "label": PHASES[name], "metrics": metrics}


def _choice(choice: Choice, index: int, comparison: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    indices = [runs.index(run) for run in choice.runs]
    behind = comparison.behind[index]
    best = max(choice.known, key=lambda value: comparison.sign * value, default=None)
    return {
        "label": choice.label,
        "runs": indices,
        "number": len(choice.runs),
        "mean": choice.mean,
        "spread": choice.spread,
        "best": best,
        "worst": min(choice.known, key=lambda value: comparison.sign * value, default=None),
        "seconds": choice.seconds,
        "behind": None if behind is None else {**vars(behind), "clear": behind.is_clear},
        "differing": {key: _joined(values[index] for index in indices) for key, values in comparison.differing.items()},
        "explanation": _explanation(choice.runs[0]),
    }


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _explanation(run: Run) -> str | None:
    """Return what the run's loss computes; None where its classes are not here."""
    if not (run.folder / CONFIG).is_file():
        return None
    from toolkit.compose.build import build_loss
    from toolkit.explain.formula import explain_loss

    try:
        return explain_loss(build_loss(OmegaConf.load(run.folder / CONFIG)))  # type: ignore[arg-type]
    except (ToolkitError, ImportError, AttributeError, KeyError) as error:
        warn_once(f"the loss of {run.folder} cannot be explained: {first_line(error)}")
        return None


def _versions() -> str:
    """Return the versions that made the page; those that made the runs are not kept."""
    packages = []
    for name in ("rl-loss-toolkit", "torch", "transformers", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return "Page made with " + ", ".join(packages) + "."


def _finite(node: Any) -> Any:
    """Return JSON values: NaN and infinities, which JSON has not, become null."""
    if isinstance(node, float):
        return node if math.isfinite(node) else None
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return [_finite(value) for value in node] if isinstance(node, (list, tuple)) else node
