"""Low precision, autocast, loss scaling and live graphs: eager and chunk must still agree."""

import pytest
import torch
from torch import Tensor

from tests.conftest import random_head, random_item
from toolkit import (
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    ConfigError,
    DataError,
    GRPOLossConfig,
    GRPOLossContext,
    LossRunner,
    register_policy_loss,
)


def gradients(mode: str, head: tuple, fields: dict, scale: float = 1.0, **options) -> list[Tensor]:
    runner = LossRunner(GRPOLossConfig(mode=mode, chunk_size=4, **options))
    loss = runner(*head, **fields).loss
    return list(torch.autograd.grad(scale * loss, [tensor for tensor in head if tensor.requires_grad]))


def test_fields_with_a_live_graph_are_constants() -> None:
    # A live old_logprobs would cancel the policy's own gradient.
    item, head = random_item(), random_head()
    fields = dict(item.tensors())
    expected = gradients("eager", head, fields)
    for name in ("advantages", "old_logprobs"):
        live = {**fields, name: fields[name] + 0 * head[0].sum(-1)}
        for mode in ("eager", "chunk"):
            for ours, theirs in zip(gradients(mode, head, live), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
def test_fp16_with_a_loss_scale(scale: float) -> None:
    # 65536 is inf in fp16: the gradients are scaled before they are rounded.
    fields = dict(random_item(dtype=torch.float32).tensors())
    head = tuple(tensor.detach().half().requires_grad_() for tensor in random_head(dtype=torch.float32))
    for ours, theirs in zip(
        gradients("chunk", head, fields, scale), gradients("eager", head, fields, scale), strict=True
    ):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=2e-2, atol=2e-3 * float(theirs.float().abs().max())
        )


@pytest.fixture
def _sequence_loss() -> None:

    @register_policy_loss("centred", scope="sequence")
    def centred(t):
        return -t.ratio() * (t.advantages - t.segment_mean(t.advantages))


@pytest.mark.usefixtures("_sequence_loss")
@pytest.mark.parametrize("policy_loss", ["vanilla", "centred"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(policy_loss: str, hidden_dtype: torch.dtype) -> None:
    # bf16 logits have 8 bits: the two modes round the same numbers, in another order of summation.
    fields = dict(random_item(dtype=torch.float32).tensors())
    hidden, weight, bias = random_head(dtype=torch.float32)
    head = hidden.detach().to(hidden_dtype).requires_grad_(), weight, bias
    found = []
    for mode in ("eager", "chunk"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runner = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": policy_loss}, mode=mode, chunk_size=4))
            loss = runner(*head, **fields).loss
        found.append(torch.autograd.grad(loss, head))
    for eager, chunked in zip(*found, strict=True):
        assert eager.abs().max() > 1e-3
        torch.testing.assert_close(
            chunked.float(), eager.float(), rtol=2e-2, atol=2e-2 * float(eager.float().abs().max())
        )


def test_mixed_dtypes_outside_autocast_are_named() -> None:
    hidden, weight, bias = random_head(dtype=torch.float32)
    with pytest.raises(DataError, match=r"hidden_states are torch.bfloat16, head_weight is torch.float32"):
        LossRunner(GRPOLossConfig())(hidden.bfloat16(), weight, bias, **dict(random_item().tensors()))


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_temperature_is_that_of_the_sampling(mode: str) -> None:
    # R7: logits [2, 1, 0, -1] at T = 0.6 give log-probability -0.2081 to the first; log_softmax / T would give -0.7336.
    bias = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    hidden = torch.zeros(1, 2, 1, dtype=torch.float64)
    cfg = GRPOLossConfig(temperature=0.6, mode=mode, chunk_size=1)
    result = LossRunner(cfg)(
        hidden,
        torch.zeros(4, 1, dtype=torch.float64),
        bias,
        shifted_labels=torch.tensor([[0, 0]]),
        advantages=1.0,
        old_logprobs=torch.tensor([[-0.2081, -0.2081]]),
    )
    assert result.metrics["ratio"] == pytest.approx(1.0, abs=1e-4)


def test_chunks_hold_chunk_size_tokens_whatever_the_number_of_rows() -> None:
    seen = []

    class Watching(GRPOLossContext):
        def loss_fn(self, hidden_states, head_weight, head_bias, loss_kwargs):
            seen.append(hidden_states.shape[:-1].numel())
            return super().loss_fn(hidden_states, head_weight, head_bias, loss_kwargs)

    item, head = random_item((8, 5)), random_head((8, 5))
    cfg = GRPOLossConfig(mode="chunk", chunk_size=7)
    (kwargs,) = Watching.build_batches_loss_kwargs([item], cfg)
    Watching(cfg, kwargs).forward(*head)
    scored = int((item.shifted_labels != -100).sum())
    assert max(seen) - min(seen) <= 1
    assert max(seen) <= 7
    assert sum(seen) == scored


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda loss, extra: loss, "return \\(loss, extra\\)"),
        (lambda loss, extra: (loss.expand(3), extra), "returned a loss of \\[3\\]"),
    ],
)
def test_what_a_loss_fn_returns_is_checked_in_both_modes(mode: str, returned, words: str) -> None:
    class Wrong(GRPOLossContext):
        def loss_fn(self, *args):
            return returned(*super().loss_fn(*args))

    cfg = GRPOLossConfig(mode=mode, chunk_size=4)
    (kwargs,) = Wrong.build_batches_loss_kwargs([random_item()], cfg)
    with pytest.raises(DataError, match=words):
        Wrong(cfg, kwargs).forward(*random_head())


