"""On-policy distillation, sampled and over candidates: hand-worked numbers, slow references, layouts, errors."""

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import random_head, random_item, random_labels
from tests.losses.evaluation import assert_same, cut, evaluate
from toolkit import (
    ConfigError,
    CorrectionConfig,
    DataError,
    GRPOLossConfig,
    LogprobSpec,
    LossRunner,
    OPDLossConfig,
    OPDLossContext,
    RLLossContextInputItem,
)
from toolkit.compose.build import build_loss
from toolkit.compose.tree import check_command_line, compose_config

VOCABULARY, K = 11, 4
DIRECTIONS = ["reverse", "forward", "jensen_shannon"]


def teacher_item(shape: tuple[int, int] = (2, 13), *, full: bool = False) -> RLLossContextInputItem:
    """No advantages; a teacher's opinion of the sampled tokens and of candidates."""
    teacher = torch.randn(*shape, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    ids = teacher.topk(K, -1).indices
    return RLLossContextInputItem(
        shifted_labels=random_labels(shape, VOCABULARY),
        old_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=torch.float64)).clamp(max=0),
        teacher_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=torch.float64)).clamp(max=0),
        teacher_topk_ids=None if full else ids,
        teacher_topk_logprobs=teacher if full else teacher.gather(-1, ids),
    )


