"""Aggregations, corrections and extra terms inside the loss: by hand, and the same however a step is cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit import ConfigError, DataError, GRPOLossConfig, GRPOLossContext, RLLossContextInputItem
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.head import TokenScores
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.metrics import merge_metrics, to_floats

SCORE = 0
AGGREGATIONS: list[Any] = [
    "token_mean",
    "token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    {"name": "constant", "length": 7.0},
    "square",
    "prompt_mean",
    {"name": "per_component", "positive_weight": 2.0, "negative_weight": 0.5},
    {"name": "seq_mean_token_mean", "count_empty": True},
]
TIS = {"granularity": "token", "statistic": "ratio", "action": "clamp_upper", "upper": 2.0}
MASK = {"granularity": "token", "statistic": "ratio", "action": "mask", "lower": 0.5, "upper": 2.0}
WHOLE_ONES = {**MASK, "granularity": "sequence", "reduction": "mean", "lower": 0.85, "upper": 1.2}
CORRECTIONS: list[Any] = [
    [TIS],
    [{**TIS, "normalize": True}],
    [TIS, {**MASK, "denominator": "survivors"}],
    [{**MASK, "denominator": "original"}],
    [{**WHOLE_ONES, "denominator": "survivors"}],
    [{**MASK, "action": "veto", "lower": 0.6, "upper": 1.8, "denominator": "survivors"}],
    [{**TIS, "granularity": "segment", "reduction": "mean"}],
    [{**WHOLE_ONES, "denominator": "original", "between": "current_rollout"}],
]


def batch(rows: int = 6, width: int = 9, seed: int = 0) -> tuple[RLLossContextInputItem, Tensor]:
    """Ragged rows with holes, one of them empty, and log-probabilities of the policy now."""
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=draw, dtype=torch.float64)

    labels = torch.zeros(rows, width, dtype=torch.int64).masked_fill(
        torch.rand(rows, width, generator=draw) < 0.4, -100
    )
    labels[2] = -100
    old = (-2 + normal(0.5)).clamp(max=0)
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=normal(1.0),
        old_logprobs=old,
        ref_logprobs=old + normal(0.3),
        rollout_logprobs=old + normal(0.6),
        teacher_logprobs=old + normal(0.3),
        group_ids=torch.tensor([[7], [7], [7], [3], [3], [99]]),
    )
    return item, old + normal(0.4)


def rows_of(item: RLLossContextInputItem, rows: slice) -> RLLossContextInputItem:
    return item.replace(**{name: value[rows] for name, value in item.tensors()})


def evaluate(cfg: GRPOLossConfig, parts: list[slice], seed: int = 0) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient with respect to the log-probabilities [B, T], and metrics, over micro-batches of these rows."""
    item, logprobs = batch(seed=seed)
    logprobs.requires_grad_()
    items = [rows_of(item, rows) for rows in parts]
    total, metrics = torch.zeros((), dtype=torch.float64), []
    for rows, kwargs in zip(parts, GRPOLossContext.build_batches_loss_kwargs(items, cfg), strict=True):
        context = GRPOLossContext(cfg, kwargs)
        scored = (context.scored_labels() != -100).reshape(-1).nonzero().squeeze(-1)
        scores = TokenScores(logprobs[rows].reshape(-1)[scored], None)
        loss, found = context.loss_from_scores(scores, kwargs.take(scored))
        total = total + loss
        metrics += [found, kwargs.step_metrics]
    (grad,) = torch.autograd.grad(total, logprobs)
    return total.detach(), grad, to_floats(merge_metrics(metrics))


WHOLE = [slice(0, 6)]


