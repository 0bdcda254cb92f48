"""Folders of runs, made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

SETTINGS = {
    "seed": 0,
    "loss": {
        "_target_": "toolkit.losses.config.policy.GRPOLossConfig",
        "policy_loss_cfg": {"loss_type": "vanilla", "cliprange_low": 0.2},
    },
    "training": {"steps": 40, "resume": None},
}


def curve(last: float, seed: int, *, steps: int = 40, first: float = 0.1) -> list[float]:
    """Rewards that rise from `first` to `last`, with noise."""
    draw = Random(f"{last}/{seed}")
    return [first + (last - first) * (1 - math.exp(-step / 8)) + draw.gauss(0, 0.01) for step in range(steps)]


def make_run(
    folder: Path,
    *,
    rewards: Sequence[float | None] = (),
    seed: int = 0,
    policy: str = "vanilla",
    overrides: Iterable[str] = (),
    summary: Mapping[str, Any] | None = None,
    row: Callable[[int], Mapping[str, Any]] = lambda step: {},
    samples: Iterable[Mapping[str, Any]] = (),
    steps: int = 40,
) -> Path:
    """Write the files of a run and return its folder."""
    (folder / ".hydra").mkdir(parents=True)
    lines = [
        {"phase": "main", "step": step, "reward": reward, "uniform_groups": 0.1, "grad_norm": 1.0, "loss": 0.1}
        | dict(row(step))
        for step, reward in enumerate(rewards)
    ]
    lines = [{name: value for name, value in line.items() if value != "absent"} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = json.loads(json.dumps(SETTINGS))
    settings["seed"] = seed
    settings["training"]["steps"] = steps
    settings["loss"]["policy_loss_cfg"]["loss_type"] = policy
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([*overrides, f"seed={seed}"]))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"seed": seed, "interrupted": False, **summary}))
    kept = [json.dumps({"schema": 1, **sample}) + "\n" for sample in samples]
    if kept:
        (folder / "samples.jsonl").write_text("".join(kept))
    return folder


def made_samples(number: int, *, with_tokens: bool = False) -> Iterable[dict[str, Any]]:
    """Samples of several steps; some with records of their tokens."""
    for index in range(number):
        text = [*"reverse", "</s>"]
        sample: dict[str, Any] = {
            "phase": "main",
            "step": index // 4,
            "prompt_index": index % 4,
            "sample": 0,
            "prompt": f"word {index} <b>&amp;</script>",
            "completion": f"drow {index}",
            "reward": index % 3 / 2,
            "parts": {"right": index % 3 / 2},
            "advantage": index % 3 - 1.0,
            "num_tokens": len(text),
            "stop": "end" if index % 5 else "length",
        }
        if with_tokens:
            values = [(-1) ** position * position / 8 for position in range(len(text))]
            sample["tokens"] = {
                "text": text,
                "advantage": values,
                "ratio": [1 + value / 4 for value in values],
                "status": ["unscored", "clipped_high", *["learns"] * (len(text) - 2)],
            }
        yield sample


def make_sweep(folder: Path, lasts: Mapping[str, float], seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """A multirun over policy losses and seeds; `lasts`: policy loss -> accuracy that its runs come to."""
    draw = Random(0)
    for number, (policy, last, seed) in enumerate((p, x, s) for p, x in lasts.items() for s in seeds):
        reached = last + (seed - 1) * 0.004 + draw.gauss(0, 0.003)
        make_run(
            folder / str(number),
            rewards=curve(last, seed),
            seed=seed,
            policy=policy,
            overrides=[f"policy_loss={policy}"],
            summary={"accuracy_before": 0.3, "accuracy_after": reached, "wall_seconds": 40.0 + number},
            row=lambda step: {"entropy": math.exp(-step / 20), "clip_fraction_low": 0.05},
            samples=made_samples(12, with_tokens=number == 0),
        )
    return folder
