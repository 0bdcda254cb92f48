"""KL(policy || reference) in the training loop: subtracted from rewards, with a coefficient that follows a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from toolkit.functional.kl import kl_estimate
from toolkit.functional.kl_control import AdaptiveKL
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.metrics import Mean, Metric
from toolkit.training.config import KLControlConfig


class KLPenalty:
    """The KL penalty of a run; its coefficient is that of the reward's KL, else that of the loss's."""

    def __init__(self, control: KLControlConfig, loss_cfg: BaseLossConfig) -> None:
        self.control = control
        in_loss = isinstance(loss_cfg, BaseRLLossConfig) and loss_cfg.needs_reference
        self.needs_reference = control.reward_type is not None or in_loss
        start = control.reward_coef if control.reward_type is not None else getattr(loss_cfg, "kl_loss_coef", 0.0)
        self.controller = (
            None if control.target is None else AdaptiveKL(start, target=control.target, horizon=control.horizon)
        )

    @property
    def reward_coef(self) -> float:
        """The coefficient of the KL in the reward now."""
        return self.control.reward_coef if self.controller is None else self.controller.coef

    def loss_config(self, loss_cfg: BaseLossConfig) -> BaseLossConfig:
        """Return the config of the loss with its current coefficient."""
        is_in_reward = self.control.reward_type is not None
        if self.controller is None or is_in_reward or not isinstance(loss_cfg, BaseRLLossConfig):
            return loss_cfg
        return loss_cfg.model_copy(update={"kl_loss_coef": self.controller.coef})

    @torch.no_grad()
    def off_rewards(
        self, rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, is_scored: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Subtract coefficient x KL of each completion from its reward.

        Args:
            rewards: [P, G] on the CPU, of P x G completions.
            logprobs: [P x G, T] log-probabilities of the policy that sampled.
            ref_logprobs: [P x G, T] those of the reference.
            is_scored: [P x G, T] bool; other positions may hold anything.
        """
        assert self.control.reward_type is not None
        logprobs, ref_logprobs = (values.where(is_scored, 0.0).double() for values in (logprobs, ref_logprobs))
        kl = kl_estimate(logprobs, ref_logprobs, self.control.reward_type).where(is_scored, 0.0).sum(-1).cpu()
        penalised = rewards - self.reward_coef * kl.to(rewards.dtype).view(rewards.shape)
        return penalised, {"kl_completion": Mean.of(kl), "reward_with_kl": Mean.of(penalised[penalised.isfinite()])}

    def observe(self, metrics: Mapping[str, float], num_completions: int) -> dict[str, float]:
        """Adapt the coefficient to the `metrics` of a step, over all processes; return what to report.

        They have ``kl_completion`` with the KL in the reward, else ``kl_ref`` in nats a token.
        """
        if self.controller is None:
            return {}
        used = self.controller.coef
        if self.control.reward_type is not None:
            observed = metrics["kl_completion"]
        else:
            observed = metrics["kl_ref"] * metrics["completion_tokens"]
        if observed == observed:  # NaN: nothing was scored in this step
            self.controller = self.controller.updated(observed, num_completions)
        return {"kl_coef": used}

    def state(self) -> dict[str, float] | None:
        """Return what a checkpoint keeps."""
        return None if self.controller is None else asdict(self.controller)

    def restore(self, state: Mapping[str, float] | None) -> None:
        """Take the coefficient of a checkpoint; target and horizon are those of this run."""
        if self.controller is not None and state is not None:
            self.controller = AdaptiveKL(state["coef"], target=self.controller.target, horizon=self.controller.horizon)
