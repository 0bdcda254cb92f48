"""What a step fixes: terms, one weight for each token and term, and the same for loops without contexts."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.losses.test_custom_loss import FocalLossConfig
from tests.processes import run_processes
from toolkit import (
    AggregationConfig,
    BaseLossConfig,
    BaseLossContext,
    BaseLossKwargs,
    ConfigError,
    DataError,
    GRPOLossConfig,
    GRPOLossContext,
    LossContextInputItem,
    LossTerm,
    PerToken,
    RLLossContextInputItem,
    ScoredLossContext,
    step_weights,
)
from toolkit.distributed import counting_over
from toolkit.losses.config.term import checked_terms, weight_columns
from toolkit.losses.summation import term_sums
from toolkit.metrics import to_floats
from toolkit.testing import Batch, assert_layout_invariant, random_batch

SHORT, LONG = torch.tensor([[5, -100]]), torch.tensor([[5, 5, 5, -100], [-100, -100, -100, -100]])
"""Micro-batches of one scored token, and of three and none."""


class MarkedItem(LossContextInputItem):
    is_marked: Annotated[Tensor | None, PerToken(pad=0, kind="bool")] = None
    choices: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None


class MarkedKwargs(BaseLossKwargs):
    choices: Annotated[Tensor, PerToken(pad=0.0, trailing=1)]


class MarkedContext(ScoredLossContext):
    item_cls, kwargs_cls = MarkedItem, MarkedKwargs

    def token_losses(self, scores, loss_kwargs):
        return -scores.logprobs * loss_kwargs.choices.square().sum(-1)


class MarkedConfig(BaseLossConfig):
    context = MarkedContext


def is_marked(item: Any) -> Tensor:
    return item.is_marked


# -------------------------------------------------------------------- weights by hand


@pytest.mark.parametrize(
    ("aggregation", "short", "long"),
    [
        ("token_mean", 1 / 4, 1 / 4),
        ("token_sum", 1.0, 1.0),
        ("seq_mean_token_mean", 1 / 2, 1 / 6),
        (AggregationConfig(name="seq_mean_token_mean", count_empty=True), 1 / 3, 1 / 9),
        (AggregationConfig(name="constant", length=10), 1 / 20, 1 / 20),
    ],
    ids=str,
)
def test_step_weights_by_hand(aggregation: Any, short: float, long: float) -> None:
    weights = step_weights([SHORT, LONG], aggregation)
    assert [own.dtype for own in weights] == [torch.float64] * 2
    assert weights[0].tolist() == [[pytest.approx(short), 0]]
    assert weights[1].tolist() == [pytest.approx([long, long, long, 0]), [0, 0, 0, 0]]


def test_packed_rows_and_prompts() -> None:
    packed = torch.tensor([[5, 5, 5, 5]])
    (weights,) = step_weights([packed], "seq_mean_token_mean", [torch.tensor([0, 1, 4])])
    assert weights.tolist() == [pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])]
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[5], [5], [5]]), group_ids=torch.tensor([[1], [1], [2]]))
    (weights,) = step_weights([item], "prompt_mean")
    assert weights.flatten().tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    with pytest.raises(DataError, match=r"data_batches\[0\].group_ids is missing, but prompt_mean"):
        step_weights([packed], "prompt_mean")


def test_a_filter_chooses_among_the_scored_tokens() -> None:
    marks = torch.tensor([[True, False, True, True], [True, True, True, True]])
    item = MarkedItem(shifted_labels=LONG, is_marked=marks)
    (weights,) = step_weights([item], token_filter=is_marked)
    assert weights.tolist() == [[0.5, 0, 0.5, 0], [0, 0, 0, 0]]
    for chosen, words in (
        (lambda item: item.is_marked.long(), r"returned torch.int64 \[2, 4\] for data_batches\[0\]; it must be bool"),
        (lambda item: item.is_marked[:1], r"returned torch.bool \[1, 4\]"),
        (lambda item: True, "returned bool"),
    ):
        with pytest.raises(DataError, match=words):
            step_weights([item], token_filter=chosen)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "square"])
def test_they_are_those_of_the_contexts(aggregation: str) -> None:
    item = random_batch().item
    cfg = GRPOLossConfig(aggregation=aggregation)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    assert torch.equal(step_weights([item], aggregation)[0], kwargs.loss_weight)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'per_component'.*that is two terms"):
        step_weights([SHORT], "per_component")
    with pytest.raises(ConfigError, match=r"name='token_meen' is not one of the choices"):
        step_weights([SHORT], "token_meen")
    with pytest.raises(ConfigError, match="gradient_reduction='max'"):
        step_weights([SHORT], gradient_reduction="max")
    with pytest.raises(DataError, match="give a list with one item for each micro-batch"):
        step_weights(SHORT)
    with pytest.raises(DataError, match="shifted_labels has shape"):
        step_weights([SHORT.float()])


# -------------------------------------------------------------------- terms


def test_columns_are_shared_by_terms_that_count_alike() -> None:
    terms = (
        LossTerm(name="a"),
        LossTerm(name="b", aggregation=AggregationConfig(), coef=2.0),
        LossTerm(name="c", token_filter=is_marked),
        LossTerm(name="d", aggregation="square"),
        LossTerm(name="e", token_filter=is_marked, use_correction=True),
    )
    assert weight_columns(terms) == (0, 0, 1, 2, 1)


def test_wrong_terms_are_named() -> None:
    with pytest.raises(ConfigError, match="must be an identifier"):
        LossTerm(name="my term")
    for given, words in (
        ((), "must be a tuple of at least one LossTerm"),
        (("policy",), "must be a tuple of at least one LossTerm, not 'policy'"),
        ((LossTerm(name="a"), LossTerm(name="a")), "two terms called 'a'"),
    ):
        with pytest.raises(ConfigError, match=words):
            checked_terms(given, "MyConfig")


def test_a_config_names_its_context_and_a_context_its_values() -> None:
    class Nothing(BaseLossConfig):
        pass

    with pytest.raises(ConfigError, match="Nothing does not name a context"):
        assert Nothing().loss_ctx_cls
    batch = random_batch()
    for base, words in ((BaseLossContext, "losses_from_logits"), (ScoredLossContext, "token_losses")):
        (kwargs,) = base.build_batches_loss_kwargs([batch.item], Nothing())
        with pytest.raises(ConfigError, match=f"computes nothing yet: define {words}"):
            base(Nothing(), kwargs).forward(batch.hidden_states, batch.head_weight)
    with pytest.raises(DataError, match=r"data_batches\[0\].choices is missing, but MarkedContext reads it"):
        MarkedContext.build_batches_loss_kwargs([MarkedItem(shifted_labels=SHORT)], MarkedConfig())


def test_kl_by_sequence_beside_a_policy_loss_by_token() -> None:
    # Rows of one and of three tokens; A = 1, pi = pi_old, so that the policy loss is -1 for each token.
    settings = {"use_kl_loss": True, "kl_loss_type": "k2", "kl_loss_coef": 0.1}
    cfg = GRPOLossConfig(**settings, kl_aggregation="seq_mean_token_mean")
    labels = torch.tensor([[0, -100, -100], [0, 0, 0]])
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.ones(2, 3, dtype=torch.float64),
        ref_logprobs=torch.tensor([[-2.0, 0, 0], [-1.0, -1.0, -1.0]], dtype=torch.float64) - math.log(2),
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    hidden, weight = torch.zeros(2, 3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    loss, metrics = GRPOLossContext(cfg, kwargs).forward(hidden, weight)
    by_sequence = (2.0 + 0.5) / 2  # k2 of log ratios 2 and 1: 2 and 0.5
    assert loss.item() == pytest.approx(-1 + 0.1 * by_sequence)
    found = to_floats(metrics)
    assert (found["policy_loss"], found["kl_loss"]) == (pytest.approx(-1), pytest.approx(by_sequence))
    assert found["kl_ref"] == pytest.approx((2.0 + 3 * 0.5) / 4)  # the mean over tokens, whatever the aggregation
    assert_layout_invariant(cfg, processes=1)
    with pytest.raises(ConfigError, match="a KL term has one mean over all tokens"):
        GRPOLossConfig(**settings, kl_aggregation="per_component")
    with pytest.raises(ConfigError, match=r"kl_aggregation=.* has no effect without use_kl_loss=True"):
        GRPOLossConfig(kl_aggregation="square")


def test_a_part_of_the_terms_reads_its_own_columns() -> None:
    terms = (LossTerm(name="a", token_filter=is_marked), LossTerm(name="b"))
    weights = torch.tensor([[0.0, 0.25], [1.0, 0.75]], dtype=torch.float64)  # of two tokens, under a and under b
    kwargs = BaseLossKwargs(shifted_labels=torch.zeros(2).long(), loss_weight=weights[:, 0], term_weights=weights)
    values = {"b": torch.tensor([8.0, 4.0], dtype=torch.float64)}
    assert term_sums(terms, values, kwargs, owner="X", partly=True)["b"].item() == 5.0
    with pytest.raises(DataError, match=r"X returned values of \['b'\], but its terms are \['a', 'b'\]"):
        term_sums(terms, values, kwargs, owner="X")


def test_what_no_term_counts_is_not_learnt_from() -> None:
    class Config(MarkedConfig):
        @property
        def terms(self):
            return LossTerm(token_filter=is_marked), LossTerm(name="off", coef=0.0)

    marks = torch.tensor([[True, False, True, True], [True, True, True, True]])
    item = MarkedItem(shifted_labels=LONG, is_marked=marks, choices=torch.ones(2, 4, 2))
    (kwargs,) = MarkedContext.build_batches_loss_kwargs([item], Config())
    assert MarkedContext(Config(), kwargs).num_learning() == 2


# -------------------------------------------------------------------- a head of values


class ValueItem(LossContextInputItem):
    returns: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class ValueKwargs(BaseLossKwargs):
    returns: Annotated[Tensor, PerToken(pad=0.0)]


class ValueContext(BaseLossContext):
    item_cls, kwargs_cls, has_vocabulary = ValueItem, ValueKwargs, False

    def loss_fn(self, hidden_states, head_weight, head_bias, loss_kwargs):
        scored = (loss_kwargs.shifted_labels != self.loss_cfg.ignore_idx).flatten().nonzero().squeeze(-1)
        taken = loss_kwargs.take(scored)
        values = hidden_states.flatten(0, -2)[scored] @ head_weight[0]
        return self.summed((values - taken.returns).square(), taken)


class ValueConfig(BaseLossConfig):
    context = ValueContext


def test_a_head_need_not_be_a_vocabulary() -> None:
    batch = random_batch(ValueConfig())
    of_values = Batch(batch.item, batch.hidden_states, batch.head_weight[:1], None, batch.lengths)
    assert int(batch.item.shifted_labels.max()) > 0  # no row of this head
    assert_layout_invariant(ValueConfig(), of_values, processes=1)


# -------------------------------------------------------------------- processes


def spread(rank: int, world: int) -> None:
    mine = [SHORT] if rank == 0 else [LONG, SHORT]
    own = step_weights(mine, gradient_reduction="sum")
    assert [weights.sum().item() for weights in own] == pytest.approx([1 / 5] if rank == 0 else [3 / 5, 1 / 5])
    averaged = step_weights(mine)
    assert [float(weights.sum()) for weights in averaged] == pytest.approx([world * float(w.sum()) for w in own])
    with pytest.raises(DataError, match="rejected the items" if rank == 0 else "shifted_labels has shape"):
        step_weights(mine if rank == 0 else [SHORT.float()])
    # A field that one rank's items lack: the other must not wait for it in backward.
    item = MarkedItem(shifted_labels=SHORT, choices=torch.ones(1, 2, 2) if rank == 0 else None)
    with pytest.raises(DataError, match="rejected the items" if rank == 0 else "choices is missing, but MarkedContext"):
        MarkedContext.build_batches_loss_kwargs([item], MarkedConfig())


def sharded(rank: int, world: int) -> None:
    mesh, here = init_device_mesh("cpu", (world,)), slice(2 * rank, 2 * rank + 2)
    (whole,) = step_weights([LONG], "seq_mean_token_mean", gradient_reduction="sum")
    (own,) = step_weights([LONG[:, here]], "seq_mean_token_mean", None, mesh, gradient_reduction="sum")
    # `whole` counted the same sequence on both ranks, `own` once.
    torch.testing.assert_close(own, world * whole[:, here], rtol=1e-12, atol=0)
    choices = torch.arange(16.0).reshape(2, 4, 2)
    item = MarkedItem(shifted_labels=LONG, choices=choices).sp_split(mesh)
    (kwargs,) = MarkedContext.build_batches_loss_kwargs([item], MarkedConfig(), None, mesh)
    assert torch.equal(kwargs.choices, choices[:, here])


def distributed_head(rank: int, world: int) -> None:
    """A head that is a DTensor: replicated it is like any other, split it has not all logits."""
    mesh, cfg = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp")), FocalLossConfig()
    batch = random_batch(cfg)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([batch.item], cfg)
    context = cfg.loss_ctx_cls(cfg, kwargs)
    plain, _ = context.forward(batch.hidden_states, batch.head_weight)
    replica = distribute_tensor(batch.head_weight, mesh["tp"], [Replicate()])
    torch.testing.assert_close(context.forward(batch.hidden_states, replica)[0], plain, rtol=1e-12, atol=0)
    split = distribute_tensor(batch.head_weight, mesh["tp"], [Shard(0)])
    with counting_over(mesh["dp"].get_group()), pytest.raises(DataError, match="whole vocabulary, but it is split"):
        context.forward(batch.hidden_states, split)


def all_of_it(rank: int, world: int) -> None:
    spread(rank, world)
    sharded(rank, world)
    distributed_head(rank, world)


def test_over_processes() -> None:
    run_processes(2, all_of_it)


@pytest.mark.slow
def test_losses_with_several_terms_have_one_gradient_over_processes() -> None:
    cfg = GRPOLossConfig(
        use_kl_loss=True,
        kl_loss_type="k3",
        kl_aggregation="seq_mean_token_mean",
        entropy_coef=0.1,
        positive_nll_coef=0.2,
    )
    for own in (cfg, cfg.model_copy(update={"aggregation": AggregationConfig(name="per_component")}), MarkedConfig()):
        assert_layout_invariant(own, processes=2)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_a_bias_may_have_another_dtype(mode: str) -> None:
    # Logits of a bf16 head with a bias of fp32, which is added in fp32.
    cfg = FocalLossConfig(mode=mode, chunk_size=5)
    batch = random_batch(cfg)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([batch.item], cfg)
    hidden, weight = batch.hidden_states.bfloat16(), batch.head_weight.bfloat16()
    bias = torch.full(weight.shape[:1], 1e-3) * torch.arange(len(weight))
    loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight, bias)
    logits = (hidden @ weight.T).double() + bias
    exact, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(logits, torch.eye(len(weight), dtype=torch.float64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
