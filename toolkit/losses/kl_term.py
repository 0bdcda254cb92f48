"""The KL term of a policy loss, estimated from the sampled tokens."""

from __future__ import annotations

from torch import Tensor

from toolkit.functional.kl import kl_estimate
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.policy import BaseRLLossConfig


def sampled_kl(terms: PolicyTerms, cfg: BaseRLLossConfig) -> Tensor:
    """Return the KL of each token to the reference, [N], with the gradient that the config asks for."""
    assert cfg.kl_loss_type is not None
    log_ratio = None
    if cfg.kl_gradient == "is_corrected":
        log_ratio = terms.logprobs - terms.anchor_logprobs(cfg.kl_anchor)
        log_ratio = log_ratio if cfg.kl_ratio_level == "token" else terms.segment_mean(log_ratio)
    return kl_estimate(
        terms.logprobs,
        terms.require("ref_logprobs"),
        cfg.kl_loss_type,
        gradient=cfg.kl_gradient,
        input_clamp=cfg.kl_input_clamp,
        output_clamp=cfg.kl_output_clamp,
        log_ratio=log_ratio,
        log_ratio_range=terms.log_ratio_range,
        ratio_level=cfg.kl_ratio_level,
    )
