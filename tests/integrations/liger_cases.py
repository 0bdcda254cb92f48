"""A batch for Liger's GRPO losses, their arguments as overrides of ours, and our loss with every gradient.

Legend: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.integrations.loops import runner_of

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 9, 5, 11
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
UNCLIPPED = ("cispo", "sapo", "vespo")
LONGEST = 12
"""``max_completion_length`` of dr_grpo."""
RANGE = {"epsilon_low": 0.1, "epsilon_high": 0.28}
CEILING = 1.3
"""``epsilon_high`` of CISPO, where it is the ceiling itself."""
WEIGHT_MAX = 1.5
"""Upper bound of the rollout weights, which Liger takes ready-made."""
MEANS = {
    "grpo": ("loss.aggregation.name=seq_mean_token_mean",),
    "dr_grpo": ("loss.aggregation.name=constant",),
    "luspo": ("loss.aggregation.name=seq_mean_token_sum",),
    **dict.fromkeys(("bnpo", "dapo"), ("loss.aggregation.name=token_mean", "loss.aggregation.count_empty=false")),
}
"""Aggregations of the loss types beside a preset with another one."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of Liger's loss, by its names."""

    loss_type: str
    level: str = "token"
    beta: float = 0.0
    delta: float | None = None
    weights: str | None = None
    """Of which unit the rollout weights are: "token" [B, T], "sequence" [B, 1], or None."""
    corrects_kl: bool = False
    temperature: float = 1.0

    def __str__(self) -> str:
        parts = {"beta": self.beta, "delta": self.delta, "weights": self.weights, "kl": self.corrects_kl}
        named = [f"{name}={value}" for name, value in parts.items() if value]
        return "-".join([self.loss_type, self.level, *named, f"t{self.temperature:g}"])

    @property
    def pads_wrongly(self) -> bool:
        """Whether Liger's LUSPO averages over the padded width here: its tokens are told apart and not masked."""
        one_value_a_row = self.level == "sequence" and not self.beta and self.weights != "token"
        return self.loss_type == "luspo" and not one_value_a_row

    def theirs(self) -> dict[str, Any]:
        """Return the arguments of ``LigerFusedLinearGRPOLoss``."""
        bounds = {"epsilon_high": CEILING} if self.loss_type == "cispo" else RANGE
        return {
            **bounds,
            "loss_type": self.loss_type,
            "importance_sampling_level": self.level,
            "beta": self.beta,
            "delta": self.delta,
            "use_bias_correction_kl": self.corrects_kl,
            "max_completion_length": LONGEST,
        }

    def ours(self) -> list[str]:
        """Return the same as overrides."""
        parts = (self._preset(), self._policy_options(), self._kl(), self._weights())
        return [*(each for part in parts for each in part), f"rollout.temperature={self.temperature}"]

    def _preset(self) -> Iterator[str]:
        if self.loss_type == "luspo" and self.level == "token":  # its preset has the sequence's ratio, as the paper
            yield from ("loss=preset/liger/grpo", *MEANS["luspo"])
        elif self.level == "token" or self.loss_type == "luspo":
            yield f"loss=preset/liger/{self.loss_type}"
        else:
            yield from ("loss=preset/liger/gspo", *MEANS[self.loss_type])
        if self.loss_type == "dr_grpo":
            yield f"++loss.aggregation.length={LONGEST}"

    def _policy_options(self) -> Iterator[str]:
        if self.loss_type == "cispo":
            yield f"loss.policy_loss_cfg.weight_max={CEILING}"
        elif self.loss_type in CLIPPED:
            yield from (f"loss.policy_loss_cfg.cliprange_{side}={RANGE[f'epsilon_{side}']}" for side in ("low", "high"))
        if self.delta is not None:
            yield f"++loss.policy_loss_cfg.delta={self.delta}"

    def _kl(self) -> Iterator[str]:
        if not self.beta:
            yield "kl=none"
            return
        yield f"loss.kl_loss_coef={self.beta}"
        if self.corrects_kl:
            yield from ("loss.kl_gradient=is_corrected", f"loss.kl_ratio_level={self.level}")

    def _weights(self) -> Iterator[str]:
        if self.weights and self.loss_type == "vespo":
            largest = WEIGHT_MAX if self.weights == "token" else "null"
            yield "++loss.policy_loss_cfg.use_rollout_weight=true"
            yield f"++loss.policy_loss_cfg.rollout_weight_max={largest}"
        elif self.weights:
            reduction = ", reduction: sum" if self.weights == "sequence" else ""
            unit = f"granularity: {self.weights}{reduction}"
            yield f"+loss.correction.vllm={{{unit}, action: clamp_upper, upper: {WEIGHT_MAX}, max_log_ratio: null}}"


