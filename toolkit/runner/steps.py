"""The gradient of several micro-batches as if they were one: the forward of a caller, or of a model.

Legend: B rows, T positions that have hidden states, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.distributed import reduce_metrics
from toolkit.errors import DataError, a_type
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.step.weights import loss_metric
from toolkit.metrics import Metric, merge_metrics, metrics_in, to_floats
from toolkit.runner.arguments import (
    RETURNS,
    call_forward,
    check_alike,
    check_has_graph,
    returned_by,
    why_without_graph,
)
from toolkit.runner.batches import ModelBatch, model_batch
from toolkit.runner.items import item_of, with_advantages
from toolkit.runner.mistakes import naming_batches
from toolkit.runner.models import ModelCall, Watch, model_call, unwrapped
from toolkit.runner.result import LossResult
from toolkit.runner.suspicions import warn_of_frozen, warn_of_log_probabilities

Forward = Callable[[Mapping[str, Any]], tuple[Any, ...]]
"""``forward(batch) -> (hidden_states, head_weight)`` or ``(hidden_states, head_weight, head_bias)``."""


class Runs(Protocol):
    """How the micro-batches of a step are run."""

    batches: Sequence[Any]
    name: str
    """For messages."""

    def fitted(self, loss_cfg: BaseLossConfig) -> BaseLossConfig:
        """Return the loss with what the model does to its logits."""

    def fields(self, index: int) -> tuple[Mapping[str, Any], int | None]:
        """Return the fields of a micro-batch, and how many positions have hidden states; None: not known yet."""

    def loss(self, index: int, context: Any, watch: Watch) -> tuple[Tensor, Any]:
        """Return loss (0-dim) and metrics of `context` on a micro-batch."""

    def backward_context(self, index: int) -> AbstractContextManager[Any]:
        """Return the context that forward and backward of a micro-batch run in."""


@dataclass
class OfForward:
    """A caller's function from a batch to hidden states and head."""

    batches: Sequence[Mapping[str, Any]]
    forward: Forward
    name: str = "forward(batch)"

    def fitted(self, loss_cfg: BaseLossConfig) -> BaseLossConfig:
        """Return `loss_cfg`: only the caller knows the model."""
        return loss_cfg

    def fields(self, index: int) -> tuple[Mapping[str, Any], int | None]:
        """Return the fields of a micro-batch."""
        return self.batches[index], None

    def loss(self, index: int, context: Any, watch: Watch) -> tuple[Tensor, Any]:
        """Return loss (0-dim) and metrics of `context` on a micro-batch."""
        batch = self.batches[index]
        hidden_states, weight, bias = returned_by(call_forward(self.forward, batch))
        kwargs = context.loss_kwargs
        width = kwargs.shifted_labels.shape[-1]
        if hidden_states.shape[-2] == width - 1 and batch.get("input_ids") is not None:
            kwargs = kwargs.chunk(width - 1)[0]  # without the last position, which has no label
            context = type(context)(context.loss_cfg, kwargs)
        loss, extra = context.forward(hidden_states, weight, bias)
        watch(extra, context, hidden_states, weight, bias)
        return loss, extra

    def backward_context(self, index: int) -> AbstractContextManager[Any]:
        """Return a context without effect: the caller's wrapper is not known."""
        return nullcontext()


@dataclass
class OfModel:
    """A model, which runs trunk and loss in one forward."""

    batches: Sequence[ModelBatch]
    call: ModelCall
    name: str = "model"

    def fitted(self, loss_cfg: BaseLossConfig) -> BaseLossConfig:
        """Return the loss with the model's logit scale and soft cap."""
        return self.call.fitted(loss_cfg)

    def fields(self, index: int) -> tuple[Mapping[str, Any], int | None]:
        """Return the fields of a micro-batch, and how many positions they have."""
        batch = self.batches[index]
        return batch.fields, batch.num_positions

    def loss(self, index: int, context: Any, watch: Watch) -> tuple[Tensor, Any]:
        """Return loss (0-dim) and metrics of `context` on a micro-batch."""
        return self.call.loss(self.batches[index], context, watch)

    def backward_context(self, index: int) -> AbstractContextManager[Any]:
        """Return a context in which gradients are averaged over ranks in the last micro-batch only."""
        return self.call.no_sync(is_last=index == len(self.batches) - 1)


