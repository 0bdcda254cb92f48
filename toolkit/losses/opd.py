"""On-policy distillation: a teacher instead of rewards. Legend: B rows, T positions of a row, N scored tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.functional.kl import top_k_kl
from toolkit.functional.terms import PolicyTerms
from toolkit.head import TokenScores
from toolkit.losses.config.opd import OPDLossConfig
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.kwargs import GRPOLossKwargs


class OPDLossContext(GRPOLossContext):
    """``loss = sum_t weight_t importance_t d_t`` with d the policy loss ``opd``, or a divergence from the teacher.

    Variant ``sampled``: an estimate from the sampled token, see `functional.policy.distillation.opd`; variant
    ``top_k``: the divergence over the teacher's candidates, or over the whole vocabulary, with autograd's exact
    gradient. The items need no advantages; corrections see 0 where there are none.

    Source: Agarwal et al. 2023, arXiv 2306.13649, with on-policy data throughout; of its generalised Jensen-Shannon
    divergences only the even mixture. Thinking Machines 2025, "On-policy distillation", for ``sampled``.
    """

    cfg_cls = OPDLossConfig
    loss_cfg: OPDLossConfig

    @classmethod
    def completed(cls, item: RLLossContextInputItem, loss_cfg: OPDLossConfig) -> RLLossContextInputItem:
        """Return an item with advantages of 0 if it has none, and with the teacher that the config names."""
        changes: dict[str, Tensor] = {}
        if item.advantages is None:
            changes["advantages"] = torch.zeros(item.shifted_labels.shape, device=item.shifted_labels.device)
        if loss_cfg.teacher == "reference" and item.ref_logprobs is not None:
            changes["teacher_logprobs"] = item.ref_logprobs
        return item.replace(**changes) if changes else item

    def policy_losses(self, terms: PolicyTerms, scores: TokenScores, loss_kwargs: GRPOLossKwargs) -> Tensor:
        """Return the divergence of each token from the teacher, [N]."""
        cfg = self.loss_cfg
        if cfg.variant == "sampled":
            return super().policy_losses(terms, scores, loss_kwargs)
        tail = "drop" if loss_kwargs.candidate_ids is None else cfg.tail
        ours, theirs = self.candidates(scores, loss_kwargs)
        divergence = top_k_kl(ours, theirs, direction=cfg.direction, tail=tail)
        terms.report("teacher_kl", divergence)
        return divergence
