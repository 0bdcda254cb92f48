"""TRL's GRPO trainer with a loss of this toolkit, exact over the accumulation window and over ranks.

Source of the hooks: TRL 1.16.0, ``trl/trainer/grpo_trainer.py``: ``_compute_loss`` is called for each micro-batch,
``_buffered_inputs`` holds all of them, and its result is not divided by the number of micro-batches.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from toolkit.distributed import world_size
from toolkit.errors import ConfigError, DataError, warn_once
from toolkit.integrations.forward import accept_loss, fitted_loss
from toolkit.integrations.trl import TESTED
from toolkit.integrations.trl.args import loss_from
from toolkit.integrations.trl.batches import Inputs, ids_and_mask, item_of
from toolkit.integrations.versions import check_version
from toolkit.integrations.window import named_metrics
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.metrics import Metrics, metrics_in

THEIR_NAMES = {
    "kl_ref": "kl",
    "entropy": "entropy",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "soft_clip_fraction": "cispo_clip_ratio",
    "phi": "vespo/phi_seq_mean",
}
"""What TRL calls our metrics; theirs are means of micro-batches, ours of the optimizer step."""

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class ToolkitLossMixin(Base):
    """Put it before a subclass of ``GRPOTrainer``: ``class Mine(ToolkitLossMixin, TheirTrainer)``.

    ``loss=`` chooses the loss; without it, it is the one that TRL's arguments describe.
    """

    loss_cfg: BaseRLLossConfig
    """The loss in use."""

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *by_position: Any, loss: Any = None, **others: Any
    ) -> None:
        """Set up TRL's trainer, then the loss.

        Args:
            model: and all further arguments: as of TRL's trainer.
            reward_funcs: as of TRL's trainer.
            args: ``GRPOConfig``. For a `loss` with a KL term ``beta`` is set: without it TRL computes no reference.
            by_position: as of TRL's trainer.
            loss: overrides as on the command line, in one string or a list, ``"policy_loss=gspo kl=k3"``; or a
                ``GRPOLossConfig``; None: the loss that `args` describe.
            others: as of TRL's trainer.

        Raises:
            ConfigError: the loss is wrong, or TRL's arguments contradict it; before the model is loaded.
        """
        check_version("trl", TESTED)
        if args is None:
            raise ConfigError("args is missing; give a trl.GRPOConfig (GRPOConfig(output_dir=...) has TRL's defaults)")
        loss_cfg, args = self._chosen(loss, args)
        sampler = loss_cfg.required_fields.get("rollout_logprobs")
        if sampler is not None and not args.use_vllm and others.get("rollout_func") is None:
            warn_once(
                f"rollout_logprobs, the sampler's log-probabilities: {sampler.why}, but TRL has them from vLLM or a "
                "rollout_func; set use_vllm=True, or leave out what needs them, unless your trainer returns "
                "sampling_per_token_logps"
            )
        super().__init__(model, reward_funcs, args, *by_position, **others)
        self.is_of_args = loss is None
        if getattr(self, "aux_loss_enabled", False):
            raise ConfigError(
                f"TRL adds {self.router_aux_loss_coef} times the router loss of a mixture of experts, which is absent "
                "here; set router_aux_loss_coef=0.0 to train without it"
            )
        accept_loss(self._inner_model())
        self.loss_cfg = fitted_loss(self.model, loss_cfg)
        self._window: list[Any] = []
        self._window_metrics: list[Metrics] = []

    @staticmethod
    def _chosen(loss: Any, args: Any) -> tuple[BaseRLLossConfig, Any]:
        """Return the loss to train with, and TRL's arguments beside it."""
        loss_cfg = loss_from(loss, args)
        if loss_cfg.needs_reference and not args.beta:
            args = copy.copy(args)
            args.beta = loss_cfg.kl_loss_coef or 1.0  # TRL has no reference model with beta = 0
        return loss_cfg, args

    def _inner_model(self) -> Any:
        model = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Add ``group_ids`` [B] to what TRL returns: the prompt of each completion, the same number on every rank."""
        output = super()._generate_and_score_completions(inputs)
        size = self.num_generations if self.model.training else self.num_generations_eval
        ids = output["completion_ids"]
        first = self.accelerator.process_index * len(ids)
        output["group_ids"] = torch.arange(first, first + len(ids), device=ids.device) // size
        return output

    def _compute_loss(self, model: Any, inputs: Inputs) -> Tensor:
        """Return the share of a micro-batch in the loss of the optimizer step; they add up."""
        is_training = self.model.training
        if inputs.get("pixel_values") is not None:
            raise DataError("the loss scores text alone, but the batch has images; use a text model and data")
        if not is_training:
            (loss_kwargs,) = self._kwargs_of(model, [inputs])
        else:
            if not self._window:
                self._window = self._kwargs_of(model, self._accumulated())
            loss_kwargs = self._window.pop(0)
        context = self.loss_cfg.loss_ctx_cls(self.loss_cfg, loss_kwargs)
        ids, mask = ids_and_mask(inputs)
        with self.accelerator.autocast():
            loss, extra = model(input_ids=ids, attention_mask=mask, toolkit_loss=context)
        self._window_metrics.append(metrics_in(extra))
        if not is_training or not self._window:
            self._log_window("train" if is_training else "eval")
        return loss

    def _accumulated(self) -> list[Inputs]:
        """Return all micro-batches of the optimizer step that begins now.

        Raises:
            DataError: some of them are not generated yet.
        """
        number, per_generation = self.current_gradient_accumulation_steps, self.args.steps_per_generation
        generated = per_generation * self.num_iterations
        if self._step % generated + number > generated:
            raise DataError(
                f"{number} micro-batches make an optimizer step, but only {generated - self._step % generated} of them "
                "are generated; make steps_per_generation x num_iterations a multiple of gradient_accumulation_steps"
            )
        return [self._buffered_inputs[(self._step + index) % per_generation] for index in range(number)]

    def _kwargs_of(self, model: Any, batches: list[Inputs]) -> list[Any]:
        cfg = self.loss_cfg
        needs_current = cfg.needs_current(len(batches) * world_size())
        current = [self._current_logprobs(model, batch) if needs_current else None for batch in batches]
        items = [
            item_of(batch, ignore_idx=cfg.ignore_idx, fills_missing=self.is_of_args, current_logprobs=logprobs)
            for batch, logprobs in zip(batches, current, strict=True)
        ]
        return cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)

    @torch.no_grad()
    def _current_logprobs(self, model: Any, batch: Inputs) -> Tensor:
        """Return the log-probabilities [B, C] before the step, in nats."""
        ids, mask = ids_and_mask(batch)
        return self._get_per_token_logps_and_entropies(model, ids, mask, batch["completion_ids"].shape[1])[0]

    def _log_window(self, mode: str) -> None:
        """Log the metrics of an optimizer step, over all ranks, under TRL's names and under ours."""
        for name, value in named_metrics(self._window_metrics, THEIR_NAMES).items():
            self._metrics[mode][name].append(value)
        self._window_metrics = []


class ToolkitGRPOTrainer(ToolkitLossMixin, GRPOTrainer):
    """TRL's ``GRPOTrainer`` with ``loss=``; see `ToolkitLossMixin`."""
