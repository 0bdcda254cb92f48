"""A model in the place of hidden states and head: which part of it runs, and how its wrapper's hooks see the loss.

Legend: B rows, T tokens of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import DataError, a_type
from toolkit.head import HeadPlan, token_logprobs
from toolkit.head.adapters import HeadTensors, refuse_wrappers
from toolkit.losses.config.base import BaseLossConfig
from toolkit.models.policy import Policy, check_head
from toolkit.runner.arguments import head_tensors, last_hidden, returned_by
from toolkit.runner.batches import ModelBatch

Watch = Callable[[Any, Any, Tensor, Tensor, Tensor | None], None]
"""Called with metrics, context, hidden states [B, T, D], weight [V, D] and bias [V] (or None) of a forward."""
HEADS = ("lm_head", "head", "output")
"""Attributes of a module that may be its head, if its forward returns hidden states alone."""


def is_model(value: Any, second: Any) -> bool:
    """Whether the first argument of a call is a model; `second` is the argument after it: a batch, or nothing."""
    return isinstance(value, nn.Module) and (second is None or isinstance(second, Mapping))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@dataclass(frozen=True)
class ModelCall:
    """A model as the caller has it, and what of it the loss runs."""

    wrapper: nn.Module
    """The model, or DistributedDataParallel around it."""
    inner: nn.Module
    """The model without a wrapper."""
    policy: Policy | None
    """The causal language model as a policy; None for another module, whose forward returns hidden states and head."""

    @property
    def device(self) -> torch.device:
        """Of the first parameter; the CPU if there is none."""
        return next((parameter.device for parameter in self.inner.parameters()), torch.device("cpu"))

    def fitted(self, loss_cfg: BaseLossConfig) -> BaseLossConfig:
        """Return `loss_cfg` with the logit scale and the soft cap of the model.

        Raises:
            ConfigError: it has others.
        """
        return loss_cfg if self.policy is None else self.policy.fitted(loss_cfg)

    def loss(self, batch: ModelBatch, context: Any, watch: Watch | None = None) -> tuple[Tensor, Any]:
        """Return the loss (0-dim) and the metrics of `context` on one batch, in one forward of the wrapper."""
        length = batch.input_ids.shape[1]
        watched = Fitted(context, length, watch)
        if self.policy is None:
            return watched.forward(*self._of_module(batch))
        options = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        arguments = (batch.input_ids, batch.attention_mask, watched)
        return _through(self.wrapper, self.inner, self.policy, arguments, options)

    def head(self, batch: ModelBatch) -> HeadTensors:
        """Return hidden states [B, T - 1, D] (or [B, T, D]), weight and bias, as a loss would get them."""
        kept: list[HeadTensors] = []
        self.loss(batch, _Keeps(kept, self.fitted(BaseLossConfig())))
        return kept[0]

    @torch.no_grad()
    def logprobs(self, batch: ModelBatch, loss_cfg: BaseLossConfig) -> Tensor:
        """Return [B, T] log-probabilities in nats, at position t of token t + 1; NaN where none is predicted."""
        hidden, weight, bias = self.head(batch)
        ids, options = batch.input_ids, self.fitted(loss_cfg).head_options
        scores = token_logprobs(
            hidden[:, : ids.shape[1] - 1],
            weight,
            ids[:, 1:],
            bias,
            chunk_size=options.chunk_size,
            temperature=options.temperature,
            softcap=options.softcap,
            logit_scale=options.logit_scale,
        ).float()
        is_text = batch.attention_mask.bool()
        is_next = is_text[:, 1:] & is_text[:, :-1]
        if batch.position_ids is not None:
            is_next &= batch.position_ids[:, 1:] > 0
        return torch.nn.functional.pad(scores.where(is_next, float("nan")), (0, 1), value=float("nan"))

    def no_sync(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context in which a backward does not average gradients over ranks, except for the last one."""
        sync = getattr(self.wrapper, "no_sync", None)
        return nullcontext() if is_last or sync is None else sync()

    def _of_module(self, batch: ModelBatch) -> HeadTensors:
        arguments = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids
        }  # fmt: skip
        accepted = inspect.signature(self.inner.forward).parameters
        chosen = {name: value for name, value in arguments.items() if name in accepted and value is not None}
        if "input_ids" not in chosen:
            raise DataError(
                f"model is {a_type(self.inner)}, which is not a causal language model and whose forward takes no "
                "input_ids; give a model of transformers, a module whose forward(input_ids, ...) returns "
                "(hidden_states, head), or call runner(hidden_states, head, input_ids=...)"
            )
        output = self.wrapper(**chosen)
        if type(output) in (tuple, list) and len(output) in (2, 3):
            return returned_by(output)
        head = next((getattr(self.inner, name) for name in HEADS if hasattr(self.inner, name)), None)
        if head is None:
            raise DataError(
                f"model is {a_type(self.inner)} without an attribute {', '.join(HEADS)}; its forward must return "
                "(hidden_states, head) or (hidden_states, head_weight, head_bias)"
            )
        return head_tensors(last_hidden(output), head, None)


