"""The GRPO loss: hand-worked numbers, masks, edges, and agreement of both modes for every registered policy loss."""

import math

import pytest
import torch

from tests.conftest import random_head, random_item
from tests.losses.evaluation import evaluate
from toolkit import ConfigError, DataError, GRPOLossConfig, GRPOLossContext, RLLossContextInputItem, errors
from toolkit.functional.policy.registry import policy_loss, policy_loss_names

KL_TYPES = [None, "k1", "abs", "k2", "k3"]
CHUNK_SIZES = [1, 4, 13, 1024]
ONE_AT_A_TIME = [
    *((name, KL_TYPES[i % 5], CHUNK_SIZES[i % 4]) for i, name in enumerate(policy_loss_names())),
    *(("vanilla", kl, 4) for kl in (*KL_TYPES, "kl", "mse", "low_var_kl")),
    *((name, None, size) for name in ("vanilla", "gspo", "real") for size in CHUNK_SIZES),
]
"""Every loss, every KL and every chunk size; what they do together is drawn in the matrix of layouts."""

NOT_OF_THE_BATCH = [name for name in policy_loss_names() if policy_loss(name).scope != "batch"]
"""The others take statistics of a micro-batch, by definition."""


def config(policy_loss: str = "vanilla", kl: str | None = None, **rest) -> GRPOLossConfig:
    return GRPOLossConfig(
        policy_loss_cfg={"loss_type": policy_loss},
        use_kl_loss=kl is not None,
        kl_loss_type=kl,
        kl_loss_coef=0.1,
        **rest,
    )


def one_token(advantage: float, old: float, **fields) -> tuple[RLLossContextInputItem, tuple]:
    """A head of two equal classes: log pi = -log 2 whatever the hidden state."""
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor([[0]]),
        advantages=torch.tensor([[advantage]]),
        old_logprobs=torch.tensor([[old]]),
        **fields,
    )
    hidden = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    return item, (hidden, weight, torch.zeros(2, dtype=torch.float64, requires_grad=True))


def test_by_hand() -> None:
    # ratio = (1/2) / (1/3) = 1.5 with A = 1: clipped at 1.2. KL k3 to a reference of probability 1/4: -1/2 + log 2.
    item, head = one_token(1.0, math.log(1 / 3), ref_logprobs=torch.tensor([[math.log(1 / 4)]]))
    loss, _, metrics = evaluate(config(kl="k3"), [item], [head])
    assert loss.item() == pytest.approx(-1.2 + 0.1 * (math.log(2) - 0.5), rel=1e-6)
    assert metrics["ratio"] == pytest.approx(1.5, rel=1e-6)
    assert metrics["clip_fraction_high"] == 1.0
    assert metrics["kl_ref"] == pytest.approx(math.log(2) - 0.5, rel=1e-6)
    assert metrics["kl_old"] == pytest.approx(0.5 - math.log(1.5), rel=1e-6)
    assert metrics["active_tokens"] == 1


