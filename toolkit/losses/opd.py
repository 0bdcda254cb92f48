"""On-policy distillation: a teacher instead of rewards. Legend: B rows, T positions of a row, N scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.functional.kl_exact import top_k_kl
from toolkit.functional.terms import PolicyTerms
from toolkit.head import TokenScores
from toolkit.losses.calibration import checked_items
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.config_opd import OPDLossConfig
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.grpo_kwargs import GRPOLossKwargs
from toolkit.losses.items import RLLossContextInputItem

__all__ = ["OPDLossConfig", "OPDLossContext"]


class OPDLossContext(GRPOLossContext):
    """``loss = sum_t weight_t importance_t d_t`` with d the policy loss ``opd``, or a divergence from the teacher.

    Variant ``sampled``: an estimate from the sampled token, see `functional.policy.distillation.opd`; variant
    ``top_k``: the divergence over the teacher's candidates, or over the whole vocabulary, whose gradient autograd has
    exactly. The items need no advantages; corrections see 0 where there are none.

    Source: Agarwal et al. 2023, arXiv 2306.13649, with on-policy data throughout; of its generalised Jensen-Shannon
    divergences only the even mixture. Thinking Machines 2025, "On-policy distillation", for ``sampled``.
    """

    cfg_type: ClassVar[type[BaseRLLossConfig]] = OPDLossConfig
    loss_cfg: OPDLossConfig

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[RLLossContextInputItem],
        loss_cfg: OPDLossConfig,  # type: ignore[override]
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[GRPOLossKwargs]:
        """Fill in what distillation does not read, then as `GRPOLossContext`.

        Raises:
            DataError: the teacher's log-probabilities are missing, or a scored position of them holds NaN or inf.
        """
        items = checked_items(data_batches, RLLossContextInputItem, loss_cfg, cls.cfg_type)
        items = [_filled(item, loss_cfg) for item in items]
        return super().build_batches_loss_kwargs(items, loss_cfg, cu_seq_lens_list, sp_mesh)

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


def _filled(item: RLLossContextInputItem, cfg: OPDLossConfig) -> RLLossContextInputItem:
    changes: dict[str, Tensor] = {}
    if item.advantages is None:
        changes["advantages"] = torch.zeros(item.shifted_labels.shape, device=item.shifted_labels.device)
    if cfg.teacher == "reference" and item.ref_logprobs is not None:
        changes["teacher_logprobs"] = item.ref_logprobs
    return item.replace(**changes) if changes else item