def model_call(model: nn.Module) -> ModelCall:
    """Return how to run a model: a causal language model, a `Policy` of one, or a module that returns states and head.

    A causal language model is run once on a few tokens, to compare what its head gives with its logits.

    Raises:
        ConfigError: the model has a head that a loss cannot use; says why.
    """
    inner = unwrapped(model)
    refuse_wrappers(inner)
    if isinstance(inner, Policy):
        return ModelCall(model, inner, inner)
    is_causal_lm = any(hasattr(inner, name) for name in ("get_output_embeddings", "get_base_model"))
    if not is_causal_lm:
        return ModelCall(model, inner, None)
    policy = Policy(inner)
    policy.training = inner.training
    check_head(policy, vocab_size=len(policy.head.module.weight))  # type: ignore[arg-type]
    return ModelCall(model, inner, policy)


def _through(wrapper: nn.Module, inner: nn.Module, policy: Policy, arguments: Any, options: dict[str, Any]) -> Any:
    """Return ``policy(*arguments, **options)`` as a forward of `wrapper`, whose hooks then see the loss.

    DistributedDataParallel prepares its gradient averaging in its forward, so the policy takes the place of the forward
    of the model inside it for one call.
    """
    if inner is policy:
        return wrapper(*arguments, **options)
    if wrapper is inner:
        return policy(*arguments, **options)
    assigned = inner.__dict__.get("forward")

    def restore() -> None:
        if assigned is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = assigned

    def once(*args: Any, **kwargs: Any) -> Any:
        restore()
        return policy(*args, **kwargs)

    inner.__dict__["forward"] = once
    try:
        return wrapper(*arguments, **options)
    finally:
        restore()


@dataclass(frozen=True)
class Fitted:
    """A context of T positions that gets hidden states of T or T - 1, and shows them to a `watch`."""

    context: Any
    length: int
    watch: Watch | None

    @property
    def loss_cfg(self) -> Any:
        """The loss."""
        return self.context.loss_cfg

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return loss (0-dim) and metrics of `hidden` [B, T - 1, D] or [B, T, D], `weight` [V, D] and `bias` [V]."""
        context = self._of(hidden)
        loss, metrics = context.forward(hidden, weight, bias)
        if self.watch is not None:
            self.watch(metrics, context, hidden, weight, bias)
        return loss, metrics

    def explain(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> HeadPlan:
        """Return the pass that `forward` takes for `hidden` [B, T, D], `weight` [V, D] and `bias` [V], and its cost."""
        plan: HeadPlan = self._of(hidden).explain(hidden, weight, bias)
        return plan

    def _of(self, hidden: Tensor) -> Any:
        kwargs = getattr(self.context, "loss_kwargs", None)
        if kwargs is None or not hidden.shape[-2] == self.length - 1 == kwargs.shifted_labels.shape[-1] - 1:
            return self.context
        return type(self.context)(self.loss_cfg, kwargs.chunk(self.length - 1)[0])  # the last one has no label


@dataclass(frozen=True)
class _Keeps:
    """In the place of a context: keeps what it gets."""

    kept: list[HeadTensors]
    loss_cfg: BaseLossConfig

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Any]:
        self.kept.append((hidden, weight, bias))
        return hidden.new_zeros(()), {}