def check_optimizer(optimizer: Any, model: Any) -> None:
    """Check that an optimizer can step, and that it holds parameters of the model.

    Args:
        optimizer: None: there is none.
        model: with or without a wrapper; None: not known.

    Raises:
        DataError: it is a class or no optimizer, or none of its parameters is one of the model's.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, type):
        raise DataError(
            f"optimizer is the class {optimizer.__name__}; give an optimizer, such as "
            f"{optimizer.__name__}(model.parameters(), lr=1e-6)"
        )
    for name in ("step", "zero_grad"):
        if not callable(getattr(optimizer, name, None)):
            raise DataError(f"optimizer is {a_type(optimizer)} without {name}(); give a torch.optim.Optimizer")
    if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        return
    of_model = {id(each) for module in (model, unwrapped(model)) for each in module.parameters()}
    if not any(id(each) in of_model for group in optimizer.param_groups for each in group["params"]):
        raise DataError(
            "the optimizer holds none of the model's parameters, so its step would change nothing; make it from "
            "model.parameters() of this model, after any wrapping or copying"
        )


def runs_of(batches: Any, forward: Any, model: Any, *, is_first: bool) -> Runs:
    """Return how to run the micro-batches of a step; the first one warns of what was probably not meant.

    Raises:
        DataError: an argument is missing or of the wrong type.
    """
    if isinstance(batches, torch.nn.Module):
        raise DataError(f"batches is {a_type(batches)}; step() takes the batches first: step([batch], model=model)")
    if model is None and forward is None:
        raise DataError(
            "step() needs a model or a function; write step(batches, model=model) or step(batches, forward)"
        )
    if model is not None and forward is not None:
        raise DataError("step() got forward and model; give one of them")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise DataError(f"model is {a_type(model)}; give a causal language model, or forward=... for a function")
    if model is None and not callable(forward):
        raise DataError(f"forward is {a_type(forward)}; give a function forward(batch) that returns {RETURNS}")
    if forward is not None and callable(getattr(forward, "get_output_embeddings", None)):
        call_forward(forward, {})  # raises: it is a model
    rows = _rows(batches, "[batch], forward" if model is None else "[batch], model=model")
    if model is None:
        return OfForward(rows, forward)
    call = model_call(model)
    with naming_batches("batches"):
        return OfModel([model_batch(fields, call.device, is_first=is_first) for fields in rows], call)


def _rows(batches: Any, single: str) -> list[Mapping[str, Any]]:
    if isinstance(batches, Mapping):
        raise DataError(f"step() takes a list of batches; for a single one write step({single})")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DataError(f"batches is {a_type(batches)}; give a list of mappings, one for each micro-batch")
    rows = [dict(each) if isinstance(each, LossContextInputItem) else each for each in batches]
    strange = next((batch for batch in rows if not isinstance(batch, Mapping)), None)
    if strange is not None:
        raise DataError(
            f"batches holds {a_type(strange)}; give a mapping of fields for each micro-batch, such as "
            "dict(input_ids=..., advantages=...)"
        )
    if not rows:
        raise DataError("step() got no batches; give at least one, masked everywhere if there is nothing to learn")
    return rows


def contexts_of(
    runs: Runs,
    loss_cfg: BaseLossConfig,
    rewarded: tuple[Any, Any],
    *,
    is_first: bool = False,
    name: str = "batches",
) -> list[Any]:
    """Return the context of each micro-batch.

    Args:
        runs: how they are run.
        loss_cfg: the loss.
        rewarded: the advantage estimator and its options.
        is_first: whether to warn of what was probably not meant.
        name: of the list of batches, for messages; empty: there is only one.
    """
    cfg = runs.fitted(loss_cfg)
    all_fields, widths = zip(*(runs.fields(index) for index in range(len(runs.batches))), strict=True)
    rows = with_advantages(all_fields, widths, cfg, *rewarded, is_first=is_first)
    items = [item_of(fields, width, cfg, is_first=is_first) for fields, width in zip(rows, widths, strict=True)]
    check_alike(items, cfg.ignore_idx)
    cu_seq_lens = [fields.get("cu_seq_lens") for fields in rows]
    bounds = None if all(value is None for value in cu_seq_lens) else cu_seq_lens
    context = cfg.loss_ctx_cls
    with naming_batches(name):
        built = context.build_batches_loss_kwargs(items, cfg, bounds)
    return [context(cfg, kwargs) for kwargs in built]


def run_step(runs: Runs, loss_cfg: BaseLossConfig, rewarded: tuple[Any, Any], *, is_first: bool) -> LossResult:
    """Run forward and backward of all micro-batches; see `LossRunner.step`."""
    parts: list[dict[str, Metric]] = []
    contexts = contexts_of(runs, loss_cfg, rewarded, is_first=is_first)
    for index, context in enumerate(contexts):
        watched = _Watched(runs.name, is_first=is_first and index == 0)
        with runs.backward_context(index):
            loss, extra = runs.loss(index, context, watched)
            check_has_graph(loss, runs.name, watched.reason)
            loss.backward()
        parts.append({**metrics_in(extra), "loss": loss_metric(loss, loss_cfg.gradient_reduction)})
    metrics = reduce_metrics(merge_metrics(parts))
    total = to_floats({"loss": metrics["loss"]})["loss"]  # waits for the device
    return LossResult(torch.tensor(total, dtype=torch.float64), metrics, is_of_step=True)


class _Watched:
    """Looks at the inputs of the head in each forward: why the loss has no gradient, and what was not meant."""

    def __init__(self, name: str, *, is_first: bool) -> None:
        self.name, self.is_first, self.reason = name, is_first, ""

    def __call__(self, extra: Any, context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.reason = why_without_graph(hidden, weight, type(context).__name__)
        if self.is_first:
            warn_of_frozen(hidden, weight, self.name)
            warn_of_log_probabilities(metrics_in(extra), context, hidden, weight, bias)


def run_call(runs: Runs, loss_cfg: BaseLossConfig, rewarded: tuple[Any, Any], *, is_first: bool) -> LossResult:
    """Return the loss of one batch with its graph; see `LossRunner.__call__`."""
    (context,) = contexts_of(runs, loss_cfg, rewarded, is_first=is_first, name="")
    watched = _Watched("runner(model, batch)", is_first=is_first)
    loss, extra = runs.loss(0, context, watched)
    return LossResult(loss, metrics_in(extra), _reason=watched.reason)


def tensors_context(
    fields: Mapping[str, Any],
    hidden_states: Tensor,
    loss_cfg: BaseLossConfig,
    rewarded: tuple[Any, Any],
    *,
    is_first: bool,
) -> Any:
    """Return the context of one batch whose `hidden_states` [B, T, D] the caller has."""
    width = hidden_states.shape[-2] if hidden_states.dim() > 1 else None
    (fields,) = with_advantages([fields], [width], loss_cfg, *rewarded, is_first=is_first)
    item = item_of(fields, width, loss_cfg, is_first=is_first)
    bounds = None if fields.get("cu_seq_lens") is None else [fields["cu_seq_lens"]]
    context = loss_cfg.loss_ctx_cls
    with naming_batches(""):
        (kwargs,) = context.build_batches_loss_kwargs([item], loss_cfg, bounds)
    return context(loss_cfg, kwargs)