def coin(**fields) -> tuple[RLLossContextInputItem, tuple]:
    """Two tokens of probability 1/2 each; the second one is not scored."""
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[0, -100]]), **fields)
    hidden = torch.ones(1, 2, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    return item, (hidden, weight, torch.zeros(2, dtype=torch.float64, requires_grad=True))


def test_sampled_by_hand() -> None:
    # The teacher gives the token 1/4, we 1/2: gain -log 2. Ratio (1/2) / (1/3) = 1.5: loss 1.5 log 2.
    item, head = coin(
        teacher_logprobs=torch.tensor([[math.log(1 / 4), math.nan]]),
        old_logprobs=torch.tensor([[math.log(1 / 3), math.nan]]),
    )
    loss, grads, metrics = evaluate(OPDLossConfig(), [item], [head])
    assert loss.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert metrics["teacher_kl"] == pytest.approx(math.log(2), rel=1e-6)
    # d loss / d bias_0 = 1.5 log 2 x d log p / d bias_0, which is 1 - 1/2: the token loses probability.
    assert grads[2].tolist() == pytest.approx([0.75 * math.log(2), -0.75 * math.log(2)], rel=1e-6)
    # plus 0.1 (log 1.5)^2; and with the threshold: 1/3 - 1/2 < 0.2, so the token stays
    more = OPDLossConfig(log_ratio_sq_coef=0.1, threshold_low=0.2)
    assert evaluate(more, [item], [head])[0].item() == pytest.approx(
        1.5 * math.log(2) + 0.1 * math.log(1.5) ** 2, rel=1e-6
    )


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("reverse", 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("forward", 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        (
            "jensen_shannon",  # mixture (3/8, 5/8)
            0.25 * (math.log(4 / 3) + math.log(4 / 5)) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
        ),
    ],
)
def test_top_k_by_hand(direction: str, expected: float) -> None:
    # The teacher's coin is (1/4, 3/4): as both tokens, and as token 1 with the rest in one bucket.
    cfg = OPDLossConfig(variant="top_k", direction=direction)
    both = torch.tensor([[[1 / 4, 3 / 4], [1.0, 1.0]]], dtype=torch.float64).log()
    item, head = coin(teacher_topk_logprobs=both)
    loss, _, metrics = evaluate(cfg, [item], [head])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["teacher_kl"] == pytest.approx(expected, rel=1e-12)
    item, head = coin(teacher_topk_ids=torch.tensor([[[1], [7]]]), teacher_topk_logprobs=both[..., 1:])
    assert evaluate(cfg, [item], [head])[0].item() == pytest.approx(expected, rel=1e-12)


def test_the_sampled_gradient_is_that_of_the_whole_divergence_on_average() -> None:
    # Over every token that could be sampled, weighted by its probability; on-policy.
    hidden = torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    head = (hidden, torch.eye(3, dtype=torch.float64, requires_grad=True), torch.zeros(3, requires_grad=True).double())
    teacher = torch.tensor([[[0.0, 0.5, -0.5]]], dtype=torch.float64).log_softmax(-1)
    average = torch.zeros(3, dtype=torch.float64)
    for label, probability in enumerate(hidden.detach().softmax(-1).flatten()):
        item = RLLossContextInputItem(
            shifted_labels=torch.tensor([[label]]), teacher_logprobs=teacher[..., label], teacher_topk_logprobs=teacher
        )
        average += probability * evaluate(OPDLossConfig(), [item], [head])[1][0].flatten()
        whole = evaluate(OPDLossConfig(variant="top_k"), [item], [head])[1][0].flatten()
    torch.testing.assert_close(average, whole, rtol=1e-12, atol=1e-15)
    assert whole.tolist() == pytest.approx([0.33404, -0.24421, -0.08984], abs=1e-5)


def slow(cfg: OPDLossConfig, item: RLLossContextInputItem, logits: Tensor) -> float:
    """The mean over scored positions, each worked out in Python."""
    values = []
    for row, position in (item.shifted_labels != -100).nonzero().tolist():
        powers = [math.exp(float(z) / cfg.temperature) for z in logits[row, position]]
        p = [power / sum(powers) for power in powers]
        if cfg.variant == "sampled":
            new = math.log(p[int(item.shifted_labels[row, position])])
            old = float(item.old_logprobs[row, position])
            gain = float(item.teacher_logprobs[row, position]) - new
            is_left_out = cfg.threshold_low is not None and math.exp(old) - math.exp(new) > cfg.threshold_low
            own = 0.0 if is_left_out else -gain * math.exp(new - old)
            values.append(own + cfg.log_ratio_sq_coef * (new - old) ** 2)
            continue
        ids = range(VOCABULARY) if item.teacher_topk_ids is None else item.teacher_topk_ids[row, position].tolist()
        ours = [p[i] for i in ids]
        theirs = [math.exp(q) for q in item.teacher_topk_logprobs[row, position].tolist()]
        if item.teacher_topk_ids is not None and cfg.tail == "one_bucket":
            ours.append(1 - sum(ours))
            theirs.append(1 - sum(theirs))
        mixture = [(a + b) / 2 for a, b in zip(ours, theirs, strict=True)]
        pairs = {
            "reverse": [(1.0, ours, theirs)],
            "forward": [(1.0, theirs, ours)],
            "jensen_shannon": [(0.5, ours, mixture), (0.5, theirs, mixture)],
        }[cfg.direction]
        values.append(sum(w * a * math.log(a / b) for w, x, y in pairs for a, b in zip(x, y, strict=True)))
    return sum(values) / len(values)


SETTINGS = [
    {},
    {"threshold_low": 0.05, "log_ratio_sq_coef": 0.01, "temperature": 0.8},
    *[{"variant": "top_k", "direction": direction} for direction in DIRECTIONS],
    {"variant": "top_k", "tail": "drop", "temperature": 1.4},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("full", [False, True])
def test_against_the_slow_reference(settings: dict, full: bool) -> None:
    item, (hidden, weight, bias) = teacher_item(full=full), random_head()
    cfg = OPDLossConfig(**settings)
    loss, _, _ = evaluate(cfg, [item], [(hidden, weight, bias)])
    assert loss.item() == pytest.approx(slow(cfg, item, (hidden @ weight.T + bias).detach()), rel=1e-10)


@pytest.mark.parametrize("settings", [*SETTINGS, {"variant": "top_k", "softcap": 3.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_chunk_equals_eager(settings: dict, chunk_size: int) -> None:
    item, head = teacher_item(), random_head()
    eager = evaluate(OPDLossConfig(**settings, use_entropy_metric=True), [item], [head])
    cfg = OPDLossConfig(**settings, use_entropy_metric=True, mode="chunk", chunk_size=chunk_size)
    assert_same(evaluate(cfg, [item], [head]), eager)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_equal_one_batch(settings: dict, aggregation: str) -> None:
    whole, (hidden, weight, bias) = teacher_item((8, 6)), random_head((8, 6))
    cfg = OPDLossConfig(**settings, aggregation=aggregation)
    expected = evaluate(cfg, [whole], [(hidden, weight, bias)])
    parts, leaves = cut(whole, hidden, [3, 1, 4])
    loss, grads, metrics = evaluate(cfg, parts, [(leaf, weight, bias) for leaf in leaves])
    assert_same((loss, [torch.cat(grads[:-2]), *grads[-2:]], metrics), expected)


@pytest.mark.parametrize("variant", ["sampled", "top_k"])
def test_advantages_are_not_read(variant: str) -> None:
    item, head = teacher_item(), random_head()
    given = item.replace(advantages=torch.randn(2, 13))
    first, second = (evaluate(OPDLossConfig(variant=variant), [own], [head]) for own in (item, given))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])
    assert item.advantages is None  # the item that was given is not filled in


def test_the_reference_may_be_the_teacher() -> None:
    item, head = random_item(), random_head()
    swapped = item.replace(teacher_logprobs=item.ref_logprobs)
    expected = evaluate(OPDLossConfig(), [swapped], [head])
    assert_same(evaluate(OPDLossConfig(teacher="reference"), [item.replace(teacher_logprobs=None)], [head]), expected)
    with pytest.raises(DataError, match="ref_logprobs is missing, but teacher='reference' needs it"):
        evaluate(OPDLossConfig(teacher="reference"), [item.replace(ref_logprobs=None)], [head])


def test_is_the_registered_policy_loss() -> None:
    item, head = random_item(), random_head()
    grpo = GRPOLossConfig(policy_loss_cfg={"loss_type": "opd", "threshold_low": 0.1})
    assert_same(evaluate(OPDLossConfig(threshold_low=0.1), [item], [head]), evaluate(grpo, [item], [head]))


def test_other_terms_and_corrections_go_along() -> None:
    # Each token's divergence times its clamped weight, plus 0.1 x the mean of k2.
    item = random_item().replace(**{n: v for n, v in teacher_item().tensors() if n.startswith("teacher_topk")})
    cfg = OPDLossConfig(
        variant="top_k",
        correction=[CorrectionConfig(action="clamp_upper", upper=1.5)],
        use_kl_loss=True,
        kl_loss_type="k2",
        kl_loss_coef=0.1,
        mode="chunk",
        chunk_size=3,
    )
    hidden, weight, bias = random_head()
    loss, _, _ = evaluate(cfg, [item], [(hidden, weight, bias)])
    all_logprobs = (hidden @ weight.T + bias).detach().log_softmax(-1)
    expected, scored = 0.0, (item.shifted_labels != -100).nonzero().tolist()
    for row, position in scored:
        one = item.replace(
            shifted_labels=torch.full((2, 13), -100).index_put(
                (torch.tensor([row]), torch.tensor([position])), item.shifted_labels[row, position]
            )
        )
        divergence = slow(OPDLossConfig(variant="top_k"), one, all_logprobs)
        mismatch = float(item.old_logprobs[row, position] - item.rollout_logprobs[row, position])
        label = int(item.shifted_labels[row, position])
        k2 = float(all_logprobs[row, position, label] - item.ref_logprobs[row, position]) ** 2 / 2
        expected += min(math.exp(mismatch), 1.5) * divergence + 0.1 * k2
    assert loss.item() == pytest.approx(expected / len(scored), rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({}, {"teacher_logprobs": None}, "teacher_logprobs is missing, but policy loss 'opd' needs it"),
        ({"variant": "top_k"}, {"teacher_topk_logprobs": None}, "teacher_topk_logprobs is missing.*variant='top_k'"),
        ({"variant": "top_k"}, {"teacher_topk_ids": torch.zeros(2, 13, K).long()}, "names a token twice"),
    ],
)
def test_what_the_items_lack(settings: dict, changes: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        OPDLossContext.build_batches_loss_kwargs([teacher_item().replace(**changes)], OPDLossConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "forward"}, "direction='forward' has no effect on variant 'sampled'.*variant='top_k'"),
        ({"variant": "top_k", "threshold_low": 0.2}, "threshold_low=0.2 has no effect on variant 'top_k'"),
        ({"variant": "top_k", "teacher": "reference"}, "teacher='reference' has no effect on variant 'top_k'"),
        ({"variant": "top_k", "use_kl_loss": True, "kl_loss_type": "full"}, "only one of teacher and reference"),
        ({"variant": "topk"}, "did you mean 'top_k'"),
        ({"policy_loss_cfg": {"loss_type": "sdar"}}, "policy_loss_cfg is not a setting"),
    ],
)
def test_settings_that_nothing_reads(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OPDLossConfig(**settings)


def test_drop_zero_advantage_is_refused() -> None:
    with pytest.raises(ConfigError, match="drop_zero_advantage=True would change policy loss 'opd'"):
        OPDLossContext.build_batches_loss_kwargs([teacher_item()], OPDLossConfig(drop_zero_advantage=True))


def test_on_the_command_line() -> None:
    cfg = build_loss(compose_config(["loss=opd", "loss.variant=top_k", "loss.direction=forward"]))
    chosen = {"variant": "top_k", "direction": "forward", "use_entropy_metric": True}
    assert cfg == OPDLossConfig(**chosen, mode="chunk", chunk_size="auto")
    with pytest.raises(ConfigError, match=r"this command has no teacher.*loss=opd loss\.teacher=reference"):
        check_command_line(["loss=opd"])
    with pytest.raises(ConfigError, match="policy_loss=sdar has no effect: OPDLossConfig has no policy_loss_cfg"):
        compose_config(["loss=opd", "policy_loss=sdar"])
    (run,), _ = check_command_line(["loss=opd", "loss.teacher=reference"])[:2]
    assert run.loss.needs_reference


def test_the_runner_takes_every_field() -> None:
    item, head = teacher_item(), random_head()
    runner = LossRunner(OPDLossConfig(variant="top_k", mode="chunk", chunk_size=3))
    expected = evaluate(runner.loss_cfg, [item], [head])[0]
    assert torch.equal(runner(*head, **dict(item.tensors())).loss.detach(), expected)
    assert runner.explain(*head, **dict(item.tensors())).name == "general"
    # input_ids have one position more than the hidden states; so have all fields of a batch.
    sampled = LossRunner(OPDLossConfig())
    ids = torch.randint(0, VOCABULARY, (2, 13))
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    fields = {"teacher_logprobs": item.teacher_logprobs, "rollout_logprobs": item.old_logprobs}
    by_ids = sampled(*head, input_ids=ids, **fields, rollout_spec=LogprobSpec(temperature=1.0))
    torch.testing.assert_close(by_ids.loss, sampled(*head, shifted_labels=labels, **fields).loss)
    with pytest.raises(
        DataError, match=r"'teacher_topk_idx' is not a field of a batch \(did you mean 'teacher_topk_ids'"
    ):
        runner.step([{"shifted_labels": labels, "teacher_topk_idx": item.teacher_topk_ids}], lambda batch: head)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 13)])
def test_the_runner_takes_groups_by_row(shape: tuple[int, ...]) -> None:
    item, head = random_item((4, 13)), random_head((4, 13))
    groups = torch.tensor([5, 5, 9, 9])
    runner = LossRunner(GRPOLossConfig(aggregation="prompt_mean"))
    fields = {name: value for name, value in item.tensors() if name != "group_ids"}
    expected = runner(*head, **fields, group_ids=groups.unsqueeze(-1).expand(4, 13)).loss
    given = groups if shape == (4,) else groups.unsqueeze(-1).expand(shape)
    assert torch.equal(runner(*head, **fields, group_ids=given).loss, expected)
    with pytest.raises(DataError, match=r"group_ids has dtype torch\.float32"):
        runner(*head, **fields, group_ids=groups.float())
    with pytest.raises(DataError, match="group_ids has shape"):
        runner(*head, **fields, group_ids=torch.tensor([1, 2, 3]))
