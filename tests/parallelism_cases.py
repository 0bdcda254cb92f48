"""Every loss and aggregation under the layouts of accelerate's `ParallelismConfig`, on meshes that accelerate builds.

What accelerate's back-ends would do to gradients is emulated: a sum over the counted ranks, divided by the divisor.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate import ParallelismConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.layout_cases import FULL, fits, grpo, others, pairs
from toolkit import BaseLossConfig
from toolkit.distributed import Parallelism, all_gather_objects, from_accelerate, world_size
from toolkit.testing import Layout, Part, random_batch
from toolkit.testing.evaluation import Result, evaluate, reference, toolkit_loop, with_current
from toolkit.testing.verdict import compare, missing_metrics

SIZES: dict[int, tuple[dict[str, int], ...]] = {
    2: ({"cp": 2}, {"sp": 2}, {"tp": 2}),
    4: (
        {"cp": 4},
        {"dp_shard": 2, "cp": 2},
        {"sp": 4},
        {"dp_shard": 2, "sp": 2},
        {"dp_shard": 2, "tp": 2},
        {"cp": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
    ),
}
"""By number of processes, the dimensions larger than 1."""
RTOL = 1e-12
DRAWN = 25
"""Pairs of loss and aggregation, and as many other configs, beside one option at a time."""


@dataclass(frozen=True)
class Case:
    """One step under one layout."""

    name: str
    cfg: BaseLossConfig
    sizes: dict[str, int]
    seed: int
    micro_batches: int
    is_packed: bool
    mode: str

    @property
    def needs_logits(self) -> bool:
        """Whether the loss compares whole distributions, which a split vocabulary does not exchange: it raises."""
        return getattr(self.cfg, "kl_loss_type", None) == "full"

    def __str__(self) -> str:
        packed = "packed" if self.is_packed else "padded"
        return f"{self.name} {self.sizes} {self.micro_batches} micro-batches {packed} {self.mode} seed {self.seed}"


def cases(world: int) -> list[Case]:
    """Each loss, each aggregation, each layout, and a drawn sample; all of them under all layouts with `FULL`."""
    draw = random.Random(world)
    every = {f"{loss}/{how}": grpo(loss, how) for loss, how in pairs()}
    losses, hows = (list(dict.fromkeys(names)) for names in zip(*pairs(), strict=True))
    alone = [f"{loss}/token_mean" for loss in losses] + [f"gspo/{how}" for how in hows]
    if os.environ.get(FULL) == "1":
        chosen = list(itertools.product({**every, **others()}.items(), SIZES[world]))
    else:
        names = dict.fromkeys([*alone, *draw.sample(sorted(every), DRAWN)])
        configs = [(name, every[name]) for name in names] + draw.sample(sorted(others().items()), DRAWN)
        chosen = [(config, SIZES[world][number % len(SIZES[world])]) for number, config in enumerate(configs)]
    drawn = [of(name, cfg, sizes, seed, draw) for seed, ((name, cfg), sizes) in enumerate(chosen)]
    return [case for case in drawn if not (case.needs_logits and "tp" in case.sizes)]


def of(name: str, cfg: BaseLossConfig, sizes: dict[str, int], seed: int, draw: random.Random) -> Case:
    number, is_packed, mode = draw.choice((1, 2)), draw.random() < 0.5, draw.choice(("eager", "chunk"))
    mode = mode if fits(cfg, Layout(mode=mode)) else "eager"
    # An idle micro-batch would be counted as an empty sequence.
    counts_empty = getattr(getattr(cfg, "aggregation", None), "count_empty", False)
    return Case(name, cfg, sizes, seed, 1 if counts_empty else number, is_packed, mode)


# -------------------------------------------------------------------- in the processes


def accelerator_of(sizes: dict[str, int]) -> Any:
    """What `from_accelerate` reads of an Accelerator, with a mesh of accelerate's; it takes no CPU itself."""
    config = ParallelismConfig(**{f"{name}_size": size for name, size in sizes.items()})
    kind = "DEEPSPEED" if "sp" in sizes else "MULTI_GPU" if set(sizes) == {"tp"} else "FSDP"
    return SimpleNamespace(
        parallelism_config=config,
        torch_device_mesh=config.build_device_mesh("cpu"),
        distributed_type=kind,
        is_fsdp2=kind == "FSDP",
        num_processes=dist.get_world_size(),
    )


