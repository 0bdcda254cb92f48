"""torchtitan's ``BaseLoss`` with a policy loss of this toolkit.

Legend: B rows, L positions of a row (several sequences packed), V vocabulary.

Source: torchtitan 0.3.0, ``components/loss.py`` (``BaseLoss``, ``ChunkedLossWrapper``), ``experiments/rl``: the loss is
a sum over tokens, divided by those with a finite ``generator_logprobs`` in all micro-batches and on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import BaseLoss, compute_logprobs

from toolkit.functional.terms import PolicyTerms
from toolkit.integrations.policy import (
    Trainer,
    loss_of,
    reported_mask,
    terms_of,
    token_losses,
    warn_of_runs,
)
from toolkit.integrations.torchtitan import TESTED
from toolkit.integrations.versions import check_version
from toolkit.losses.policy_metrics import policy_metrics
from toolkit.metrics import Max, Mean

TORCHTITAN = Trainer(
    name="torchtitan",
    example="ToolkitLoss.Config(loss='policy_loss=cispo')",
    decides=(
        ("aggregation", "it divides by the tokens of the step: every token weighs the same"),
        ("kl", "it has no reference policy"),
        ("correction", "ratios are already to the sampler; choose a loss that bounds them (cispo, ipo, dppo_tv)"),
        ("mode", "use ChunkedLossWrapper for chunks"),
    ),
    passes=frozenset({"rollout_logprobs"}),
    aggregation="token_mean",
)


class ToolkitLoss(BaseLoss):
    """A policy loss by its overrides; every ratio is to the generator, and each token weighs the same."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Which loss."""

        loss: str = "policy_loss=vanilla"
        """Overrides as on the command line: ``"policy_loss=cispo policy_loss.weight_max=5"``."""

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        """Choose the loss.

        Args:
            config: with ``loss``.
            compile_config: ignored.

        Raises:
            ConfigError: the loss does not exist, or asks for what torchtitan does itself or does not pass.
        """
        check_version("torchtitan", TESTED)
        self.loss_cfg = loss_of(TORCHTITAN, config.loss)
        warn_of_runs(
            self.loss_cfg,
            TORCHTITAN,
            "train on samples of one turn, and not inside ChunkedLossWrapper, which cuts sequences",
        )

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the share of a micro-batch in the loss of the step, 0-dim, and metrics for a sum over ranks.

        Args:
            pred: [B, L, V] logits of the policy.
            labels: [B, L], shifted.
            global_valid_tokens: tokens of the step with a finite ``generator_logprobs``; None: the result is a sum.
            generator_logprobs: [B, L] in nats, of the sampler; tokens where they are not finite are skipped.
            advantages: [B, L].
            loss_mask: [B, L] bool.
            others: ignored.
        """
        logprobs, cfg = compute_logprobs(pred, labels), self.loss_cfg
        scored = loss_mask.bool()
        mask = reported_mask(cfg, scored, generator_logprobs, "generator_logprobs", drops_missing=True)
        fields = {"advantages": advantages, **dict.fromkeys(("old_logprobs", "rollout_logprobs"), generator_logprobs)}
        terms = terms_of(cfg, logprobs, mask, fields, runs_of=scored)
        divisor = 1.0 if global_valid_tokens is None else global_valid_tokens
        number = torch.as_tensor(divisor, dtype=logprobs.dtype, device=logprobs.device).clamp(min=1)
        loss = token_losses(cfg, terms).sum() / number
        return loss, {"loss/mean": loss.detach(), **_metrics(terms, number)}


@torch.no_grad()
def _metrics(terms: PolicyTerms, number: Tensor) -> dict[str, Tensor]:
    """Return means over the step's tokens, this micro-batch's share of each, and largest values."""
    metrics = {**policy_metrics(terms, None), **terms.reported}
    means = {f"toolkit/{name}/mean": each.num / number for name, each in metrics.items() if isinstance(each, Mean)}
    largest = {f"toolkit/{name}/max": each.largest for name, each in metrics.items() if isinstance(each, Max)}
    return {**means, **largest}
