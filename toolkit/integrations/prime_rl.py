"""A policy loss of this toolkit for prime-rl's custom loss.

[trainer.loss]
type = "custom"
import_path = "toolkit.integrations.prime_rl.policy_loss"
kwargs = { loss = "policy_loss=gspo policy_loss.cliprange_high=4e-4" }

Source: prime-rl, ``src/prime_rl/trainer/rl/loss.py``, October 2026: ``LossInputs`` holds one sequence, [T] each, and
the trainer divides the sum of all losses by the number of tokens of the step.
"""

from __future__ import annotations

from typing import Any

import torch

from toolkit.errors import ConfigError, DataError
from toolkit.integrations.policy import Trainer, loss_of, metrics_of, reported_mask, terms_of, token_losses

PRIME_RL = Trainer(
    name="prime-rl",
    example='kwargs = { loss = "policy_loss=gspo" }',
    decides=(
        ("aggregation", "it divides by the tokens of the step: every token weighs the same"),
        ("correction", "ratios are already to the sampler; choose a loss that bounds them (cispo, ipo, dppo_tv)"),
        ("mode", "it computes log-probabilities before the loss is called"),
    ),
    passes=frozenset({"rollout_logprobs", "ref_logprobs", "teacher_logprobs"}),
    aggregation="token_mean",
)


def policy_loss(inputs: Any, *, loss: Any = "policy_loss=vanilla") -> Any:
    """Return prime-rl's ``LossOutputs`` of one sequence: the sum over the tokens of ``loss_mask``, and metrics.

    Every ratio is to the sampler: ``old_logprobs`` and ``rollout_logprobs`` are both ``inference_logprobs``. The
    reference that prime-rl scores with, if any, is the reference of a KL term and the teacher of ``loss=opd``.

    Args:
        inputs: ``LossInputs``: ``trainer_logprobs`` [T] with gradient, ``inference_logprobs``, ``advantages`` [T],
            ``loss_mask`` [T] bool, ``ref_logprobs`` and ``loss_weights`` [T] or None.
        loss: overrides as on the command line, in one string or a list.

    Raises:
        ConfigError: the loss does not exist, or asks for what prime-rl does itself.
        DataError: the loss reads ``ref_logprobs``, or log-probabilities of the sampler that are missing.
    """
    cfg = loss_of(PRIME_RL, loss)
    logprobs, sampled = inputs.trainer_logprobs, inputs.inference_logprobs
    mask = reported_mask(cfg, inputs.loss_mask.bool(), sampled, "inference_logprobs")
    fields = {"old_logprobs": sampled, "rollout_logprobs": sampled, "advantages": inputs.advantages}
    if inputs.ref_logprobs is not None:
        fields |= dict.fromkeys(("ref_logprobs", "teacher_logprobs"), inputs.ref_logprobs)
    elif cfg.use_kl_loss or "teacher_logprobs" in cfg.policy.needs:
        raise DataError(
            "the loss reads ref_logprobs, but this batch has none; choose an algorithm of prime-rl that scores with a "
            "reference (opd), or a loss without a KL term"
        )
    terms = terms_of(cfg, logprobs, mask, fields)
    values = token_losses(cfg, terms)
    if inputs.loss_weights is not None:
        values = values * inputs.loss_weights[mask].to(values.dtype)
    metrics = {f"toolkit/{name}": torch.tensor(value) for name, value in metrics_of(terms).items()}
    return _outputs()(loss=values.sum(), metrics=metrics)


def _outputs() -> Any:
    """Return prime-rl's class of results.

    Raises:
        ConfigError: this prime-rl has none.
    """
    try:
        from prime_rl.trainer.rl.loss import LossOutputs
    except ImportError as error:
        raise ConfigError(
            f"prime_rl.trainer.rl.loss.LossOutputs is missing ({error}); use a prime-rl with custom losses"
        ) from None
    return LossOutputs
