"""KL over candidates or the whole vocabulary, as a term of the GRPO loss: enumeration, chunks, layouts, errors."""

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import random_head, random_labels
from tests.losses.evaluation import assert_same, cut, evaluate
from toolkit import ConfigError, DataError, GRPOLossConfig, GRPOLossContext, LossRunner, RLLossContextInputItem
from toolkit.compose.build import build_loss
from toolkit.compose.tree import check_command_line, compose_config
from toolkit.losses import scored

VOCABULARY, K = 11, 4
TRANSFORMS = [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.5}]


def config(kl: str = "full", coef: float = 1.0, **rest) -> GRPOLossConfig:
    return GRPOLossConfig(use_kl_loss=True, kl_loss_type=kl, kl_loss_coef=coef, **rest)


def distributions(shape: tuple[int, ...], vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(*shape, vocabulary, dtype=torch.float64).log_softmax(-1)


def candidates(logprobs: Tensor, num: int = K) -> tuple[Tensor, Tensor]:
    """Any `num` different tokens, in any order, and their log-probabilities."""
    ids = torch.rand(logprobs.shape).argsort(-1)[..., :num]
    return ids, logprobs.gather(-1, ids)


def an_item(kl: str = "full", shape: tuple[int, int] = (2, 13)) -> RLLossContextInputItem:
    reference = distributions(shape)
    ids, values = candidates(reference) if kl == "top_k" else (None, reference)
    return RLLossContextInputItem(
        shifted_labels=random_labels(shape, VOCABULARY),
        advantages=torch.randn(shape, dtype=torch.float64),
        old_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=torch.float64)).clamp(max=0),
        ref_topk_ids=ids,
        ref_topk_logprobs=values,
    )