def test_clamped_log_ratios_are_counted() -> None:
    # REQ-12: two tokens, one of them 99 nats from where it was.
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor([[0, 0]]),
        advantages=torch.ones(2),
        old_logprobs=torch.tensor([[-100.0, -1.0]]),
    )
    head = torch.zeros(1, 2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    _, _, metrics = evaluate(config(), [item], [(*head, torch.zeros(2, requires_grad=True))])
    assert metrics["log_ratio_clamped"] == 0.5
    assert metrics["ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)


def test_entropy_metric_by_hand() -> None:
    item, head = one_token(1.0, math.log(1 / 2))
    _, _, metrics = evaluate(config(use_entropy_metric=True), [item], [head])
    assert metrics["entropy"] == pytest.approx(math.log(2))


def test_on_policy_loss_is_zero_but_its_gradient_is_not() -> None:
    # R20, with logits tanh-free: A = [1, -1] gives loss 0 and d loss / d logp = [-0.5, 0.5].
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[0, 1]]), advantages=torch.tensor([[1.0, -1.0]]))
    hidden = torch.zeros(1, 2, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    loss, (grad, *_), _ = evaluate(
        config(), [item], [(hidden, weight, torch.zeros(2, dtype=torch.float64, requires_grad=True))]
    )
    # d logp_0 / d h = 1 - p_0 = 0.5 for label 0 and -p_0 = -0.5 for label 1.
    assert loss.item() == 0.0
    assert grad.flatten().tolist() == pytest.approx([-0.25, -0.25])


@pytest.mark.parametrize(("policy_loss", "kl", "chunk_size"), sorted(set(ONE_AT_A_TIME), key=str))
def test_chunk_equals_eager(policy_loss: str, kl: str | None, chunk_size: int) -> None:
    item, head = random_item(), random_head()
    if policy_loss in ("rollout_is", "vespo"):  # so far off-policy they would leave nearly nothing
        now = torch.nn.functional.linear(*head).log_softmax(-1).detach()
        now = now.gather(-1, item.shifted_labels.clip(min=0).unsqueeze(-1)).squeeze(-1)
        near = now + 0.1 * torch.randn_like(now)
        item = item.replace(old_logprobs=near, rollout_logprobs=near)
    eager, eager_grads, eager_metrics = evaluate(config(policy_loss, kl, use_entropy_metric=True), [item], [head])
    cfg = config(policy_loss, kl, use_entropy_metric=True, mode="chunk", chunk_size=chunk_size)
    chunked, chunked_grads, chunked_metrics = evaluate(cfg, [item], [head])
    assert abs(eager.item()) > 1e-4
    torch.testing.assert_close(chunked, eager, rtol=1e-12, atol=0)
    for ours, theirs in zip(chunked_grads, eager_grads, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert chunked_metrics == pytest.approx(eager_metrics, rel=1e-12)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize(
    ("policy_loss", "garbage"),
    [
        *((name, math.nan) for name in policy_loss_names()),
        *((name, garbage) for name in ("vanilla", "gspo") for garbage in (math.inf, -math.inf, 1e30)),
    ],
)
def test_masked_positions_may_hold_anything(policy_loss: str, mode: str, garbage: float) -> None:
    # REQ-4: bit-identical to zeros, gradients included.
    item, (hidden, weight, bias) = random_item(), random_head()
    masked = item.shifted_labels == -100
    cfg = config(policy_loss, "k3", mode=mode, chunk_size=5)
    results = []
    for filling in (0.0, garbage):
        filled = {
            # Groups are integers and say which sequences belong together, scored or not.
            name: value if name == "group_ids" else value.masked_fill(masked, filling)
            for name, value in item.tensors()
            if name != "shifted_labels"
        }
        states = hidden.detach().masked_fill(masked.unsqueeze(-1), filling).requires_grad_()
        results.append(
            evaluate(
                cfg, [RLLossContextInputItem(shifted_labels=item.shifted_labels, **filled)], [(states, weight, bias)]
            )
        )
    clean, dirty = results
    assert torch.equal(clean[0], dirty[0])
    for ours, theirs in zip(clean[1], dirty[1], strict=True):
        assert torch.equal(ours, theirs)
    assert dirty[1][0][masked].abs().sum() == 0


@pytest.mark.parametrize("policy_loss", policy_loss_names())
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_nothing_scored_gives_zero_with_a_live_graph(policy_loss: str, mode: str) -> None:
    # R19
    item = random_item().replace(shifted_labels=torch.full((2, 13), -100))
    loss, grads, metrics = evaluate(config(policy_loss, "k3", mode=mode, chunk_size=5), [item], [random_head()])
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], config())
    assert torch.equal(kwargs.loss_weight, torch.zeros_like(kwargs.loss_weight))  # not NaN: own losses multiply by it
    assert loss.item() == 0.0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert metrics["active_tokens"] == 0
    assert math.isnan(metrics["ratio"])


@pytest.mark.parametrize("policy_loss", NOT_OF_THE_BATCH)
@pytest.mark.parametrize("lengths", [[8], [2, 6], [1] * 8, [3, 5]])
def test_micro_batches_equal_one_batch(policy_loss: str, lengths: list[int]) -> None:
    # R1: eight rows cut in any way.
    whole = random_item((8, 6)).replace(group_ids=torch.arange(8).unsqueeze(-1))
    hidden, weight, bias = random_head((8, 6))
    cfg = config(policy_loss, "k3")
    loss, grads, metrics = evaluate(cfg, [whole], [(hidden, weight, bias)])
    parts = [
        RLLossContextInputItem(**{name: value.split(lengths)[i] for name, value in whole.tensors()})
        for i in range(len(lengths))
    ]
    leaves = [part.detach().requires_grad_() for part in hidden.split(lengths)]
    split_loss, split_grads, split_metrics = evaluate(cfg, parts, [(leaf, weight, bias) for leaf in leaves])
    torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=0)
    *hidden_grads, weight_grad, bias_grad = split_grads
    for ours, theirs in zip([torch.cat(hidden_grads), weight_grad, bias_grad], grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert split_metrics == pytest.approx(metrics, rel=1e-12)


def test_token_mean_over_micro_batches_by_hand() -> None:
    # R1: token losses [1, 1] and [3] * 6 have mean 2.5; the mean of the means would be 2.0.
    heads, items = [], []
    weight, bias = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, requires_grad=True)
    for tokens, advantage in ((2, -1.0), (6, -3.0)):
        items.append(
            RLLossContextInputItem(
                shifted_labels=torch.zeros(1, tokens, dtype=torch.int64), advantages=torch.full((tokens,), advantage)
            )
        )
        heads.append((torch.ones(1, tokens, 1, requires_grad=True), weight, bias))
    assert evaluate(config(), items, heads)[0].item() == pytest.approx(2.5)


