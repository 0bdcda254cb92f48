"""One optimizer step, and the two phases made of them: supervised warm-up and RL.

Every random choice of a step comes from (seed, phase, step, rank), so that a resumed run goes on as the uninterrupted
one would have.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from toolkit.config import RunConfig
from toolkit.distributed import all_gather_objects, all_reduce_sum, reduce_metrics
from toolkit.functional.rewards import RewardTerms
from toolkit.losses.calibration import loss_metric
from toolkit.losses.config import BaseLossConfig, BaseRLLossConfig, CELossConfig
from toolkit.losses.grpo_kwargs import scope_of
from toolkit.metrics import Max, Mean, Metric, Sum, merge_metrics, metrics_in, to_floats
from toolkit.models.policy import Policy
from toolkit.rollout.sampler import complete
from toolkit.tasks.base import Example, Task
from toolkit.training.config import SchedulerConfig
from toolkit.training.experience import (
    IGNORED,
    Rows,
    joined_terms,
    reward_terms,
    rows_from_answers,
    rows_from_completions,
)
from toolkit.training.kl_penalty import KLPenalty

WARMUP_RISE = 10
"""Updates over which the warm-up's learning rate rises."""
PROBE_EVERY = 2
"""Warm-up steps between two looks at the accuracy."""
PROBE_SIZE = 256
"""Prompts in such a look; a standard error of 0.03."""


@dataclass
class Phase:
    """A sequence of steps with its own optimizer and learning-rate schedule."""

    name: str
    num_steps: int
    step_fn: Callable[[Phase], dict[str, float]]
    optimizer: Any
    learning_rate: Callable[[int], float]
    """Of the update with this number, from 0."""
    next_step: int = 0
    num_updates: int = 0