@pytest.mark.parametrize("policy_loss", ["vanilla", "gspo", "reinforce"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_micro_batches_do_not_matter_to_any_aggregation(aggregation: Any, policy_loss: str) -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": policy_loss},
        aggregation=aggregation,
        use_kl_loss=True,
        kl_loss_type="k2",
        kl_loss_coef=0.2,
        positive_nll_coef=0.3,
    )
    loss, grad, metrics = evaluate(cfg, WHOLE)
    for parts in ([slice(0, 1), slice(1, 6)], [slice(i, i + 1) for i in range(6)], [slice(3, 6), slice(0, 3)]):
        other_loss, other_grad, other_metrics = evaluate(cfg, parts)
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-15)
        assert other_metrics == pytest.approx(metrics, rel=1e-12, nan_ok=True)
    assert abs(float(loss)) > 1e-3


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "prompt_mean"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda own: "+".join(part["action"] for part in own))
def test_micro_batches_do_not_matter_to_corrections(correction: Any, aggregation: str) -> None:
    cfg = GRPOLossConfig(correction=correction, aggregation=aggregation, use_kl_loss=True, kl_loss_type="k2")
    loss, grad, metrics = evaluate(cfg, WHOLE)
    other_loss, other_grad, other_metrics = evaluate(cfg, [slice(0, 2), slice(2, 3), slice(3, 6)])
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-15)
    assert other_metrics == pytest.approx(metrics, rel=1e-12, nan_ok=True)
    plain = evaluate(GRPOLossConfig(aggregation=aggregation, use_kl_loss=True, kl_loss_type="k2"), WHOLE)
    assert not torch.allclose(grad, plain[1])


def by_hand(aggregation: Any, advantages: list[float], labels: list[list[int]], groups: list[int]) -> list[float]:
    """The weight of each token: -d loss / d log pi under REINFORCE with these advantages, over the advantage."""
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, aggregation=aggregation)
    item = RLLossContextInputItem(
        shifted_labels=torch.tensor(labels),
        advantages=torch.tensor(advantages).unsqueeze(-1),
        group_ids=torch.tensor(groups).unsqueeze(-1),
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    weights = kwargs.loss_weight if kwargs.term_weights is None else kwargs.term_weights.sum(-1)
    return weights.flatten().tolist()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0.2]),
        ("token_sum", [1, 1, 1, 1, 0, 0, 0, 0, 1]),
        ("seq_mean_token_mean", [1 / 9, 1 / 9, 1 / 9, 1 / 3, 0, 0, 0, 0, 1 / 3]),
        ("seq_mean_token_sum", [1 / 3, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 1 / 3]),
        ({"name": "constant", "length": 10}, [1 / 30, 1 / 30, 1 / 30, 1 / 30, 0, 0, 0, 0, 1 / 30]),
        # Prompt 5 has rows 0 and 1 (4 tokens), prompt 6 row 2: 1/2 / 4 and 1/2 / 1.
        ("prompt_mean", [1 / 8, 1 / 8, 1 / 8, 1 / 8, 0, 0, 0, 0, 1 / 2]),
        # A > 0 in rows 0 and 2: 4 tokens; A <= 0 in row 1: 1 token.
        ("per_component", [1 / 4, 1 / 4, 1 / 4, 1, 0, 0, 0, 0, 1 / 4]),
    ],
    ids=str,
)
def test_weights_by_hand(aggregation: Any, expected: list[float]) -> None:
    labels = [[0, 0, 0], [0, -100, -100], [-100, -100, 0]]
    assert by_hand(aggregation, [1.0, -1.0, 2.0], labels, [5, 5, 6]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bounds", [[0, 3, 3, 5], [0, 3, 5, 5]])
def test_empty_sequences_of_a_packed_row_count_wherever_they_stand(bounds: list[int]) -> None:
    cfg = GRPOLossConfig(aggregation={"name": "seq_mean_token_sum", "count_empty": True})
    item = RLLossContextInputItem(shifted_labels=torch.zeros(1, 5, dtype=torch.int64), advantages=torch.ones(1, 5))
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg, [torch.tensor(bounds)])
    assert kwargs.loss_weight.flatten().tolist() == pytest.approx([1 / 3] * 5)


