"""The KL term times the ratio of the sequence, as TRL and Liger have it beside GSPO."""

import pytest
import torch

from tests.conftest import random_head, random_item
from tests.losses.evaluation import evaluate
from toolkit import ConfigError, DataError, GRPOLossConfig, GRPOLossContext, RLLossContextInputItem
from toolkit.head import TokenScores

BETA = 0.1
KL = {
    "use_kl_loss": True,
    "kl_loss_type": "k3",
    "kl_loss_coef": BETA,
    "kl_gradient": "is_corrected",
    "kl_ratio_level": "sequence",
}


def config(loss: str = "gspo", **settings) -> GRPOLossConfig:
    options = {"cliprange_low": 0.2, "cliprange_high": 0.2}
    return GRPOLossConfig(
        policy_loss_cfg={"loss_type": loss, **options}, aggregation="seq_mean_token_mean", **{**KL, **settings}
    )


def test_gspo_with_kl_is_trls_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    old, ref, noise = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    old, ref = old / 3 - 3, old / 3 - 3 + ref / 3
    logprobs = (old + noise / 3).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    advantages = torch.tensor([[1.0], [-0.5], [2.0]], dtype=torch.float64)

    lengths = mask.sum(-1, keepdim=True)
    s = (((logprobs - old) * mask).sum(-1, keepdim=True) / lengths).exp()
    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
    loss = -torch.min(s * advantages, s.clamp(0.8, 1.2) * advantages) + BETA * s * kl
    expected = ((loss * mask).sum(-1, keepdim=True) / lengths).mean()
    (expected_grad,) = torch.autograd.grad(expected, logprobs)

    cfg = config()
    item = RLLossContextInputItem(
        shifted_labels=torch.zeros(3, 4, dtype=torch.int64).masked_fill(~mask, -100),
        advantages=advantages,
        old_logprobs=old,
        ref_logprobs=ref,
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    scored = mask.reshape(-1).nonzero().squeeze(-1)
    scores = TokenScores(logprobs.reshape(-1)[scored], None)
    ours, _ = GRPOLossContext(cfg, kwargs).loss_from_scores(scores, kwargs.take(scored))
    (grad,) = torch.autograd.grad(ours, logprobs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["vanilla", "gspo"])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_chunk_holds_the_whole_sequence(loss: str, chunk_size: int) -> None:
    cfg = config(loss)
    assert cfg.scope == "sequence"
    item, head = random_item(), random_head()
    eager, chunked = (
        evaluate(config(loss, mode=mode, chunk_size=chunk_size), [item], [head]) for mode in ("eager", "chunk")
    )
    torch.testing.assert_close(chunked[0], eager[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(chunked[1], eager[1], rtol=1e-11, atol=1e-13)


def test_a_piece_of_a_sequence_is_refused() -> None:
    cfg = config("vanilla")
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([random_item()], cfg)
    assert kwargs.sequence_ids is not None
    hidden, weight, bias = random_head()
    with pytest.raises(DataError, match="or the KL term"):
        GRPOLossContext(cfg, kwargs.chunk(4)[0]).forward(hidden[:, :4], weight, bias)


def test_kwargs_of_the_other_level_are_refused() -> None:
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([random_item()], config("vanilla", kl_ratio_level="token"))
    with pytest.raises(ConfigError, match="kl_ratio_level is 'token', but the context's config has 'sequence'"):
        GRPOLossContext(config("vanilla"), kwargs).forward(*random_head())
