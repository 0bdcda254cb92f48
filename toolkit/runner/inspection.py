"""What a `LossRunner` says of its loss besides computing it: formula, cost, comparison, checks, diagnosis.

Legend: B rows, T positions that have hidden states, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

from torch import Tensor, nn

from toolkit.errors import DataError, a_type
from toolkit.head import HeadPlan
from toolkit.head.adapters import HeadTensors
from toolkit.losses.config.base import BaseLossConfig
from toolkit.runner.arguments import head_tensors
from toolkit.runner.batches import model_batch
from toolkit.runner.checking import CheckReport, check_loss
from toolkit.runner.comparison import Build, Comparison, compare_losses
from toolkit.runner.diagnosis import Diagnosis, diagnose
from toolkit.runner.diagnosis.of_model import diagnose_model
from toolkit.runner.items import check_names
from toolkit.runner.mistakes import BY_NAME, check_first
from toolkit.runner.models import Fitted, is_model, model_call
from toolkit.runner.shown import Explanation, explanation_of, runner_html, runner_text
from toolkit.runner.steps import OfModel, contexts_of, tensors_context
from toolkit.runner.variants import named_variants


class Inspection:
    """Base of `LossRunner`: its methods change neither the runner nor the gradients of a model."""

    loss_cfg: BaseLossConfig
    _overrides: tuple[str, ...] | None
    _config_dir: str | os.PathLike[str] | None

    @overload
    def explain(self) -> Explanation: ...
    @overload
    def explain(
        self,
        hidden_states: Any,
        head_weight: Any = ...,
        head_bias: Tensor | None = ...,
        *by_position: Any,
        **fields: Any,
    ) -> HeadPlan: ...
    def explain(
        self,
        hidden_states: Any = None,
        head_weight: Any = None,
        head_bias: Tensor | None = None,
        *by_position: Any,
        **fields: Any,
    ) -> HeadPlan | Explanation:
        """Return what the loss computes, in words; with a batch, the pass of the head that a call would take.

        ``print`` it: of a batch, the pass, why, and its cost.

        Args:
            hidden_states: [B, T, D]; all arguments are as in `LossRunner.__call__`; none at all: the loss in words.
            head_weight: [V, D].
            head_bias: [V], optional.
            by_position: raises; all fields are given by name.
            fields: ``input_ids``, ``advantages`` ...

        Raises:
            DataError: as `LossRunner.__call__`.
        """
        if hidden_states is None and head_weight is None and not fields and not by_position:
            return explanation_of(self.loss_cfg)
        check_first(hidden_states, head_weight, "runner.explain({})")
        head, build, *_ = self._prepared(hidden_states, head_weight, head_bias, by_position, fields)
        plan: HeadPlan = build(self.loss_cfg).explain(*head)
        return plan

    def compare(
        self,
        losses: Sequence[Any] | Mapping[str, Any],
        hidden_states: Any = None,
        head_weight: Any = None,
        head_bias: Tensor | None = None,
        *by_position: Any,
        **fields: Any,
    ) -> Comparison:
        """Return several losses on one batch: loss, gradient, clip fractions, time, peak memory, cosines of gradients.

        The gradients of a model are those of its parameters: its trunk runs forward once, and backward once for each
        loss; each loss holds one number in fp32 for each parameter. Otherwise they are those of the hidden states, and
        of the head if it requires one. Several ranks each compare their batch; nothing is left in ``.grad``.

        Args:
            losses: overrides that change this runner's loss, ``["policy_loss=vanilla", "policy_loss=gspo"]``, lists of
                them, or configs or runners, which are taken as they are; or a mapping from names to such.
            hidden_states: [B, T, D], or a model; all further arguments are as in `LossRunner.__call__`.
            head_weight: [V, D], or the batch of a model.
            head_bias: [V], optional.
            by_position: raises; all fields are given by name.
            fields: ``input_ids``, ``advantages``, ``rewards`` ...

        Raises:
            ConfigError: an override is mistyped, or cannot change this loss.
            DataError: as `LossRunner.__call__`, with the name of the loss.
        """
        _check_inputs(hidden_states, head_weight, "runner.compare(losses, {})")
        configs = named_variants(losses, self.loss_cfg, self._overrides, self._config_dir)
        head, build, parameters, of = self._prepared(hidden_states, head_weight, head_bias, by_position, fields)
        return compare_losses(configs, build, head, parameters, of)

    def sweep(
        self,
        key: str,
        values: Sequence[Any],
        hidden_states: Any = None,
        head_weight: Any = None,
        head_bias: Tensor | None = None,
        *by_position: Any,
        **fields: Any,
    ) -> Comparison:
        """Return the loss with each of several values of one setting, compared as `compare` does.

        Args:
            key: as on the command line, such as ``policy_loss.cliprange_high``.
            values: of it.
            hidden_states: [B, T, D], or a model; all further arguments are as in `LossRunner.__call__`.
            head_weight: [V, D], or the batch of a model.
            head_bias: [V], optional.
            by_position: raises; all fields are given by name.
            fields: ``input_ids``, ``advantages``, ``rewards`` ...

        Raises:
            ConfigError: there is no such setting, or it does not take a value.
            DataError: as `LossRunner.__call__`.
        """
        if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise DataError(f"values is {a_type(values)}; give a list, such as [0.1, 0.2, 0.3]")
        if not isinstance(key, str) or "=" in key:
            raise DataError(f"key is {key!r}; give a setting without a value, such as 'policy_loss.cliprange_high'")
        if len(values) == 0:
            raise DataError("values is empty; give at least one, such as [0.1, 0.2, 0.3]")
        _check_inputs(hidden_states, head_weight, "runner.sweep(key, values, {})")
        shown = ["null" if value is None else value.item() if hasattr(value, "item") else value for value in values]
        losses = [f"{key}={value}" for value in shown]
        return self.compare(losses, hidden_states, head_weight, head_bias, *by_position, **fields)

    def check(self) -> CheckReport:
        """Check the loss on made-up batches on the CPU, as ``toolkit-check`` does; takes seconds."""
        return check_loss(self.loss_cfg)

    def logprobs(self, model: nn.Module, batch: Mapping[str, Any] | None = None, **fields: Any) -> Tensor:
        """Return the log-probabilities [B, T] of a batch in nats, for ``old_logprobs=`` or ``ref_logprobs=``.

        Position t holds that of token t + 1, at the temperature of the loss; NaN where no token is predicted (the last
        position, padding). Without gradient, and in the mode that the model is in: with dropout call ``model.eval()``.

        Args:
            model: as in `step`.
            batch: with ``input_ids``, as in `step`; fields may also be given by name.
            fields: of the batch.

        Raises:
            DataError: there are no token ids; or the argument is not a model.
        """
        if not is_model(model, batch):
            raise DataError(f"logprobs() got {a_type(model)} and {a_type(batch)}; write runner.logprobs(model, batch)")
        call = model_call(model)
        return call.logprobs(model_batch({**(batch or {}), **fields}, call.device), self.loss_cfg)

    def diagnose(
        self,
        rollout_logprobs: Any = None,
        trainer_logprobs: Any = None,
        mask: Any = None,
        ids: Any = None,
        *,
        model: nn.Module | None = None,
        batch: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        bos_id: int | None = None,
    ) -> Diagnosis:
        """Say why a sampler's log-probabilities differ from a trainer's, on raw arrays; ``print`` the result.

        ``runner.diagnose(rollout, trainer, mask=mask, ids=ids)`` compares arrays of the same tokens in the same places.
        ``runner.diagnose(rollout, model=model, batch=batch)`` scores the batch by the model, and makes each fault again
        on up to 16 rows, so it also tells apart what looks alike in the arrays.

        Args:
            rollout_logprobs: [B, T] in nats, as the sampler reported them; None: those in the batch. With a model value
                t is of token t + 1, as in `__call__`.
            trainer_logprobs: [B, T] in nats; not with a model.
            mask: [B, T], 1 at the tokens to compare; not with a model, whose batch has ``loss_mask``.
            ids: [B, T] the token that each value is of; not with a model.
            model: as in `step`.
            batch: of the model, with ``input_ids``.
            vocab_size: V; None: from `ids`, or not used.
            bos_id: with a model: the token that begins every sequence; None: the first token of each row.

        Raises:
            DataError: an argument is missing, or shapes differ.
        """
        if model is None:
            if batch is not None or rollout_logprobs is None or trainer_logprobs is None:
                raise DataError(
                    "diagnose() needs rollout_logprobs and trainer_logprobs, or model=... and batch=... instead of "
                    "trainer_logprobs"
                )
            return diagnose(rollout_logprobs, trainer_logprobs, mask, ids, vocab_size=vocab_size)
        arrays = {"trainer_logprobs": trainer_logprobs, "mask": mask, "ids": ids}
        unread = [name for name, value in arrays.items() if value is not None]
        if unread:
            raise DataError(f"{unread[0]} has no effect beside model=; the batch has input_ids and loss_mask")
        if not isinstance(batch, Mapping):
            raise DataError(f"batch is {a_type(batch)}; give the batch of the model, with input_ids")
        fields = dict(batch) | ({} if rollout_logprobs is None else {"rollout_logprobs": rollout_logprobs})
        return diagnose_model(model_call(model), self.loss_cfg, fields, bos_id=bos_id)

    def _prepared(
        self, hidden_states: Any, head_weight: Any, head_bias: Any, by_position: tuple[Any, ...], fields: dict[str, Any]
    ) -> tuple[HeadTensors, Build, list[Tensor], str]:
        """Return the inputs of the head, how contexts are built, and what gradients are of: tensors [...]."""
        if by_position:
            raise DataError(BY_NAME.format(type(by_position[0]).__name__))
        rewarded = fields.pop("advantage", None), fields.pop("advantage_options", None)
        check_names(fields, self.loss_cfg, strictly=fields)
        if is_model(hidden_states, head_weight):
            call = model_call(hidden_states)
            batch = model_batch({**(head_weight or {}), **fields}, call.device)
            runs, length = OfModel([batch], call), batch.input_ids.shape[1]

            def build_for_model(config: BaseLossConfig) -> Any:
                (context,) = contexts_of(runs, config, rewarded, name="")
                return Fitted(context, length, None)

            parameters: list[Tensor] = [parameter for parameter in call.inner.parameters() if parameter.requires_grad]
            return call.head(batch), build_for_model, parameters, "the model's parameters"
        head = head_tensors(hidden_states, head_weight, head_bias)

        def build(config: BaseLossConfig) -> Any:
            return tensors_context(fields, head[0], config, rewarded, is_first=False)

        requires = [
            name
            for name, part in zip(("weight", "bias"), head[1:], strict=True)
            if part is not None and part.requires_grad
        ]
        return head, build, [], " and ".join(["the hidden states", *(f"the head's {name}" for name in requires)])

    def __repr__(self) -> str:
        return runner_text(self.loss_cfg)

    def _repr_html_(self) -> str:
        return runner_html(self.loss_cfg)


def _check_inputs(first: Any, second: Any, call: str) -> None:
    """Raise `DataError` if a comparison has no inputs, or wrong ones; `call` is how it is written."""
    if first is None and second is None:
        of_head = call.format("hidden_states, head, input_ids=..., advantages=...")
        raise DataError(f"there is nothing to compare the losses on; write {call.format('model, batch')} or {of_head}")
    check_first(first, second, call)