def test_empty_sequences_count_only_on_request() -> None:
    # D20: two tokens in one row, another row is empty.
    labels = [[0, 0], [-100, -100]]
    assert by_hand("seq_mean_token_mean", [1.0, 1.0], labels, [0, 0])[0] == pytest.approx(1 / 2)
    counted = {"name": "seq_mean_token_mean", "count_empty": True}
    assert by_hand(counted, [1.0, 1.0], labels, [0, 0])[0] == pytest.approx(1 / 4)


def test_empty_prompts_count_only_on_request() -> None:
    # Two tokens of prompt 3; prompt 4 has a row without any, and -1 is the padding of a row.
    labels, counted = [[0, 0], [-100, -100]], {"name": "prompt_mean", "count_empty": True}
    assert by_hand("prompt_mean", [1.0, 1.0], labels, [3, 4])[0] == pytest.approx(1 / 2)
    assert by_hand(counted, [1.0, 1.0], labels, [3, 4])[0] == pytest.approx(1 / 4)
    assert by_hand(counted, [1.0, 1.0], labels, [3, -1])[0] == pytest.approx(1 / 2)


@pytest.mark.parametrize(("denominator", "weight"), [("original", 1 / 5), ("survivors", 1 / 2)])
def test_rejected_tokens_and_the_denominator(denominator: str, weight: float) -> None:
    # R8: log ratios .1, -1.5, .8, -10, .3 with [.5, 2]: tokens 0 and 4 stay.
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, correction=[{**MASK, "denominator": denominator}])
    rollout = torch.tensor([[-2.0, -2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    item = RLLossContextInputItem(
        shifted_labels=torch.zeros(1, 5, dtype=torch.int64),
        advantages=torch.ones(1, 5),
        old_logprobs=rollout + torch.tensor([[0.1, -1.5, 0.8, -10.0, 0.3]], dtype=torch.float64),
        rollout_logprobs=rollout,
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    effective = kwargs.loss_weight * kwargs.importance
    assert effective.flatten().tolist() == pytest.approx([weight, 0, 0, 0, weight])
    assert ((kwargs.shifted_labels != -100).sum().item()) == (5 if denominator == "original" else 2)


def test_a_rejected_token_may_be_infinite() -> None:
    # -A log pi is 1 for the first of two tokens, and 6e38, more than fp32 holds, for the rejected one.
    mask = {**MASK, "denominator": "original"}
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, correction=[mask])
    item = RLLossContextInputItem(
        shifted_labels=torch.zeros(1, 2, dtype=torch.int64),
        advantages=torch.tensor([[1.0, 3e38]]),
        old_logprobs=torch.tensor([[-1.0, -2.0]]),
        rollout_logprobs=torch.tensor([[-1.0, -9.0]]),
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    scores = TokenScores(torch.tensor([-1.0, -2.0]), None)
    loss, _ = GRPOLossContext(cfg, kwargs).loss_from_scores(scores, kwargs.take(torch.arange(2)))
    assert loss.item() == pytest.approx(1 / 2)


def test_weights_multiply_the_policy_term_alone_unless_asked() -> None:
    # D10: ms-swift weights its KL term too.
    options: dict[str, Any] = {"correction": [TIS], "use_kl_loss": True, "kl_loss_type": "k2", "kl_loss_coef": 0.5}
    losses = {
        (on_kl, coef): evaluate(GRPOLossConfig(**{**options, "correction_on_kl": on_kl, "kl_loss_coef": coef}), WHOLE)[
            0
        ]
        for on_kl in (False, True)
        for coef in (1e-9, 0.5)
    }
    item, logprobs = batch()
    scored = item.shifted_labels != -100
    kl = 0.5 * (logprobs - item.ref_logprobs)[scored].square()
    weight = (item.old_logprobs - item.rollout_logprobs)[scored].exp().clamp(max=2)
    plain, weighted = (float(losses[on_kl, 0.5] - losses[on_kl, 1e-9]) for on_kl in (False, True))
    assert plain == pytest.approx(0.5 * float(kl.mean()), rel=1e-6)
    assert weighted == pytest.approx(0.5 * float((weight * kl).mean()), rel=1e-6)


def test_positive_nll_is_the_mean_over_positive_tokens() -> None:
    base, extra = GRPOLossConfig(), GRPOLossConfig(positive_nll_coef=0.25)
    item, logprobs = batch()
    positive = (item.shifted_labels != -100) & (item.advantages > 0)
    difference = evaluate(extra, WHOLE)[0] - evaluate(base, WHOLE)[0]
    assert float(difference) == pytest.approx(-0.25 * float(logprobs[positive].mean()), rel=1e-10)


def test_a_group_cut_in_two_is_refused() -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "real"}, aggregation="prompt_mean")
    # A row with nothing to score, as a rank without work sends one, may belong to any group.
    evaluate(cfg, [slice(0, 3), slice(2, 3), slice(3, 6)])
    evaluate(cfg, [slice(0, 3), slice(3, 6)])
    with pytest.raises(DataError, match="group 7 is in several micro-batches"):
        evaluate(cfg, [slice(0, 1), slice(1, 6)])


def test_sequences_without_an_advantage_are_counted() -> None:
    item, _ = batch()
    item = item.replace(advantages=torch.tensor([[1.0], [0.0], [1.0], [2.0], [-2.0], [0.0]]))
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig())
    found = to_floats(kwargs.step_metrics)
    is_scored = item.shifted_labels != -100
    assert found["zero_advantage_sequences"] == pytest.approx(2 / int(is_scored.any(-1).sum()))
    assert found["zero_advantage_tokens"] == pytest.approx(int(is_scored[[1, 5]].sum()) / int(is_scored.sum()))
    assert found["denominator"] == float((item.shifted_labels != -100).sum())


@pytest.mark.parametrize(
    ("spec", "temperature", "words"),
    [
        ({"mode": "raw"}, 0.6, "they are raw"),
        ({"mode": "raw", "temperature": 0.6}, 1.0, "they are raw"),
        ({"temperature": 0.6}, 1.0, "temperature 0.6"),
        ({"top_p": 0.9}, 1.0, "top_p=0.9"),
        ({"top_k": 50}, 1.0, "top_k=50"),
        ({"min_p": 0.1}, 1.0, "min_p=0.1"),
        ({"temperature": 0.6}, 0.6, None),
        ({"mode": "raw"}, 1.0, None),
    ],
)
def test_log_probabilities_of_another_distribution_are_refused(
    spec: dict[str, Any], temperature: float, words: str | None
) -> None:
    # REQ-6, R6, R7.
    item, _ = batch()
    item = item.replace(rollout_spec=LogprobSpec(**spec))
    options: dict[str, Any] = {"correction": [TIS], "temperature": temperature}
    if words is None:
        GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig(**options))
        return
    with pytest.raises(DataError, match=words):
        GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig(**options))
    GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig(**options, accept_mismatch=True))
    # Where nothing reads them they do no harm, and are not measured: the ratios would be of two distributions.
    cfg = GRPOLossConfig(temperature=temperature)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    assert kwargs.rollout_logprobs is None
    assert not [name for name in kwargs.step_metrics if "rollout" in name or "mismatch" in name]
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item.replace(rollout_spec=None)], cfg)
    assert "rollout_mismatch" in kwargs.step_metrics


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"rollout_logprobs": None}, {"correction": [TIS]}, "rollout_logprobs is missing"),
        ({"old_logprobs": None}, {"correction": [TIS]}, "old_logprobs is missing"),
        ({"rollout_logprobs": None}, {"policy_loss_cfg": {"loss_type": "vanilla", "anchor": "rollout"}}, "rollout"),
        ({"teacher_logprobs": None}, {"policy_loss_cfg": {"loss_type": "opd"}}, "teacher_logprobs is missing"),
        ({"group_ids": None}, {"aggregation": "prompt_mean"}, "group_ids is missing"),
        ({"group_ids": None}, {"policy_loss_cfg": {"loss_type": "real"}}, "group_ids is missing"),
        ({"rollout_logprobs": torch.full((6, 9), torch.nan)}, {"correction": [TIS]}, r"rollout_logprobs\[0, 0\] = nan"),
    ],
)
def test_what_is_read_must_be_there(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    item, _ = batch()
    item = item.replace(**changes)
    with pytest.raises(DataError, match=words):
        GRPOLossContext.build_batches_loss_kwargs([item], GRPOLossConfig(**options))


def test_a_rollout_weight_inside_of_a_loss_is_checked_as_any_other() -> None:
    item, _ = batch()
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "vespo", "use_rollout_weight": True})
    for changes, words in (
        ({"rollout_logprobs": torch.full((6, 9), torch.nan)}, "= nan"),
        ({"rollout_logprobs": None}, "is missing"),
        ({"rollout_spec": LogprobSpec(temperature=0.5)}, "temperature 0.5"),
    ):
        with pytest.raises(DataError, match=words):
            GRPOLossContext.build_batches_loss_kwargs([item.replace(**changes)], cfg)


