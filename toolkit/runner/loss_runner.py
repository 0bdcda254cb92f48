"""`LossRunner`: a loss in one call, for notebooks and custom loops.

Legend: B rows, T positions that have hidden states, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from toolkit.distributed import reduce_metrics
from toolkit.errors import ConfigError, DataError, a_type, warn_once
from toolkit.explain.lint import mistyped_values
from toolkit.head import HeadPlan
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.losses.context import BaseLossContext
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem
from toolkit.losses.step.builder import item_class
from toolkit.losses.step.weights import loss_metric
from toolkit.metrics import Metric, merge_metrics, metrics_in, to_floats
from toolkit.runner.arguments import (
    RETURNS,
    as_tensor,
    call_forward,
    check_alike,
    check_has_graph,
    head_tensors,
    labels_of,
    padding_of,
    returned_by,
    spread,
    why_without_graph,
)
from toolkit.runner.mistakes import (
    BY_NAME,
    naming_batches,
    not_a_config,
    not_a_field,
    not_a_list,
    not_of_loss,
)
from toolkit.runner.result import LossResult
from toolkit.runner.suspicions import warn_of_frozen, warn_of_log_probabilities, warn_of_masks, warn_of_values

RL_FIELDS = tuple(name for name in RLLossContextInputItem.model_fields if name != "shifted_labels")
FIELDS = ("input_ids", "shifted_labels", "loss_mask", "attention_mask", "cu_seq_lens", *RL_FIELDS)
"""Keys of a batch that the loss reads; all others are for the caller's forward."""
Forward = Callable[[Mapping[str, Any]], tuple[Any, ...]]
"""``forward(batch) -> (hidden_states, head_weight)`` or ``(hidden_states, head_weight, head_bias)``; see `__call__`."""


