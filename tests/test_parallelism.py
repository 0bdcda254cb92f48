"""accelerate's parallelism: who counts, what averages, the order of shards; results equal those of one process."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.tensor.experimental import context_parallel

from tests.conftest import random_item
from tests.layout_cases import FULL, grpo
from tests.parallelism_cases import SIZES, Case, accelerator_of, cases, of, parallelism_of, worker
from tests.processes import run_processes
from toolkit import GRPOLossConfig, RLLossContextInputItem
from toolkit.distributed import Parallelism, SequenceMesh, counting_over, from_accelerate, sp_gather, sp_split
from toolkit.distributed.counting import gradient_divisor
from toolkit.distributed.sequence import sp_joined
from toolkit.errors import ConfigError, DataError, LaunchError
from toolkit.testing import processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -------------------------------------------------------------------- the order of shards


@dataclass(frozen=True)
class Mesh(SequenceMesh):
    """One of several ranks, without processes."""

    number: int = 2
    index: int = 0

    def size(self) -> int:
        return self.number

    def get_local_rank(self) -> int:
        return self.index


def meshes(number: int) -> list[Mesh]:
    return [Mesh(None, "head_tail", number=number, index=index) for index in range(number)]


def test_head_tail_order_by_hand() -> None:
    row = torch.arange(12).reshape(1, 12)
    shards = [sp_split(row, mesh, pad=0) for mesh in meshes(3)]
    assert [shard[0].tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert torch.equal(sp_joined(shards, meshes(3)[1]), row)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_joined_shards_are_the_row(number: int) -> None:
    values = torch.randn(2, 4 * number, 3)
    shards = [sp_split(values, mesh, dim=1, pad=0.0) for mesh in meshes(number)]
    assert torch.equal(sp_joined(shards, meshes(number)[0], dim=1), values)
    assert sp_split(values[:, :0], meshes(number)[0], dim=1, pad=0.0).shape == (2, 0, 3)


def test_a_length_without_a_head_tail_order_raises() -> None:
    with pytest.raises(DataError, match=r"a row of 6 positions .* over 2 ranks .* divisible by 4, twice the number"):
        sp_split(torch.zeros(1, 6), meshes(2)[0], pad=0.0)
    with pytest.raises(DataError, match="a shard of 3 positions is not in head-tail order"):
        sp_joined([torch.zeros(1, 3)] * 2, meshes(2)[0])
    with pytest.raises(ConfigError, match=r"order='zigzag' is not an order of shards; choose .*'head_tail'"):
        SequenceMesh(None, "zigzag")  # type: ignore[arg-type]


def test_a_record_without_a_mesh_stays_whole() -> None:
    item = random_item((2, 4))
    assert item.sp_split(None) is item


def test_the_divisor_of_a_back_end() -> None:
    with counting_over(None, divisor=3):
        assert gradient_divisor() == 3
    assert gradient_divisor() == 1
    with (
        pytest.raises(ConfigError, match="divisor=0 of counting_over must be at least 1"),
        counting_over(None, divisor=0),
    ):
        pass


def wide_item() -> RLLossContextInputItem:
    """An item with candidates, and advantages that are one value for each row."""
    item = random_item((2, 8))
    logprobs = torch.randn(2, 8, 3, dtype=torch.float64).log_softmax(-1)
    ids = torch.arange(3).expand(2, 8, 3)
    return item.replace(advantages=torch.tensor([[1.0], [-0.5]]), ref_topk_logprobs=logprobs, ref_topk_ids=ids)


def head_tail_with_torch(rank: int, world: int) -> None:
    """What torch's context_parallel does to the buffers of an item is what `sp_split` gives."""
    torch.manual_seed(3)
    item = wide_item()
    sp_mesh = parallelism_of({"cp": world}).sp_mesh
    assert sp_mesh is not None
    assert (sp_mesh.order, sp_mesh.is_packable) == ("head_tail", False)
    mesh = accelerator_of({"cp": world}).torch_device_mesh["cp"]
    kept = {name: value.clone() for name, value in item.tensors()}
    copy, buffers, dims = item.cp_buffers()
    assert len(buffers) == len(dims) == len(kept)
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=dims):
        expected = item.sp_split(sp_mesh)
        for name, value in copy.tensors():
            assert torch.equal(value, getattr(expected, name)), name
    for name, value in kept.items():
        assert torch.equal(getattr(item, name), value), name
        assert torch.equal(getattr(copy, name), value), name

    values, weights = torch.randn(2, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    shard = sp_split(values, sp_mesh, pad=0.0).requires_grad_()
    whole = sp_gather(shard, sp_mesh)
    assert torch.equal(whole, values)
    (whole.square() * weights).sum().backward()
    torch.testing.assert_close(shard.grad, sp_split(2 * world * values * weights, sp_mesh, pad=0.0), rtol=0, atol=0)


def packed_rows(rank: int, world: int) -> None:
    """accelerate's context parallelism has no mask between the sequences of a row."""
    sp_mesh = parallelism_of({"cp": world}).sp_mesh
    cfg, item = GRPOLossConfig(), random_item((1, 8)).sp_split(sp_mesh)
    with pytest.raises(DataError, match=r"cu_seq_lens_list\[0\] has 2 sequences in a row, but accelerate's context"):
        cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, [torch.tensor([0, 3, 8])], sp_mesh=sp_mesh)
    cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, [torch.tensor([0, 8])], sp_mesh=sp_mesh)
    odd = random_item((1, 3))
    with pytest.raises(DataError, match="a shard of 3 positions is not in head-tail order"):
        cfg.loss_ctx_cls.build_batches_loss_kwargs([odd], cfg, sp_mesh=sp_mesh)


