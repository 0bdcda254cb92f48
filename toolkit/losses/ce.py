"""Cross-entropy on labelled text. Legend: B rows, T positions of a row, N selected tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import DataError
from toolkit.functional.aggregation import Share
from toolkit.head import TokenScores
from toolkit.losses.base import BaseLossKwargs, as_loss_dtype
from toolkit.losses.calibration import (
    aggregated,
    calibrated,
    check_config,
    checked_items,
    counts_here,
    counts_of,
    device_of,
    loss_metric,
    sequence_ids_of_batches,
)
from toolkit.losses.census import Counts, census
from toolkit.losses.config import CELossConfig
from toolkit.losses.items import CELossContextInputItem
from toolkit.losses.scored import ScoredLossContext
from toolkit.losses.shards import given_and_whole
from toolkit.metrics import Mean, Metric, Sum

AGGREGATION_OF = {"token": "token_mean", "sample": "seq_mean_token_mean", "square": "square"}
"""XTuner's names of the reductions of cross-entropy, and ours."""


class CELossKwargs(BaseLossKwargs):
    """Labels and calibrated weights."""


class CELossContext(ScoredLossContext[CELossContextInputItem]):
    """``loss = sum_t weight_t * (-log pi(y_t))``."""

    loss_cfg: CELossConfig
    loss_kwargs: CELossKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[CELossContextInputItem],
        loss_cfg: CELossConfig,
        cu_seq_lens_list: Sequence[Tensor | None] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[CELossKwargs]:
        """Fix the weight of every token of the step; see the base class for the arguments."""
        check_config(loss_cfg, CELossConfig)
        device = device_of(data_batches)
        shares: list[Share] = []
        whole: list[CELossContextInputItem] = []

        def count() -> Counts:
            _, items = given_and_whole(
                lambda: checked_items(data_batches, CELossContextInputItem, loss_cfg, CELossConfig), sp_mesh
            )
            whole.extend(items)
            labels = [item.shifted_labels for item in whole]
            ids = sequence_ids_of_batches(labels, cu_seq_lens_list, ignore_idx=loss_cfg.ignore_idx)
            shares.extend(
                aggregated(labels, ids, AGGREGATION_OF[loss_cfg.loss_reduction], ignore_idx=loss_cfg.ignore_idx)
            )
            own = Counts(counts_of(shares, device))
            return own if counts_here(sp_mesh) else own.uncounted()

        total = census(count, num_numbers=2, has_tables=False, device=device)
        weights = calibrated(shares, total.numbers, gradient_reduction=loss_cfg.gradient_reduction)
        kwargs = [
            CELossKwargs(shifted_labels=item.shifted_labels, loss_weight=own)
            for item, own in zip(whole, weights, strict=True)
        ]
        return kwargs if sp_mesh is None else [own.sp_split(sp_mesh, ignore_idx=loss_cfg.ignore_idx) for own in kwargs]

    def loss_from_scores(self, scores: TokenScores, loss_kwargs: CELossKwargs) -> tuple[Tensor, dict[str, Metric]]:
        """Return the weighted sum of negative log-probabilities and its metrics."""
        if loss_kwargs.loss_weight is None:
            raise DataError("CELossKwargs has no loss_weight; build it with CELossContext.build_batches_loss_kwargs")
        token_losses = -scores.logprobs
        loss = (as_loss_dtype(loss_kwargs.loss_weight, token_losses) * token_losses).sum()
        nll = Mean.of(token_losses)
        total = loss_metric(loss, self.loss_cfg.gradient_reduction)
        return loss, {"loss": total, "nll": nll, "active_tokens": Sum(nll.den)}
