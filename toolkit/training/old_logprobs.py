"""Log-probabilities of the policy that sampled: the sampler's own where they serve, otherwise those of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import reduce_metrics
from toolkit.errors import warn_once
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.metrics import Mean, Metric
from toolkit.training.experience import IGNORED, Rows
from toolkit.training.run_config import RunConfig
from toolkit.training.updates import Updater

MISMATCH = "rollout_mismatch"
"""Metric: mean |difference| in nats; of the losses, too, where they get both log-probabilities."""
BOUNDS = {"fp32": 1e-4, "fp16": 2.5e-3, "bf16": 2e-2}
"""Mean |difference| in nats that rounding explains, by the narrowest dtype of the forward.

The sampler sees one token at a time beside cached keys and values, a forward all at once beside other padding: the same
sums in another order. In fp32 that is 1e-7 to 1e-6 for a small model and 1e-5 for a deep one; a temperature, a penalty
or a token that only one of them applies is 1e-2 and more. bf16 has 8 bits: logits around 10 are rounded by 2e-2. fp16
has 11 bits, an eighth of that."""


class OldLogprobs:
    """Gives rows their ``old_logprobs``, and remembers whether the sampler's were found to be those of the policy."""

    def __init__(self, config: RunConfig, updater: Updater) -> None:
        self._updater = updater
        self._settings = _settings(config, updater)
        self._bound = BOUNDS[self._settings["narrowest"]]
        self._may_reuse = config.rollout.old_logprobs == "sampler" and not compares_both(config)
        self.is_same: bool | None = None
        """Whether the sampler's are those of the policy, within the bound; None: not compared yet."""

    def add(self, rows: Rows, most: int) -> tuple[Rows, dict[str, Metric]]:
        """Return the rows with ``old_logprobs``, and metrics over all processes; all call it together.

        Where these are the sampler's, the rows have no ``rollout_logprobs`` besides: a loss would compare them with
        themselves.

        Args:
            rows: of this process, perhaps none, before any update of the step.
            most: rows of the process that has most of them.
        """
        if self._may_reuse and self.is_same:
            return _reused(rows), {}
        recomputed = replace(rows, old_logprobs=self._updater.score(rows, most))
        if not self._may_reuse or self.is_same is False or most == 0:
            return recomputed, {}
        assert recomputed.old_logprobs is not None
        difference = reduce_metrics({MISMATCH: Mean.of(_differences(recomputed))})
        value = difference[MISMATCH].value()
        self.is_same = value <= self._bound  # not if it is NaN: the sampler did not report a token
        if self.is_same:
            return _reused(rows), difference
        warn_once(
            f"the sampler's log-probabilities are {value:.2g} nats a token from those of a forward (more than "
            f"{self._bound:g}, which rounding in {self._settings['narrowest']} explains), so each step computes "
            "old_logprobs with a forward; rollout.old_logprobs=recomputed does so without comparing"
        )
        return recomputed, {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"is_same": self.is_same, "settings": self._settings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the decision of a checkpoint, unless settings have changed that it depends on: then compare again."""
        if state.get("settings") == self._settings:
            self.is_same = state["is_same"]


def compares_both(config: RunConfig) -> bool:
    """Whether a loss looks at the difference between sampler and trainer, which the sampler's alone do not have."""
    loss_cfg = config.loss
    if not isinstance(loss_cfg, BaseRLLossConfig):
        return True  # a loss of another kind may
    return bool(loss_cfg.correction) or "rollout_logprobs" in loss_cfg.required_fields


def _reused(rows: Rows) -> Rows:
    assert rows.rollout_logprobs is not None
    is_scored = rows.shifted_labels != IGNORED
    return replace(rows, old_logprobs=rows.rollout_logprobs.where(is_scored, 0.0), rollout_logprobs=None)


def _differences(rows: Rows) -> Tensor:
    assert rows.old_logprobs is not None
    assert rows.rollout_logprobs is not None
    return (rows.old_logprobs - rows.rollout_logprobs)[rows.shifted_labels != IGNORED].abs()


def _settings(config: RunConfig, updater: Updater) -> dict[str, Any]:
    """Return what the difference between sampler and trainer depends on, as JSON values."""
    precision = updater.accelerator.mixed_precision
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtypes = {names.get(parameter.dtype, "fp32") for parameter in updater.policy.parameters()}
    narrowest = max({precision if precision in BOUNDS else "fp32", *dtypes}, key=lambda name: BOUNDS[name])
    return {
        "narrowest": narrowest,
        "mixed_precision": precision,
        "device": updater.accelerator.device.type,
        "model": config.model.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
    }
