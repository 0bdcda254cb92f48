"""Small steps of every kind, each with the formula of what it communicates; `toolkit.scale.measure` runs them.

Legend: B rows, T positions of a row, D hidden width, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed import counting_over, reduce_metrics
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.grpo import GRPOLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.samples import sample_fields
from toolkit.metrics import metrics_in
from toolkit.scale import step
from toolkit.scale.collectives import Collective

ROWS, POSITIONS, WIDTH, VOCABULARY, MICRO_BATCHES = 2, 12, 8, 32, 3
"""B, T, D, V and the micro-batches of a step."""
CHUNKS = 4
CHUNK = ROWS * POSITIONS // CHUNKS
MANY_PROMPTS = 300
"""More than fit in one exchange."""
LONG = 4096
"""Positions of a row: enough for the values of pickled tensors to outweigh their overhead."""
PICKLE_OVERHEAD = 0.05
"""Relative to the bytes of the values."""


@dataclass(frozen=True)
class Case:
    """A step, or a part of one."""

    what: str
    formula: list[Collective]
    run: Callable[[], Any]
    tolerance: float = 0.0
    """Relative amount by which the bytes may exceed the formula."""


def all_cases(ranks: int, mesh: DeviceMesh) -> Iterator[Case]:
    """Yield every case; all `ranks` of the process group, which `mesh` has, must run them together."""
    yield from counting_cases(ranks)
    yield from sequence_parallel_cases(ranks, mesh)
    yield from vocabulary_parallel_cases(ranks, mesh)
    yield from gradient_cases(ranks, mesh)


def counting_cases(ranks: int) -> Iterator[Case]:
    """Yield what data-parallel steps exchange: counts, metrics, and for a loss of the whole batch all its tokens."""
    cfg, counts = GRPOLossConfig(), step.counting(ranks, numbers=step.numbers_counted())
    build = cfg.loss_ctx_cls.build_batches_loss_kwargs
    for number in (1, MICRO_BATCHES):
        plural = "es" if number > 1 else ""
        yield Case(f"counts of a step, {number} micro-batch{plural}", counts, partial(build, _items(number), cfg))
    for prompts in (ROWS, MANY_PROMPTS):
        of_prompts = GRPOLossConfig(aggregation=AggregationConfig(name="prompt_mean"))
        formula = step.counting_prompts(ranks, numbers=step.numbers_counted(), prompts=prompts)
        run = partial(build, _items(prompts // ROWS), of_prompts)
        yield Case(f"counts of a step with {prompts} prompts", formula, run)
    (kwargs,) = build(_items(1), cfg)
    hidden, weight = torch.randn(ROWS, POSITIONS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    measured = dict(metrics_in(cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight)[1]))
    numbers = sum(len(metric.parts) for metric in measured.values())
    yield Case("metrics", step.metrics(ranks, numbers=numbers), partial(reduce_metrics, measured))
    wide = GRPOLossConfig(policy_loss_cfg={"loss_type": "kl_cov"})
    items = _items(2, positions=LONG, with_current=True)
    (one, _) = build(items, wide)
    size = sum(value.dtype.itemsize for _, value in one.global_view.kwargs.tensors())
    gathered = step.gathered_tokens(ranks, tokens=2 * ROWS * LONG, bytes_per_token=size)
    yield Case("a loss of the whole batch", [*counts, *gathered], partial(build, items, wide), PICKLE_OVERHEAD)


def sequence_parallel_cases(ranks: int, mesh: DeviceMesh) -> Iterator[Case]:
    """Yield a step whose rows are cut over all ranks, before the first forward and in it."""
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "gspo"})
    pieces = [item.sp_split(mesh) for item in _items(MICRO_BATCHES)]
    tokens, number = ROWS * POSITIONS, len(list(pieces[0].tensors()))
    before = step.small_fields(ranks, positions=tokens, fields=number, micro_batches=MICRO_BATCHES)
    before += step.counting(ranks, numbers=step.numbers_counted())
    build = partial(cfg.loss_ctx_cls.build_batches_loss_kwargs, pieces, cfg, sp_mesh=mesh)
    yield Case("sequence parallelism, before the forward", before, build)
    yield Case(
        "sequence parallelism, a loss of whole sequences",
        step.row_logprobs(ranks, tokens=tokens, micro_batches=MICRO_BATCHES),
        partial(_forwards, cfg, build(), torch.randn(VOCABULARY, WIDTH, requires_grad=True)),
    )


def vocabulary_parallel_cases(ranks: int, mesh: DeviceMesh) -> Iterator[Case]:
    """Yield forward and backward of a head whose vocabulary is cut over all ranks, with and without entropies."""
    pair = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    weight = distribute_tensor(torch.randn(VOCABULARY, WIDTH), pair["tp"], [Shard(0)]).requires_grad_()
    alone = pair["dp"].get_group()  # all ranks share the same tokens
    for entropy_coef in (0.0, 0.01):
        cfg = GRPOLossConfig(mode="chunk", chunk_size=CHUNK, entropy_coef=entropy_coef)
        formula = step.vocabulary_parallel(
            ranks,
            tokens=ROWS * POSITIONS,
            width=WIDTH,
            chunks=CHUNKS,
            micro_batches=MICRO_BATCHES,
            with_entropy=bool(entropy_coef),
            itemsize=4,
        )
        with counting_over(alone):
            batches = cfg.loss_ctx_cls.build_batches_loss_kwargs(_items(MICRO_BATCHES), cfg)
        name = "vocabulary parallelism" + (", with entropies" if entropy_coef else "")
        yield Case(name, formula, counting_over(alone)(partial(_forwards, cfg, batches, weight)))


def gradient_cases(ranks: int, mesh: DeviceMesh) -> Iterator[Case]:
    """Yield what is communicated in any case: the gradient of a layer, under DDP and under FSDP2."""
    parameters, rows = ranks * WIDTH * WIDTH, torch.ones(1, WIDTH)

    def net() -> torch.nn.Module:
        return torch.nn.Linear(WIDTH, ranks * WIDTH, bias=False)

    ddp = DistributedDataParallel(net())
    fsdp: Any = net()
    fully_shard(fsdp, mesh=mesh, reshard_after_forward=True)

    def ddp_step() -> None:
        with ddp.no_sync():
            ddp(rows).sum().backward()
        ddp(rows).sum().backward()

    def fsdp_step(exchange: str) -> None:
        for index in range(MICRO_BATCHES):
            fsdp.set_requires_gradient_sync(exchange == "micro_batch" or index == MICRO_BATCHES - 1)
            fsdp(rows).sum().backward()

    yield Case("gradient, DDP", step.data_parallel_gradient(ranks, parameters=parameters), ddp_step)
    exchanges: tuple[Literal["step", "micro_batch"], ...] = ("step", "micro_batch")
    for exchange in exchanges:
        sharded = step.sharded_gradient(
            ranks, parameters=parameters, micro_batches=MICRO_BATCHES, itemsize=4, exchange=exchange
        )
        name = "gradient, FSDP2" + (", every micro-batch" if exchange == "micro_batch" else "")
        yield Case(name, sharded, partial(fsdp_step, exchange))


def _forwards(cfg: BaseRLLossConfig, batches: list[Any], weight: torch.Tensor) -> None:
    for kwargs in batches:
        hidden = torch.randn(*kwargs.shifted_labels.shape, WIDTH, requires_grad=True)
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight)
        loss.backward()


def _items(number: int, *, positions: int = POSITIONS, with_current: bool = False) -> list[RLLossContextInputItem]:
    names = {"advantages", "old_logprobs", *(["current_logprobs"] if with_current else [])}
    logprobs, draw = torch.full((ROWS, positions), -3.0), torch.Generator().manual_seed(0)
    items = []
    for index in range(number):
        fields: dict[str, Any] = sample_fields(RLLossContextInputItem, logprobs, draw=draw, names=names)
        fields["shifted_labels"] = torch.randint(0, VOCABULARY, logprobs.shape, generator=draw)
        fields["group_ids"] = ROWS * index + torch.arange(ROWS).unsqueeze(-1)
        items.append(RLLossContextInputItem(**fields))
    return items
