"""OREAL: `GRPOLossContext` with the settings of `OrealLossConfig`. Legend: N+ and N- tokens."""

from __future__ import annotations

from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.losses.grpo import GRPOLossContext


class OrealLossContext(GRPOLossContext):
    """``loss = f+ (w_sft mean+(-log pi) + w_pol mean+(policy loss)) + f- mean-(policy loss) + kl_loss_coef mean(KL)``.

    mean+ is over the N+ tokens with A > 0 and mean- over the N- others, of all micro-batches and ranks; a mean over no
    token is 0. The mean of the KL term is over all tokens. With ``f+ = positive_loss_factor``,
    ``w_sft = pos_sft_loss_weight``, ``w_pol = pos_policy_loss_weight``, ``f- = negative_loss_factor``.

    Source: Lyu et al. 2025, arXiv 2502.06781, as in XTuner's OREAL loss: any policy loss on either side; without the
    paper's token-level reward model, whose weights belong in the advantages. Differs from XTuner where no token has
    A <= 0: the loss there is NaN, here that mean is 0.
    """

    cfg_cls = OrealLossConfig
