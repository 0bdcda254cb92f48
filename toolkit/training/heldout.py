"""The evaluations of a run: before RL, every few steps and at the end; each is a line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toolkit.tasks.base import Example
from toolkit.training.evaluation import Evaluation
from toolkit.training.phase import Phase
from toolkit.training.tracker_run import Shown
from toolkit.training.tracking import Tracker

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


class Evaluations:
    """Evaluates the policy of a run on the held-out prompts; all processes call it together."""

    def __init__(self, trainer: Trainer, tracker: Tracker, console: Console) -> None:
        self._trainer, self._tracker, self._console = trainer, tracker, console
        self._latest: tuple[int, Evaluation] | None = None

    def after_step(self, phase: Phase) -> Evaluation | None:
        """Evaluate if `evaluation.every` asks for it after the step that has just ended; None: it does not.

        The last step's evaluation is the one at the end, which comes after its checkpoint.
        """
        every = self._trainer.config.evaluation.every
        if phase.name != "main" or not every or phase.next_step % every or phase.next_step >= phase.num_steps:
            return None
        evaluation = self.at(phase.next_step)
        self.say(evaluation, f" after step {phase.next_step}:")
        return evaluation

    def say(self, evaluation: Evaluation, when: str) -> None:
        """Print the results, `when` after the name of the first."""
        results = ", ".join(
            filter(None, (evaluation.shown(when), evaluation.shown_reward(), evaluation.shown_samples()))
        )
        if results:
            self._console.print(f"held-out {results}", soft_wrap=True, markup=False)

    def at(self, step: int) -> Evaluation:
        """Return what the policy makes of the held-out prompts after `step` steps; measured once for each step."""
        if self._latest is None or self._latest[0] != step:
            start = time.perf_counter()
            evaluation = self._trainer.evaluate(step)
            self._latest = step, evaluation
            metrics = evaluation.metrics()
            if metrics:
                metrics["seconds"] = time.perf_counter() - start
                self._tracker.log_evaluation(step, metrics, self._samples(evaluation))
        return self._latest[1]

    def _samples(self, evaluation: Evaluation) -> list[Shown]:
        """Return the completions that trackers show, with their prompts."""
        rewards = evaluation.rewards or [None] * len(evaluation.completions)
        rows = zip(self._trainer.task.heldout, evaluation.completions, rewards, strict=False)
        return [Shown(_messages(example), text, reward, example.answer) for example, text, reward in rows]


def _messages(example: Example) -> Sequence[Mapping[str, Any]]:
    """Return the prompt as messages: those of its chat, or one of the user."""
    is_chat = isinstance(example.source, list)
    return example.source if is_chat else [{"role": "user", "content": example.prompt}]
