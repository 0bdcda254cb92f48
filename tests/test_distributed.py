"""Several processes give the gradient of one: really spawned, joined by gloo."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import random_head, random_item
from tests.processes import run_processes
from toolkit import CELossConfig, GRPOLossConfig, LaunchError, LossRunner, OrealLossConfig, RLLossContextInputItem
from toolkit.distributed import check_world_size, reduce_metrics, sp_gather, sp_split
from toolkit.losses.items import CELossContextInputItem
from toolkit.metrics import EffectiveSampleSize, Max, Mean, Min, Sum, merge_metrics, to_floats

SHAPE = (4, 6)
CONFIGS = {
    "grpo": GRPOLossConfig(use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1, use_entropy_metric=True),
    "grpo_chunk": GRPOLossConfig(use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1, mode="chunk", chunk_size=4),
    "grpo_corrected": GRPOLossConfig(
        policy_loss_cfg={"loss_type": "gspo", "cliprange_low": 0.2},
        aggregation="prompt_mean",
        correction=[
            {"action": "clamp_upper", "upper": 2.0, "normalize": True},
            {"action": "mask", "lower": 0.4, "upper": 2.5, "denominator": "survivors"},
        ],
        positive_nll_coef=0.3,
    ),
    "grpo_nll": GRPOLossConfig(positive_nll_coef=0.5),
    "oreal": OrealLossConfig(pos_sft_loss_weight=0.7, negative_loss_factor=0.4),
    "grpo_real": GRPOLossConfig(policy_loss_cfg={"loss_type": "real"}, aggregation="prompt_mean"),
    "grpo_components": GRPOLossConfig(aggregation={"name": "per_component", "positive_weight": 2.0}),
    "grpo_constant": GRPOLossConfig(aggregation={"name": "constant", "length": 5}, mode="chunk", chunk_size=4),
    "grpo_sum": GRPOLossConfig(aggregation="token_sum"),
    "grpo_sequences": GRPOLossConfig(aggregation="seq_mean_token_mean"),
    "ce_token": CELossConfig(),
    "ce_sample": CELossConfig(loss_reduction="sample"),
    "ce_square": CELossConfig(loss_reduction="square", mode="chunk", chunk_size=4),
}


class Wrapped(nn.Module):
    """A head as the only trainable part, its loss inside the forward, as DDP wants it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, hidden: Tensor, context: Any) -> Any:
        return context.forward(hidden, self.weight, self.bias)