def test_only_metrics_are_merged() -> None:
    class Extra(GRPOLossContext):
        def loss_fn(self, *args):
            loss, metrics = super().loss_fn(*args)
            return loss, {**metrics, "raw": torch.ones(3)}

    cfg = GRPOLossConfig(mode="chunk", chunk_size=4)
    (kwargs,) = Extra.build_batches_loss_kwargs([random_item()], cfg)
    _, extra = Extra(cfg, kwargs).forward(*random_head())
    assert "ratio" in extra
    assert "raw" not in extra


def test_fields_that_are_not_read_may_be_incomplete() -> None:
    item, head = random_item(), random_head()
    broken = torch.full((2, 13), torch.nan)
    rollout = item.old_logprobs.clone()
    rollout[:, ::2] = torch.nan
    fields = {**dict(item.tensors()), "ref_logprobs": broken, "rollout_logprobs": rollout}
    result = LossRunner(GRPOLossConfig())(*head, **fields)
    assert result.metrics["rollout_mismatch"] == 0.0


def test_data_batches_must_be_a_list_of_the_right_items() -> None:
    with pytest.raises(DataError, match="give a list"):
        GRPOLossContext.build_batches_loss_kwargs(random_item(), GRPOLossConfig())  # type: ignore[arg-type]
    ce = CELossContextInputItem(shifted_labels=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(DataError, match=r"data_batches\[0\] is a CELossContextInputItem"):
        GRPOLossContext.build_batches_loss_kwargs([ce], GRPOLossConfig())  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"is a RLLossContextInputItem; this loss takes CELossContextInputItem"):
        CELossContext.build_batches_loss_kwargs([random_item()], CELossConfig())  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="takes a GRPOLossConfig, not a CELossConfig"):
        GRPOLossContext.build_batches_loss_kwargs([random_item()], CELossConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("length", [12, 14])
def test_kwargs_of_another_length_are_named(mode: str, length: int) -> None:
    cfg = GRPOLossConfig(mode=mode, chunk_size=5)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([random_item((1, 13))], cfg)
    wrong = kwargs.replace(advantages=torch.ones(1, length))
    with pytest.raises(DataError, match=rf"GRPOLossKwargs.advantages has shape \[1, {length}\]"):
        GRPOLossContext(cfg, wrong).forward(*random_head((1, 13)))
    with pytest.raises(DataError, match="no loss_weight"):
        GRPOLossContext(cfg, kwargs.replace(loss_weight=None)).forward(*random_head((1, 13)))


def test_scored_positions_behind_the_last_boundary() -> None:
    item = random_item((1, 8)).replace(shifted_labels=torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(DataError, match=r"shifted_labels\[0, 6\] is scored, but lies behind the end of cu_seq_lens"):
        GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig(), [torch.tensor([0, 6])])


@pytest.mark.parametrize("bounds", [[0, 8], torch.tensor([0.0, 8.0]), torch.tensor(8)])
def test_boundaries_of_another_kind(bounds) -> None:
    with pytest.raises(DataError, match="one-dimensional integer tensor"):
        GRPOLossContext.build_batches_loss_kwargs([random_item((1, 8))], GRPOLossConfig(), [bounds])
