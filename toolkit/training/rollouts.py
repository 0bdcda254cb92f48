"""Rollouts of the RL phase: prompts are drawn, completed and rewarded, and the rewards become advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.distributed import all_gather_objects, reduce_metrics
from toolkit.metrics import Mean, Metric
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example, Task
from toolkit.training.draws import Draws
from toolkit.training.experience import IGNORED, Rows, joined_terms, reward_terms, rows_from_completions
from toolkit.training.generation import Generator
from toolkit.training.kl_penalty import KLPenalty
from toolkit.training.layout import Shares
from toolkit.training.reference import Reference
from toolkit.training.rewarding import Rewarded, Rewarder
from toolkit.training.run_config import RunConfig
from toolkit.training.updates import Updater


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    rows: Rows
    """Of this process, perhaps none."""
    rows_of: list[int]
    """How many rows each process has."""
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

    def collect(self, step: int, reference: Reference | None) -> Experience:
        """Return rewarded completions of the prompts of a step, with the log-probabilities that its updates need."""
        cfg = self.config
        prompts = self.task.draw_at(step, cfg.rollout.prompts_per_step, self.draws.rng("main", step, "data"))
        experience = self.of_prompts(prompts, step, reference)
        rows, most = experience.rows, max(experience.rows_of)
        needs_old = cfg.training.minibatches > 1 or bool(getattr(cfg.loss, "correction", ()))
        if needs_old and rows.old_logprobs is None:
            rows = replace(rows, old_logprobs=self.updater.score(rows, most))
        if reference is not None and rows.ref_logprobs is None:
            rows = replace(rows, ref_logprobs=self.updater.score(rows, most, reference))
        return replace(experience, rows=rows)

    def of_prompts(self, prompts: list[Example], step: int, reference: Reference | None) -> Experience:
        """Return rewarded completions of this process's share of the prompts."""
        cfg, size = self.config.rollout, self.config.rollout.group_size
        share = self.shares.of(len(prompts))
        completions = self.generator.sample(
            prompts[share] or prompts[:1], range(share.start, share.stop), step, group_size=size
        )
        examples = [prompt for prompt in prompts[share] for _ in range(size)]
        seeds = [self.draws.key("main", step, "reward", share.start * size + row) for row in range(len(examples))]
        rewarded = self.rewarder(examples, completions, seeds)
        rewards = rewarded.totals.view(-1, size)
        groups = torch.arange(share.start, share.stop).repeat_interleave(size)
        rows = rows_from_completions(completions, groups, temperature=cfg.temperature)
        measured = rewarded.metrics
        if self.config.kl_control.reward_type is not None:
            assert reference is not None
            most = self.shares.largest(len(prompts)) * size
            old, ref = self.updater.score(rows, most), self.updater.score(rows, most, reference)
            rows = replace(rows, old_logprobs=old, ref_logprobs=ref)
            rewards, kl_metrics = self.kl_penalty.off_rewards(rewards, old, ref, rows.shifted_labels != IGNORED)
            measured |= kl_metrics
            rewarded = replace(rewarded, parts=None)  # they do not add up to the reward less the KL
        advantages = self.advantages(rewards, completions, rewarded)
        local_advantages = advantages[share.start * size : share.stop * size, : rows.shifted_labels.shape[1]]
        rows = replace(rows, advantages=local_advantages.to(rows.input_ids.device).expand(rows.shifted_labels.shape))
        is_known = ~rewards.isnan()
        highest, lowest = (x.where(is_known, -torch.inf).amax(-1) for x in (rewards, -rewards))
        metrics = reduce_metrics(
            {
                **measured,
                "uniform_groups": Mean.of(highest <= -lowest),
                "completion_tokens": Mean.of(completions.is_new.sum(-1).cpu()),
            }
        )
        self.rewarder.check_failures(metrics, rewarded.scores)
        teaches = (advantages != 0).any(-1).view(-1, size).any(-1) | (not cfg.skip_uniform_groups)
        kept = teaches[share].repeat_interleave(size).nonzero().squeeze(-1)
        shares = (self.shares.of(len(prompts), rank) for rank in range(self.shares.world))
        rows_of = [size * int(teaches[each].sum()) for each in shares]
        return Experience(rows.select(kept.to(rows.input_ids.device)), rows_of, metrics)

    def advantages(self, rewards: Tensor, completions: Completions, rewarded: Rewarded) -> Tensor:
        """Return the advantages of the completions of all processes, [R, 1] or [R, T - 1], in the order of prompts."""
        parts = all_gather_objects(reward_terms(rewards, completions, rewarded.parts, rewarded.weights))
        advantages = self.config.advantage.compute(joined_terms(parts))
        return advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)
