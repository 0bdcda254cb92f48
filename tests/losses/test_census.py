"""One exchange over ranks counts all that a step divides by; what cannot be counted stops every rank with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.conftest import random_head, random_item, run_processes
from toolkit import DataError, GRPOLossConfig, GRPOLossContext
from toolkit.losses.census import Counts, census
from toolkit.losses.items import RLLossContextInputItem

MASK_BY_CURRENT = {
    "action": "mask",
    "lower": 0.7,
    "upper": 1.5,
    "between": "current_old",
    "denominator": "survivors",
}
CALLS = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter", "all_to_all_single")


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
        (GRPOLossConfig(), [("all_reduce", 2 + 3 + 2)]),
        (
            GRPOLossConfig(
                policy_loss_cfg={"loss_type": "gspo"},
                aggregation="per_component",
                positive_nll_coef=0.1,
                entropy_coef=0.1,
                correction=[{"action": "clamp_upper", "upper": 2.0, "normalize": True}],
            ),
            [("all_reduce", 2 + 3 + 3 * 2 + 2)],
        ),
        (GRPOLossConfig(aggregation="prompt_mean"), [("all_gather_object", 0)]),
    ):
        own = batches(rank, world)
        _, seen = counted_calls(lambda cfg=cfg, own=own: GRPOLossContext.build_batches_loss_kwargs(own, cfg))
        assert [call for call in seen if call[0] != "all_gather"] == expected, seen  # of which objects are made


def a_rank_with_bad_items(rank: int, world: int) -> None:
    own = batches(rank, world)
    if rank == 1:
        label = int((own[0].shifted_labels[0] != -100).nonzero()[0])
        advantages = own[0].advantages.clone()
        advantages[0, label] = torch.nan
        own[0] = own[0].replace(advantages=advantages)
    for aggregation in ("token_mean", "prompt_mean"):
        words = "data_batches.0..advantages" if rank == 1 else "rank 1 refused the items of this step"
        with pytest.raises(DataError, match=words):
            GRPOLossContext.build_batches_loss_kwargs(own, GRPOLossConfig(aggregation=aggregation))
    GRPOLossContext.build_batches_loss_kwargs(batches(rank, world), GRPOLossConfig())  # and all go on together


def pieces_that_differ(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    own = random_item((2, 4))
    for broken in ([own] * (1 + rank), [own if rank else own.replace(ref_logprobs=None)], [random_item((2, 4 + rank))]):
        with pytest.raises(DataError, match="ranks that share sequences differ"):
            GRPOLossContext.build_batches_loss_kwargs(broken, GRPOLossConfig(), sp_mesh=mesh)


def all_of_it(rank: int, world: int) -> None:
    one_exchange(rank, world)
    a_rank_with_bad_items(rank, world)
    pieces_that_differ(rank, world)


@pytest.mark.dist
def test_over_two_processes() -> None:
    run_processes(2, all_of_it)


def test_without_a_process_group() -> None:
    counts = Counts(torch.tensor([2.0]), {"tokens": {3: 4.0}})
    options: dict[str, Any] = {"num_numbers": 1, "has_tables": True, "device": torch.device("cpu")}
    assert census(lambda: counts, **options) is counts

    def refused() -> Counts:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        census(refused, **options)


# -------------------------------------------------------------------- survivors of the current policy (R30)


def test_survivors_of_the_current_policy_are_the_denominator() -> None:
    """Five tokens, two within [0.7, 1.5] of the old policy: their sum over 2, not over 5."""
    hidden, weight, bias = random_head((1, 5))
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    logits = hidden @ weight.T + bias
    current = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).detach()
    log_ratios = torch.tensor([[0.1, -1.5, 0.8, -10.0, 0.3]], dtype=torch.float64)
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
        ({"policy_loss_cfg": {"loss_type": "kl_cov"}}, "statistics of the whole batch, which the 2 micro-batches"),
        ({"policy_loss_cfg": {"loss_type": "real"}}, "group 0 lies in several micro-batches"),
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