def test_packed_equals_padded() -> None:
    item, (hidden, weight, bias) = random_item((3, 4)), random_head((3, 4))
    packed = RLLossContextInputItem(**{name: value.reshape(1, -1) for name, value in item.tensors()})
    states = hidden.detach().reshape(1, 12, -1).requires_grad_()
    padded_loss, padded_grads, _ = evaluate(config(kl="k3"), [item], [(hidden, weight, bias)])
    packed_loss, packed_grads, _ = evaluate(
        config(kl="k3"), [packed], [(states, weight, bias)], [torch.tensor([0, 4, 8, 12])]
    )
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(packed_grads[0].reshape(3, 4, -1), padded_grads[0], rtol=1e-12, atol=1e-15)


def test_scaling_advantages_scales_the_loss() -> None:
    item, head = random_item(), random_head()
    loss, _, _ = evaluate(config(), [item], [head])
    doubled, _, _ = evaluate(config(), [item.replace(advantages=2 * item.advantages)], [head])
    torch.testing.assert_close(doubled, 2 * loss, rtol=1e-12, atol=0)


def test_kl_coefficient_changes_the_gradient() -> None:
    # REQ-18
    item, head = random_item(), random_head()
    without = evaluate(config(), [item], [head])[1][0]
    with_kl = evaluate(config(kl="k3"), [item], [head])[1][0]
    assert (without - with_kl).abs().max() > 1e-4


def test_bf16_inputs_give_an_fp32_loss_and_bf16_gradients() -> None:
    item = random_item(dtype=torch.float32)
    hidden, weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in random_head(dtype=torch.float32))
    for mode in ("eager", "chunk"):
        cfg = config(kl="k3", mode=mode, chunk_size=4)
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        loss, _ = GRPOLossContext(cfg, kwargs).forward(hidden, weight, bias)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, weight)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"advantages": None}, "advantages is missing"),
        ({"ref_logprobs": None}, r"ref_logprobs is missing.*use_kl_loss"),
    ],
)
def test_missing_fields(change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        GRPOLossContext.build_batches_loss_kwargs([random_item().replace(**change)], config(kl="k3"))


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_non_finite_at_a_scored_position_is_named(name: str, value: float) -> None:
    item = random_item()
    row, position = (item.shifted_labels != -100).nonzero()[3].tolist()
    broken = getattr(item, name).clone()
    broken[row, position] = value
    with pytest.raises(DataError, match=rf"data_batches\[0\]\.{name}\[{row}, {position}\] = "):
        GRPOLossContext.build_batches_loss_kwargs([item.replace(**{name: broken})], config(kl="k3"))


@pytest.mark.parametrize("label", [11, 99, -1, -101])
def test_labels_outside_the_vocabulary(label: int) -> None:
    item = random_item()
    labels = item.shifted_labels.clone()
    labels[1, 5] = label
    cfg = config()
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item.replace(shifted_labels=labels)], cfg)
    with pytest.raises(DataError, match=rf"shifted_labels\[1, 5\] = {label} lies outside the vocabulary of 11"):
        GRPOLossContext(cfg, kwargs).forward(*random_head())


@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
def test_wrong_shapes(which: str) -> None:
    hidden, weight, bias = random_head()
    wrong = {"hidden": hidden[:, :-1], "weight": weight[:, :-1], "bias": bias[:-1]}
    cfg = config()
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([random_item()], cfg)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias} | {which: wrong[which]}
    with pytest.raises(DataError, match=which):
        GRPOLossContext(cfg, kwargs).forward(inputs["hidden"], inputs["weight"], inputs["bias"])


def test_kl_without_an_estimator_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="kl_loss_type"):
        GRPOLossConfig(use_kl_loss=True)


def test_an_estimator_without_kl_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())  # an earlier test may have heard it
    with pytest.warns(UserWarning, match="no effect"):
        GRPOLossConfig(kl_loss_type="k3")


@pytest.mark.parametrize(
    "wrong", [{"mode": "chnk"}, {"chunk_size": 0}, {"kl_loss_coef": -1}, {"mode": "chunk", "chunk_size": None}]
)
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GRPOLossConfig(**wrong)


def test_inputs_are_not_changed() -> None:
    item, head = random_item(), random_head()
    copies = [value.clone() for _, value in item.tensors()], [tensor.detach().clone() for tensor in head]
    evaluate(config(kl="k3", mode="chunk", chunk_size=3), [item], [head])
    assert all(torch.equal(a, b) for (_, a), b in zip(item.tensors(), copies[0], strict=True))
    assert all(torch.equal(a.detach(), b) for a, b in zip(head, copies[1], strict=True))
