"""What a policy makes of examples: accuracy, mean reward, pass@k with 95% intervals, and likelihood of completions.

Every number is computed from the rewards of all prompts, in their order, on every process: it does not depend on the
number of processes, but for the completions themselves.

Legend: P prompts, N completions of each.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from toolkit.distributed import all_gather_objects, reduce_metrics
from toolkit.functional.estimates import mean_estimate, unbiased_pass_at_k, wilson_interval
from toolkit.losses.config.ce import CELossConfig
from toolkit.metrics import Mean, Metric, merge_metrics
from toolkit.tasks.base import Example
from toolkit.training.experience import IGNORED, rows_from_answers
from toolkit.training.rewarding import FAILURES, SCORED

EVALUATION = "evaluation"
"""What the sampled completions are drawn for, and the phase of an evaluation's line in metrics.jsonl."""
BATCH = 512
"""Completions that are made at a time."""
NUM_SHOWN = 3
"""Held-out prompts whose completions are shown."""
VERIFIED = 1.0
"""Reward of a right answer, by a task's verifier."""


class Evaluation(NamedTuple):
    """What a policy makes of held-out examples; None or missing: not measured."""

    accuracy: float | None = None
    """Share of greedy completions that pass: by the task's verifier, or `evaluation.passing_reward`."""
    completions: Sequence[str] = ()
    """Greedy, of the first examples, to show."""
    reward: float | None = None
    """Mean reward of the greedy completions."""
    reward_se: float | None = None
    """Its standard error over the examples."""
    nll: float | None = None
    """Mean negative log-likelihood of the tokens of the completions in the data, in nats; of supervised runs."""
    sampled: Mapping[str, float] = {}
    """Means over the examples: `sampled_reward` and, where completions pass or fail, `pass@1`, `pass@4` ..."""
    intervals: Mapping[str, tuple[float, float]] = {}
    """95% intervals by name: of `accuracy`, `reward` and what `sampled` has."""
    rewards: Sequence[float | None] = ()
    """Of `completions`."""

    @property
    def objective(self) -> float | None:
        """The number that says how good the policy is, more is better: accuracy, else mean reward, else likelihood."""
        likelihood = None if self.nll is None else -self.nll
        return next((value for value in (self.accuracy, self.reward, likelihood) if value is not None), None)

    def metrics(self) -> dict[str, float]:
        """Return every number by name; an interval is two, such as `accuracy_low` and `accuracy_high`."""
        values = {"accuracy": self.accuracy, "reward": self.reward, "nll": self.nll, **self.sampled}
        numbers = {name: value for name, value in values.items() if value is not None}
        for name, (low, high) in self.intervals.items():
            numbers |= {f"{name}_low": low, f"{name}_high": high}
        return numbers

    def shown(self, after_name: str = "", *, with_interval: bool = True) -> str:
        """Return the most telling of these in words, `after_name` after its name; empty if nothing was measured."""
        for name in ("accuracy", "reward", "nll"):
            if getattr(self, name) is not None:
                interval = self.shown_interval(name) if with_interval else ""
                return f"{name}{after_name} {getattr(self, name):.3f}{interval}"
        return ""

    def shown_reward(self) -> str:
        """Return the mean reward in words where `shown` has an accuracy that is another number; else empty."""
        if self.accuracy is None or self.reward is None or self.reward == self.accuracy:
            return ""
        return f"reward {self.reward:.3f}{self.shown_interval('reward')}"

    def shown_interval(self, name: str) -> str:
        """Return the interval of a number, after a space; empty if it has none."""
        if name not in self.intervals:
            return ""
        low, high = self.intervals[name]
        return f" [{low:.2f}, {high:.2f}]"

    def shown_samples(self) -> str:
        """Return what sampled completions gave, in words."""
        return ", ".join(f"{name} {self.sampled[name]:.3f}{self.shown_interval(name)}" for name in self.notable)

    @property
    def notable(self) -> list[str]:
        """Names of `sampled` that are worth showing: the mean reward only where nothing passes or fails."""
        passing = [name for name in self.sampled if name.startswith("pass@")]
        return passing or list(self.sampled)

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return what `_asdict` gave, after JSON."""
        intervals = {name: (low, high) for name, (low, high) in values.get("intervals", {}).items()}
        return cls(**{**values, "intervals": intervals})


def evaluate(trainer: Any, examples: Sequence[Example], step: int = 0) -> Evaluation:
    """Return what the policy of a `Trainer` makes of `examples`, over all processes; all call it together.

    The random state is afterwards what it was, so a run with evaluations is the same as one without them.

    Args:
        trainer: a `Trainer`.
        examples: equal on all processes.
        step: steps of the main phase that the policy has made; sampled completions depend on it.
    """
    if not examples:
        return Evaluation()
    with _same_random_state():
        if trainer.rewarder.has_rewards:
            measured = rewarded_greedily(trainer, examples)
        else:
            measured = Evaluation(completions=trainer.generator.greedy(examples[:NUM_SHOWN]).transcripts)
        if trainer.config.evaluation.samples:
            measured = _with_samples(measured, trainer, examples, step)
        if isinstance(trainer.config.loss, CELossConfig):
            measured = measured._replace(nll=_nll(trainer, [e for e in examples if e.segments]))
    return measured


def rewarded_greedily(trainer: Any, examples: Sequence[Example], batch_size: int = BATCH) -> Evaluation:
    """Complete the prompts greedily and reward the completions, over all processes; all call it together."""
    texts, totals = _completed(trainer, examples, batch_size)
    known = [reward for (reward,) in totals if not math.isnan(reward)]
    if not known:  # no reward applies to any of them
        return Evaluation(completions=texts)
    mean, intervals = mean_estimate(known), {}
    accuracy = None
    if trainer.config.tells_right_from_wrong:
        passed = sum(reward >= _passing(trainer) for reward in known)
        accuracy, intervals["accuracy"] = passed / len(known), wilson_interval(passed, len(known))
    reward_interval = mean.interval()
    if reward_interval is not None:
        intervals["reward"] = reward_interval
    return Evaluation(
        accuracy=accuracy,
        completions=texts,
        reward=mean.mean,
        reward_se=mean.standard_error,
        intervals=intervals,
        rewards=[None if math.isnan(reward) else reward for (reward,) in totals[: len(texts)]],
    )


def _with_samples(measured: Evaluation, trainer: Any, examples: Sequence[Example], step: int) -> Evaluation:
    """Add what sampled completions of the prompts give; the prompt is the unit of all intervals."""
    known = [[r for r in of_prompt if not math.isnan(r)] for of_prompt in _completed(trainer, examples, step=step)[1]]
    values = {"sampled_reward": [math.fsum(rewards) / len(rewards) for rewards in known if rewards]}
    if trainer.config.tells_right_from_wrong:
        least = _passing(trainer)
        for k in trainer.config.evaluation.pass_at:
            counts = [(len(rewards), sum(r >= least for r in rewards)) for rewards in known if len(rewards) >= k]
            values[f"pass@{k}"] = [unbiased_pass_at_k(number, passed, k) for number, passed in counts]
    values = {name: of_prompts for name, of_prompts in values.items() if of_prompts}
    intervals = {name: _interval(name, of_prompts) for name, of_prompts in values.items()}
    return measured._replace(
        sampled={name: mean_estimate(of_prompts).mean for name, of_prompts in values.items()},
        intervals={**measured.intervals, **{name: pair for name, pair in intervals.items() if pair is not None}},
    )


def _interval(name: str, of_prompts: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of the mean of a value of each prompt."""
    if not name.startswith("pass@"):
        return mean_estimate(of_prompts).interval()
    if set(of_prompts) <= {0.0, 1.0}:  # each prompt passes or fails; they may all do, and then have no spread
        return wilson_interval(round(sum(of_prompts)), len(of_prompts))
    return mean_estimate(of_prompts).interval(0.0, 1.0)