# -------------------------------------------------------------------- who counts, and what averages

LAYOUTS: dict[int, dict[str, tuple[int, list[int], list[int], list[int]]]] = {
    2: {
        "dp_shard 2": (2, [0, 1], [], []),
        "cp 2": (2, [0, 1], [0, 1], []),
        "sp 2": (1, [0, 1], [0, 1], []),
        "tp 2": (1, [0], [], [0, 1]),
    },
    4: {
        "dp_replicate 2 dp_shard 2": (4, [0, 1, 2, 3], [], []),
        "dp_shard 2 cp 2": (4, [0, 1, 2, 3], [0, 1], []),
        "dp_shard 2 sp 2": (2, [0, 1, 2, 3], [0, 1], []),
        "dp_shard 2 tp 2": (2, [0, 2], [], [0, 1]),
        "cp 2 tp 2": (2, [0, 2], [0, 2], [0, 1]),
    },
}
"""On rank 0: the divisor, and the ranks that count, that share a sequence, and that share the vocabulary."""


def members(group: Any) -> list[int]:
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def read_from_accelerate(rank: int, world: int) -> None:
    for name, (divisor, counting, sequence, vocabulary) in LAYOUTS[world].items():
        words = name.split()
        found = parallelism_of({key: int(size) for key, size in zip(words[::2], words[1::2], strict=True)})
        assert found.divisor == divisor, name
        with found.counting():
            assert gradient_divisor() == divisor
        assert rank in members(found.counting_group)
        if rank:
            continue
        assert members(found.counting_group) == counting, name
        assert (members(found.sp_mesh.get_group()) if found.sp_mesh else []) == sequence, name
        assert (members(found.tp_mesh.get_group()) if found.tp_mesh else []) == vocabulary, name


def without_a_config(rank: int, world: int) -> None:
    found = from_accelerate(Accelerator(cpu=True))
    assert found == Parallelism(None, world, None, None)


def accelerator(kind: str, sizes: dict[str, int], *, is_fsdp2: bool = False) -> Any:
    config = SimpleNamespace(**{f"{name}_size": size for name, size in sizes.items()})
    return SimpleNamespace(
        parallelism_config=config, torch_device_mesh=None, distributed_type=kind, is_fsdp2=is_fsdp2, num_processes=4
    )


@pytest.mark.parametrize(
    ("kind", "sizes", "error", "message"),
    [
        ("FSDP", {}, LaunchError, "the launcher asks for FSDP 1, .* use FSDP 2"),
        ("MEGATRON_LM", {"tp": 2}, LaunchError, "the launcher asks for MEGATRON_LM"),
        ("MULTI_GPU", {"sp": 2}, ConfigError, "sp_size=2 needs DeepSpeed, but the distributed type is MULTI_GPU"),
        ("DEEPSPEED", {"cp": 2}, ConfigError, "cp_size=2 under DeepSpeed"),
        ("DEEPSPEED", {"cp": 2, "sp": 2}, ConfigError, "cp_size=2 and sp_size=2 both split sequences"),
        ("MULTI_GPU", {"dp_shard": 2, "tp": 2}, ConfigError, "dp_shard_size=2, tp_size=2 without FSDP 2: .* averaged"),
    ],
)
def test_what_cannot_be_right_raises(kind: str, sizes: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_accelerate(accelerator(kind, sizes))


def test_deepspeed_is_missing_or_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"sp_size=2 needs DeepSpeed, which cannot be imported .* install deepspeed"):
        from_accelerate(accelerator("DEEPSPEED", {"sp": 2}))
    assert from_accelerate(accelerator("DEEPSPEED", {})) == Parallelism(divisor=4)
    for name in ("deepspeed", "deepspeed.utils", "deepspeed.utils.groups"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def no_group() -> None:
        raise KeyError("No sequence parallel group found")

    monkeypatch.setattr(sys.modules["deepspeed.utils.groups"], "_get_sequence_parallel_group", no_group, raising=False)
    with pytest.raises(ConfigError, match=r"no group of ranks that share a sequence yet; call .* after accelerator"):
        from_accelerate(accelerator("DEEPSPEED", {"sp": 2}))


# -------------------------------------------------------------------- tests with processes


def two(rank: int, world: int) -> None:
    read_from_accelerate(rank, world)
    without_a_config(rank, world)
    head_tail_with_torch(rank, world)
    packed_rows(rank, world)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("world", "function"), [(2, two), (4, read_from_accelerate)])
def test_what_is_read_and_split(world: int, function: Callable[..., None]) -> None:
    run_processes(world, function)


def quick_cases() -> list[Case]:
    draw = random.Random(0)
    chosen = [("gspo", "seq_mean_token_mean"), ("vanilla", "prompt_mean"), ("real", "token_mean")]
    return [
        of(f"{loss}/{how}", grpo(loss, how), sizes, seed, draw)
        for seed, ((loss, how), sizes) in enumerate(zip(chosen, SIZES[2], strict=True))
    ]


@pytest.mark.dist
def test_some_losses_under_each_layout_of_two_processes() -> None:
    assert not processes.run_processes(2, worker, quick_cases())


@pytest.mark.slow
def test_the_sample_meets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FULL, raising=False)
    for world in SIZES:
        drawn = cases(world)
        assert {str(case.sizes) for case in drawn} == {str(sizes) for sizes in SIZES[world]}
        names = {case.name for case in drawn}
        assert {"gspo/prompt_mean", "vanilla/token_mean", "clip_cov/token_mean", "kl_cov/token_mean"} <= names
        assert {case.mode for case in drawn} == {"eager", "chunk"}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_losses_and_aggregations_equal_one_process(world: int) -> None:
    assert not processes.run_processes(world, worker, cases(world))
