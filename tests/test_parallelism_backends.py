"""What back-ends average under accelerate's parallelism: the probe's factor, and gradients of accelerate's FSDP 2."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.conftest import random_item
from tests.layout_cases import grpo
from tests.parallelism_cases import SIZES, accelerator_of, parallelism_of
from tests.processes import run_processes
from toolkit import RLLossContextInputItem
from toolkit.distributed import Parallelism, counting_over, from_accelerate
from toolkit.errors import DataError, LaunchError
from toolkit.metrics import unsharded
from toolkit.testing.evaluation import alone
from toolkit.training.probe import check_gradient_scale

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -------------------------------------------------------------------- the probe under each combination


class SplitVocabulary(nn.Module):
    """A module whose head, [2, P], is split over the ranks of a mesh."""

    def __init__(self, module: Any, mesh: Any) -> None:
        super().__init__()
        self.module = module
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class Summed(nn.Module):
    """Sums gradients over all ranks and divides them, as DeepSpeed's ZeRO does."""

    def __init__(self, module: nn.Module, divisor: int) -> None:
        super().__init__()
        self.module = module
        self.divisor = divisor

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        return parameter.grad / self.divisor


def as_accelerate_wraps(module: nn.Module, sizes: dict[str, int], found: Parallelism, mesh: Any) -> Any:
    """Wrap as accelerate's FSDP 2 does: a split head first, then shards over its joint mesh."""
    wrapped = module if found.tp_mesh is None else SplitVocabulary(module, found.tp_mesh)
    if set(sizes) == {"tp"}:
        return wrapped
    names = ["dp_replicate"] * ("dp_replicate" in sizes) + ["dp_shard_cp"]
    return fully_shard(wrapped, mesh=mesh[tuple(names)])


def probe(rank: int, world: int) -> None:
    for sizes in (*SIZES[world], {"dp_shard": world}):
        with parallelism_of(sizes).counting():
            probe_one(sizes)


def probe_one(sizes: dict[str, int]) -> None:
    found = parallelism_of(sizes)
    if "sp" in sizes:
        loops = [Summed(nn.Module(), divisor) for divisor in (found.divisor, dist.get_world_size())]
        right, averaged = (functools.partial(summed_probe, found, loop) for loop in loops)
        assert right() == pytest.approx(1, abs=1e-6)
        with pytest.raises(LaunchError, match="ranks share a sequence"):
            averaged()
        with counting_over(None), pytest.raises(LaunchError, match=r"counted twice; .*DeepSpeed sums: .*divisor"):
            right()
        return
    mesh = accelerator_of(sizes).torch_device_mesh
    wrap = functools.partial(as_accelerate_wraps, sizes=sizes, found=found, mesh=mesh)
    assert check_gradient_scale(wrap=wrap, sp_mesh=found.sp_mesh) == pytest.approx(1, abs=1e-6), sizes
    twice = counting_over(found.counting_group, divisor=2 * found.divisor)
    with twice, pytest.raises(LaunchError, match="gradients are 2 times"):
        check_gradient_scale(wrap=wrap, sp_mesh=found.sp_mesh)
    if found.tp_mesh is not None:
        with counting_over(None), pytest.raises(DataError, match="each counts the same tokens"):
            check_gradient_scale(wrap=wrap, sp_mesh=found.sp_mesh)


def summed_probe(found: Parallelism, loop: Summed) -> float:
    def wrap(module: nn.Module) -> nn.Module:
        loop.module = module
        return loop

    return check_gradient_scale(wrap=wrap, gradient=loop.gradient, sp_mesh=found.sp_mesh)


# -------------------------------------------------------------------- accelerate itself

CFG = grpo("gspo", "seq_mean_token_mean", mode="chunk", chunk_size=3)


PREPARED: dict[int, tuple[dict[str, int], ...]] = {
    2: ({"dp_shard": 2}, {"cp": 2}),
    4: (
        {"dp_shard": 2, "cp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_shard": 2, "tp": 2},
        {"cp": 2, "tp": 2},
    ),
}
"""Layouts that accelerate prepares here."""


