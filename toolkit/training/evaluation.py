"""What a policy makes of examples: accuracy, mean reward with its standard error, and likelihood of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from toolkit.distributed import reduce_metrics
from toolkit.losses.config.ce import CELossConfig
from toolkit.metrics import Mean, Metric, Sum, merge_metrics
from toolkit.tasks.base import Example
from toolkit.training.experience import IGNORED, rows_from_answers
from toolkit.training.rewarding import FAILURES, SCORED

BATCH = 512
"""Prompts that are completed at a time."""
NUM_SHOWN = 3
"""Held-out prompts whose completions are shown."""


class Evaluation(NamedTuple):
    """What a policy makes of held-out examples, greedily; None: not measured."""

    accuracy: float | None = None
    """Share of right answers, by the task's verifier."""
    completions: Sequence[str] = ()
    """Of the first examples, to show."""
    reward: float | None = None
    """Mean reward."""
    reward_se: float | None = None
    """Its standard error over the examples."""
    nll: float | None = None
    """Mean negative log-likelihood of the tokens of the completions in the data, in nats; of supervised runs."""

    def shown(self, after_name: str = "") -> str:
        """Return the most telling of these in words, `after_name` after its name; empty if nothing was measured."""
        if self.accuracy is not None:
            return f"accuracy{after_name} {self.accuracy:.3f}"
        if self.reward is not None:
            spread = "" if self.reward_se is None else f" (standard error {self.reward_se:.3f})"
            return f"reward{after_name} {self.reward:.3f}{spread}"
        return "" if self.nll is None else f"nll{after_name} {self.nll:.3f}"


def evaluate(trainer: Any, examples: Sequence[Example]) -> Evaluation:
    """Return what the policy of a `Trainer` makes of `examples`, over all processes; all call it together."""
    if not examples:
        return Evaluation()
    measured = Evaluation()
    if trainer.rewarder.has_rewards:
        measured = rewarded_greedily(trainer, examples)
    if isinstance(trainer.config.loss, CELossConfig):
        measured = measured._replace(nll=_nll(trainer, [e for e in examples if e.segments]))
    return measured


def rewarded_greedily(trainer: Any, examples: Sequence[Example], batch_size: int = BATCH) -> Evaluation:
    """Complete the prompts greedily and reward the completions, over all processes; all call it together."""
    local_share = trainer.shares.of(len(examples))
    local_examples = examples[local_share]
    parts: list[dict[str, Metric]] = []
    last = None
    for start in range(0, trainer.shares.largest(len(examples)), batch_size):
        batch = local_examples[start : start + batch_size]
        # All must generate equally often.
        completions = trainer.generator.greedy(batch or examples[:1]).first(len(batch))
        seeds = [f"heldout/{local_share.start + start + row}" for row in range(len(batch))]
        last = trainer.rewarder(batch, completions, seeds, by_verifier=True)
        totals = last.totals[~last.totals.isnan()].double()
        kept = {name: metric for name, metric in last.metrics.items() if name in (FAILURES, SCORED)}
        counted = Sum(torch.tensor(float(len(totals))))
        moments = {"reward": Mean.of(totals), "square": Mean.of(totals.square()), "number": counted}
        parts.append({**kept, **moments, "accuracy": Mean.of(totals >= 1.0)})
    reduced = reduce_metrics(merge_metrics(parts))
    trainer.rewarder.check_failures(reduced, last.scores if last is not None else None)
    mean, square, number = (reduced[name].value() for name in ("reward", "square", "number"))
    if not number:  # no reward applies to any of them
        return Evaluation()
    variance = max(square - mean * mean, 0.0) * number / (number - 1) if number > 1 else None
    return Evaluation(
        accuracy=reduced["accuracy"].value() if trainer.rewarder.measures_accuracy else None,
        reward=mean,
        reward_se=None if variance is None else math.sqrt(variance / number),
    )


@torch.no_grad()
def _nll(trainer: Any, examples: Sequence[Example]) -> float | None:
    """Return the mean negative log-likelihood of the completions in the data; None if there are none."""
    if not examples:
        return None
    local_examples = examples[trainer.shares.of(len(examples))]
    rows = rows_from_answers(local_examples, trainer.tokenizer, trainer.accelerator.device)
    logprobs = trainer.updater.score(rows, trainer.shares.largest(len(examples)))
    return reduce_metrics({"nll": Mean.of(-logprobs[rows.shifted_labels != IGNORED])})["nll"].value()