def data(name: str, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(3)
    item = random_item(SHAPE, dtype=dtype)
    labels = item.shifted_labels.clone()
    labels[1] = -100  # a row without a scored token
    item = item.replace(shifted_labels=labels)
    if name.startswith("ce"):
        item = CELossContextInputItem(shifted_labels=item.shifted_labels)
    return item, tuple(tensor.detach() for tensor in random_head(SHAPE, dtype=dtype))  # type: ignore[return-value]


def take(item: Any, rows: slice) -> Any:
    return type(item)(**{name: value[rows] for name, value in item.tensors()})


def one_process(name: str, dtype: torch.dtype) -> tuple[float, Tensor, Tensor, dict[str, float]]:
    cfg = CONFIGS[name]
    item, (hidden, weight, bias) = data(name, dtype)
    model = Wrapped(weight, bias)
    context = cfg.loss_ctx_cls
    (kwargs,) = context.build_batches_loss_kwargs([item], cfg)
    loss, metrics = model(hidden, context(cfg, kwargs))
    loss.backward()
    return loss.item(), model.weight.grad, model.bias.grad, to_floats(metrics)  # type: ignore[return-value]


def data_parallel(rank: int, world: int, name: str, dtype: torch.dtype, is_uneven: bool) -> None:
    """DDP over the rows, two micro-batches on every rank; uneven: rank 0 has everything that is scored."""
    cfg = CONFIGS[name]
    loss, weight_grad, bias_grad, metrics = reference(name, dtype)
    item, (hidden, weight, bias) = data(name, dtype)
    ddp = DistributedDataParallel(Wrapped(weight, bias))
    if is_uneven:
        rows = [slice(0, 2), slice(2, 4)] if rank == 0 else [slice(1, 2), slice(1, 2)]
    else:
        own = SHAPE[0] // world
        start = rank * own
        rows = [slice(start, start + own // 2), slice(start + own // 2, start + own)]
        rows = [r if r.stop > r.start else slice(1, 2) for r in rows]
    context = cfg.loss_ctx_cls
    batches = context.build_batches_loss_kwargs([take(item, r) for r in rows], cfg)
    total, parts = 0.0, []
    for index, (r, kwargs) in enumerate(zip(rows, batches, strict=True)):
        with ddp.no_sync() if index == 0 else torch.enable_grad():
            part, found = ddp(hidden[r], context(cfg, kwargs))
            part.backward()
        total += part.item()
        parts.append(found)
    mean_loss = torch.tensor(total, dtype=torch.float64)
    dist.all_reduce(mean_loss)
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(mean_loss.item() / world, loss, **tolerance)
    torch.testing.assert_close(ddp.module.weight.grad, weight_grad, **tolerance)
    torch.testing.assert_close(ddp.module.bias.grad, bias_grad, **tolerance)
    ours = to_floats(reduce_metrics(merge_metrics(parts)))
    for key, value in metrics.items():
        assert ours[key] == pytest.approx(value, rel=tolerance["rtol"], abs=tolerance["atol"]), key


def reference(name: str, dtype: torch.dtype) -> tuple[float, Tensor, Tensor, dict[str, float]]:
    """The loss of everything in one batch, worked out without the process group."""
    with alone():
        return one_process(name, dtype)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if there were no process group."""
    kept, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = kept


@pytest.mark.dist
@pytest.mark.parametrize("is_uneven", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_processes_equal_one(dtype: torch.dtype, is_uneven: bool) -> None:
    run_processes(2, all_configs, dtype, is_uneven)


def all_configs(rank: int, world: int, dtype: torch.dtype, is_uneven: bool) -> None:
    for name in CONFIGS:
        if name == "grpo_real" and not is_uneven:
            continue  # its groups must be whole: here in two micro-batches of two rows each on one rank
        data_parallel(rank, world, name, dtype, is_uneven)


def summing_back_end(rank: int, world: int) -> None:
    item, (hidden, weight, bias) = data("grpo", torch.float64)
    _, expected, _, _ = reference("grpo", torch.float64)
    cfg = CONFIGS["grpo"].model_copy(update={"gradient_reduction": "sum"})
    model = Wrapped(weight, bias)
    rows = slice(2 * rank, 2 * rank + 2)
    context = cfg.loss_ctx_cls
    (kwargs,) = context.build_batches_loss_kwargs([take(item, rows)], cfg)
    loss, _ = model(hidden[rows], context(cfg, kwargs))
    loss.backward()
    dist.all_reduce(model.weight.grad)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=1e-15)


def runner_step(rank: int, world: int) -> None:
    """`LossRunner.step` reports the loss of the whole batch on every rank, every term of it."""
    _, _, _, expected = reference("grpo", torch.float64)
    item, (hidden, weight, bias) = data("grpo", torch.float64)
    rows = slice(2 * rank, 2 * rank + 2)
    batch = dict(take(item, rows).tensors())
    result = LossRunner(CONFIGS["grpo"]).step([batch], lambda _: (hidden[rows], weight.requires_grad_(), bias))
    assert result.metrics == pytest.approx(expected, rel=1e-9)
    assert float(result.loss) == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.dist
def test_runner_step_over_two_processes() -> None:
    run_processes(2, runner_step)


@pytest.mark.dist
def test_a_back_end_that_sums() -> None:
    run_processes(2, summing_back_end)


def sequence_parallel(rank: int, world: int) -> None:
    """Two ranks share a packed row whose length is odd; token, sample and square weights."""
    mesh = init_device_mesh("cpu", (world,))
    bounds = torch.tensor([0, 5, 6, 23])
    for name in (
        "grpo",
        "grpo_nll",
        "oreal",
        "grpo_components",
        "grpo_constant",
        "grpo_sum",
        "grpo_sequences",
        "ce_sample",
        "ce_square",
    ):
        cfg = CONFIGS[name]
        item, (hidden, weight, bias) = data(name, torch.float64)
        row = type(item)(**{key: value.reshape(1, -1)[:, :23] for key, value in item.tensors()})
        hidden = hidden.reshape(1, -1, hidden.shape[-1])[:, :23]
        shards = row.sp_split(mesh)
        assert shards.shifted_labels.shape == (1, 12)
        if rank == 1:
            assert shards.shifted_labels[0, -1] == -100
        context = cfg.loss_ctx_cls
        (kwargs,) = context.build_batches_loss_kwargs([shards], cfg, [bounds], sp_mesh=mesh)
        model = Wrapped(weight, bias)
        states = torch.cat([hidden, hidden.new_full((1, 1, hidden.shape[-1]), torch.nan)], 1).chunk(2, 1)[rank]
        loss, _ = model(states, context(cfg, kwargs))
        loss.backward()
        dist.all_reduce(model.weight.grad, op=dist.ReduceOp.SUM)
        whole = Wrapped(weight, bias)
        with alone():
            (kwargs,) = context.build_batches_loss_kwargs([row], cfg, [bounds])
            whole(hidden, context(cfg, kwargs))[0].backward()
        torch.testing.assert_close(model.weight.grad / world, whole.weight.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.dist
def test_sequence_parallel_equals_one_process() -> None:
    run_processes(2, sequence_parallel)


UNEVEN = (
    {},
    {"policy_loss_cfg": {"loss_type": "gspo"}, "aggregation": "prompt_mean", "mode": "eager"},
    {"policy_loss_cfg": {"loss_type": "real"}, "aggregation": "seq_mean_token_mean"},
    {"policy_loss_cfg": {"loss_type": "clip_cov"}},
    {"aggregation": "square", "gradient_reduction": "sum"},
)
SPLITS = ([[(0, 2)], [(2, 3), (3, 4), (4, 5), (5, 6)]], [[], [(0, 3), (3, 6)]], [[(0, 6)], []])
"""Rows of each micro-batch of each rank."""


def other_numbers_of_micro_batches(rank: int, world: int) -> None:
    """Ranks with one and four micro-batches, and ranks without any, which take part in the exchanges all the same."""
    torch.manual_seed(4)
    item, (hidden, weight, _) = random_item((6, 7)), random_head((6, 7))
    current = (hidden @ weight.T).log_softmax(-1).gather(-1, item.shifted_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    item, hidden = item.replace(current_logprobs=current.detach()), hidden.detach()
    for options, split in itertools.product(UNEVEN, SPLITS):
        cfg = GRPOLossConfig(**{"mode": "chunk", "chunk_size": 4, **options})  # type: ignore[arg-type]
        context = cfg.loss_ctx_cls
        with alone():
            (kwargs,) = context.build_batches_loss_kwargs([item], cfg)
            loss, known = context(cfg, kwargs).forward(hidden, weight)
            (expected,) = torch.autograd.grad(loss, weight)
            known = to_floats(known)
        rows = [slice(*own) for own in split[rank]]
        batches = context.build_batches_loss_kwargs([take(item, own) for own in rows], cfg)
        found, parts = torch.zeros_like(weight), []
        for own, kwargs in zip(rows, batches, strict=True):
            part, metrics = context(cfg, kwargs).forward(hidden[own], weight)
            found += torch.autograd.grad(part, weight)[0]
            parts.append(metrics)
        dist.all_reduce(found)
        factor = world if cfg.gradient_reduction == "mean" else 1
        torch.testing.assert_close(found / factor, expected, rtol=1e-12, atol=1e-15)
        measured = to_floats(reduce_metrics(merge_metrics(parts)))
        assert measured == pytest.approx(known, rel=1e-12, abs=1e-15, nan_ok=True), (options, split)


def gathered_with_gradients(rank: int, world: int) -> None:
    """Each rank computes a part of the loss from the whole; a shard's gradient is what all of them ask of it."""
    mesh = init_device_mesh("cpu", (world,))
    values, weights = torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    is_own = torch.arange(values.numel()).reshape(values.shape) % world == rank
    for dim in (1, -2, 0, 2, -1):  # of lengths 5, 5, 2, 3, 3
        shard = sp_split(values, mesh, dim=dim, pad=7.0).requires_grad_()
        whole = sp_gather(shard, mesh, dim=dim)
        missing = -values.shape[dim] % world
        assert whole.shape[dim] == values.shape[dim] + missing
        assert bool((whole.narrow(dim, values.shape[dim], missing) == 7).all())
        whole = whole.narrow(dim, 0, values.shape[dim])
        assert torch.equal(whole, values)
        (whole.square() * weights * is_own).sum().backward()
        assert shard.grad is not None
        torch.testing.assert_close(shard.grad, sp_split(2 * values * weights, mesh, dim=dim, pad=0.0), rtol=0, atol=0)


def uneven_and_gathered(rank: int, world: int) -> None:
    other_numbers_of_micro_batches(rank, world)
    gathered_with_gradients(rank, world)


@pytest.mark.dist
def test_other_numbers_of_micro_batches_and_gathered_shards() -> None:
    run_processes(2, uneven_and_gathered)


def metrics_reduce(rank: int, world: int) -> None:
    values = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0])][rank]
    parts = {"m": Mean.of(values), "s": Sum(values.sum()), "lo": Min.of(values), "hi": Max.of(values)}
    found = to_floats(reduce_metrics({**parts, "ess": EffectiveSampleSize.of(values)}))
    # The mean of the means would be 3.5.
    assert found == {"m": 13 / 4, "s": 13.0, "lo": 1.0, "hi": 6.0, "ess": 13**2 / (4 * 57)}


@pytest.mark.dist
def test_metrics_reduce_exactly() -> None:
    run_processes(2, metrics_reduce)


def test_world_size_other_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_world_size(1)
    with pytest.raises(LaunchError, match=r"training.num_processes asks for 2 processes, but 1 work together"):
        check_world_size(1, expected=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaunchError, match="WORLD_SIZE asks for 4"):
        check_world_size(1)


def test_one_item_is_what_the_reference_uses() -> None:
    item, _ = data("grpo", torch.float64)
    assert isinstance(item, RLLossContextInputItem)
    assert abs(one_process("grpo", torch.float64)[0]) > 1e-3
