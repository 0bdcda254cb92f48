"""samples.jsonl: completions as they were sampled, with their rewards and advantages.

A line holds ``schema``, ``phase``, ``step`` (from 0), ``prompt_index`` (in the step, over all processes), ``sample``,
``prompt``, ``completion``, ``answer``, ``reward``, ``parts`` (of several rewards), ``advantage`` (of a token, their
mean), ``num_tokens``, ``stop`` (end or length; with an environment what ended the episode) and, of some steps,
``tokens`` (`toolkit.training.token_log`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.distributed import all_gather_objects
from toolkit.errors import warn_once
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example
from toolkit.training.config import TrackerConfig
from toolkit.training.experience import Rows
from toolkit.training.rewarding import Rewarded
from toolkit.training.token_log import TokenLog, first_record, first_sampled, row_keys

SAMPLES = "samples.jsonl"
SCHEMA = 1
"""Version of a line."""
SOME = 2
"""Prompts of a step of which all completions are kept with ``tracker.samples=some``."""
MEGABYTE = 1e6


class SampleLog:
    """Writes a JSON line for each completion that is kept; all processes call it together, the main one writes."""

    def __init__(self, config: TrackerConfig, output_dir: Path, tokenizer: Any = None, *, is_main: bool) -> None:
        """Take the settings, the folder, and the tokenizer that gives tokens their text."""
        self.config, self.path, self._is_main = config, output_dir / SAMPLES, is_main
        self._tokenizer, self._is_full = tokenizer, False
        self._taken: list[tuple[Hashable, int, dict[str, Any]]] = []
        """Of the step that goes on: what tells the row apart, where its record begins, and the line."""

    def restore(self, run_dir: Path, next_step: int) -> None:
        """Take the lines that the earlier run wrote before the step of the main phase that it resumes at."""
        source, fresh = run_dir / SAMPLES, self.path.with_name(f"{SAMPLES}.writing")
        if not self._is_main or not source.is_file():
            return
        with source.open(encoding="utf-8", errors="replace") as lines, fresh.open("w", encoding="utf-8") as kept:
            kept.writelines(line for line in lines if _is_before(line, next_step))
        fresh.replace(self.path)

    def keeps(self, step: int) -> bool:
        """Return whether completions of this step are kept."""
        kind = self.config.samples
        is_due = kind == "some" and step % self.config.samples_every == 0
        return kind == "all" or is_due or self.keeps_tokens(step)

    def keeps_tokens(self, step: int) -> bool:
        """Return whether what is kept of this step has records of its tokens."""
        every = self.config.tokens_every
        return self.config.samples != "none" and every > 0 and step % every == 0

    def take(
        self,
        step: int,
        examples: Sequence[Example],
        indices: Sequence[tuple[int, int]],
        completions: Completions,
        rewarded: Rewarded,
        rows: Rows,
        advantages: Tensor,
    ) -> None:
        """Take completions of this process; `flush` writes them when the step has been learnt from.

        Args:
            step: of the main phase.
            examples: R of them, one for each completion.
            indices: number of the prompt in the step and of the sample, of each.
            completions: R rows.
            rewarded: what they were rewarded with.
            rows: of the completions.
            advantages: [R, 1] or [R, T - 1], on the CPU.
        """
        is_some = self.config.samples == "some"
        is_sampled, keys = completions.is_new[:, 1:].cpu(), row_keys(rows)
        means = mean_advantages(advantages, is_sampled)
        for row in [row for row, (prompt, _) in enumerate(indices) if not is_some or prompt < SOME]:
            sample = {
                "schema": SCHEMA,
                "phase": "main",
                "step": step,
                "prompt_index": indices[row][0],
                "sample": indices[row][1],
                "prompt": examples[row].prompt,
                "completion": completions.transcripts[row],
                "answer": examples[row].answer,
                "reward": _finite(float(rewarded.totals[row])),
                "parts": _parts(rewarded, row),
                "advantage": _finite(float(means[row])),
                "num_tokens": int(completions.is_new[row].sum()),
                "stop": _stop(completions, row),
            }
            if self.keeps_tokens(step):
                sample["tokens"] = first_record(rows, completions, row, advantages, self._tokenizer)
            self._taken.append((keys[row], first_sampled(is_sampled[row]), sample))

    def flush(self, token_log: TokenLog | None = None) -> None:
        """Write what was taken, those of the processes in order; all processes call it together.

        Args:
            token_log: of the updates of this step.
        """
        taken, self._taken = self._taken, []
        if token_log is not None:
            for key, first, sample in taken:
                sample["tokens"] = token_log.completed(key, sample["tokens"], first)
        gathered = all_gather_objects([sample for *_, sample in taken])
        text = "".join(json.dumps(sample) + "\n" for samples in gathered for sample in samples)
        if text and self._is_main and not self._is_full:
            self._append(text)

    def _append(self, text: str) -> None:
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size + len(text) > self.config.samples_mb * MEGABYTE:
            self._is_full = True
            warn_once(
                f"{SAMPLES} has reached tracker.samples_mb={self.config.samples_mb:g}, so no more samples are kept"
            )
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _is_before(line: str, next_step: int) -> bool:
    """Whether a line is of a step before `next_step`; one that was cut is not."""
    try:
        return bool(json.loads(line)["step"] < next_step)
    except (ValueError, KeyError, TypeError):
        return False


def _parts(rewarded: Rewarded, row: int) -> Mapping[str, float | None]:
    scores = rewarded.scores
    return {} if scores is None else {name: _finite(values[row]) for name, values in scores.parts.items()}


def _stop(completions: Completions, row: int) -> str:
    if completions.episodes is not None:
        return str(completions.episodes[row].end)
    return "end" if completions.finished[row] else "length"


def _finite(value: float) -> float | None:
    """Return the value, or None for NaN and infinities, which JSON has not."""
    return value if math.isfinite(value) else None


def mean_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the mean advantage of the scored tokens of each completion, [R].

    Args:
        advantages: [R, 1] or [R, T].
        mask: [R, T'] bool, where a token is scored; T' may be larger.
    """
    if advantages.shape[1] == 1:
        return advantages[:, 0]
    scored = mask[:, : advantages.shape[1]]
    return (advantages * scored).sum(-1) / scored.sum(-1).clamp(min=1)
