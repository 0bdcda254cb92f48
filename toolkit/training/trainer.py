"""The trainer: supervised warm-up and RL as sequences of steps, and what a policy makes of held-out examples.

A run is the same on any number of processes: random draws depend on the seed, the phase, the step and the index of the
prompt or sample, never on the process (only dropout does). So a resumed run continues like an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.metrics import merge_metrics, to_floats
from toolkit.models.policy import Policy
from toolkit.tasks.base import Example, Task
from toolkit.training.config import SchedulerConfig
from toolkit.training.draws import Draws
from toolkit.training.evaluation import BATCH, Evaluation, evaluate, rewarded_greedily
from toolkit.training.experience import rows_from_answers
from toolkit.training.generation import Generator
from toolkit.training.kl_penalty import KLPenalty
from toolkit.training.layout import Shares, minibatches
from toolkit.training.packing_checks import check_budget
from toolkit.training.phase import Phase, learning_rate_schedule
from toolkit.training.reference import Reference, loaded_reference, reference_of, refresh_reference
from toolkit.training.rewarding import Rewarder
from toolkit.training.rollouts import Rollouts
from toolkit.training.run_config import RunConfig
from toolkit.training.sharding import prepare_policy
from toolkit.training.step import without_empty
from toolkit.training.token_log import TokenLog
from toolkit.training.updates import Updater

WARMUP_RISE = 10
"""Updates over which the warm-up's learning rate rises."""
PROBE_EVERY = 2
"""Warm-up steps between two measurements of the accuracy."""
PROBE_SIZE = 256
"""Prompts in such a measurement; a standard error of 0.03."""


