"""`LossRunner`: a loss in one call, for notebooks and custom loops.

Legend: B rows, T positions that have hidden states, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from toolkit.errors import ConfigError, DataError, warn_once
from toolkit.explain.lint import mistyped_values
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.losses.items import LossContextInputItem
from toolkit.metrics import metrics_in
from toolkit.runner.arguments import check_has_graph, head_tensors, why_without_graph
from toolkit.runner.batches import model_batch
from toolkit.runner.inspection import Inspection
from toolkit.runner.items import FIELDS, check_names
from toolkit.runner.launching import launch_step
from toolkit.runner.mistakes import BY_NAME, check_first, not_a_config, not_a_list, not_of_loss
from toolkit.runner.models import is_model, model_call
from toolkit.runner.result import LossResult
from toolkit.runner.steps import Forward, OfModel, check_optimizer, run_call, run_step, runs_of, tensors_context
from toolkit.runner.suspicions import warn_of_frozen, warn_of_log_probabilities


class LossRunner(Inspection):
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
        self._overrides: tuple[str, ...] | None = None
        self._config_dir: str | os.PathLike[str] | None = None
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
        runner = cls(load_loss(chosen, config_dir=config_dir))
        runner._overrides, runner._config_dir = tuple(chosen), config_dir
        return runner

    def __call__(
        self,
        hidden_states: Any,
        head_weight: Any = None,
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
        rewards: Tensor | None = None,
        advantage: Any = None,
        advantage_options: Mapping[str, Any] | None = None,
        **extra_fields: Any,
    ) -> LossResult:
        """Return the loss of one batch, normalised over this batch (and the other ranks, if there are any).

        ``runner(model, batch)`` runs a model on a mapping of fields (see `step`); ``runner(hidden_states, head,
        input_ids=...)`` takes what a model gave.

        Give either `input_ids`, which are shifted here, or `shifted_labels`. All other fields are indexed by the
        position that predicts a token. Sampler outputs are indexed by token:
        ``RLLossContextInputItem.from_unshifted(input_ids, mask, ...)`` shifts them together with the labels, and
        ``runner(hidden, head, **dict(item))`` takes the item.

        Fields may be tensors, lists or arrays. The first call warns of what was probably not meant: padding or a prompt
        that is scored, log-probabilities, labels or advantages of another token, a frozen model, rewards as advantages.
        It waits for the device and computes the logits of up to 256 tokens again; later calls do neither.

        Args:
            hidden_states: [B, T, D]; or the output of a model of transformers, of which the last ones are taken; or
                the model itself, as in `step`.
            head_weight: [V, D]; or the LM head itself, an ``nn.Linear``, with or without LoRA; after a model, the
                batch: a mapping of the fields, which may also be given by name.
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
            rewards: [B] one number for each row (or sequence of a packed row), not together with advantages;
                `group_ids` then say which rows answer one prompt.
            advantage: the registered estimator that compares them, by name; None: grpo. Only with rewards.
            advantage_options: of that estimator; None: its defaults.
            by_position: raises; all fields are given by name.
            extra_fields: other fields that the items of a custom loss declare.

        Raises:
            DataError: a field is missing, has the wrong shape, or is not finite at a scored position.
        """
        fields = dict(locals())  # every argument by its name
        if by_position:
            raise DataError(BY_NAME.format(type(by_position[0]).__name__))
        check_first(hidden_states, head_weight)
        fields = {name: fields[name] for name in FIELDS} | extra_fields
        fields |= {"rewards": rewards} if rewards is not None else {}
        rewarded = (advantage, advantage_options)
        if is_model(hidden_states, head_weight):
            check_names({**(head_weight or {}), **fields}, self.loss_cfg, strictly=fields)
            runs = self._of_model(hidden_states, head_weight, fields)
            result = run_call(runs, self.loss_cfg, rewarded, is_first=self._is_first)
            self._is_first = False
            return result
        check_names(fields, self.loss_cfg, strictly=fields)
        head = head_tensors(hidden_states, head_weight, head_bias)
        context = tensors_context(fields, head[0], self.loss_cfg, rewarded, is_first=self._is_first)
        loss, extra = context.forward(*head)
        metrics = metrics_in(extra)
        if self._was_first():
            warn_of_frozen(*head[:2], "runner(hidden_states, head_weight)")
            warn_of_log_probabilities(metrics, context, *head)
        return LossResult(loss, metrics, _reason=why_without_graph(*head[:2], type(context).__name__))

    def step(
        self,
        batches: Iterable[Mapping[str, Any] | LossContextInputItem],
        forward: Forward | None = None,
        *,
        model: nn.Module | None = None,
        optimizer: Any = None,
        advantage: Any = None,
        advantage_options: Mapping[str, Any] | None = None,
    ) -> LossResult:
        """Accumulate the gradient of several micro-batches as if they were one batch.

        Args:
            batches: mappings with the fields of `__call__` (and whatever else `forward` reads), or items, whose fields
                `forward` then gets. For a model each has ``input_ids``: a tensor or array [B, T], or a list of rows of
                any length, which are padded on the right; what a tokenizer of transformers returns is one.
            forward: returns the hidden states and the head (and its bias) of one batch; called once for each, with
                gradients enabled. What they may be is as in `__call__`.
            model: instead of `forward`: a causal language model of transformers, with LoRA, tied, with a logit scale
                or soft cap; a `toolkit.models.policy.Policy`; a module whose forward returns hidden states and head;
                or one of these in DistributedDataParallel, with the same number of batches on every rank. It runs in
                the mode that it is in (training or evaluation).
            optimizer: clears the gradients before, and takes its step after; None: both are left to the caller.
            advantage: the registered estimator for batches with ``rewards`` [B], which are compared over all batches of
                the step, but not over ranks; None: grpo. Only with rewards.
            advantage_options: of that estimator; None: its defaults.

        Returns:
            The loss of all batches together (detached) and its metrics, summed over ranks too.

        Raises:
            DataError: as `__call__`; or `forward` returns something else, or what has no gradient; or the optimizer
                holds none of the model's parameters.
        """
        check_has_graph(None, "step()")
        check_optimizer(optimizer, model)
        runs = runs_of(batches, forward, model, is_first=self._is_first)
        if optimizer is not None:
            optimizer.zero_grad()
        result = run_step(runs, self.loss_cfg, (advantage, advantage_options), is_first=self._is_first)
        self._is_first = False
        if optimizer is not None:
            optimizer.step()
        return result

    def launch(
        self,
        batches: Sequence[Mapping[str, Any]],
        model: nn.Module,
        *,
        num_processes: int = 2,
        advantage: Any = None,
        advantage_options: Mapping[str, Any] | None = None,
    ) -> LossResult:
        """Return loss and metrics of a step over new processes on the CPU, each with a copy of the model in DDP.

        They are those of ``step(batches, model=model)`` in one process, and ``gradient_norm``, the L2 norm of the
        averaged gradient, besides. Starting the processes takes seconds; the model here keeps its gradients. Classes
        and functions that the loss needs must be in files: new processes do not know the cells of a notebook.

        Args:
            batches: as in `step`; a multiple of `num_processes`.
            model: as in `step`, without a wrapper; on the CPU.
            num_processes: how many.
            advantage: as in `step`; rewards of all processes are compared together.
            advantage_options: of that estimator; None: its defaults.

        Raises:
            DataError: an argument is wrong; or as `step`.
            LaunchError: a process died.
        """
        return launch_step(self.loss_cfg, batches, model, num_processes, (advantage, advantage_options))

    def _of_model(self, model: nn.Module, batch: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> OfModel:
        """Return how to run a model on one batch; `fields` were given by name."""
        by_name = {name: value for name, value in fields.items() if value is not None}
        both = sorted({*by_name} & {*(batch or {})})
        if both:
            raise DataError(f"{both[0]} is in the batch and also given by name; leave out one of them")
        call = model_call(model)
        return OfModel([model_batch({**(batch or {}), **by_name}, call.device, is_first=self._is_first)], call)

    def _was_first(self) -> bool:
        """Whether this is the first call or step; later ones are not."""
        was_first, self._is_first = self._is_first, False
        return was_first
