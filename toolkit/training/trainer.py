"""One optimizer step, and the two phases made of them: supervised warm-up and RL.

A run is the same on any number of processes: random draws depend on the seed, the phase, the step and the index of the
prompt or sample, never on the process (only dropout does). So a resumed run continues like an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from toolkit.distributed import all_gather_objects, reduce_metrics
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.step.weights import loss_metric
from toolkit.metrics import Max, Mean, Metric, Sum, merge_metrics, metrics_in, to_floats
from toolkit.models.policy import Policy
from toolkit.rollout.sampler import Completions, complete, row_uniforms
from toolkit.tasks.base import Example, Task
from toolkit.training.config import SchedulerConfig
from toolkit.training.evaluation import BATCH, NUM_SHOWN, Evaluation, evaluate, rewarded_greedily
from toolkit.training.experience import (
    IGNORED,
    Rows,
    joined_terms,
    reward_terms,
    rows_from_answers,
    rows_from_completions,
)
from toolkit.training.kl_penalty import KLPenalty
from toolkit.training.layout import minibatches, share_of
from toolkit.training.phase import Phase, learning_rate_schedule
from toolkit.training.reference import Reference, reference_of
from toolkit.training.rewarding import Rewarded, Rewarder
from toolkit.training.run_config import RunConfig
from toolkit.training.sharding import (
    accumulating,
    clip_grad_norm,
    is_sharded,
    local_parameters,
    prepare_policy,
    unwrapped,
)
from toolkit.training.step import on_host, per_update, router_weights, without_empty

WARMUP_RISE = 10
"""Updates over which the warm-up's learning rate rises."""
PROBE_EVERY = 2
"""Warm-up steps between two measurements of the accuracy."""
PROBE_SIZE = 256
"""Prompts in such a measurement; a standard error of 0.03."""
NUM_LEARNING = "num_learning"
"""Name of the number of tokens to learn from, reduced with the metrics of a step."""


