"""Rewards of completions as tensors and metrics, over all processes.

Legend: R completions, K rewards of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.distributed import all_gather_objects
from toolkit.errors import DataError
from toolkit.metrics import Mean, Metric, Sum
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example, Task
from toolkit.tasks.config import TaskConfig
from toolkit.tasks.episodes import Episode
from toolkit.tasks.scoring import ENVIRONMENT, Scores, Written

FAILURES, SCORED = "reward_failures", "num_rewarded"
"""Metrics: completions with a reward that failed (or whose environment did), and all of them."""


@dataclass(frozen=True)
class Rewarded:
    """Rewards of completions."""

    totals: Tensor
    """[R] the weighted sum, NaN where no reward applies."""
    metrics: dict[str, Metric]
    parts: Tensor | None = None
    """[R, K] each reward by itself, NaN where it does not apply; None: there is one."""
    weights: Tensor | None = None
    """[K] of each in the sum."""
    scores: Scores | None = None
    """The same as numbers, with what went wrong."""


class Rewarder:
    """The rewards of a run."""

    def __init__(self, config: TaskConfig, task: Task, seed: int) -> None:
        self._task = task
        self._rewards = config.build_rewards(seed)
        self._has_verifier = config.has_verifier
        self._most_failures = config.max_reward_failures
        self.environment = config.build_environment(seed)
        self.has_rewards = bool(config.rewards) or self.environment is not None

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Completions,
        seeds: Sequence[str],
        *,
        by_verifier: bool = False,
    ) -> Rewarded:
        """Return the rewards of this process's completions; all processes call it together.

        Args:
            examples: one for each completion.
            completions: R rows.
            seeds: of coin flips, one for each completion.
            by_verifier: ask the verifier where coins would be flipped.
        """
        lengths = completions.is_new.sum(-1).tolist()
        episodes = completions.episodes
        each_episode = [None] * len(lengths) if episodes is None else episodes
        rows = zip(examples, completions.texts, completions.finished, lengths, seeds, each_episode, strict=True)
        scores = self._rewards.score(
            self._task, [Written(*row) for row in rows], by_verifier=by_verifier and self._has_verifier
        )
        totals = torch.tensor(scores.totals)
        metrics: dict[str, Metric] = {"reward": Mean.of(totals[~totals.isnan()])}
        if episodes is not None:
            metrics |= _of_episodes(episodes)
        elif not self._rewards.has_functions:
            return Rewarded(totals, metrics, scores=scores)
        # A part of a dict may be missing on a process; all need the same columns.
        weights = dict(sorted({k: v for each in all_gather_objects(scores.weights) for k, v in each.items()}.items()))
        unknown = [float("nan")] * len(scores.totals)
        columns = [scores.parts.get(name, unknown) for name in weights]
        parts = torch.tensor(columns).reshape(len(weights), len(unknown)).T  # perhaps without columns or rows
        for name, column in zip(weights, parts.unbind(-1), strict=True):
            metrics[f"reward/{name}"] = Mean.of(column[~column.isnan()])
        metrics |= self._of_dicts(weights, parts)
        metrics[FAILURES] = Sum(torch.tensor(float(scores.num_failed)))
        metrics[SCORED] = Sum(torch.tensor(float(len(scores.totals))))
        if len(weights) < 2:
            return Rewarded(totals, metrics, scores=scores)
        return Rewarded(totals, metrics, parts, torch.tensor(list(weights.values())), scores)

    @staticmethod
    def _of_dicts(weights: dict[str, float], parts: Tensor) -> dict[str, Metric]:
        """Return the mean of each reward that is a dict: the sum of its parts."""
        metrics: dict[str, Metric] = {}
        for reward in dict.fromkeys(name.partition("/")[0] for name in weights if "/" in name):
            inside = parts[:, [name.partition("/")[0] == reward for name in weights]]
            is_known = ~inside.isnan().all(-1)
            metrics[f"reward/{reward}"] = Mean.of(inside.nansum(-1)[is_known])
        return metrics

    def check_failures(self, metrics: dict[str, Metric], scores: Scores | None) -> None:
        """Raise if too many rewards failed, on all processes together.

        Args:
            metrics: of all processes; the number of completions is removed.
            scores: of this process, which may have the reason.

        Raises:
            DataError: more than ``task.max_reward_failures`` of the completions have a reward that failed.
        """
        if SCORED not in metrics:
            return
        number, failed = metrics.pop(SCORED).value(), metrics[FAILURES].value()
        if failed <= self._most_failures * number:
            return
        failures = scores.failures if scores is not None else []
        reasons = all_gather_objects((failures[0][0], failures[0][1].reason) if failures else None)
        name, reason = next((each for each in reasons if each is not None), ("", "see above"))
        raise DataError(
            f"{self.called(name)} failed for {int(failed)} of {int(number)} completions: {reason}; fix it, or raise "
            f"task.max_reward_failures={self._most_failures:g}"
        )

    def called(self, name: str) -> str:
        """Return what a reward is called in messages; the environment is one of them."""
        if self.environment is not None and name == ENVIRONMENT:
            return f"environment {self.environment.spec!r}"
        return f"reward {name!r}"

    def close(self) -> None:
        """End worker processes."""
        self._rewards.close()
        if self.environment is not None:
            self.environment.close()


def _of_episodes(episodes: Sequence[Episode]) -> dict[str, Metric]:
    """Return how long episodes were, why they ended, and for how many the environment failed."""
    turns = torch.tensor([float(len(episode.texts)) for episode in episodes])
    ends = {
        name: torch.tensor([float(episode.end == name) for episode in episodes]) for name in ("max_turns", "context")
    }
    return {
        "num_turns": Mean.of(turns),
        **{f"ended_by_{name}": Mean.of(is_end) for name, is_end in ends.items()},
        "environment_failures": Sum(torch.tensor(float(sum(episode.failure is not None for episode in episodes)))),
    }
