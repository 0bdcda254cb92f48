"""Hugging Face's Trainer with the loss inside the model's forward: no logits, and exact over the accumulation window.

Source of the hooks: transformers 5.23, ``trainer.py``: ``get_batch_samples`` returns all micro-batches of an optimizer
step, ``compute_loss`` is called for each, and with ``loss_is_scaled_for_ga`` its result is not divided.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Trainer

from toolkit.distributed import reduce_metrics, world_size
from toolkit.errors import ConfigError, DataError, warn_once
from toolkit.integrations.forward import accept_loss, fitted_loss
from toolkit.integrations.transformers import TESTED
from toolkit.integrations.transformers.function import config_of
from toolkit.integrations.versions import check_version
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import LossContextInputItem
from toolkit.metrics import Metrics, merge_metrics, metrics_in, to_floats

if TYPE_CHECKING:
    Base = Any
else:
    Base = object

LARGEST_OFF = 0.5
"""Nats by which log-probabilities before the step usually differ from the policy's at most; those of another token
differ by 0.5 to 3."""
OF_MODEL = ("input_ids", "attention_mask", "position_ids")
"""Fields of a batch that the model reads; any other one that the loss knows is the loss's."""


class ToolkitTrainerMixin(Base):
    """Put it before a subclass of ``Trainer``: ``class Mine(ToolkitTrainerMixin, TheirTrainer)``.

    ``loss=`` chooses the loss. A batch has ``input_ids``, ``labels`` [B, T] (not shifted) and whatever else the loss
    reads, indexed by token: ``advantages``, ``old_logprobs`` ... With these, set ``remove_unused_columns=False``.
    """

    loss_is_scaled_for_ga = True
    loss_cfg: BaseLossConfig
    """The loss in use."""

    def __init__(self, model: Any = None, args: Any = None, *by_position: Any, loss: Any = "loss=ce", **others: Any):
        """Set up the Trainer, then the loss.

        Args:
            model: and all further arguments: as of the Trainer.
            args: as of the Trainer.
            by_position: as of the Trainer.
            loss: overrides as on the command line, in one string or a list, ``"loss=ce loss.loss_reduction=sample"``;
                or a config.
            others: as of the Trainer.

        Raises:
            ConfigError: the loss is wrong, or the Trainer's arguments contradict it.
        """
        check_version("transformers", TESTED)
        loss_cfg = config_of(loss)
        if others.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func has no effect beside loss; leave out one of them")
        if loss_cfg.gradient_reduction != "mean":
            raise ConfigError("gradient_reduction='sum': the Trainer's processes average their gradients; use 'mean'")
        if getattr(args, "use_liger_kernel", False):
            raise ConfigError("use_liger_kernel=True replaces parts of the model that the loss reads; leave it out")
        read = sorted(getattr(loss_cfg, "required_fields", ()))
        if read and getattr(args, "remove_unused_columns", True):
            raise ConfigError(
                f"remove_unused_columns=True removes {', '.join(read)} from the data, which the loss reads; set it to "
                "False in the TrainingArguments"
            )
        if getattr(args, "label_smoothing_factor", 0):
            raise ConfigError("label_smoothing_factor has no effect beside loss; set it to 0")
        super().__init__(model, args, *by_position, **others)
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size(), self.args.n_gpu) > 1:
            raise ConfigError(
                "ranks that share a batch (tensor, context or sequence parallelism) and DataParallel are not "
                "supported; use DDP or FSDP, started by torchrun"
            )
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        accept_loss(inner)
        self.loss_cfg = fitted_loss(self.model, loss_cfg)
        self._window: list[Any] = []
        self._window_metrics: list[Metrics] = []
        self._is_first = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of an optimizer step, after counting what their loss divides by."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = self._kwargs_of(batches) if batches else []
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the share of a micro-batch in the loss of the optimizer step; they add up."""
        is_training = model.training
        loss_kwargs = self._window.pop(0) if is_training and self._window else self._kwargs_of([inputs])[0]
        context = self.loss_cfg.loss_ctx_cls(self.loss_cfg, loss_kwargs.to(inputs["input_ids"].device))
        of_model = {name: value for name, value in inputs.items() if not self._is_of_loss(name)}
        loss, extra = model(**of_model, toolkit_loss=context)
        if is_training:
            self._warn_of_first(metrics_in(extra))
            self._window_metrics.append(metrics_in(extra))
        if not return_outputs:
            return loss
        outputs = {"logits": model(**of_model).logits} if self.compute_metrics is not None else {}
        return loss, {"loss": loss, **outputs}

    def log(self, logs: dict[str, float], *others: Any, **named: Any) -> None:
        """Add the metrics of the optimizer steps since the last entry to `logs`, over all ranks."""
        if self._window_metrics and "loss" in logs:
            metrics = to_floats(reduce_metrics(merge_metrics(self._window_metrics)))
            self._window_metrics = []
            steps = {"loss", *(f"{term.name}_loss" for term in self.loss_cfg.checked_terms)}  # sums, not means
            logs = {**logs, **{f"toolkit/{name}": value for name, value in metrics.items() if name not in steps}}
        super().log(logs, *others, **named)

    def _warn_of_first(self, metrics: Metrics) -> None:
        """Warn, in the first forward, if log-probabilities of a batch are far from the policy's."""
        if self._is_first and "log_ratio_abs" in metrics:
            off = to_floats({"off": metrics["log_ratio_abs"]})["off"]
            if off > LARGEST_OFF:
                warn_once(
                    f"old_logprobs differ from the policy's log-probabilities by {off:.2g} nats on average in the "
                    f"first step (up to {LARGEST_OFF} is usual). All fields of a batch are indexed by token, as labels "
                    "are: what LossRunner.logprobs gives is shifted by torch.nn.functional.pad(x[:, :-1], (1, 0))"
                )
        self._is_first = False

    def _is_of_loss(self, name: str) -> bool:
        fields = self.loss_cfg.loss_ctx_cls.item_cls.model_fields
        return name == "labels" or (name in fields and name not in OF_MODEL)

    def _kwargs_of(self, batches: list[Mapping[str, Any]]) -> list[Any]:
        cfg = self.loss_cfg
        if cfg.needs_current(len(batches) * world_size()):
            raise ConfigError(
                "the loss compares tokens of several micro-batches, which needs the current log-probabilities before "
                "the step; choose a loss of tokens or sequences, or one micro-batch in one process"
            )
        return cfg.loss_ctx_cls.build_batches_loss_kwargs([self._item_of(batch) for batch in batches], cfg)

    def _item_of(self, batch: Mapping[str, Any]) -> LossContextInputItem:
        """Return a micro-batch as an item; every field of it is indexed by token, as the labels are.

        Raises:
            DataError: it has no labels.
        """
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise DataError("the batch has no labels; add labels [B, T], -100 where nothing is scored")
        fields = {name: batch[name] for name in batch if name != "labels" and self._is_of_loss(name)}
        ignore_idx, item_cls = self.loss_cfg.ignore_idx, self.loss_cfg.loss_ctx_cls.item_cls
        return item_cls.from_unshifted(labels, labels != ignore_idx, ignore_idx=ignore_idx, **fields)


class ToolkitTrainer(ToolkitTrainerMixin, Trainer):
    """Hugging Face's ``Trainer`` with ``loss=``; see `ToolkitTrainerMixin`."""
