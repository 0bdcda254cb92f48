"""One exchange over ranks counts all that a step divides by; what cannot be counted stops every rank with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.conftest import random_head, random_item
from tests.processes import run_processes
from toolkit import CELossConfig, DataError, GRPOLossConfig, GRPOLossContext
from toolkit.losses.items import CELossContextInputItem, RLLossContextInputItem
from toolkit.losses.step.totals import ROOM, Counts, exchange_counts

MASK_BY_CURRENT = {
    "action": "mask",
    "lower": 0.7,
    "upper": 1.5,
    "between": "current_old",
    "denominator": "survivors",
}
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
CALLS = ("all_reduce", "all_gather", "all_gather_object", GATHER, "broadcast", "reduce_scatter", "all_to_all_single")


def counted_calls(call: Callable[[], Any]) -> tuple[Any, list[tuple[str, int]]]:
    """Run `call` and note the name and the elements of every collective on the way."""
    seen: list[tuple[str, int]] = []
    kept = {name: getattr(dist, name) for name in CALLS}

    def noting(name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            tensors = [own for own in args if isinstance(own, torch.Tensor)]
            seen.append((name, tensors[-1].numel() if tensors else 0))
            return kept[name](*args, **options)

        return wrapped

    for name in CALLS:
        setattr(dist, name, noting(name))
    try:
        return call(), seen
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def batches(rank: int, world: int) -> list[RLLossContextInputItem]:
    torch.manual_seed(1)
    item = random_item((4, 6))
    rows = [slice(rank, rank + 1), slice(rank + world, rank + world + 1)]
    return [RLLossContextInputItem(**{name: value[own] for name, value in item.tensors()}) for own in rows]


def one_exchange(rank: int, world: int) -> None:
    for cfg, expected in (
        (GRPOLossConfig(), [("all_reduce", 16)]),
        (
            GRPOLossConfig(
                policy_loss_cfg={"loss_type": "gspo"},
                aggregation="per_component",
                positive_nll_coef=0.1,
                entropy_coef=0.1,
                correction=[{"action": "clamp_upper", "upper": 2.0, "normalize": True}],
            ),
            [
                ("all_reduce", 16)
            ],  # 4 flags, 3 heads, 3 terms (positive tokens are counted once for two), 2 sums, filled up
        ),
        (GRPOLossConfig(aggregation="prompt_mean"), [(GATHER, 1 + ROOM)]),
        (GRPOLossConfig(policy_loss_cfg={"loss_type": "real"}, aggregation="prompt_mean"), [(GATHER, 1 + ROOM)]),
    ):
        own = [item.replace(group_ids=item.group_ids * 0 + 2 * i + rank) for i, item in enumerate(batches(rank, world))]
        _, seen = counted_calls(lambda cfg=cfg, own=own: GRPOLossContext.build_batches_loss_kwargs(own, cfg))
        assert seen == expected


def a_rank_with_bad_items(rank: int, world: int) -> None:
    own = batches(rank, world)
    if rank == 1:
        label = int((own[0].shifted_labels[0] != -100).nonzero()[0])
        advantages = own[0].advantages.clone()
        advantages[0, label] = torch.nan
        own[0] = own[0].replace(advantages=advantages)
    for aggregation in ("token_mean", "prompt_mean"):
        words = "data_batches.0..advantages" if rank == 1 else "rank 1 rejected the items of this step"
        with pytest.raises(DataError, match=words):
            GRPOLossContext.build_batches_loss_kwargs(own, GRPOLossConfig(aggregation=aggregation))
    GRPOLossContext.build_batches_loss_kwargs(batches(rank, world), GRPOLossConfig())  # and all go on together


def a_rank_with_another_kind_of_item(rank: int, world: int) -> None:
    own: list[Any] = batches(rank, world)
    if rank == 0:
        own[0] = CELossContextInputItem(shifted_labels=own[0].shifted_labels)
    words = "is a CELossContextInputItem" if rank == 0 else "rank 0 rejected the items"
    with pytest.raises(DataError, match=words):
        GRPOLossContext.build_batches_loss_kwargs(own, GRPOLossConfig())


def more_prompts_than_fit(rank: int, world: int) -> None:
    """Rank r has r + 1 tokens of each of 300 prompts, with numbers below 0 and beyond what float64 holds."""
    prompts = torch.arange(300) - 7
    prompts[-1] = 2**60 + 1
    labels = torch.zeros(300, 3, dtype=torch.int64)
    labels[:, rank + 1 :] = -100
    item = RLLossContextInputItem(
        shifted_labels=labels, advantages=torch.ones(300, 1), group_ids=prompts.flip(0).unsqueeze(-1)
    )
    cfg = GRPOLossConfig(aggregation="prompt_mean")
    (kwargs,), seen = counted_calls(lambda: GRPOLossContext.build_batches_loss_kwargs([item], cfg))
    assert seen == [(GATHER, 1 + ROOM), (GATHER, 16 + 1 + 2 * 300 - ROOM)]
    own = kwargs.loss_weight[labels != -100]
    torch.testing.assert_close(own, torch.full_like(own, world / (300 * 3)), rtol=1e-15, atol=0)


def pieces_that_differ(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    own = random_item((2, 4))
    for broken in ([own] * (1 + rank), [own if rank else own.replace(ref_logprobs=None)], [random_item((2, 4 + rank))]):
        with pytest.raises(DataError, match="ranks that share sequences differ"):
            GRPOLossContext.build_batches_loss_kwargs(broken, GRPOLossConfig(), sp_mesh=mesh)


def refused_in_a_mesh(rank: int, world: int) -> None:
    """The others wait for the pieces of the rank that refuses, before they count anything."""
    mesh = init_device_mesh("cpu", (world,))
    items = {
        "ce": CELossContextInputItem(shifted_labels=torch.zeros(1, 4, dtype=torch.int64)),
        "rl": random_item((1, 4)),
    }
    for cfg, own, other in ((GRPOLossConfig(), "rl", "ce"), (CELossConfig(), "ce", "rl")):
        for wrong in ([items[other]], items[own]):
            given: Any = wrong if rank == 1 else [items[own]]
            words = r"data_batches.* is a " if rank == 1 else "rank 1 of the mesh .* rejected the items of this step"
            with pytest.raises(DataError, match=words):
                cfg.loss_ctx_cls.build_batches_loss_kwargs(given, cfg, sp_mesh=mesh)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([items[own]], cfg, sp_mesh=mesh)  # and all go on
        assert float(kwargs.loss_weight.sum()) > 0


def all_of_it(rank: int, world: int) -> None:
    one_exchange(rank, world)
    more_prompts_than_fit(rank, world)
    a_rank_with_bad_items(rank, world)
    a_rank_with_another_kind_of_item(rank, world)
    pieces_that_differ(rank, world)
    refused_in_a_mesh(rank, world)


@pytest.mark.dist
def test_over_two_processes() -> None:
    run_processes(2, all_of_it)


def test_without_a_process_group() -> None:
    counts = Counts(torch.tensor([2.0]), {"tokens": {3: 4.0}})
    options: dict[str, Any] = {"num_numbers": 1, "has_tables": True, "device": torch.device("cpu")}
    assert exchange_counts(lambda: counts, **options) is counts

    def refused() -> Counts:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        exchange_counts(refused, **options)


# -------------------------------------------------------------------- survivors of the current policy (R30)


def test_survivors_of_the_current_policy_are_the_denominator() -> None:
    """Five tokens, two within [0.7, 1.5] of the old policy: their sum over 2, not over 5."""
    hidden, weight, bias = random_head((1, 5))
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    logits = hidden @ weight.T + bias
    current = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).detach()
    log_ratios = torch.tensor([[0.1, -1.5, 0.8, 10.0, 0.3]], dtype=torch.float64)
    item = RLLossContextInputItem(
        shifted_labels=labels, advantages=torch.ones(1, 5), old_logprobs=current - log_ratios, current_logprobs=current
    )
    kept = torch.tensor([0, 4])
    expected = -(log_ratios[0, kept].exp()).sum()
    for denominator, number in (("survivors", 2), ("original", 5)):
        cfg = GRPOLossConfig(
            policy_loss_cfg={"loss_type": "is_reinforce"}, correction=[{**MASK_BY_CURRENT, "denominator": denominator}]
        )
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        loss, _ = GRPOLossContext(cfg, kwargs).forward(hidden, weight, bias)
        torch.testing.assert_close(loss.detach(), expected / number, rtol=1e-12, atol=0)
        one_by_one = (
            item.replace(shifted_labels=labels.where(torch.arange(5) < 2, -100)),
            item.replace(shifted_labels=labels.where(torch.arange(5) >= 2, -100)),
        )
        parts = GRPOLossContext.build_batches_loss_kwargs(list(one_by_one), cfg)
        total = sum(GRPOLossContext(cfg, own).forward(hidden, weight, bias)[0] for own in parts)
        grads = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, total)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-15)
        assert bool((grads[0] != 0).any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"correction": [MASK_BY_CURRENT]}, "must know the current policy before the first forward"),
        (
            {"policy_loss_cfg": {"loss_type": "kl_cov"}},
            "statistics of the whole batch, but this step has 2 micro-batches",
        ),
        ({"policy_loss_cfg": {"loss_type": "real"}}, "group 0 is in several micro-batches"),
    ],
)
def test_a_step_that_cannot_be_seen_whole(options: dict, words: str) -> None:
    item = random_item((4, 6))
    rows = [[0, 2], [1, 3]]
    items = [RLLossContextInputItem(**{name: value[own] for name, value in item.tensors()}) for own in rows]
    cfg = GRPOLossConfig(**options)
    with pytest.raises(DataError, match=words) as caught:
        GRPOLossContext.build_batches_loss_kwargs(items, cfg)
    assert "current_logprobs" in str(caught.value)
    given = [own.replace(current_logprobs=own.old_logprobs) for own in items]
    GRPOLossContext.build_batches_loss_kwargs(given, cfg)
    with pytest.raises(DataError, match="1 of 2 micro-batches have current_logprobs"):
        GRPOLossContext.build_batches_loss_kwargs([given[0], items[1]], cfg)


# -------------------------------------------------------------------- what a review found


def step_wide(items: list[RLLossContextInputItem], hidden: list, weight: torch.Tensor, cfg: GRPOLossConfig) -> float:
    batches = GRPOLossContext.build_batches_loss_kwargs(items, cfg)
    return sum(
        float(GRPOLossContext(cfg, own).forward(states, weight)[0].detach())
        for own, states in zip(batches, hidden, strict=True)
    )


def test_equal_tokens_in_other_contexts_are_told_apart() -> None:
    """Six completions of the same two tokens: which of them clip_cov draws must not depend on the cut."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    labels, advantages = torch.tensor([[4, 1]]).expand(6, 2), torch.tensor([1.0, 1, -1, 1, 2, 1])[:, None].expand(6, 2)
    current = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": "clip_cov", "clip_cov_ratio": 0.3, "cov_low": -5.0, "cov_high": 50.0}
    )
    found = []
    for cut in ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[3, 4, 5], [0, 1, 2]], [[5, 0], [1, 2, 3, 4]]):
        items = [
            RLLossContextInputItem(
                shifted_labels=labels[rows], advantages=advantages[rows].double(), current_logprobs=current[rows]
            )
            for rows in cut
        ]
        found.append(step_wide(items, [hidden[rows] for rows in cut], weight, cfg))
    assert found == pytest.approx([found[0]] * 4, rel=1e-12)


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov", "real"])
@pytest.mark.parametrize("without", [0, 1])
def test_micro_batches_with_other_fields(loss: str, without: int) -> None:
    """Without old_logprobs a micro-batch is on-policy, also beside one that is not."""
    torch.manual_seed(3)
    item, (hidden, weight, _) = random_item((4, 6)), random_head((4, 6))
    current = (hidden @ weight.T).log_softmax(-1).gather(-1, item.shifted_labels.clamp(min=0).unsqueeze(-1))
    current = current.squeeze(-1).detach()
    own = slice(2 * without, 2 * without + 2)
    old = item.old_logprobs.clone()
    old[own] = current[own]
    whole = item.replace(old_logprobs=old, current_logprobs=current, rollout_logprobs=None)
    parts = [
        RLLossContextInputItem(**{name: value[2 * i : 2 * i + 2] for name, value in whole.tensors()}) for i in (0, 1)
    ]
    parts[without] = parts[without].replace(old_logprobs=None)
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": loss})
    expected = step_wide([whole], [hidden], weight, cfg)
    found = step_wide(parts, [hidden[:2], hidden[2:]], weight, cfg)
    assert found == pytest.approx(expected, rel=1e-12)
    parts[without] = parts[without].replace(teacher_logprobs=None)
    with pytest.raises(DataError, match="some micro-batches of this step have teacher_logprobs"):
        step_wide(parts, [hidden[:2], hidden[2:]], weight, cfg)


def test_negative_numbers_of_prompts() -> None:
    item, (hidden, weight, _) = random_item((4, 6)), random_head((4, 6))
    cfg = GRPOLossConfig(aggregation="prompt_mean")
    losses = [
        step_wide([item.replace(group_ids=torch.tensor(ids)[:, None].expand(4, 6))], [hidden], weight, cfg)
        for ids in ([0, 0, 1, 1], [-5, -5, 1, 1], [-5, -5, -6, -6])
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_pieces_of_kwargs_are_refused_where_sequences_count() -> None:
    item, (hidden, weight, _) = random_item((2, 6)), random_head((2, 6))
    for loss, is_refused in (("vanilla", False), ("gspo", True)):
        cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": loss})
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        piece = GRPOLossContext(cfg, kwargs.chunk(3)[0])
        if is_refused:
            with pytest.raises(DataError, match="looks at whole sequences"):
                piece.forward(hidden[:, :3], weight)
        else:
            piece.forward(hidden[:, :3], weight)
