"""TRL's RLOO trainer with a loss of this toolkit.

Source: TRL 1.16.0, ``trl/trainer/rloo_trainer.py``: the leave-one-out advantage and a KL penalty in the reward
(``beta``) are made with the completions; the loss is PPO's clip on the ratio of whole sequences, a mean over the
sequences of each micro-batch. Old log-probabilities are computed for each token and kept as sums of sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import RLOOTrainer

from toolkit.errors import ConfigError
from toolkit.integrations.chosen import chosen_config
from toolkit.integrations.trl.args import TRL
from toolkit.integrations.trl.trainer import ToolkitLossMixin
from toolkit.integrations.window import check_accumulation
from toolkit.losses.config.policy import BaseRLLossConfig

if TYPE_CHECKING:
    Base = Any
else:
    Base = RLOOTrainer


class ToolkitRLOOTrainer(ToolkitLossMixin, Base):
    """TRL's ``RLOOTrainer`` with ``loss=``; see `ToolkitLossMixin`. Without it, RLOO's loss with our head."""

    loss_is_scaled_for_ga = True
    _old: Tensor | None = None
    _is_generating = False

    @staticmethod
    def _chosen(loss: Any, args: Any) -> tuple[BaseRLLossConfig, Any]:
        if args.use_liger_kernel:
            raise ConfigError("use_liger_kernel=True replaces parts of the model that the loss reads; leave it out")
        check_accumulation(args)
        cfg = chosen_config(list(_of_rloo(args)) if loss is None else loss, args, TRL)
        if loss is not None and (args.epsilon, args.epsilon_high or args.epsilon) != (0.2, 0.2):
            raise ConfigError("epsilon has no effect beside loss; write it in loss: policy_loss.cliprange_low=...")
        if cfg.needs_reference:
            raise ConfigError(
                "RLOO has the KL in the reward, by beta; leave kl out of loss, and set beta, such as beta=0.05"
            )
        return cfg, args

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Add the old log-probabilities of each token, [B, C], which TRL sums over sequences."""
        self._old, self._is_generating = None, True
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._is_generating = False
        if self._old is not None:
            output["old_per_token_logps"] = self._old
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL computes, and keep the first of a generation: the policy's; a reference's follows."""
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._is_generating and self._old is None:
            self._old = torch.as_tensor(result[0]).detach()
        return result


def _of_rloo(args: Any) -> Any:
    """Yield the overrides of RLOO's loss; sequences without a token count in its mean, as in TRL."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    yield "policy_loss=rloo_sequence"
    yield f"policy_loss.cliprange_low={args.epsilon}"
    yield f"policy_loss.cliprange_high={high}"
    yield from ("aggregation=seq_mean_token_mean", "loss.aggregation.count_empty=true")
    yield "loss.log_ratio_range=[null,null]"