class ReplicateParallel:
    """What accelerate 1.15 imports from transformers for tp, which 5.23 does not have: inputs and outputs of modules
    with replicated weights."""

    def prepare_module_tp(self, module: nn.Module, mesh: Any) -> None:
        if not module._forward_hooks:  # called once for each parameter
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(DTensor.from_local(own, mesh, [Replicate()]) for own in inputs)
            )
            module.register_forward_hook(lambda _module, _inputs, output: output.to_local())


class Tiny(nn.Module):
    """A model without attention, so a position is computed alike wherever it is; the loss is in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.trunk = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)

    def forward(self, ids: Tensor, context: Any) -> Tensor:
        return context.forward(self.trunk(self.embedding(ids)).tanh(), self.head.weight)[0]


def tiny() -> Tiny:
    torch.manual_seed(5)
    return Tiny().double()


def accelerator_on_cpu(sizes: dict[str, int]) -> Accelerator:
    """An Accelerator with a ParallelismConfig on CPU, which it would refuse if it knew: it is told of GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    config = ParallelismConfig(**{f"{name}_size": size for name, size in sizes.items()})
    return Accelerator(cpu=True, parallelism_config=config, fsdp_plugin=plugin)


def data_of(team: int) -> tuple[Tensor, RLLossContextInputItem]:
    torch.manual_seed(10 + team)
    return torch.randint(0, 11, (2, 8)), random_item((2, 8))


def gradients_alone(teams: int) -> dict[str, Tensor]:
    """Of all batches in one process."""
    model = tiny()
    with alone():
        batches = [data_of(team) for team in range(teams)]
        kwargs = CFG.loss_ctx_cls.build_batches_loss_kwargs([item for _, item in batches], CFG)
        for (ids, _), own in zip(batches, kwargs, strict=True):
            model(ids, CFG.loss_ctx_cls(CFG, own)).backward()
    return {name: own.grad for name, own in model.named_parameters() if own.grad is not None}


def through_accelerate(rank: int, world: int) -> None:
    for sizes in (
        ({"dp_shard": 2}, {"cp": 2}) if world == 2 else ({"dp_shard": 2, "cp": 2}, {"dp_replicate": 2, "dp_shard": 2})
    ):
        one_accelerator(rank, sizes, is_split_by_torch=False)
        one_accelerator(rank, sizes, is_split_by_torch=True)


def one_accelerator(rank: int, sizes: dict[str, int], *, is_split_by_torch: bool) -> None:
    own = accelerator_on_cpu(sizes)
    model, split = tiny(), own.parallelism_config.tp_size > 1
    if split:
        model.head.weight = nn.Parameter(
            distribute_tensor(model.head.weight.detach(), own.torch_device_mesh["tp"], [Shard(0)])
        )
    from transformers.integrations import tensor_parallel

    with mock.patch.object(tensor_parallel, "ReplicateParallel", ReplicateParallel, create=True):
        model, _ = own.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    found = from_accelerate(own)
    shards = sizes.get("cp", 1) * sizes.get("tp", 1)  # ranks with one batch are neighbours
    teams, team = dist.get_world_size() // shards, rank // shards
    exact = gradients_alone(teams)
    ids, item = data_of(team)
    cp_item, buffers, dims = item.cp_buffers()
    if not is_split_by_torch:
        buffers, dims, cp_item = [], [], item.sp_split(found.sp_mesh)
    with found.counting(), own.maybe_context_parallel(buffers=[ids, *buffers], buffer_seq_dims=[1, *dims]):
        (kwargs,) = CFG.loss_ctx_cls.build_batches_loss_kwargs([cp_item], CFG, sp_mesh=found.sp_mesh)
        own.backward(model(ids, CFG.loss_ctx_cls(CFG, kwargs)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(unsharded(parameter.grad), exact[name], rtol=1e-12, atol=1e-15)

    def wrap(module: nn.Module) -> Any:
        own._models.clear()
        return own.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))[0]

    if not split:  # the probe's module is prepared as the model was
        with found.counting():
            assert check_gradient_scale(own.backward, wrap, sp_mesh=found.sp_mesh) == pytest.approx(1, abs=1e-6)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_probe_under_each_layout(world: int) -> None:
    run_processes(world, probe)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", PREPARED)
def test_gradients_of_what_accelerate_prepares(world: int) -> None:
    pytest.importorskip("transformers")
    run_processes(world, through_accelerate)
