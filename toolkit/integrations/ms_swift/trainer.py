"""ms-swift's GRPO trainer with a loss of this toolkit, exact over the accumulation window and over ranks.

Legend: B rows, T positions, C positions from the first completion token on.

Source of the hooks: ms-swift 4.6.0, ``swift/rlhf_trainers/grpo_trainer.py``: with ``use_liger_loss`` the trainer calls
``compute_liger_loss`` inside the forward of the wrapped model, and transformers' Trainer divides its result by the
number of micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.rlhf_trainers.utils import _ForwardRedirection
from swift.utils import get_logger
from torch import Tensor

from toolkit.distributed import world_size
from toolkit.errors import ConfigError
from toolkit.head.adapters import find_head
from toolkit.integrations.chosen import chosen_config, summary
from toolkit.integrations.forward import fitted_loss
from toolkit.integrations.ms_swift import registered
from toolkit.integrations.ms_swift.args import MS_SWIFT, check_args
from toolkit.integrations.window import named_metrics
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import Metrics, metrics_in

THEIR_NAMES = {
    "kl_ref": "kl",
    "entropy": "entropy/mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "soft_clip_fraction": "cispo_clip_ratio",
}
"""What ms-swift calls our metrics; theirs are means of micro-batches, ours of the optimizer step."""
NOT_OF_TRUNK = ("labels", "logits_to_keep", "use_cache")
"""Arguments of the model's forward that its trunk does not get."""
Batch = Mapping[str, Any]
"""A micro-batch of ms-swift: ``model_inputs`` and ``grpo_batch``."""


class ToolkitGRPOTrainer(GRPOTrainer):
    """ms-swift's ``GRPOTrainer`` with the loss that `register` was called with, in the place of Liger's fused loss."""

    def __init__(self, *by_position: Any, **named: Any) -> None:
        """Check the loss, then set up ms-swift's trainer.

        Raises:
            ConfigError: the loss is wrong, or ms-swift's arguments contradict it.
        """
        self.loss_cfg = chosen_config(registered(), named["args"], MS_SWIFT)
        check_args(named["args"], self.loss_cfg, registered(), named["template"])
        super().__init__(*by_position, **named)
        if self.is_multimodal:
            raise ConfigError("the loss scores text alone, but the model takes images; use a text model")
        self.loss_cfg = fitted_loss(self.model, self.loss_cfg)
        get_logger().info(f"The loss of toolkit: {summary(self.loss_cfg)}")
        self._window: list[Any] = []
        self._window_metrics: list[Metrics] = []

    def _prepare_liger_loss(self) -> None:
        """Ask for `compute_liger_loss`, without Liger."""
        self.use_liger_loss = True
        self._forward_redirection = _ForwardRedirection()

    def compute_liger_loss(self, unwrapped_model: Any, model_inputs: dict[str, Any], grpo_batch: Any) -> Tensor:
        """Return the loss of a micro-batch, 0-dim: their mean over an optimizer step is the loss of the step."""
        is_training = self.model.training
        if not is_training:
            (loss_kwargs,) = self._kwargs_of([{"model_inputs": model_inputs, "grpo_batch": grpo_batch}])
        else:
            if not self._window:
                self._window = self._kwargs_of(self._accumulated())
            loss_kwargs = self._window.pop(0)
        context = self.loss_cfg.loss_ctx_cls(self.loss_cfg, loss_kwargs)
        arguments = {name: value for name, value in model_inputs.items() if name not in NOT_OF_TRUNK}
        with self.accelerator.autocast():
            head = find_head(unwrapped_model)
            hidden = head.trunk(**arguments, use_cache=False).last_hidden_state
            loss, extra = context.forward(*head.inputs(hidden))
        self._window_metrics.append(metrics_in(extra))
        if not is_training or not self._window:
            self._log_window("train" if is_training else "eval")
        return loss * self.current_gradient_accumulation_steps if is_training else loss

    def _accumulated(self) -> list[Batch]:
        """Return all micro-batches of the optimizer step that begins now."""
        number = self.current_gradient_accumulation_steps
        return [self._buffered_inputs[(self._step + index) % len(self._buffered_inputs)] for index in range(number)]

    def _kwargs_of(self, batches: list[Batch]) -> list[Any]:
        cfg = self.loss_cfg
        needs_current = cfg.needs_current(len(batches) * world_size())
        items = []
        for batch in batches:
            current = self._current_logprobs(batch) if needs_current else None
            items.append(self._item_of(batch["model_inputs"]["input_ids"], batch["grpo_batch"], current))
        return cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)

    @torch.no_grad()
    def _current_logprobs(self, batch: Batch) -> Tensor:
        """Return the log-probabilities [B, C] before the step, in nats."""
        return self._get_per_token_logps_and_entropies(self.model, batch["model_inputs"], batch["grpo_batch"])[0]

    def _item_of(self, input_ids: Tensor, grpo_batch: Any, current: Tensor | None) -> RLLossContextInputItem:
        """Return a micro-batch as an item.

        Args:
            input_ids: [B, T].
            grpo_batch: ms-swift's ``GRPOBatch``, whose fields are [B, C].
            current: [B, C] under the policy that is about to be updated, in nats.
        """
        mask = grpo_batch.completion_mask
        if self.overlong_filter:
            mask = mask & ~grpo_batch.truncated_mask.unsqueeze(-1)
        before = input_ids.shape[1] - mask.shape[1]
        logprobs = {
            "old_logprobs": grpo_batch.old_per_token_logps,
            "rollout_logprobs": grpo_batch.rollout_per_token_logps,
            "ref_logprobs": grpo_batch.ref_per_token_logps,
            "current_logprobs": current,
        }
        by_token: dict[str, Any] = {
            name: F.pad(values.detach(), (before, 0), value=math.nan)
            for name, values in logprobs.items()
            if values is not None
        }
        advantages = F.pad(grpo_batch.advantages, (before, 0))
        scored = F.pad(mask.long(), (before, 0))
        ignored = self.loss_cfg.ignore_idx
        return RLLossContextInputItem.from_unshifted(
            input_ids, scored, ignore_idx=ignored, advantages=advantages, **by_token
        )

    def _log_window(self, mode: str) -> None:
        """Log the metrics of an optimizer step, over all ranks, under ms-swift's names and under ours."""
        for name, value in named_metrics(self._window_metrics, THEIR_NAMES).items():
            self._metrics[mode][name].append(value)
        self._window_metrics = []