def _passing(trainer: Any) -> float:
    least = trainer.config.evaluation.passing_reward
    return torch.tensor(VERIFIED if least is None else least, dtype=torch.float32).item()  # rounded as rewards are


def _completed(
    trainer: Any, examples: Sequence[Example], batch_size: int = BATCH, *, step: int | None = None
) -> tuple[list[str], list[list[float]]]:
    """Complete and reward the prompts; return the first texts and all rewards, equal on all processes.

    Args:
        trainer: a `Trainer`.
        examples: P prompts.
        batch_size: completions at a time.
        step: sample completions for the evaluation after this step; None: one greedy completion of each.

    Returns:
        The first completions of the first `NUM_SHOWN` prompts, and the N rewards of each prompt, NaN where none
        applies.
    """
    cfg = trainer.config.evaluation
    size = 1 if step is None else cfg.samples
    share, at_a_time = trainer.shares.of(len(examples)), max(batch_size // size, 1)
    local_examples = examples[share]
    parts: list[dict[str, Metric]] = []
    texts: list[str] = []
    rewards: list[list[float]] = []
    rewarded = None
    for start in range(0, trainer.shares.largest(len(examples)), at_a_time):
        batch = local_examples[start : start + at_a_time]
        prompts = batch or examples[:1]  # all must generate equally often
        indices = range(share.start + start, share.start + start + len(batch))
        if step is None:
            completions = trainer.generator.greedy(prompts).first(len(batch))
        else:
            options = {"group_size": size, "purpose": EVALUATION, "temperature": cfg.temperature}
            completions = trainer.generator.sample(prompts, indices, step, **options)
        seeds = [f"heldout/{index * size + sample}" for index in indices for sample in range(size)]
        answers = [example for example in batch for _ in range(size)]
        rewarded = trainer.rewarder(answers, completions, seeds, by_verifier=True)
        parts.append({name: metric for name, metric in rewarded.metrics.items() if name in (FAILURES, SCORED)})
        rewards += rewarded.totals.double().view(-1, size).tolist()
        texts += completions.transcripts[::size][: NUM_SHOWN - len(texts)]
    reduced = reduce_metrics(merge_metrics(parts))
    trainer.rewarder.check_failures(reduced, rewarded.scores if rewarded is not None else None)
    gathered = all_gather_objects((texts, rewards))
    all_texts = [text for local_texts, _ in gathered for text in local_texts]
    return all_texts[:NUM_SHOWN], [of_prompt for _, local_rewards in gathered for of_prompt in local_rewards]


@torch.no_grad()
def _nll(trainer: Any, examples: Sequence[Example]) -> float | None:
    """Return the mean negative log-likelihood of the completions in the data; None if there are none."""
    if not examples:
        return None
    local_examples = examples[trainer.shares.of(len(examples))]
    rows = rows_from_answers(local_examples, trainer.tokenizer, trainer.accelerator.device)
    logprobs = trainer.updater.score(rows, trainer.shares.largest(len(examples)))
    return reduce_metrics({"nll": Mean.of(-logprobs[rows.shifted_labels != IGNORED])})["nll"].value()


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Restore the global random states: a reward of the user may draw from them, and so may a library."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), numpy.random.get_state() if numpy else None
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
