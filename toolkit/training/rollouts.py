"""Rollouts of the RL phase: prompts are drawn, completed and rewarded, and the rewards become advantages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import all_gather_objects, reduce_metrics
from toolkit.functional.rewards import RewardTerms
from toolkit.metrics import Mean, Metric
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example, Task
from toolkit.training.draws import Draws
from toolkit.training.dynamic_sampling import Groups, Round, sample_rounds
from toolkit.training.experience import IGNORED, Rows, joined_terms, reward_terms, rows_from_completions
from toolkit.training.generation import Generator
from toolkit.training.kl_penalty import KLPenalty
from toolkit.training.layout import Shares, most_of_one
from toolkit.training.old_logprobs import OldLogprobs
from toolkit.training.overlong import Overlong
from toolkit.training.reference import Reference
from toolkit.training.rewarding import Rewarded, Rewarder
from toolkit.training.run_config import RunConfig
from toolkit.training.sample_log import SampleLog
from toolkit.training.updates import Updater


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    rows: Rows
    """Of this process, perhaps none."""
    owners: Tensor
    """[N] the process that has each of the N rows of all, in the order of prompts."""
    metrics: dict[str, Metric]
    """Of all processes."""


class Rollouts:
    """Makes the experience of each step; all processes call it together."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        generator: Generator,
        rewarder: Rewarder,
        updater: Updater,
        kl_penalty: KLPenalty,
        draws: Draws,
        shares: Shares,
    ) -> None:
        """Take the parts of a `Trainer`."""
        self.config, self.task, self.generator, self.rewarder = config, task, generator, rewarder
        self.updater, self.kl_penalty, self.draws, self.shares = updater, kl_penalty, draws, shares
        self.overlong = Overlong(config.rollout)
        self.old_logprobs = OldLogprobs(config, updater)
        self.num_refills = 0
        """Batches of prompts drawn so far beside the first of each step."""
        self.samples: SampleLog | None = None
        """Where completions are kept."""

    def collect(self, step: int, reference: Reference | None) -> Experience:
        """Return rewarded completions of the prompts of a step, with the log-probabilities that its updates need."""
        cfg, rank = self.config, self.shares.rank
        groups, metrics, num_rounds = sample_rounds(
            lambda number: self.sample_round(self._draw(step + number), step, number, reference),
            wanted=cfg.rollout.prompts_per_step,
            max_rounds=cfg.rollout.max_sampling_rounds,
            rank=rank,
        )
        self.num_refills += num_rounds - 1
        if num_rounds > 1 and len(groups.owners):  # statistics of a batch are those of the groups that it learns from
            groups = groups.with_advantages(self._advantages(groups.terms), rank)
        rows, owners = groups.rows, groups.owners.repeat_interleave(groups.size)
        most = most_of_one(owners)
        is_off_policy = cfg.training.minibatches * cfg.training.epochs > 1
        if (is_off_policy or bool(getattr(cfg.loss, "correction", ()))) and rows.old_logprobs is None:
            rows, measured = self.old_logprobs.add(rows, most)
            metrics |= measured
        if reference is not None and rows.ref_logprobs is None:
            rows = replace(rows, ref_logprobs=self.updater.score(rows, most, reference))
        return Experience(rows, owners, metrics)

    def sample_round(self, prompts: list[Example], step: int, number: int, reference: Reference | None) -> Round:
        """Return rewarded completions of this process's share of the prompts.

        Args:
            prompts: of all processes.
            step: of the main phase.
            number: how many batches of prompts this step has completed already.
            reference: for the KL in the reward.
        """
        cfg, size = self.config.rollout, self.config.rollout.group_size
        share = self.shares.of(len(prompts))
        # Prompts are numbered through all rounds of a step.
        indices = range(number * len(prompts) + share.start, number * len(prompts) + share.stop)
        completions = self.generator.sample(prompts[share] or prompts[:1], indices, step, group_size=size)
        examples = [prompt for prompt in prompts[share] for _ in range(size)]
        seeds = [self.draws.key("main", step, "reward", indices.start * size + row) for row in range(len(examples))]
        rewarded = self.overlong.penalised(self.rewarder(examples, completions, seeds), completions)
        group_ids = torch.arange(indices.start, indices.stop).repeat_interleave(size)
        rows = rows_from_completions(completions, group_ids, temperature=cfg.temperature)
        most = self.shares.largest(len(prompts)) * size
        rows, rewarded, kl_metrics = self._less_kl(rows, rewarded, reference, most)
        rewards = rewarded.totals.view(-1, size)
        terms, is_masked = self._of_all_processes(rewards, completions, rewarded)
        advantages = self._advantages(terms)
        owners = self.shares.owners(len(prompts))
        labels, is_local = rows.shifted_labels, (owners == self.shares.rank).repeat_interleave(size)
        labels = labels.masked_fill(is_masked[is_local].unsqueeze(-1).to(labels.device), IGNORED)
        rows = replace(rows, shifted_labels=labels)
        metrics = reduce_metrics(rewarded.metrics | _measured(rewards, completions))
        self.rewarder.check_failures(metrics, rewarded.scores)
        teaches = (advantages != 0).any(-1) & ~is_masked
        is_kept = teaches.view(-1, size).any(-1) | (not cfg.skip_uniform_groups)
        if self.samples is not None and self.samples.keeps(step):
            sample_indices = [(prompt, sample) for prompt in indices for sample in range(size)]
            self.samples.take(step, examples, sample_indices, completions, rewarded, rows, advantages[is_local])
        groups = Groups(rows, owners, terms, size).with_advantages(advantages, self.shares.rank)
        return Round(groups.select(is_kept, self.shares.rank), len(prompts), {**metrics, **kl_metrics})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"num_refills": self.num_refills, "old_logprobs": self.old_logprobs.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned; parts that it lacks stay as they are."""
        self.num_refills = state.get("num_refills", 0)
        self.old_logprobs.restore(state.get("old_logprobs", {}))

    def _draw(self, index: int) -> list[Example]:
        """Return a batch of prompts; without refills there is one for each step, and `index` is the step."""
        batch = index + self.num_refills
        return self.task.draw_at(batch, self.config.rollout.prompts_per_step, self.draws.rng("main", batch, "data"))

    def _less_kl(
        self, rows: Rows, rewarded: Rewarded, reference: Reference | None, most: int
    ) -> tuple[Rows, Rewarded, dict[str, Metric]]:
        """Subtract the KL from the rewards of this process, if it is to be there; return metrics of all processes."""
        if self.config.kl_control.reward_type is None:
            return rows, rewarded, {}
        assert reference is not None
        rows, metrics = self.old_logprobs.add(rows, most)
        rows = replace(rows, ref_logprobs=self.updater.score(rows, most, reference))
        assert rows.old_logprobs is not None
        assert rows.ref_logprobs is not None
        rewards, kl_metrics = self.kl_penalty.off_rewards(
            rewarded.totals.unsqueeze(-1), rows.old_logprobs, rows.ref_logprobs, rows.shifted_labels != IGNORED
        )
        # The parts of a reward do not add up to the reward less the KL.
        rewarded = replace(rewarded, totals=rewards.squeeze(-1), parts=None, metrics=rewarded.metrics | kl_metrics)
        return rows, rewarded, metrics

    def _of_all_processes(
        self, rewards: Tensor, completions: Completions, rewarded: Rewarded
    ) -> tuple[RewardTerms, Tensor]:
        """Return what the estimator sees of the completions of all, and which are left out of the loss, [R] bool."""
        terms = reward_terms(rewards, completions, rewarded.parts, rewarded.weights)
        parts, masked = zip(*all_gather_objects((terms, self.overlong.masked(completions))), strict=True)
        return joined_terms(parts), torch.cat(masked)

    def _advantages(self, terms: RewardTerms) -> Tensor:
        """Return the advantages of the completions of all processes, [R, 1] or [R, T - 1], in the order of prompts."""
        advantages = self.config.advantage.compute(terms)
        return advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)


def _measured(rewards: Tensor, completions: Completions) -> dict[str, Metric]:
    """Return metrics of this process's completions and of their rewards, [P, G]."""
    is_known = ~rewards.isnan()
    highest, lowest = (x.where(is_known, -torch.inf).amax(-1) for x in (rewards, -rewards))
    return {
        "uniform_groups": Mean.of(highest <= -lowest),
        "completion_tokens": Mean.of(completions.is_new.sum(-1).cpu()),
        "truncated": Mean.of(~torch.tensor(completions.finished, dtype=torch.bool)),
    }