TRITON = {
    str(arguments): arguments
    for arguments in (Arguments("dapo", beta=0.04), Arguments("grpo", "sequence", 0.04), Arguments("cispo"))
}
"""Cases of its Triton kernel, which is slow in Triton's interpreter."""


def batch(dtype: torch.dtype, *, is_full: bool = False, temperature: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Return hidden states [B, T, D], a head [V, D], advantages [B], and [B, T]: labels, mask, log-probabilities.

    One row has a tool's result inside, one no scored token; with `is_full` every position is scored.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight = noise(ROWS, LENGTH, WIDTH), noise(VOCABULARY, WIDTH) / WIDTH**0.5
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    logprobs = scored(hidden, weight, labels, temperature)
    mask = torch.arange(LENGTH) < torch.tensor([9, 5, 0, 7])[:, None]
    mask[0, 3:5] = False
    old = logprobs + 0.3 * noise(ROWS, LENGTH)
    fields = {
        "hidden": hidden,
        "weight": weight,
        "advantages": torch.tensor([1.0, -0.6, 0.3, -1.4], dtype=torch.float64),
        "old_logprobs": old,
        "ref_logprobs": logprobs + 0.5 * noise(ROWS, LENGTH),
        "rollout_logprobs": old + 0.2 * noise(ROWS, LENGTH),
    }
    rounded = {name: values.to(dtype) for name, values in fields.items()}
    return rounded | {"labels": labels, "mask": mask | is_full}


def scored(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities [B, T] of `labels` in nats."""
    logits = hidden @ weight.T / temperature
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def rollout_weights(arguments: Arguments, given: dict[str, Tensor]) -> Tensor | None:
    """Return the weights that TRL would pass to Liger, [B, T] or [B, 1]; 1 where nothing is scored."""
    log_ratio = (given["old_logprobs"] - given["rollout_logprobs"]).masked_fill(~given["mask"], 0.0)
    if arguments.weights is None:
        return None
    if arguments.weights == "token":
        return log_ratio.exp().clamp(max=WEIGHT_MAX)
    weights = log_ratio.sum(-1, keepdim=True).exp()
    # VESPO here has a cap for the weight of a token, none for that of a sequence.
    return weights if arguments.loss_type == "vespo" else weights.clamp(max=WEIGHT_MAX)


def leaves(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return hidden states and head with gradients of their own."""
    return given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()


def with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Return loss, gradient of the hidden states and of the head."""
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def of_ours(arguments: Arguments, given: dict[str, Tensor]) -> list[Tensor]:
    """Return loss and gradients of `LossRunner`."""
    hidden, weight = leaves(given)
    runner = runner_of(*arguments.ours())
    fields = {name: given[name] for name in ("advantages", "old_logprobs")}
    fields |= {"ref_logprobs": given["ref_logprobs"]} if arguments.beta else {}
    fields |= {"rollout_logprobs": given["rollout_logprobs"]} if arguments.weights else {}
    labels = given["labels"].masked_fill(~given["mask"], -100)
    result = runner(hidden, weight, shifted_labels=labels, **fields)
    return with_gradients(result.loss, hidden, weight)