class Trainer:
    """Holds the policy and turns batches into optimizer steps, on any number of processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, task: Task, policy: Policy, tokenizer: Any) -> None:
        self.config, self.accelerator, self.task, self.tokenizer = config, accelerator, task, tokenizer
        self.reference: Reference | None = None
        self.kl_penalty = KLPenalty(config.kl_control, config.loss)
        policy.fitted(config.loss)  # raises if the loss contradicts the model
        self.context = context_length(policy.lm)
        task.prepare(tokenizer, context=self.context, max_new_tokens=config.rollout.max_new_tokens)
        self.draws = Draws(config.seed)
        self.shares = Shares(accelerator.process_index, accelerator.num_processes)
        self.rewarder = Rewarder(config.task, task, config.seed)
        self.policy = prepare_policy(policy, accelerator, config.training.sharding)
        longest = config.rollout.max_new_tokens or task.longest_completion(self.context)
        check_budget(config, task, tokenizer, longest)
        environment = self.rewarder.environment
        self.generator = Generator(
            config.rollout, self.policy, tokenizer, self.draws, longest, environment=environment, context=self.context
        )
        self.updater = Updater(config, self.policy, accelerator, self.shares)
        self.rollouts = Rollouts(
            config, task, self.generator, self.rewarder, self.updater, self.kl_penalty, self.draws, self.shares
        )

    # ---------------------------------------------------------------- phases

    def warmup_phase(self) -> Phase:
        """Return the supervised phase: the toolkit's cross-entropy on demonstrations."""
        cfg = self.config.warmup
        shape = SchedulerConfig(shape="constant", warmup_updates=WARMUP_RISE)
        schedule = learning_rate_schedule(shape, cfg.lr, self.config.warmup_steps)
        loss_cfg, optimizer = CELossConfig(), self.updater.optimizer(cfg.lr)
        steps = self.config.warmup_steps
        return Phase("warmup", steps, lambda phase: self._supervised_step(phase, loss_cfg), optimizer, schedule)

    def main_phase(self) -> Phase:
        """Return the main phase: RL, or supervised learning with ``loss=ce``."""
        cfg, loss_cfg, lr = self.config.training, self.config.loss, self.config.optimizer.lr
        step_fn, num_updates = self._rl_step, cfg.steps * cfg.epochs * cfg.minibatches
        if isinstance(loss_cfg, CELossConfig):
            step_fn, num_updates = (lambda phase: self._supervised_step(phase, loss_cfg)), cfg.steps
        elif self.kl_penalty.needs_reference and self.reference is None:
            path = cfg.reference_path
            self.reference = (
                reference_of(self.policy) if path is None else loaded_reference(path, self.policy, self.tokenizer)
            )
        schedule = learning_rate_schedule(self.config.scheduler, lr, num_updates)
        return Phase("main", cfg.steps, step_fn, self.updater.optimizer(lr), schedule)

    def run_step(self, phase: Phase) -> dict[str, float]:
        """Run the next step of `phase` and return its metrics, merged over all processes."""
        step = phase.next_step
        torch.manual_seed(self.draws.rng(phase.name, step, self.shares.rank).getrandbits(63))
        start = time.perf_counter()
        metrics = phase.step_fn(phase)
        seconds = time.perf_counter() - start
        if "clip_fraction_low" in metrics and "clip_fraction_high" in metrics:
            metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        metrics |= {
            "lr": phase.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": metrics.get("active_tokens", 0.0) / seconds,
        }
        phase.next_step += 1
        return metrics

    # ---------------------------------------------------------------- steps

    def _supervised_step(self, phase: Phase, loss_cfg: BaseLossConfig) -> dict[str, float]:
        step = phase.next_step
        draw = self.draws.rng(phase.name, step, "data")
        examples = self.task.demonstrate_at(step, self.config.warmup.batch_size, draw)
        local_examples = examples[self.shares.of(len(examples))]
        rows = rows_from_answers(local_examples, self.tokenizer, self.accelerator.device)
        return to_floats(self.updater.step(phase, rows, loss_cfg, self.shares.largest(len(examples))))

    def _rl_step(self, phase: Phase) -> dict[str, float]:
        cfg, step = self.config, phase.next_step
        experience = self.rollouts.collect(step, self.reference)
        rows, measured = experience.rows, experience.metrics
        loss_cfg = self.kl_penalty.loss_config(without_empty(cfg.loss))
        unit = cfg.rollout.group_size if self.updater.needs_groups else 1
        samples = self.rollouts.samples
        token_log = TokenLog() if samples is not None and samples.keeps_tokens(step) else None
        for epoch in range(cfg.training.epochs):
            is_last = epoch == cfg.training.epochs - 1
            shuffle = self.draws.rng("main", step, "shuffle", *([epoch] if epoch else []))
            for cut in minibatches(experience.owners, self.shares.rank, cfg.training.minibatches, shuffle, unit=unit):
                batch = rows.select(cut.local_rows.to(rows.input_ids.device))
                log = token_log if is_last else None
                measured = merge_metrics([measured, self.updater.step(phase, batch, loss_cfg, cut.largest, log)])
        metrics = to_floats(measured)
        if samples is not None:
            samples.flush(token_log)
        every = cfg.training.refresh_reference_every
        if self.reference is not None and every is not None and (step + 1) % every == 0:
            refresh_reference(self.reference, self.policy, cfg.training.reference_mixup)
        return metrics | self.kl_penalty.observe(metrics, cfg.rollout.prompts_per_step * cfg.rollout.group_size)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside weights, optimizer and the position in the phase, as JSON values."""
        return {
            "num_skipped": self.updater.num_skipped,
            "num_overflows": self.updater.num_overflows,
            "num_nonfinite": self.updater.num_nonfinite,
            "nonfinite_in_a_row": self.updater.nonfinite_in_a_row,
            "kl_control": self.kl_penalty.state(),
            "rollouts": self.rollouts.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned, perhaps among other values."""
        self.updater.num_skipped = state["num_skipped"]
        self.updater.num_overflows = state["num_overflows"]
        self.updater.num_nonfinite = state["num_nonfinite"]
        self.updater.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.kl_penalty.restore(state["kl_control"])
        self.rollouts.restore(state["rollouts"])

    # ---------------------------------------------------------------- evaluation

    def is_warm(self, phase: Phase) -> bool:
        """Return whether the warm-up has reached its accuracy, measured every few steps on training prompts."""
        goal = self.config.warmup.stop_accuracy
        if phase.name != "warmup" or goal is None or phase.next_step % PROBE_EVERY or not self.rewarder.has_rewards:
            return False
        probe = self.task.draw(PROBE_SIZE, self.draws.rng("probe", phase.next_step))
        return self.accuracy(probe) >= goal

    def accuracy(self, examples: Sequence[Example], batch_size: int = BATCH) -> float:
        """Return the fraction of `examples` whose greedy completion is right (or the mean reward) on all ranks."""
        measured = rewarded_greedily(self, examples, batch_size)
        value = measured.reward if measured.accuracy is None else measured.accuracy
        return float("nan") if value is None else value

    def evaluate(self, step: int = 0) -> Evaluation:
        """Return what the policy makes of the held-out examples, after `step` steps of the main phase."""
        return evaluate(self, list(self.task.heldout)[: self.config.evaluation.max_prompts], step)


def context_length(lm: Any) -> int | None:
    """Return how many tokens a model reads at most; None if its config does not say."""
    config = lm.config.get_text_config() if hasattr(lm.config, "get_text_config") else lm.config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
