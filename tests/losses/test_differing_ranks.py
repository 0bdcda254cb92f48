"""Ranks of one step with different losses are told so in the step's one exchange."""

from __future__ import annotations

import pytest
import torch

from tests.processes import run_processes
from toolkit import ConfigError, GRPOLossConfig, RLLossContextInputItem, step_weights

WORDS = {
    "aggregation": ({"aggregation": "seq_mean_token_mean"}, "aggregation is .*token_mean.* on rank 0; .*on rank 1"),
    "another term": ({"use_kl_loss": True, "kl_loss_type": "k3"}, "kl_loss_type is None on rank 0; 'k3' on rank 1"),
    "coefficient": ({"positive_nll_coef": 0.1}, "positive_nll_coef is 0 on rank 0; 0.1 on rank 1"),
}
SAME = {"mode": "chunk", "chunk_size": 7}
"""Settings that may differ: they change no number."""


def _item() -> RLLossContextInputItem:
    return RLLossContextInputItem(
        shifted_labels=torch.tensor([[1, 2, -100]]), advantages=torch.ones(1, 3), ref_logprobs=-torch.ones(1, 3)
    )


def _differ(rank: int, world: int) -> None:
    for changes, words in WORDS.values():
        cfg = GRPOLossConfig(**(changes if rank else {}))
        with pytest.raises(ConfigError, match=words):
            cfg.loss_ctx_cls.build_batches_loss_kwargs([_item()], cfg)
    with pytest.raises(ConfigError, match=r"aggregation of loss is .*token_sum.* on rank 0; .*token_mean.* on rank 1"):
        step_weights([_item()], "token_mean" if rank else "token_sum")
    cfg = GRPOLossConfig(**(SAME if rank else {}))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([_item()], cfg)
    assert kwargs.loss_weight is not None
    assert kwargs.loss_weight.sum().item() == pytest.approx(1.0)  # times 2 ranks, over 4 tokens of which 2 are here


@pytest.mark.dist
def test_ranks_with_different_losses_are_told_so() -> None:
    run_processes(2, _differ)
