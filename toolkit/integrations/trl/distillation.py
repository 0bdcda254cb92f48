"""TRL's distillation trainer with our on-policy distillation.

Source: TRL 1.16.0, ``trl/trainer/distillation_trainer.py``: the student's completions of an optimizer step are in
``_buffered_inputs``, ``teacher_model`` scores them inside ``compute_loss``.

Legend: B rows, C completion tokens, T tokens of prompt and completion, K candidates, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DistillationTrainer

from toolkit.distributed import reduce_metrics, world_size
from toolkit.errors import ConfigError, DataError
from toolkit.integrations.chosen import chosen_config
from toolkit.integrations.forward import accept_loss, fitted_loss
from toolkit.integrations.trl import TESTED
from toolkit.integrations.trl.args import TRL
from toolkit.integrations.trl.batches import Inputs, ids_and_mask
from toolkit.integrations.versions import check_version
from toolkit.losses.config.opd import OPDLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import Metrics, merge_metrics, metrics_in, to_floats

if TYPE_CHECKING:
    Base = Any
else:
    Base = DistillationTrainer


class ToolkitDistillationTrainer(Base):
    """TRL's ``DistillationTrainer`` with ``loss="loss=opd ..."``: a teacher scores the student's completions."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        *by_position: Any,
        loss: Any = "loss=opd",
        top_k: int | None = None,
        **others: Any,
    ) -> None:
        """Set up TRL's trainer, then the loss.

        Args:
            model: and all further arguments: as of TRL's trainer.
            teacher_model: as of TRL's trainer.
            args: ``DistillationConfig``.
            by_position: as of TRL's trainer.
            loss: overrides as on the command line, in one string or a list, or a config: ``"loss=opd"`` compares the
                sampled tokens, ``"loss=opd loss.variant=top_k"`` distributions.
            top_k: candidates of ``loss.variant=top_k``, the teacher's likeliest; None: the whole vocabulary, [B, C, V]
                of the teacher for all micro-batches of a step.
            others: as of TRL's trainer.

        Raises:
            ConfigError: the loss is not one of distillation, or TRL's arguments contradict it.
        """
        check_version("trl", TESTED)
        if args is None:
            raise ConfigError("args is missing; give a trl.DistillationConfig")
        cfg = _checked(chosen_config(loss, args, TRL), args, top_k)
        super().__init__(model, teacher_model, args, *by_position, **others)
        if self.teacher_model is None:
            raise ConfigError("teacher_model is missing; give the teacher's name, or the model")
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        accept_loss(inner)
        self.loss_cfg = fitted_loss(self.model, cfg)
        self.top_k = top_k
        self._window: list[Any] = []
        self._window_metrics: list[Metrics] = []

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the share of a micro-batch in the loss of the optimizer step; they add up."""
        is_training, cfg = self.model.training, self.loss_cfg
        if inputs.get("pixel_values") is not None:
            raise DataError("the loss scores text alone, but the batch has images; use a text model and data")
        if is_training and not self._window:
            self._window = self._kwargs_of(self._buffered_inputs)
        loss_kwargs = self._window.pop(0) if is_training else self._kwargs_of([inputs])[0]
        ids, mask = ids_and_mask(inputs)
        with self.accelerator.autocast():
            loss, extra = model(input_ids=ids, attention_mask=mask, toolkit_loss=cfg.loss_ctx_cls(cfg, loss_kwargs))
        self._window_metrics.append(metrics_in(extra))
        if not self._window or not is_training:
            metrics = to_floats(reduce_metrics(merge_metrics(self._window_metrics)))
            self._window_metrics = []
            theirs = {"entropy": metrics["entropy"]} if "entropy" in metrics else {}
            for name, value in {**theirs, **{f"toolkit/{key}": each for key, each in metrics.items()}}.items():
                self._metrics["train" if is_training else "eval"][name].append(value)
        return (loss, None) if return_outputs else loss

    def _kwargs_of(self, batches: list[Inputs]) -> list[Any]:
        cfg = self.loss_cfg
        if cfg.needs_current(len(batches) * world_size()):
            raise ConfigError("the loss compares tokens of several micro-batches; choose one of tokens or sequences")
        return cfg.loss_ctx_cls.build_batches_loss_kwargs([self._item_of(batch) for batch in batches], cfg)

    def _item_of(self, batch: Inputs) -> RLLossContextInputItem:
        """Return a micro-batch with what the teacher says of its tokens."""
        ids, _ = ids_and_mask(batch)
        scored = batch["completion_mask"]
        if batch.get("tool_mask") is not None:
            scored = scored * batch["tool_mask"]
        width = batch["prompt_ids"].shape[1]
        item = RLLossContextInputItem.from_unshifted(
            ids, F.pad(scored, (width, 0)), ignore_idx=self.loss_cfg.ignore_idx
        )
        logprobs = self._teacher_logprobs(batch)  # [B, C, V], of the positions that predict a completion's tokens

        def placed(values: Tensor, pad: float) -> Tensor:
            """Return values [B, C, ..] as [B, T, ..]: position t has what predicts token t + 1."""
            full = values.new_full((*ids.shape, *values.shape[2:]), pad)
            full[:, width - 1 : width - 1 + values.shape[1]] = values
            return full

        if self.loss_cfg.variant == "sampled":
            chosen = logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
            return item.replace(teacher_logprobs=placed(chosen, math.nan))
        if self.top_k is None:
            return item.replace(teacher_topk_logprobs=placed(logprobs, 0.0))
        best = logprobs.topk(self.top_k, dim=-1)
        return item.replace(teacher_topk_ids=placed(best.indices, -1), teacher_topk_logprobs=placed(best.values, 0.0))

    @torch.no_grad()
    def _teacher_logprobs(self, batch: Inputs) -> Tensor:
        """Return the teacher's log-probabilities [B, C, V] in nats at TRL's temperature, fp32."""
        self.teacher_model.eval()
        ids, mask = ids_and_mask(batch)
        width = batch["completion_ids"].shape[1]
        logits = self.teacher_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return (logits[:, -width - 1 : -1].float() / self.args.temperature).log_softmax(-1)


def _checked(cfg: Any, args: Any, top_k: int | None) -> OPDLossConfig:
    """Return the loss if it is one of distillation.

    Raises:
        ConfigError: it is another one, or `args` describe another one.
    """
    if not isinstance(cfg, OPDLossConfig):
        raise ConfigError(f"{type(cfg).__name__} has no teacher; choose loss='loss=opd', or use ToolkitGRPOTrainer")
    default = next(field.default for field in args.__dataclass_fields__.values() if field.name == "beta")
    if args.beta != default:
        raise ConfigError(
            f"beta={args.beta} has no effect beside loss; beta=1 is loss.variant=top_k loss.direction=reverse, beta=0 "
            "is loss.direction=forward"
        )
    if cfg.needs_reference:
        raise ConfigError("the loss reads a reference, which TRL's distillation does not have; leave out kl")
    if top_k is not None and cfg.variant != "top_k":
        raise ConfigError(f"top_k={top_k} has no effect on loss.variant={cfg.variant}; add loss.variant=top_k to loss")
    if args.use_liger_kernel:
        raise ConfigError("use_liger_kernel=True replaces parts of the model that the loss reads; leave it out")
    return cfg


__all__ = ["ToolkitDistillationTrainer"]