class LossRunner:
    """Runs a configured loss and hides items, kwargs and contexts. A cell may be run again: calls do not change it.

    Example:
        >>> runner = LossRunner.from_overrides(["loss=grpo", "kl=k3", "mode=chunk"])
        >>> result = runner(hidden, lm_head, input_ids=ids, advantages=adv, ref_logprobs=ref)  # doctest: +SKIP
        >>> result.loss.backward()  # doctest: +SKIP
    """

    def __init__(self, loss_cfg: BaseLossConfig | None = None, **settings: Any) -> None:
        if settings or not isinstance(loss_cfg, BaseLossConfig):
            raise ConfigError(not_a_config(loss_cfg, settings))
        self.loss_cfg = loss_cfg
        self._is_first = True
        for message in mistyped_values(loss_cfg):
            warn_once(message)

    @classmethod
    def from_overrides(
        cls, overrides: Sequence[str] | str = (), *, config_dir: str | os.PathLike[str] | None = None, **choices: Any
    ) -> Self:
        """Pick the loss as on the command line: ``["loss=grpo", "policy_loss.cliprange_high=0.28", "kl=k3"]``.

        Args:
            overrides: a list, or a single one.
            config_dir: a folder with custom YAML files, as ``--config-dir`` on the command line.
            **choices: not accepted; the error message shows the list to write instead.

        Raises:
            ConfigError: an override is mistyped (the message suggests the nearest one) or does not concern the loss.
        """
        from toolkit.compose.overrides import is_of_loss, parse
        from toolkit.compose.tree import compose_config, load_loss

        chosen = [overrides] if isinstance(overrides, str) else overrides
        is_list = isinstance(chosen, Sequence) and all(isinstance(each, str) for each in chosen)
        if choices or not is_list or (isinstance(overrides, str) and overrides.count("=") > 1 and " " in overrides):
            raise ConfigError(not_a_list(overrides, choices))
        chosen = list(chosen)
        for override in parse(chosen):
            if not is_of_loss(override):
                compose_config(chosen, config_dir=config_dir)  # raises if the override is mistyped
                raise ConfigError(not_of_loss(override.input_line or "", str(override.key_or_group)))
        return cls(load_loss(chosen, config_dir=config_dir))

    def __call__(
        self,
        hidden_states: Any,
        head_weight: Any,
        head_bias: Tensor | None = None,
        *by_position: Any,
        input_ids: Tensor | None = None,
        shifted_labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        advantages: Tensor | float | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        current_logprobs: Tensor | None = None,
        group_ids: Tensor | None = None,
        rollout_spec: LogprobSpec | None = None,
        teacher_topk_ids: Tensor | None = None,
        teacher_topk_logprobs: Tensor | None = None,
        ref_topk_ids: Tensor | None = None,
        ref_topk_logprobs: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        **extra_fields: Any,
    ) -> LossResult:
        """Return the loss of one batch, normalised over this batch (and the other ranks, if there are any).

        Give either `input_ids`, which are shifted here, or `shifted_labels`. All other fields are indexed by the
        position that predicts a token. Sampler outputs are indexed by token:
        ``RLLossContextInputItem.from_unshifted(input_ids, mask, ...)`` shifts them together with the labels, and
        ``runner(hidden, head, **dict(item))`` takes the item.

        Fields may be tensors, lists or arrays. The first call warns of what was probably not meant: padding or a prompt
        that is scored, log-probabilities, labels or advantages of another token, a frozen model, rewards as advantages.
        It waits for the device and computes the logits of up to 256 tokens again; later calls do neither.

        Args:
            hidden_states: [B, T, D]; or the output of a model of transformers, of which the last ones are taken.
            head_weight: [V, D]; or the LM head itself, an ``nn.Linear``, with or without LoRA.
            head_bias: [V], optional; that of a module is used without it.
            input_ids: [B, T] token ids (or [B, T + 1] when the last one has no hidden state).
            shifted_labels: [B, T], -100 (`ignore_idx`) where nothing is scored.
            loss_mask: like `input_ids`: which *tokens* count, e.g. 1 on completions; only with `input_ids`.
            attention_mask: like `input_ids`: 0 for padding, which is not scored; only with `input_ids`.
            advantages: a number, [B] one per row, [T] for every row, [B, 1] or [B, T]; [B] raises where B = T.
            old_logprobs: [B, T] in nats; None: on-policy.
            ref_logprobs: [B, T] in nats; needed with a KL term.
            rollout_logprobs: [B, T] in nats, as the sampler reported them; measured, and read by corrections and
                ``anchor="rollout"``.
            teacher_logprobs: [B, T] in nats; for distillation.
            current_logprobs: [B, T] in nats, from a forward without gradient before the step; for losses of groups and
                batches in `step`, and rejections by the current policy.
            group_ids: integers, [B] one per row, [B, 1] or [B, T]: the prompt that a row answers.
            rollout_spec: how `rollout_logprobs` were taken.
            teacher_topk_ids: [B, T, K] candidate tokens, negative for none; None: the whole vocabulary.
            teacher_topk_logprobs: [B, T, K] the teacher's log-probabilities of them in nats.
            ref_topk_ids: [B, T, K] the same of the reference.
            ref_topk_logprobs: [B, T, K] the same of the reference; for an exact KL.
            cu_seq_lens: [S + 1] boundaries of the sequences in one packed row.
            by_position: raises; all fields are given by name.
            extra_fields: other fields that the items of a custom loss declare.

        Raises:
            DataError: a field is missing, has the wrong shape, or is not finite at a scored position.
        """
        fields = dict(locals())  # every argument by its name
        if by_position:
            raise DataError(BY_NAME.format(type(by_position[0]).__name__))
        fields = {name: fields[name] for name in FIELDS} | extra_fields
        self._check_names(fields)
        head = head_tensors(hidden_states, head_weight, head_bias)
        context = self._context(fields, head[0])
        loss, extra = context.forward(*head)
        metrics = metrics_in(extra)
        if self._was_first():
            warn_of_frozen(*head[:2], "runner(hidden_states, head_weight)")
            warn_of_log_probabilities(metrics, context, *head)
        return LossResult(loss, metrics, _reason=why_without_graph(*head[:2], type(context).__name__))

    def explain(
        self, hidden_states: Any, head_weight: Any, head_bias: Tensor | None = None, *by_position: Any, **fields: Any
    ) -> HeadPlan:
        """Return the pass of the head that a call with these arguments would take, why, and its cost; ``print`` it.

        Args:
            hidden_states: [B, T, D]; all arguments are as in `__call__`.
            head_weight: [V, D].
            head_bias: [V], optional.
            by_position: raises; all fields are given by name.
            fields: ``input_ids``, ``advantages`` ...

        Raises:
            DataError: as `__call__`.
        """
        if by_position:
            raise DataError(BY_NAME.format(type(by_position[0]).__name__))
        self._check_names(fields)
        head = head_tensors(hidden_states, head_weight, head_bias)
        return self._context(fields, head[0]).explain(*head)

    def step(self, batches: Iterable[Mapping[str, Any] | LossContextInputItem], forward: Forward) -> LossResult:
        """Accumulate the gradient of several micro-batches as if they were one batch; run the optimizer step yourself.

        Args:
            batches: mappings with the fields of `__call__` (and whatever else `forward` reads), or items, whose fields
                `forward` then gets.
            forward: returns the hidden states and the head (and its bias) of one batch; called once for each, with
                gradients enabled. What they may be is as in `__call__`.

        Returns:
            The loss of all batches together (detached) and its metrics, summed over ranks too.

        Raises:
            DataError: as `__call__`; or `forward` returns something else, or what has no gradient.
        """
        check_has_graph(None, "step()")
        if not callable(forward):
            raise DataError(f"forward is {a_type(forward)}; give a function forward(batch) that returns {RETURNS}")
        if isinstance(batches, Mapping):
            raise DataError("step() takes a list of batches; for a single one write step([batch], forward)")
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
        items = [self._item(batch, None) for batch in rows]
        check_alike(items, self.loss_cfg.ignore_idx)
        cu_seq_lens = [batch.get("cu_seq_lens") for batch in rows]
        bounds = None if all(value is None for value in cu_seq_lens) else cu_seq_lens
        context = self.loss_cfg.loss_ctx_cls
        parts: list[dict[str, Metric]] = []
        with naming_batches("batches"):
            built = context.build_batches_loss_kwargs(items, self.loss_cfg, bounds)
        for batch, kwargs in zip(rows, built, strict=True):
            hidden_states, weight, bias = returned_by(call_forward(forward, batch))
            width = kwargs.shifted_labels.shape[-1]
            if hidden_states.shape[-2] == width - 1 and batch.get("input_ids") is not None:
                kwargs = kwargs.chunk(width - 1)[0]  # without the last position, which has no label
            ctx = context(self.loss_cfg, kwargs)
            loss, extra = ctx.forward(hidden_states, weight, bias)
            check_has_graph(loss, "forward(batch)", why_without_graph(hidden_states, weight, context.__name__))
            if self._was_first():
                warn_of_frozen(hidden_states, weight, "forward(batch)")
                warn_of_log_probabilities(metrics_in(extra), ctx, hidden_states, weight, bias)
            loss.backward()
            parts.append({**metrics_in(extra), "loss": loss_metric(loss, self.loss_cfg.gradient_reduction)})
        metrics = reduce_metrics(merge_metrics(parts))
        number = to_floats({"loss": metrics["loss"]})["loss"]  # waits for the device
        return LossResult(torch.tensor(number, dtype=torch.float64), metrics, is_of_step=True)

    def _was_first(self) -> bool:
        """Whether this is the first call or step; later ones are not."""
        was_first, self._is_first = self._is_first, False
        return was_first

    def _context(self, fields: Mapping[str, Any], hidden_states: Tensor) -> BaseLossContext[Any]:
        """Return the context of one batch."""
        item = self._item(fields, hidden_states.shape[-2] if hidden_states.dim() > 1 else None)
        bounds = None if fields.get("cu_seq_lens") is None else [fields["cu_seq_lens"]]
        context = self.loss_cfg.loss_ctx_cls
        with naming_batches(""):
            (kwargs,) = context.build_batches_loss_kwargs([item], self.loss_cfg, bounds)
        return context(self.loss_cfg, kwargs)

    def _item(self, fields: Mapping[str, Any], num_positions: int | None) -> LossContextInputItem:
        item_cls = self._item_cls
        self._check_names(fields, may_have_others=True)
        like = next((value for value in fields.values() if isinstance(value, Tensor)), None)
        known = {*FIELDS, *item_cls.model_fields} - {"advantages"}  # a number is an advantage, too
        fields = {
            name: as_tensor(name, value, None if like is None else like.device) if name in known else value
            for name, value in fields.items()
        }
        labels = labels_of(fields, num_positions, self.loss_cfg.ignore_idx)
        names = {*RL_FIELDS, *item_cls.model_fields} - {"shifted_labels"}
        values = {name: fields[name] for name in names if fields.get(name) is not None}
        unread = [name for name in RL_FIELDS if name in values and name not in item_cls.model_fields]
        if unread:
            if isinstance(self.loss_cfg, CELossConfig):
                raise DataError(f"{unread[0]} has no effect on cross-entropy; leave it out or use a policy loss")
            raise DataError(
                f"{unread[0]} has no effect on {type(self.loss_cfg).__name__}, whose context takes "
                f"{item_cls.__name__}; leave it out, or write item_cls = RLLossContextInputItem in "
                f"{self.loss_cfg.loss_ctx_cls.__name__}"
            )
        for name in ("advantages", "group_ids"):
            if name in values:
                values[name] = spread(name, values[name], labels)
        item = item_cls(shifted_labels=labels, **values)
        if self._is_first:
            if fields.get("input_ids") is not None and fields.get("cu_seq_lens") is None:
                is_policy_loss = not isinstance(self.loss_cfg, CELossConfig)
                masks = fields.get("loss_mask"), padding_of(fields)
                warn_of_masks(fields["input_ids"], *masks, is_policy_loss=is_policy_loss)
            warn_of_values(item, self.loss_cfg)
        return item

    @property
    def _item_cls(self) -> type[LossContextInputItem]:
        return item_class(self.loss_cfg.loss_ctx_cls)

    def _check_names(self, fields: Mapping[str, Any], *, may_have_others: bool = False) -> None:
        """Raise if a name is unknown; others, for the caller's forward, only if they look like a misspelled field."""
        known = tuple(dict.fromkeys((*FIELDS, *self._item_cls.model_fields)))
        for name in fields:
            message = None if name in known else not_a_field(name, fields, known, self.loss_cfg, may_have_others)
            if message is not None:
                raise DataError(message)

    def __repr__(self) -> str:
        lines = [f"  {name}={value!r}" for name, value in self.loss_cfg.model_dump().items()]
        return "\n".join([f"LossRunner({type(self.loss_cfg).__name__}", *lines, ")"])
