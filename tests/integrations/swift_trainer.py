"""ms-swift's GRPO trainer without a model, and its arguments as overrides of ours.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from torch import Tensor

from tests.integrations.loops import namespace, of_a_trainer

RANGE = (0.1, 0.28)
"""``epsilon`` and ``epsilon_high``."""
CEILING = 1.3
"""``epsilon_high`` of CISPO, where it is the ceiling itself."""
LONGEST = 12
"""``max_completion_length``, which dr_grpo divides by."""
THRESHOLD = 1.01
"""``rollout_importance_sampling_threshold``."""
MEANS = {
    "grpo": (),
    "dr_grpo": ("loss.aggregation.name=constant",),
    **dict.fromkeys(("bnpo", "dapo"), ("loss.aggregation.name=token_mean", "loss.aggregation.count_empty=false")),
}
"""Aggregations of the loss types beside GSPO's preset."""
GSPO = {"sequence": "gspo", "sequence_token": "gspo_token"}
"""Our presets of values of ``importance_sampling_level``."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of ms-swift's trainer, by its names."""

    loss_type: str
    level: str = "token"
    beta: float = 0.0
    delta: float | None = None
    rollout: str | None = None
    """``rollout_importance_sampling_mode``."""
    off_policy: float | None = None
    """``off_policy_sequence_mask_delta``."""

    def __str__(self) -> str:
        parts = {"beta": self.beta, "delta": self.delta, "rollout": self.rollout, "off_policy": self.off_policy}
        return "-".join([self.loss_type, self.level, *(f"{name}={value}" for name, value in parts.items() if value)])

    def ours(self) -> list[str]:
        """Return the same as overrides."""
        parts = (self._preset(), self._policy_options(), self._kl(), self._corrections())
        return [each for part in parts for each in part]

    def _preset(self) -> Iterator[str]:
        if self.level == "token":
            yield f"loss=preset/ms_swift/{'grpo_opsm' if self.off_policy else self.loss_type}"
        else:
            yield f"loss=preset/ms_swift/{GSPO[self.level]}"
            yield from MEANS[self.loss_type]
        if self.loss_type == "dr_grpo":
            yield f"++loss.aggregation.length={LONGEST}"

    def _policy_options(self) -> Iterator[str]:
        options = "loss.policy_loss_cfg"
        if self.loss_type == "cispo":
            yield f"{options}.weight_max={CEILING}"
        elif self.loss_type not in ("sapo", "real"):
            yield from (f"{options}.cliprange_low={RANGE[0]}", f"{options}.cliprange_high={RANGE[1]}")
        if self.delta is not None:
            yield f"++{options}.delta={self.delta}"

    def _kl(self) -> Iterator[str]:
        if self.beta:
            yield from ("kl=k3", f"loss.kl_loss_coef={self.beta}")
            if self.rollout or self.off_policy:
                yield "loss.correction_on_kl=true"

    def _corrections(self) -> Iterator[str]:
        if self.rollout:
            unit, _, action = self.rollout.partition("_")
            bounded = "max_token_log_ratio: 20"
            measured = bounded if unit == "token" else f"granularity: sequence, reduction: mean, {bounded}"
            if action == "truncate":
                yield f"+loss.correction.is={{{measured}, action: clamp_upper, upper: {THRESHOLD}}}"
            else:
                yield f"+loss.correction.weight={{{bounded}, action: clamp_upper, upper: null}}"
                rejection = f"action: mask, upper: {THRESHOLD}, denominator: original"
                yield f"+loss.correction.rejection={{{measured}, {rejection}}}"
        if self.off_policy:
            yield f"loss.correction.opsm.upper={self.off_policy}"


class Bare(GRPOTrainer):
    """ms-swift's trainer with the attributes that its loss reads, and no model."""

    def __init__(self, arguments: Arguments, **changes: Any) -> None:
        low, high = RANGE
        self.__dict__ |= {
            "model": namespace(training=True),
            "args": namespace(
                delta=arguments.delta, log_entropy=False, top_entropy_quantile=1.0, gradient_accumulation_steps=1
            ),
            "accelerator": namespace(num_processes=1, gather_for_metrics=lambda values: values),
            "model_accepts_loss_kwargs": False,
            "compute_loss_func": None,
            "compute_entropy": False,
            "overlong_filter": False,
            "beta": arguments.beta,
            "kl_in_reward": False,
            "loss_type": arguments.loss_type,
            "importance_sampling_level": arguments.level,
            "epsilon_low": low,
            "epsilon_high": CEILING if arguments.loss_type == "cispo" else high,
            "tau_pos": 1.0,
            "tau_neg": 1.05,
            "real_tau": 0.5,
            "num_generations": 2,
            "fipo_gamma": 2 ** (-1 / 32),
            "fipo_clip_range": 0.2,
            "fipo_clip_high_only": True,
            "fipo_safety_threshold": 4.0,
            "max_completion_length": LONGEST,
            "rollout_importance_sampling_mode": arguments.rollout,
            "rollout_importance_sampling_threshold": THRESHOLD,
            "log_rollout_offpolicy_metrics": False,
            "disable_rollout_importance_sampling": False,
            "off_policy_sequence_mask_delta": arguments.off_policy,
            "_has_teacher": False,
            "sdar_loss_coef": 0.0,
            "sdar_gate_beta": 5.0,
            "chord_sft_iterator": None,
            "_metrics": {"train": defaultdict(list)},
            **changes,
        }

    def _get_per_token_logps_and_entropies(self, model: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return what stands for the model: log-probabilities [B, T]."""
        return model, None


def grpo_batch(arguments: Arguments, given: dict[str, Tensor], **changes: Any) -> GRPOBatch:
    """Return a micro-batch as ms-swift holds it."""
    mask = given["mask"]
    fields = {
        "completion_mask": mask,
        "truncated_mask": mask.new_zeros(len(mask)),
        "seq_lengths": mask.sum(-1),
        "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["ref_logprobs"] if arguments.beta else None,
        "rollout_per_token_logps": given.get("rollout_logprobs"),
        "advantages": given["advantages"],
        "num_items_in_batch": mask.sum(),
    }
    return GRPOBatch(**(fields | changes))


def of_ms_swift(arguments: Arguments, given: dict[str, Tensor], *, of_batch: Any = (), **changes: Any) -> list[Tensor]:
    """Return loss and gradient of the logits of a micro-batch, as its trainer computes them."""
    trainer = Bare(arguments, **changes)
    inputs = grpo_batch(arguments, given, **dict(of_batch))
    return of_a_trainer(given, lambda logprobs: trainer._compute_loss_and_metrics(logprobs, {}, inputs)[0])
