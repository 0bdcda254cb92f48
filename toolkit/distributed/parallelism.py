"""Which ranks share a batch, a sequence or a vocabulary, as accelerate's `ParallelismConfig` lays them out.

Legend: R ranks. Ranks along "tp", "cp" and "sp" have the same batch; those along "dp_replicate" and "dp_shard" do not.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed.counting import counting_over
from toolkit.distributed.sequence import Order, SequenceMesh
from toolkit.errors import ConfigError, LaunchError

SIZES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
"""The dimensions of a `ParallelismConfig`."""


@dataclass(frozen=True)
class Parallelism:
    """Which ranks count a step, share its sequences or split its vocabulary; made by `from_accelerate`."""

    counting_group: Any = None
    """The process group of ranks with different tokens, which count the step; None: all ranks."""
    divisor: int = 1
    """What the back-end divides the sum of these ranks' gradients by."""
    sp_mesh: SequenceMesh | None = None
    """The ranks that share each sequence, with the order of their shards; None: each rank has whole sequences."""
    tp_mesh: DeviceMesh | None = None
    """The ranks that share the vocabulary, one-dimensional: the head is a DTensor with `Shard(0)` over it."""

    def counting(self) -> AbstractContextManager[None]:
        """Return the `counting_over` for kwargs, forwards and `reduce_metrics`."""
        return counting_over(self.counting_group, divisor=self.divisor)


def from_accelerate(accelerator: Any) -> Parallelism:
    """Read which ranks share what from an `Accelerator`; every rank must call it, after ``accelerator.prepare``.

    ::

        parallelism = from_accelerate(accelerator)
        items = [item.sp_split(parallelism.sp_mesh) for item in items]
        with parallelism.counting():
            batches_kwargs = context.build_batches_loss_kwargs(items, loss_cfg, sp_mesh=parallelism.sp_mesh)

    Raises:
        ConfigError: nothing averages gradients over data-parallel ranks as the loss expects, `prepare` was not called,
            or DeepSpeed is needed but not installed.
        LaunchError: the launcher asks for FSDP 1 or Megatron-LM.
    """
    sizes = _sizes(accelerator.parallelism_config)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    _check_kind(kind, accelerator, sizes)
    if kind == "DEEPSPEED":
        sp_mesh = None if sizes["sp"] == 1 else SequenceMesh(_ulysses_group(sizes["sp"]))
        return Parallelism(divisor=accelerator.num_processes // sizes["sp"], sp_mesh=sp_mesh)
    mesh: DeviceMesh | None = accelerator.torch_device_mesh
    if mesh is None:  # DDP, or FSDP 2 without a ParallelismConfig: over all ranks
        return Parallelism(divisor=accelerator.num_processes)
    sp_mesh = None
    if sizes["cp"] > 1:
        sp_mesh = SequenceMesh(mesh["cp"].get_group(), _order_of_context_parallel(mesh["cp"]), is_packable=False)
    number = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["cp"]
    if sizes["tp"] == 1:
        return Parallelism(divisor=number, sp_mesh=sp_mesh)
    return Parallelism(_counting_group(mesh, number), number, sp_mesh, mesh["tp"])


def _sizes(config: Any) -> dict[str, int]:
    """Return the sizes by dimension; 1 for all without a `ParallelismConfig`."""
    sizes = {name: 1 if config is None else int(getattr(config, f"{name}_size", 1) or 1) for name in SIZES}
    if sizes["cp"] > 1 and sizes["sp"] > 1:
        raise ConfigError(f"cp_size={sizes['cp']} and sp_size={sizes['sp']} both split sequences; set one of them to 1")
    return sizes


def _check_kind(kind: str, accelerator: Any, sizes: dict[str, int]) -> None:
    """Raise if the back-end does not average gradients over exactly the ranks with different tokens."""
    shown = ", ".join(f"{name}_size={size}" for name, size in sizes.items() if size > 1) or "no parallelism"
    if kind in ("MEGATRON_LM", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
        name = "FSDP 1" if kind == "FSDP" else kind
        raise LaunchError(
            f"the launcher asks for {name}, whose layout from_accelerate does not read; use FSDP 2 "
            "(FullyShardedDataParallelPlugin(fsdp_version=2)), DDP or DeepSpeed"
        )
    if sizes["sp"] > 1 and kind != "DEEPSPEED":
        raise ConfigError(
            f"sp_size={sizes['sp']} needs DeepSpeed, but the distributed type is {kind}; give a DeepSpeedPlugin, or "
            "use cp_size with FSDP 2"
        )
    if kind == "DEEPSPEED" and (sizes["tp"] > 1 or sizes["cp"] > 1):
        raise ConfigError(
            f"{shown} under DeepSpeed: accelerate builds no groups for it; use FSDP 2, or sp_size with DeepSpeed"
        )
    is_wrapped = sizes["tp"] == 1 or kind == "FSDP"
    if not is_wrapped and sizes["dp_replicate"] * sizes["dp_shard"] * sizes["cp"] > 1:
        raise ConfigError(
            f"{shown} without FSDP 2: accelerate does not wrap a tensor-parallel model in DDP, so its gradients would "
            "not be averaged over the other ranks; give FullyShardedDataParallelPlugin(fsdp_version=2)"
        )


def _counting_group(mesh: DeviceMesh, number: int) -> Any:
    """Return the group of the `number` ranks along all dimensions but "tp", with this one."""
    if number == 1:  # there is no such mesh: every rank counts the step for itself
        return dist.new_subgroups(1)[0]
    with warnings.catch_warnings():  # torch would have accelerate keep the joint mesh that it makes
        warnings.filterwarnings("ignore", message="Slicing a flattened dim", category=UserWarning)
        return mesh["dp_cp"].get_group()


def _ulysses_group(size: int) -> Any:
    """Return DeepSpeed's group of the `size` ranks that share a sequence; their shards are contiguous."""
    try:
        groups = importlib.import_module("deepspeed.utils.groups")
    except ImportError as error:
        raise ConfigError(
            f"sp_size={size} needs DeepSpeed, which cannot be imported ({error}); install deepspeed>=0.18.2"
        ) from None
    try:
        group = groups._get_sequence_parallel_group()
    except (KeyError, AssertionError):
        raise ConfigError(
            f"sp_size={size}, but DeepSpeed has no group of ranks that share a sequence yet; call from_accelerate "
            "after accelerator.prepare(model, optimizer, ...), which makes it"
        ) from None
    if dist.get_world_size(group) != size:
        raise ConfigError(
            f"sp_size={size}, but {dist.get_world_size(group)} ranks are in DeepSpeed's group; give both one size"
        )
    return group


def _order_of_context_parallel(mesh: DeviceMesh) -> Order:
    """Return the order in which torch splits a row over `mesh`: it depends on a setting of torch, so it is tried."""
    from torch.distributed.tensor.experimental import context_parallel  # loads the compiler, which takes a second

    number, index = mesh.size(), mesh.get_local_rank()
    positions = torch.arange(2 * number, device=mesh.device_type)
    with context_parallel(mesh, buffers=[positions], buffer_seq_dims=[0]):
        shard = positions.tolist()
    orders: dict[Order, list[int]] = {
        "head_tail": [index, 2 * number - 1 - index],
        "contiguous": [2 * index, 2 * index + 1],
    }
    for order, expected in orders.items():
        if shard == expected:
            return order
    raise ConfigError(
        f"torch's context_parallel gave rank {index} of {number} the positions {shard} of {2 * number}; only head-tail "
        "and contiguous order are known: report it, with the version of torch"
    )