class Trainer:
    """Holds the policy and turns batches into optimizer steps, on any number of processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, task: Task, policy: Policy, tokenizer: Any) -> None:
        self.config = config
        self.accelerator = accelerator
        self.task = task
        self.tokenizer = tokenizer
        self.reference: Reference | None = None
        self.kl_penalty = KLPenalty(config.kl_control, config.loss)
        policy.fitted(config.loss)  # raises if the loss contradicts the model
        self.context = context_length(policy.lm)
        task.prepare(tokenizer, context=self.context, max_new_tokens=config.rollout.max_new_tokens)
        self.rewarder = Rewarder(config.task, task, config.seed)
        self.policy = prepare_policy(policy, accelerator, config.training.sharding)
        self.num_skipped = 0
        self.num_overflows = 0

    # ---------------------------------------------------------------- phases

    def warmup_phase(self) -> Phase:
        """Return the supervised phase: the toolkit's cross-entropy on demonstrations."""
        cfg = self.config.warmup
        shape = SchedulerConfig(shape="constant", warmup_updates=WARMUP_RISE)
        schedule = learning_rate_schedule(shape, cfg.lr, self.config.warmup_steps)
        loss_cfg, optimizer = CELossConfig(), self._optimizer(cfg.lr)
        steps = self.config.warmup_steps
        return Phase("warmup", steps, lambda phase: self._supervised_step(phase, loss_cfg), optimizer, schedule)

    def main_phase(self) -> Phase:
        """Return the main phase: RL, or supervised learning with ``loss=ce``."""
        cfg, loss_cfg, lr = self.config.training, self.config.loss, self.config.optimizer.lr
        step_fn, num_updates = self._rl_step, cfg.steps * cfg.minibatches
        if isinstance(loss_cfg, CELossConfig):
            step_fn, num_updates = (lambda phase: self._supervised_step(phase, loss_cfg)), cfg.steps
        elif self.kl_penalty.needs_reference and self.reference is None:
            self.reference = reference_of(self.policy)
        schedule = learning_rate_schedule(self.config.scheduler, lr, num_updates)
        return Phase("main", cfg.steps, step_fn, self._optimizer(lr), schedule)

    def _optimizer(self, lr: float) -> Any:
        cfg = self.config.optimizer
        # The phases share parameters, and clip_grad_norm_ removes the loss scale for each optimizer that it knows.
        self.accelerator._optimizers.clear()
        trained = [parameter for parameter in local_parameters(self.policy) if parameter.requires_grad]
        return self.accelerator.prepare_optimizer(
            torch.optim.AdamW(trained, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
        )

    def run_step(self, phase: Phase) -> dict[str, float]:
        """Run the next step of `phase` and return its metrics, merged over all processes."""
        step = phase.next_step
        torch.manual_seed(self._rng(phase.name, step, self.accelerator.process_index).getrandbits(63))
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

    def _seed(self, *parts: object) -> str:
        return "/".join(map(str, (self.config.seed, *parts)))

    def _rng(self, *parts: object) -> Random:
        return Random(self._seed(*parts))

    # ---------------------------------------------------------------- steps

    def _supervised_step(self, phase: Phase, loss_cfg: BaseLossConfig) -> dict[str, float]:
        step = phase.next_step
        draw = self._rng(phase.name, step, "data")
        examples = self.task.demonstrate_at(step, self.config.warmup.batch_size, draw)
        rows = rows_from_answers(examples[self._share(len(examples))], self.tokenizer, self.accelerator.device)
        return to_floats(self._optimizer_step(phase, rows, loss_cfg, self._largest(len(examples))))

    def _rl_step(self, phase: Phase) -> dict[str, float]:
        cfg, step = self.config, phase.next_step
        prompts = self.task.draw_at(step, cfg.rollout.prompts_per_step, self._rng("main", step, "data"))
        rows, rows_of, measured = self._experience(prompts, step)
        needs_old = cfg.training.minibatches > 1 or bool(getattr(cfg.loss, "correction", ()))
        if needs_old and rows.old_logprobs is None:
            rows = replace(rows, old_logprobs=self._score(unwrapped(self.policy), rows, max(rows_of)))
        if self.reference is not None and rows.ref_logprobs is None:
            rows = replace(rows, ref_logprobs=self._score(self.reference, rows, max(rows_of)))
        loss_cfg = self.kl_penalty.loss_config(without_empty(cfg.loss))
        unit = cfg.rollout.group_size if self._needs_groups else 1
        shuffle = self._rng("main", step, "shuffle")
        rank = self.accelerator.process_index
        for cut in minibatches(rows_of, rank, cfg.training.minibatches, shuffle, unit=unit):
            batch = rows.select(cut.local_rows.to(rows.input_ids.device))
            measured = merge_metrics([measured, self._optimizer_step(phase, batch, loss_cfg, cut.largest)])
        metrics = to_floats(measured)
        return metrics | self.kl_penalty.observe(metrics, cfg.rollout.prompts_per_step * cfg.rollout.group_size)

    @property
    def _needs_groups(self) -> bool:
        loss_cfg = self.config.loss
        return isinstance(loss_cfg, BaseRLLossConfig) and loss_cfg.scope == "group"

    def _experience(self, prompts: list[Example], step: int) -> tuple[Rows, list[int], dict[str, Metric]]:
        """Return rewarded completions of this process's prompts, how many rows each process has, and metrics of all."""
        cfg, size = self.config.rollout, self.config.rollout.group_size
        share = self._share(len(prompts))
        completions = self._sample(prompts, share, step)
        examples = [prompt for prompt in prompts[share] for _ in range(size)]
        seeds = [self._seed("main", step, "reward", share.start * size + row) for row in range(len(examples))]
        rewarded = self.rewarder(examples, completions, seeds)
        rewards = rewarded.totals.view(-1, size)
        groups = torch.arange(share.start, share.stop).repeat_interleave(size)
        rows = rows_from_completions(completions, groups, temperature=cfg.temperature)
        measured = rewarded.metrics
        if self.config.kl_control.reward_type is not None:
            assert self.reference is not None
            most = self._largest(len(prompts)) * size
            old, ref = self._score(unwrapped(self.policy), rows, most), self._score(self.reference, rows, most)
            rows = replace(rows, old_logprobs=old, ref_logprobs=ref)
            rewards, kl_metrics = self.kl_penalty.off_rewards(rewards, old, ref, rows.shifted_labels != IGNORED)
            measured |= kl_metrics
            rewarded = replace(rewarded, parts=None)  # they do not add up to the reward less the KL
        advantages = self._advantages(rewards, completions, rewarded)
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
        rows_of = [size * int(teaches[self._share(len(prompts), rank)].sum()) for rank in range(self._world)]
        return rows.select(kept.to(rows.input_ids.device)), rows_of, metrics

    def _sample(self, prompts: list[Example], share: slice, step: int) -> Completions:
        """Sample the completions of this process's prompts, each token from (seed, step, prompt, sample, position)."""
        cfg = self.config.rollout
        local_prompts = prompts[share]
        samples = [(prompt, sample) for prompt in range(share.start, share.stop) for sample in range(cfg.group_size)]
        seeds = [self._seed("main", step, "sample", *indices) for indices in samples]
        completions = self._complete(
            [example.prompt for example in local_prompts or prompts[:1]],  # all must sample, even without prompts
            group_size=cfg.group_size,
            temperature=cfg.temperature,
            uniforms=row_uniforms(seeds or [""] * cfg.group_size, self.max_new_tokens),
        )
        return completions.first(len(samples))

    def _complete(self, prompts: list[str], **options: Any) -> Completions:
        options |= {"max_new_tokens": self.max_new_tokens, "synced_gpus": is_sharded(self.policy)}
        return unwrapped(self.policy).inside(complete, self.tokenizer, prompts, **options)

    def _advantages(self, rewards: Tensor, completions: Completions, rewarded: Rewarded) -> Tensor:
        """Return the advantages of the completions of all processes, [R, 1] or [R, T - 1], in the order of prompts."""
        parts = all_gather_objects(reward_terms(rewards, completions, rewarded.parts, rewarded.weights))
        advantages = self.config.advantage.compute(joined_terms(parts))
        return advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)

    @torch.no_grad()
    def _score(self, policy: Reference, rows: Rows, most: int) -> Tensor:
        """Return the log-probabilities of the rows, [R, T - 1]; `most`: rows of the process that has most of them."""
        policy.eval()
        temperature, size = self.config.loss.temperature, self.config.training.micro_batch_size
        pieces = rows.split(size, max(1, -(-most // size)))
        return torch.cat([policy(p.input_ids, p.attention_mask, temperature=temperature) for p in pieces])[: len(rows)]

    def _optimizer_step(self, phase: Phase, rows: Rows, loss_cfg: BaseLossConfig, most: int) -> dict[str, Metric]:
        """Take one calibrated step on this process's rows, perhaps none; return its reduced metrics, on the host."""
        accelerator, loss_cfg = self.accelerator, unwrapped(self.policy).fitted(loss_cfg)
        for group in phase.optimizer.param_groups:
            group["lr"] = phase.learning_rate(phase.num_updates)
        phase.num_updates += 1
        size = self.config.training.micro_batch_size
        if self._needs_groups:  # RunConfig has made sure that a micro-batch holds a group
            size -= size % self.config.rollout.group_size
        number = max(1, -(-most // size))
        if loss_cfg.needs_current(number * self._world):
            rows = replace(rows, current_logprobs=self._score(unwrapped(self.policy), rows, most))
        micro_batches = rows.split(size, number)
        context, items = loss_cfg.loss_ctx_cls, [r.item(loss_cfg.ignore_idx) for r in micro_batches]
        batches_kwargs = context.build_batches_loss_kwargs(items, loss_cfg)
        contexts = [context(loss_cfg, kwargs) for kwargs in batches_kwargs]
        routers = router_weights(unwrapped(self.policy), micro_batches, loss_cfg.gradient_reduction)
        parts: list[dict[str, Metric]] = []
        self.policy.train()
        for index, (batch, loss_ctx, router) in enumerate(zip(micro_batches, contexts, routers, strict=True)):
            # Gradients are exchanged once, in the last backward; until then they add up locally.
            with accumulating(self.policy, is_last=index == number - 1):
                loss, metrics = self.policy(batch.input_ids, batch.attention_mask, loss_ctx, auxiliary_weight=router)
                accelerator.backward(loss)
            summed = loss_metric(loss, loss_cfg.gradient_reduction)
            parts.append({**metrics_in(metrics), "loss": summed, NUM_LEARNING: Sum(loss_ctx.num_learning())})
        grad_norm = clip_grad_norm(self.policy, self.config.optimizer.max_grad_norm, accelerator)
        norms = {"grad_norm": Mean.of(grad_norm), "grad_norm_max": Max.of(grad_norm)}
        # One wait for the device, after the last backward: what the host needs to step, and all that is reported.
        reduced = on_host(per_update(reduce_metrics({**merge_metrics(parts), **norms})))
        if reduced.pop(NUM_LEARNING).value() == 0:
            self.num_skipped += 1  # no rank has a token to learn from: Adam's momentum must not move the weights
            reduced = {name: metric for name, metric in reduced.items() if name not in norms}
            if accelerator.scaler is not None:
                accelerator.scaler.update(accelerator.scaler.get_scale())  # it expects a step after unscaling
        else:
            phase.optimizer.step()
            if phase.optimizer.step_was_skipped:  # the loss scale was too large: the gradient is not finite
                self.num_overflows += 1
                reduced = {name: metric for name, metric in reduced.items() if name not in norms}
        phase.optimizer.zero_grad()
        return reduced

    # ---------------------------------------------------------------- evaluation

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest completion, the end of the text included."""
        return self.config.rollout.max_new_tokens or self.task.longest_completion(self.context)

    def is_warm(self, phase: Phase) -> bool:
        """Return whether the warm-up has reached its accuracy, measured every few steps on training prompts."""
        goal = self.config.warmup.stop_accuracy
        if phase.name != "warmup" or goal is None or phase.next_step % PROBE_EVERY or not self.rewarder.has_rewards:
            return False
        probe = self.task.draw(PROBE_SIZE, self._rng("probe", phase.next_step))
        return self.accuracy(probe) >= goal

    def accuracy(self, examples: Sequence[Example], batch_size: int = BATCH) -> float:
        """Return the fraction of `examples` whose greedy completion is right (or the mean reward) on all ranks."""
        measured = rewarded_greedily(self, examples, batch_size)
        value = measured.reward if measured.accuracy is None else measured.accuracy
        return float("nan") if value is None else value

    def evaluate(self) -> Evaluation:
        """Return what the policy makes of the held-out examples, and the completions of the first three."""
        examples = list(self.task.heldout)
        shown = self._complete([example.prompt for example in examples[:NUM_SHOWN]]).texts if examples else ()
        return evaluate(self, examples)._replace(completions=shown)

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes

    def _share(self, number: int, rank: int | None = None) -> slice:
        return share_of(number, self.accelerator.process_index if rank is None else rank, self._world)

    def _largest(self, number: int) -> int:
        return -(-number // self._world)


def context_length(lm: Any) -> int | None:
    """Return how many tokens a model reads at most; None if its config does not say."""
    config = lm.config.get_text_config() if hasattr(lm.config, "get_text_config") else lm.config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