def parallelism_of(sizes: dict[str, int]) -> Parallelism:
    with pretended_deepspeed(sizes["sp"]) if "sp" in sizes else contextlib.nullcontext():
        made = from_accelerate(accelerator_of(sizes))
    # FSDP averages over data and context parallelism; DeepSpeed sums over a sequence and averages over the rest.
    assert made.divisor == math.prod(size for name, size in sizes.items() if name not in ("sp", "tp"))
    return made


@contextlib.contextmanager
def pretended_deepspeed(size: int) -> Iterator[None]:
    """Install modules with the one function that is read of DeepSpeed; neighbours share a sequence, as there."""
    group, _ = dist.new_subgroups(size)
    names = ("deepspeed", "deepspeed.utils", "deepspeed.utils.groups")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]]._get_sequence_parallel_group = lambda: group  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, modules):
        yield


@dataclass(frozen=True)
class SplitPart(Part):
    """A part whose head is split over ranks; reducing its gradients gathers them into the part that it is made of."""

    origin: Part | None = None

    def reduce_gradients(self) -> None:
        assert self.origin is not None
        for name in ("head_weight", "head_bias"):
            if (leaf := getattr(self, name)) is not None and leaf.grad is not None:
                grad = leaf.grad
                getattr(self.origin, name).grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        self.origin.reduce_gradients()


def split_part(part: Part, mesh: DeviceMesh) -> SplitPart:
    def split(leaf: Tensor) -> Tensor:
        return distribute_tensor(leaf.detach(), mesh, [Shard(0)]).requires_grad_()

    bias = None if part.head_bias is None else part.head_bias.detach().clone().requires_grad_()
    fields = {name: getattr(part, name) for name in Part.__dataclass_fields__}
    return SplitPart(**{**fields, "head_weight": split(part.head_weight), "head_bias": bias}, origin=part)


def result_of(case: Case, parallelism: Parallelism) -> tuple[Layout, Result, Result]:
    """Return the layout, the result under it, and that of one process."""
    draw = random.Random(case.seed)
    batch = random_batch(
        case.cfg,
        seed=case.seed,
        num_sequences=draw.choice((4, 5, 6)),
        longest=draw.choice((3, 4, 5)),
        garbage=float("nan"),
    )
    batch = with_current(batch, case.cfg)
    known = reference(batch, case.cfg)
    mesh, tp_mesh = parallelism.sp_mesh, parallelism.tp_mesh
    if mesh is not None:  # the loss is right where attention would not be
        mesh = replace(mesh, is_packable=True)
    shards, order = (1, "contiguous") if mesh is None else (mesh.size(), mesh.order)

    def loop(part: Part) -> Any:
        return toolkit_loop(part if tp_mesh is None else split_part(part, tp_mesh))

    with parallelism.counting():
        layout = Layout(world_size(), case.micro_batches, shards, case.is_packed, case.mode, order)  # type: ignore[arg-type]
        return layout, evaluate(batch, case.cfg, layout, loop, sp_mesh=mesh), known


def difference(case: Case, parallelism: Parallelism) -> str:
    """Return what differs from one process, empty when nothing does."""
    layout, result, known = result_of(case, parallelism)
    findings = compare(result, known, layout, RTOL) + missing_metrics(result, known, layout)
    return "; ".join(map(str, findings))


def worker(batch_of_cases: list[Case]) -> list[str]:
    """Run the cases in all processes and return what failed in any of them."""
    made: dict[str, Parallelism] = {}
    failed: list[str] = []
    for case in batch_of_cases:
        if str(case.sizes) not in made:
            made[str(case.sizes)] = parallelism_of(case.sizes)
        try:
            words = difference(case, made[str(case.sizes)])
        except Exception as error:  # the others would wait for this process
            words = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
        failed += [f"{case}: {each}" for each in dict.fromkeys(all_gather_objects(words)) if each]
    return failed