class Trainer:
    """Holds the policy and turns batches into optimizer steps, on any number of processes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, task: Task, policy: Policy, tokenizer: Any) -> None:
        self.config = config
        self.accelerator = accelerator
        self.task = task
        self.tokenizer = tokenizer
        self.reference: Policy | None = None
        self.kl_penalty = KLPenalty(config.kl_control, config.loss)
        self.policy = accelerator.prepare_model(policy)
        self.num_skipped = 0

    @property
    def unwrapped(self) -> Policy:
        """The policy without DDP around it: for generation and saving, never for a loss."""
        return self.accelerator.unwrap_model(self.policy)

    # ---------------------------------------------------------------- phases

    def warmup_phase(self) -> Phase:
        """Return the supervised phase: the toolkit's cross-entropy on demonstrations."""
        cfg = self.config.warmup
        schedule = SchedulerConfig(shape="constant", warmup_updates=WARMUP_RISE)
        return Phase(
            "warmup",
            cfg.steps,
            lambda phase: self._supervised_step(phase, CELossConfig()),
            self._optimizer(cfg.lr),
            learning_rate_schedule(schedule, cfg.lr, cfg.steps),
        )

    def main_phase(self) -> Phase:
        """Return the main phase: RL, or supervised learning with ``loss=ce``."""
        cfg, loss_cfg, lr = self.config.training, self.config.loss, self.config.optimizer.lr
        if isinstance(loss_cfg, CELossConfig):
            schedule = learning_rate_schedule(self.config.scheduler, lr, cfg.steps)
            return Phase(
                "main",
                cfg.steps,
                lambda phase: self._supervised_step(phase, loss_cfg),
                self._optimizer(lr),
                schedule,
            )
        if self.kl_penalty.needs_reference and self.reference is None:
            self.reference = copy.deepcopy(self.unwrapped).eval().requires_grad_(False)
        schedule = learning_rate_schedule(self.config.scheduler, lr, cfg.steps * cfg.minibatches)
        return Phase("main", cfg.steps, self._rl_step, self._optimizer(lr), schedule)

    def _optimizer(self, lr: float) -> Any:
        cfg = self.config.optimizer
        return self.accelerator.prepare_optimizer(
            torch.optim.AdamW(self.policy.parameters(), lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
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

    def _rng(self, *place: object) -> Random:
        return Random(f"{self.config.seed}/{'/'.join(map(str, place))}")

    # ---------------------------------------------------------------- steps

    def _supervised_step(self, phase: Phase, loss_cfg: BaseLossConfig) -> dict[str, float]:
        draw = self._rng(phase.name, phase.next_step, "data")
        examples = self.task.demonstrate(self.config.warmup.batch_size, draw)
        rows = rows_from_answers(self._own_share(examples), self.tokenizer, self.accelerator.device)
        return to_floats(self._optimizer_step(phase, rows, loss_cfg))

    def _rl_step(self, phase: Phase) -> dict[str, float]:
        cfg, step = self.config, phase.next_step
        prompts = self.task.draw(cfg.rollout.prompts_per_step, self._rng("main", step, "data"))
        rows, measured = self._experience(self._own_share(prompts), self._rng("main", step, "reward", self._rank))
        needs_old = cfg.training.minibatches > 1 or bool(getattr(cfg.loss, "correction", ()))
        if needs_old and rows.old_logprobs is None:
            rows = replace(rows, old_logprobs=self._score(self.unwrapped, rows))
        if self.reference is not None and rows.ref_logprobs is None:
            rows = replace(rows, ref_logprobs=self._score(self.reference, rows))
        loss_cfg = self.kl_penalty.loss_config(_without_empty(cfg.loss))
        for index in self._shuffled(len(rows)).tensor_split(cfg.training.minibatches):
            own = index.flatten().to(rows.input_ids.device)
            stepped = self._optimizer_step(phase, rows.select(own) if len(own) else rows.silenced(), loss_cfg)
            measured = merge_metrics([measured, stepped])
        metrics = to_floats(measured)
        return metrics | self.kl_penalty.observe(metrics, cfg.rollout.prompts_per_step * cfg.rollout.group_size)

    def _shuffled(self, number: int) -> Tensor:
        """Return the rows of a rollout in random order: [n, 1], or [P, G] where a loss needs whole groups."""
        size = self.config.rollout.group_size if self._needs_groups and number > 1 else 1
        groups = torch.randperm(number // size)
        return groups.unsqueeze(-1) * size + torch.arange(size)

    @property
    def _needs_groups(self) -> bool:
        loss_cfg = self.config.loss
        return isinstance(loss_cfg, BaseRLLossConfig) and scope_of(loss_cfg) == "group"

    def _experience(self, examples: list[Example], rng: Random) -> tuple[Rows, dict[str, Metric]]:
        """Sample completions of this process's prompts, reward them and compare them within their groups."""
        cfg = self.config.rollout
        completions = complete(
            self.unwrapped.lm,
            self.tokenizer,
            [example.prompt for example in examples],
            max_new_tokens=self.max_new_tokens,
            group_size=cfg.group_size,
            temperature=cfg.temperature,
        )
        rewards = torch.tensor(
            [
                self.task.reward(examples[row // cfg.group_size], text, finished=ended)
                if self.config.task.reward == "verifier"
                else float(rng.random() < 0.5)
                for row, (text, ended) in enumerate(zip(completions.texts, completions.finished, strict=True))
            ]
        ).view(-1, cfg.group_size)
        # Prompts are dealt out in turn, so these numbers are those of the prompts over all processes.
        prompts = self._rank + self.accelerator.num_processes * torch.arange(len(examples))
        groups = prompts.repeat_interleave(cfg.group_size)
        rows = rows_from_completions(completions, torch.zeros(len(groups)), groups, temperature=cfg.temperature)
        measured: dict[str, Metric] = {"reward": Mean.of(rewards)}
        if self.config.kl_control.reward_type is not None:
            assert self.reference is not None
            old, ref = self._score(self.unwrapped, rows), self._score(self.reference, rows)
            rows = replace(rows, old_logprobs=old, ref_logprobs=ref)
            rewards, of_kl = self.kl_penalty.off_rewards(rewards, old, ref, rows.shifted_labels != IGNORED)
            measured |= of_kl
        advantages = self._advantages(reward_terms(rewards, completions))
        per_token = (advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)).to(rows.input_ids.device)
        rows = replace(rows, advantages=per_token.expand(rows.shifted_labels.shape))
        is_uniform = (rewards == rewards[:, :1]).all(-1)
        metrics = reduce_metrics(
            {
                **measured,
                "uniform_groups": Mean.of(is_uniform),
                "completion_tokens": Mean.of(completions.is_new.sum(-1).cpu()),
            }
        )
        if cfg.skip_uniform_groups:
            teaches = (advantages.view(*rewards.shape, -1) != 0).any(-1).any(-1)
            kept = teaches.repeat_interleave(cfg.group_size).nonzero().squeeze(-1).to(rows.input_ids.device)
            rows = rows.select(kept) if len(kept) else rows.silenced()
        return rows, metrics

    def _advantages(self, own: RewardTerms) -> Tensor:
        """Return the advantages of this process's completions, [R] or [R, T - 1]; the batch is that of all of them."""
        parts = all_gather_objects(own)
        start = sum(len(part.rewards) for part in parts[: self._rank])
        found = self.config.advantage.compute(joined_terms(parts))[start : start + len(own.rewards)]
        return found if found.dim() == 1 else found[:, : own.given("mask").shape[1]]

    @torch.no_grad()
    def _score(self, policy: Policy, rows: Rows) -> Tensor:
        """Return the log-probabilities of the rows; unwrapped, for ranks may have different numbers of pieces."""
        policy.eval()
        temperature = self.config.loss.temperature
        pieces = rows.split(self.config.training.micro_batch_size)
        return torch.cat([policy(p.input_ids, p.attention_mask, temperature=temperature) for p in pieces])

    def _optimizer_step(self, phase: Phase, rows: Rows, loss_cfg: BaseLossConfig) -> dict[str, Metric]:
        """Take one calibrated step on `rows`, however many forwards that takes; return its reduced metrics."""
        accelerator = self.accelerator
        for group in phase.optimizer.param_groups:
            group["lr"] = phase.learning_rate(phase.num_updates)
        phase.num_updates += 1
        size = self.config.training.micro_batch_size
        if self._needs_groups:  # RunConfig has made sure that a micro-batch holds a group
            size -= size % self.config.rollout.group_size
        micro_batches = self._same_number_everywhere(rows.split(size))
        items = [rows.item(loss_cfg.ignore_idx) for rows in micro_batches]
        context = loss_cfg.loss_ctx_cls
        batches_kwargs = context.build_batches_loss_kwargs(items, loss_cfg)
        parts = []
        self.policy.train()
        for index, (batch, kwargs) in enumerate(zip(micro_batches, batches_kwargs, strict=True)):
            is_last = index == len(micro_batches) - 1
            # DDP exchanges gradients once, in the last backward; until then they add up locally.
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.policy):
                loss, metrics = self.policy(batch.input_ids, batch.attention_mask, context(loss_cfg, kwargs))
                accelerator.backward(loss)
            parts.append({**metrics_in(metrics), "loss": loss_metric(loss, loss_cfg.gradient_reduction)})
        step_metrics = _per_update(reduce_metrics(merge_metrics(parts)))
        tokens = sum(context(loss_cfg, kwargs).num_learning() for kwargs in batches_kwargs)
        if float(all_reduce_sum(torch.as_tensor(tokens, dtype=torch.float64, device=accelerator.device))) == 0:
            self.num_skipped += 1  # nothing to learn from anywhere: Adam's momentum must not move the weights
            phase.optimizer.zero_grad()
            return step_metrics
        grad_norm = accelerator.clip_grad_norm_(self.policy.parameters(), self.config.optimizer.max_grad_norm)
        phase.optimizer.step()
        phase.optimizer.zero_grad()
        return {**step_metrics, "grad_norm": Mean.of(grad_norm.reshape(1)), "grad_norm_max": Max.of(grad_norm)}

    def _same_number_everywhere(self, micro_batches: list[Rows]) -> list[Rows]:
        """Add silent micro-batches until every process has as many: each forward is a collective under DDP."""
        most = reduce_metrics({"count": Max.of(torch.tensor([float(len(micro_batches))]))})["count"].value()
        return micro_batches + [micro_batches[0].silenced()] * (int(most) - len(micro_batches))

    # ---------------------------------------------------------------- evaluation

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest completion, the end of the text included."""
        return self.config.rollout.max_new_tokens or self.task.longest_answer + 1

    def is_warm(self, phase: Phase) -> bool:
        """Return whether the warm-up has reached its accuracy, measured now and then on training prompts."""
        goal = self.config.warmup.stop_accuracy
        if phase.name != "warmup" or goal is None or phase.next_step % PROBE_EVERY:
            return False
        probe = self.task.draw(PROBE_SIZE, self._rng("probe", phase.next_step))
        return self.accuracy(probe) >= goal

    def accuracy(self, examples: Sequence[Example], batch_size: int = 512) -> float:
        """Return the fraction of `examples` whose greedy completion is right, over all processes."""
        own = self._own_share(list(examples))
        right = []
        for start in range(0, len(own), batch_size):
            examples = own[start : start + batch_size]
            found = complete(
                self.unwrapped.lm, self.tokenizer, [e.prompt for e in examples], max_new_tokens=self.max_new_tokens
            )
            right += [
                self.task.reward(example, text, finished=ended) >= 1.0
                for example, text, ended in zip(examples, found.texts, found.finished, strict=True)
            ]
        return reduce_metrics({"accuracy": Mean.of(torch.tensor(right))})["accuracy"].value()

    def evaluate(self) -> tuple[float, list[str]]:
        """Return the accuracy on the held-out examples, and the greedy completions of the first three."""
        prompts = [example.prompt for example in self.task.heldout[:3]]
        shown = complete(self.unwrapped.lm, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens)
        return self.accuracy(self.task.heldout), shown.texts

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index

    def _own_share(self, examples: list[Example]) -> list[Example]:
        # A process without work still takes part: with fewer examples than processes, some are seen twice.
        return examples[self._rank :: self.accelerator.num_processes] or examples[:1]


def _without_empty(loss_cfg: BaseLossConfig) -> BaseLossConfig:
    """Do not count empty sequences: every completion has a token, only the rows of a rank without work have none."""
    if "aggregation" not in type(loss_cfg).model_fields:
        return loss_cfg
    aggregation = loss_cfg.aggregation.model_copy(update={"count_empty": False})  # type: ignore[attr-defined]
    return loss_cfg.model_copy(update={"aggregation": aggregation})


def _per_update(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Turn the summed losses of one update into means of one, to be averaged over the updates of a step."""
    return {
        name: Mean(metric.total, torch.ones_like(metric.total))
        if isinstance(metric, Sum) and name.endswith("loss")
        else metric
        for name, metric in metrics.items()
    }


def learning_rate_schedule(config: SchedulerConfig, peak: float, num_updates: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the update, from 0 to num_updates - 1."""

    def learning_rate(update: int) -> float:
        rise = min(1.0, (update + 1) / max(config.warmup_updates, 1))
        done = min(update / max(num_updates, 1), 1.0)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.shape]
        floor = 1.0 if config.shape == "constant" else config.final_ratio
        return peak * rise * (floor + (1 - floor) * left)

    return learning_rate
