"""Optimizer steps: rows in, one calibrated update of the policy out, on any number of processes.

Legend: R rows, T tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from toolkit.distributed import reduce_metrics
from toolkit.errors import ToolkitError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.step.weights import loss_metric
from toolkit.metrics import Max, Mean, Metric, Sum, merge_metrics, metrics_in
from toolkit.training.experience import Rows
from toolkit.training.layout import Shares
from toolkit.training.packing import PackedPlan, PaddedPlan, Plan
from toolkit.training.packing_checks import check_model, compare_with_single
from toolkit.training.phase import Phase
from toolkit.training.reference import Reference
from toolkit.training.run_config import RunConfig
from toolkit.training.sharding import accumulating, clip_grad_norm, local_parameters, unwrapped
from toolkit.training.step import on_host, per_update, router_weights
from toolkit.training.token_log import TokenLog

NONFINITE = "nonfinite_updates"
"""Name of the number of updates of a step that were skipped because the gradient was NaN or infinite."""
NUM_LEARNING = "num_learning"
"""Name of the number of tokens to learn from, reduced with the metrics of a step."""


class Updater:
    """Makes optimizers for the policy and takes their steps."""

    def __init__(self, config: RunConfig, policy: Any, accelerator: Accelerator, shares: Shares) -> None:
        """Take a policy from `prepare_policy`."""
        self.config, self.policy, self.accelerator, self.shares = config, policy, accelerator, shares
        self.num_skipped = 0
        """Updates with nothing to learn from."""
        self.num_overflows = 0
        """Updates that the loss scale of fp16 made too large."""
        self.is_packing_checked = False
        """Whether a packed row has been compared with its sequences one by one."""
        check_model(unwrapped(policy), config.training.micro_batch_tokens)
        self.num_nonfinite = self.nonfinite_in_a_row = 0
        """Updates with a gradient that is NaN or infinite: all, and since the last one that was not."""

    @property
    def needs_groups(self) -> bool:
        """Whether the loss compares the completions of a prompt, which must then stay together."""
        loss_cfg = self.config.loss
        return isinstance(loss_cfg, BaseRLLossConfig) and loss_cfg.scope == "group"

    def optimizer(self, lr: float) -> Any:
        """Return a fresh optimizer of what is trained."""
        cfg = self.config.optimizer
        # The phases share parameters, and clip_grad_norm_ removes the loss scale for each optimizer that it knows.
        self.accelerator._optimizers.clear()
        trained = [parameter for parameter in local_parameters(self.policy) if parameter.requires_grad]
        return self.accelerator.prepare_optimizer(
            torch.optim.AdamW(trained, lr=lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
        )

    @torch.no_grad()
    def score(self, rows: Rows, most: int, policy: Reference | None = None) -> Tensor:
        """Return the log-probabilities of the rows, [R, T - 1], by the policy as it is now or by another one.

        Args:
            rows: of this process, perhaps none.
            most: rows of the process that has most of them.
            policy: the reference; None: the policy that is trained.
        """
        scorer = unwrapped(self.policy) if policy is None else policy
        scorer.eval()
        plan, temperature = self._plan(rows, most), self.config.loss.temperature
        return plan.put_back([batch.forward(scorer, temperature=temperature) for batch in plan.cut(rows)], rows)

    def _plan(self, rows: Rows, most: int, unit: int = 1) -> Plan:
        """Return how these rows are cut into micro-batches, as many on every process; all call it together.

        Args:
            rows: of this process.
            most: rows of the process that has most of them.
            unit: rows that stay in one micro-batch of padded rows; packed ones need not, see `needs_current`.
        """
        size, budget = self.config.training.micro_batch_size, self.config.training.micro_batch_tokens
        if budget is None:
            size -= size % unit  # RunConfig has made sure that a micro-batch holds a group
            return PaddedPlan(size, max(1, -(-most // size)))
        plan = PackedPlan.agreed(rows, budget)
        if plan.most_together > 1 and not self.is_packing_checked:
            precision, temperature = self.accelerator.mixed_precision, self.config.loss.temperature
            policy = unwrapped(self.policy)
            compare_with_single(policy, rows, plan, budget=budget, precision=precision, temperature=temperature)
            self.is_packing_checked = True
        return plan

    def step(
        self, phase: Phase, rows: Rows, loss_cfg: BaseLossConfig, most: int, token_log: TokenLog | None = None
    ) -> dict[str, Metric]:
        """Take one calibrated step and return its reduced metrics, on the host.

        Args:
            phase: with the optimizer.
            rows: of this process, perhaps none.
            loss_cfg: of the loss.
            most: rows of the process that has most of them.
            token_log: takes what the loss makes of each token; on all processes or on none.
        """
        accelerator, loss_cfg = self.accelerator, unwrapped(self.policy).fitted(loss_cfg)
        for group in phase.optimizer.param_groups:
            group["lr"] = phase.learning_rate(phase.num_updates)
        phase.num_updates += 1
        plan = self._plan(rows, most, unit=self.config.rollout.group_size if self.needs_groups else 1)
        if loss_cfg.needs_current(plan.number * self.shares.world):
            rows = replace(rows, current_logprobs=self.score(rows, most))
        micro_batches = plan.cut(rows)
        context, items = loss_cfg.loss_ctx_cls, [b.rows.item(loss_cfg.ignore_idx) for b in micro_batches]
        boundaries = [b.cu_seq_lens for b in micro_batches] if isinstance(plan, PackedPlan) else None
        batches_kwargs = context.build_batches_loss_kwargs(items, loss_cfg, boundaries)
        contexts = [context(loss_cfg, kwargs) for kwargs in batches_kwargs]
        routers = router_weights(unwrapped(self.policy), [b.rows for b in micro_batches], loss_cfg.gradient_reduction)
        if token_log is not None:
            token_log.add(unwrapped(self.policy), plan, rows, micro_batches, contexts)
        parts: list[dict[str, Metric]] = []
        self.policy.train()
        for index, (batch, loss_ctx, router) in enumerate(zip(micro_batches, contexts, routers, strict=True)):
            # Gradients are exchanged once, in the last backward; until then they add up locally.
            with accumulating(self.policy, is_last=index == plan.number - 1):
                loss, metrics = batch.forward(self.policy, loss_ctx, auxiliary_weight=router)
                accelerator.backward(loss)
            summed = loss_metric(loss, loss_cfg.gradient_reduction)
            parts.append({**metrics_in(metrics), "loss": summed, NUM_LEARNING: Sum(loss_ctx.num_learning())})
        grad_norm = clip_grad_norm(self.policy, self.config.optimizer.max_grad_norm, accelerator)
        norms = {"grad_norm": Mean.of(grad_norm), "grad_norm_max": Max.of(grad_norm)}
        # One wait for the device, after the last backward: what the host needs to step, and all that is reported.
        reduced = on_host(per_update(reduce_metrics({**merge_metrics(parts), **norms})))
        num_learning, norm = reduced.pop(NUM_LEARNING).value(), reduced["grad_norm_max"].value()
        if not self._apply(phase.optimizer, num_learning=num_learning, grad_norm=norm):
            reduced = {name: metric for name, metric in reduced.items() if name not in norms}
            if self.nonfinite_in_a_row and num_learning:
                reduced[NONFINITE] = Sum(torch.tensor(1.0, dtype=torch.float64))
                self._check_finite(phase)
        phase.optimizer.zero_grad()
        return reduced

    def _apply(self, optimizer: Any, *, num_learning: float, grad_norm: float) -> bool:
        """Take the step of the gradients that are there, and return whether the weights moved."""
        if num_learning == 0:
            self.num_skipped += 1  # no rank has a token to learn from: Adam's momentum must not move the weights
            scaler = self.accelerator.scaler
            if scaler is not None:
                scaler.update(scaler.get_scale())  # it expects a step after unscaling
            return False
        if self.accelerator.scaler is None and not math.isfinite(grad_norm):  # the same on all ranks
            self.num_nonfinite += 1
            self.nonfinite_in_a_row += 1
            return False
        self.nonfinite_in_a_row = 0
        optimizer.step()
        if optimizer.step_was_skipped:  # the loss scale was too large: the gradient is not finite
            self.num_overflows += 1
            return False
        return True

    def _check_finite(self, phase: Phase) -> None:
        """Raise if the gradient has not been finite in too many updates in a row; on all ranks or on none.

        Raises:
            ToolkitError: it has not.
        """
        most = self.config.optimizer.max_nonfinite_updates
        if self.nonfinite_in_a_row >= most:
            raise ToolkitError(
                f"the gradient was NaN or infinite in {most} updates in a row, the last in {phase.name} step "
                f"{phase.next_step}; none of them changed the weights; lower optimizer.lr (warmup.lr) and continue "
                "from an earlier checkpoint, or raise optimizer.max_nonfinite_updates"
            )