@pytest.mark.parametrize("policy_loss", policy_loss_names())
def test_a_micro_batch_with_nothing_to_score_reports_the_same_metrics(policy_loss: str) -> None:
    # Ranks merge their metrics by position: a name that one of them lacks would mix up all others.
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": policy_loss}, positive_nll_coef=0.1, correction=[TIS])
    item, logprobs = batch()
    names = []
    for own in (item, item.replace(shifted_labels=torch.full((6, 9), -100))):
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([own], cfg)
        scored = (kwargs.shifted_labels != -100).reshape(-1).nonzero().squeeze(-1)
        context = GRPOLossContext(cfg, kwargs)
        _, found = context.loss_from_scores(TokenScores(logprobs.reshape(-1)[scored], None), kwargs.take(scored))
        names.append([*found, *kwargs.step_metrics])
    assert names[0] == names[1]


def test_no_micro_batches_at_all() -> None:
    assert GRPOLossContext.build_batches_loss_kwargs([], GRPOLossConfig(aggregation="prompt_mean")) == []


def test_rejected_tokens_are_not_learnt_from() -> None:
    item, _ = batch()
    everything = {**MASK, "lower": 1e6, "upper": 1e7, "denominator": "original"}
    for options, is_void in (({}, True), ({"use_kl_loss": True, "kl_loss_type": "k2"}, False)):
        cfg = GRPOLossConfig(correction=[everything], **options)
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        assert (GRPOLossContext(cfg, kwargs).num_learning() == 0) == is_void


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggregation": "constant"}, "needs it: give length"),
        ({"aggregation": {"name": "token_mean", "length": 3}}, "length=3.0 has no effect"),
        ({"aggregation": {"name": "token_mean", "count_empty": True}}, "count_empty=True has no effect"),
        ({"aggregation": "token-mean"}, "token_mean"),
        ({"kl_gradient": "straight_through"}, "kl_gradient='straight_through' has no effect"),
        ({"correction_on_kl": True}, "correction_on_kl=True has no effect"),
        ({"kl_anchor": "rollout", "use_kl_loss": True, "kl_loss_type": "k2"}, "kl_anchor='rollout' has no effect"),
        ({"kl_ratio_level": "sequence", "use_kl_loss": True, "kl_loss_type": "k3"}, "kl_ratio_level='sequence' has no"),
        ({"missing_rollout": "reject"}, "missing_rollout='reject' has no effect"),
        ({"log_ratio_range": (1.0, 2.0)}, "must lie inside"),
        ({"correction": [{**MASK}]}, "denominator"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GRPOLossConfig(**options)


def test_an_aggregation_may_be_given_by_name() -> None:
    assert GRPOLossConfig(aggregation="square").aggregation == AggregationConfig(name="square")