def three_tokens(label: int, **candidates_: Tensor) -> tuple[RLLossContextInputItem, tuple]:
    """R13: the policy softmax([1, 0, -1]), its logits being the hidden states, and one token without advantage."""
    hidden = torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor([[label]]), advantages=torch.zeros(1, 1, dtype=torch.float64), **candidates_
    )
    return item, (hidden, weight, torch.zeros(3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_full_is_the_enumerated_kl_and_its_true_gradient(label: int) -> None:
    # R13: KL(softmax([1, 0, -1]) || softmax([0, .5, -.5])), the same whichever token was sampled.
    reference = torch.tensor([[[0.0, 0.5, -0.5]]], dtype=torch.float64).log_softmax(-1)
    item, head = three_tokens(label, ref_topk_logprobs=reference)
    loss, (grad, *_), metrics = evaluate(config(), [item], [head])
    assert loss.item() == pytest.approx(0.270525, abs=1e-6)
    assert metrics["kl_ref"] == pytest.approx(0.270525, abs=1e-6)
    assert grad.flatten().tolist() == pytest.approx([0.33404, -0.24421, -0.08984], abs=1e-5)
    # by enumeration: p_j (log p_j - log q_j - KL)
    p = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).softmax(-1)
    difference = p.log() - reference.flatten()
    torch.testing.assert_close(grad.flatten(), p * (difference - (p * difference).sum()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jensen_shannon"])
def test_top_k_by_hand(direction: str) -> None:
    # Token 0 alone is a candidate: the coin (p, 1 - p) against the coin (q, 1 - q), p = e / (e + 1 + 1/e).
    p, q = math.e / (math.e + 1 + 1 / math.e), 0.25
    item, head = three_tokens(
        2,
        ref_topk_ids=torch.tensor([[[0, -1]]]),
        ref_topk_logprobs=torch.tensor([[[math.log(q), math.nan]]], dtype=torch.float64),
    )

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    mixture = (p + q) / 2
    expected = {"reverse": kl(p, q), "forward": kl(q, p), "jensen_shannon": (kl(p, mixture) + kl(q, mixture)) / 2}
    loss, _, _ = evaluate(config("top_k", kl_direction=direction), [item], [head])
    assert loss.item() == pytest.approx(expected[direction], rel=1e-12)
    if direction == "reverse":
        dropped, _, _ = evaluate(config("top_k", kl_tail="drop"), [item], [head])
        assert dropped.item() == pytest.approx(p * math.log(p / q), rel=1e-12)


def slow(cfg: GRPOLossConfig, item: RLLossContextInputItem, logits: Tensor) -> float:
    """The mean over scored positions of sum p log(p / q), candidate by candidate."""
    values = []
    for row, position in (item.shifted_labels != -100).nonzero().tolist():
        raw = [float(z) * cfg.logit_scale for z in logits[row, position]]
        capped = [z if cfg.softcap is None else cfg.softcap * math.tanh(z / cfg.softcap) for z in raw]
        powers = [math.exp(z / cfg.temperature) for z in capped]
        ids = range(VOCABULARY) if item.ref_topk_ids is None else item.ref_topk_ids[row, position].tolist()
        ours = [powers[i] / sum(powers) for i in ids]
        theirs = [math.exp(q) for q in item.ref_topk_logprobs[row, position].tolist()]
        if item.ref_topk_ids is not None and cfg.kl_tail == "one_bucket":
            ours.append(1 - sum(ours))
            theirs.append(1 - sum(theirs))
        left, right = (ours, theirs) if cfg.kl_direction == "reverse" else (theirs, ours)
        values.append(sum(p * math.log(p / q) for p, q in zip(left, right, strict=True)))
    return sum(values) / len(values)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("kl", "direction", "tail"),
    [("full", "reverse", "one_bucket"), ("full", "forward", "one_bucket")]
    + [("top_k", direction, tail) for direction in ("reverse", "forward") for tail in ("one_bucket", "drop")],
)
def test_against_the_slow_reference(kl: str, direction: str, tail: str, transform: dict) -> None:
    item, (hidden, weight, bias) = an_item(kl), random_head()
    item = item.replace(advantages=torch.zeros_like(item.advantages))  # the policy loss is then 0
    cfg = config(kl, kl_direction=direction, **({"kl_tail": tail} if kl == "top_k" else {}), **transform)
    loss, _, _ = evaluate(cfg, [item], [(hidden, weight, bias)])
    assert loss.item() == pytest.approx(slow(cfg, item, (hidden @ weight.T + bias).detach()), rel=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kl", ["full", "top_k"])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_chunk_equals_eager(kl: str, chunk_size: int, transform: dict) -> None:
    item, head = an_item(kl), random_head()
    shared = {"coef": 0.1, "use_entropy_metric": True, "entropy_coef": 0.01, **transform}
    eager = evaluate(config(kl, **shared), [item], [head])
    assert_same(evaluate(config(kl, mode="chunk", chunk_size=chunk_size, **shared), [item], [head]), eager)


@pytest.mark.parametrize("kl", ["full", "top_k"])
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_packed_equals_padded(kl: str, mode: str) -> None:
    cfg = config(kl, coef=0.1, mode=mode, chunk_size=5, aggregation="seq_mean_token_mean")
    item, (hidden, weight, bias) = an_item(kl, (3, 4)), random_head((3, 4))
    packed = RLLossContextInputItem(**{name: value.reshape(1, 12, *value.shape[2:]) for name, value in item.tensors()})
    states = hidden.detach().reshape(1, 12, -1).requires_grad_()
    expected = evaluate(cfg, [item], [(hidden, weight, bias)])
    loss, grads, metrics = evaluate(cfg, [packed], [(states, weight, bias)], [torch.tensor([0, 4, 8, 12])])
    assert_same((loss, [grads[0].reshape(3, 4, -1), *grads[1:]], metrics), expected)


@pytest.mark.parametrize("kl", ["full", "top_k"])
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_micro_batches_equal_one_batch(kl: str, mode: str) -> None:
    whole, (hidden, weight, bias) = an_item(kl, (8, 6)), random_head((8, 6))
    cfg, lengths = config(kl, coef=0.1, mode=mode, chunk_size=4), [1, 5, 2]
    expected = evaluate(cfg, [whole], [(hidden, weight, bias)])
    parts, leaves = cut(whole, hidden, lengths)
    loss, grads, metrics = evaluate(cfg, parts, [(leaf, weight, bias) for leaf in leaves])
    assert_same((loss, [torch.cat(grads[:-2]), *grads[-2:]], metrics), expected)


@pytest.mark.parametrize("kl", ["full", "top_k"])
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_masked_positions_may_hold_anything(kl: str, mode: str) -> None:
    item, head = an_item(kl), random_head()
    masked = item.shifted_labels == -100
    filled = {
        name: value.masked_fill(
            masked.reshape(*masked.shape, *[1] * (value.dim() - 2)), math.nan if value.is_floating_point() else 999
        )
        for name, value in item.tensors()
        if name != "shifted_labels"
    }
    cfg = config(kl, mode=mode, chunk_size=5)
    clean, dirty = (evaluate(cfg, [own], [head]) for own in (item, item.replace(**filled)))
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(clean[1], dirty[1], strict=True))


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_nothing_scored_gives_zero_with_a_live_graph(mode: str) -> None:
    item = an_item("top_k").replace(shifted_labels=torch.full((2, 13), -100))
    loss, grads, _ = evaluate(config("top_k", mode=mode, chunk_size=5), [item], [random_head()])
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_chunk_mode_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], scored.eager_scores

    def spy(hidden: Tensor, *args, **kwargs):
        sizes.append(len(hidden))
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(scored, "eager_scores", spy)
    item, head = an_item("top_k"), random_head()
    cfg = config("top_k", mode="chunk", chunk_size=4)
    evaluate(cfg, [item], [head])
    assert sum(sizes) == int((item.shifted_labels != -100).sum())
    assert max(sizes) <= 4
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    assert GRPOLossContext(cfg, kwargs).explain(*head).name == "general"


def test_candidates_in_any_order_and_absent_ones_change_nothing() -> None:
    item, head = an_item("top_k"), random_head()
    order = torch.rand(2, 13, K + 2).argsort(-1)
    ids = torch.cat([item.ref_topk_ids, torch.full((2, 13, 2), -1)], -1).gather(-1, order)
    values = torch.cat([item.ref_topk_logprobs, torch.zeros(2, 13, 2, dtype=torch.float64)], -1).gather(-1, order)
    shuffled = item.replace(ref_topk_ids=ids, ref_topk_logprobs=values)
    for tail in ("one_bucket", "drop"):
        cfg = config("top_k", kl_tail=tail)
        first, second = (evaluate(cfg, [own], [head]) for own in (item, shuffled))
        torch.testing.assert_close(second[0], first[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(second[1][0], first[1][0], rtol=1e-12, atol=1e-15)


def test_all_tokens_as_candidates_are_the_whole_vocabulary() -> None:
    full, head = an_item("full"), random_head()
    ids, values = candidates(full.ref_topk_logprobs, VOCABULARY)
    listed = full.replace(ref_topk_ids=ids, ref_topk_logprobs=values)
    expected, _, _ = evaluate(config("full"), [full], [head])
    assert evaluate(config("top_k", kl_tail="drop"), [listed], [head])[0] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("policy_loss", ["gspo", "vespo"])
def test_sequence_losses_are_served_in_eager_mode_only(policy_loss: str) -> None:
    loss, _, _ = evaluate(config(policy_loss_cfg={"loss_type": policy_loss}), [an_item()], [random_head()])
    assert loss.isfinite()
    with pytest.raises(ConfigError, match=rf"policy loss '{policy_loss}' looks at more than one.*mode='eager'"):
        config(policy_loss_cfg={"loss_type": policy_loss}, mode="chunk")


class Mesh:
    """As much of a mesh as splitting asks for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def size(self) -> int:
        return 2

    def get_local_rank(self) -> int:
        return self.rank


def test_fields_with_a_trailing_axis_are_cut_along_the_tokens() -> None:
    item = an_item("top_k", (2, 7))
    pieces = item.chunk(3)
    shards = [item.sp_split(Mesh(rank)) for rank in range(2)]  # type: ignore[arg-type]
    for name, dim in (("ref_topk_ids", -2), ("ref_topk_logprobs", -2), ("advantages", -1)):
        whole = getattr(item, name)
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces], dim), whole)
        joined = torch.cat([getattr(shard, name) for shard in shards], dim)
        assert joined.shape[dim] == 8
        assert torch.equal(joined.narrow(dim, 0, 7), whole)
    assert shards[1].ref_topk_ids is not None
    assert shards[1].ref_topk_ids[:, -1].tolist() == [[-1] * K] * 2
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], config("top_k"))
    assert torch.equal(kwargs.take(torch.tensor([8, 3])).candidate_ids, item.ref_topk_ids.reshape(-1, K)[[8, 3]])
    assert kwargs.take(torch.tensor([8, 3]), as_row=True).candidate_logprobs.shape == (1, 2, K)


@pytest.mark.parametrize(
    ("kl", "changes", "words"),
    [
        ("top_k", {"ref_topk_logprobs": None}, r"data_batches\[0\].ref_topk_logprobs is missing.*kl_loss_type='top_k'"),
        ("top_k", {"ref_topk_ids": None}, "ref_topk_ids is missing.*kl=full"),
        ("full", {"ref_topk_ids": torch.zeros(2, 13, VOCABULARY, dtype=torch.int64)}, "no effect.*kl=top_k"),
        ("top_k", {"ref_topk_ids": torch.zeros(2, 13, 3, dtype=torch.int64)}, r"has shape \[2, 13, 3\]"),
        ("top_k", {"ref_topk_ids": torch.zeros(2, 12, K, dtype=torch.int64)}, r"must be \[2, 13, K\]"),
        ("top_k", {"ref_topk_ids": torch.zeros(2, 13, K)}, "dtype torch.float32.*integer"),
        ("top_k", {"ref_topk_logprobs": torch.zeros(2, 13, K, dtype=torch.int64)}, "floating-point"),
        ("top_k", {"ref_topk_ids": torch.zeros(2, 13, K, dtype=torch.int64)}, "names a token twice"),
        ("top_k", {"ref_topk_logprobs": torch.full((2, 13, K), -math.inf)}, "= -inf at a scored position.*id -1"),
        ("top_k", {"ref_topk_logprobs": torch.full((2, 13, K), 1.0)}, "add up to a probability of 10.9.*not logits"),
    ],
)
def test_wrong_candidates_are_named(kl: str, changes: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        GRPOLossContext.build_batches_loss_kwargs([an_item(kl).replace(**changes)], config(kl))


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_candidates_outside_the_vocabulary(mode: str) -> None:
    item, head = an_item("top_k"), random_head()
    row, position = (item.shifted_labels != -100).nonzero()[2].tolist()
    ids = item.ref_topk_ids.clone()
    ids[row, position, 1] = VOCABULARY
    with pytest.raises(DataError, match=rf"candidate_ids\[{row}, {position}, 1\] = 11 lies outside the vocabulary"):
        evaluate(config("top_k", mode=mode), [item.replace(ref_topk_ids=ids)], [head])
    short = an_item("full")
    short = short.replace(ref_topk_logprobs=short.ref_topk_logprobs[..., :-1])
    with pytest.raises(DataError, match="has 10 values for each position and no ids, but the vocabulary has 11"):
        evaluate(config("full", mode=mode), [short], [head])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl": "full", "kl_gradient": "straight_through"}, "kl_gradient.*no effect without a KL estimated"),
        ({"kl": "full", "kl_tail": "drop"}, "kl_tail='drop' has no effect without kl=top_k"),
        ({"kl": "k2", "kl_direction": "forward"}, "kl_direction='forward' has no effect without an exact KL"),
        ({"kl": "topk"}, "did you mean 'top_k'"),
        ({"kl": "top_k", "kl_direction": "backward"}, "kl_direction='backward' is not one of the choices"),
    ],
)
def test_settings_that_nothing_reads(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_from_overrides_but_not_in_training() -> None:
    runner = LossRunner.from_overrides(["kl=top_k", "loss.kl_direction=forward", "mode=chunk", "loss.chunk_size=3"])
    item, head = an_item("top_k"), random_head()
    result = runner(*head, **dict(item.tensors()))
    assert torch.equal(result.loss.detach(), evaluate(runner.loss_cfg, [item], [head])[0])
    assert build_loss(compose_config(["kl=full"])).kl_loss_type == "full"
    with pytest.raises(ConfigError, match=r"kl_loss_type=full reads ref_topk_logprobs.*this command does not make"):
        check_command_line(["kl=full"])
