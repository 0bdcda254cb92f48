"""DeepSpeed's ZeRO-1 and ZeRO-2 around a policy, in a loop of one's own. Skipped unless DeepSpeed is installed.

It is no dependency: it has no wheels, and is built beside the torch that it is to serve (CONTRIBUTING says how).
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

from tests.conftest import random_item
from tests.layout_cases import grpo
from tests.models.heads import head_variant
from tests.processes import run_processes
from tests.test_sharded import CFG, MAX_NORM, STEPS, batch, micro_batches, optimizer_of, train
from toolkit.distributed import from_accelerate, sp_split
from toolkit.errors import ConfigError, LaunchError
from toolkit.models.policy import Policy
from toolkit.testing.evaluation import alone
from toolkit.training.probe import check_gradient_scale

pytestmark = [pytest.mark.dist, pytest.mark.slow]
TOLERANCE = 1e-5
"""DeepSpeed computes norms, updates and optimizer states in fp32, whatever the weights are."""


def initialized(
    module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, stage: int, *, mpu: Any = None, **settings: Any
) -> Any:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)[0]


def full_gradient(parameter: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def three_steps(rank: int, world: int, stage: int, number: int, kind: str) -> None:
    """The loop of conf/launch/deepspeed_zero2.yaml, beside one process without DeepSpeed."""
    with alone():
        exact = train(Policy(head_variant(kind)), 0, 1, 1)
    policy = Policy(head_variant(kind))
    named = {name: own for name, own in policy.named_parameters() if own.requires_grad}
    engine = initialized(policy, optimizer_of(policy), rank, stage, gradient_clipping=MAX_NORM)
    norms: list[Tensor] = []
    for step in range(STEPS):
        engine.train()
        parts = micro_batches(step, rank, world, number)
        batches_kwargs = CFG.loss_ctx_cls.build_batches_loss_kwargs([item for _, _, item in parts], CFG)
        for index, ((ids, mask, _), kwargs) in enumerate(zip(parts, batches_kwargs, strict=True)):
            engine.set_gradient_accumulation_boundary(index == number - 1)
            loss, _ = engine(ids, mask, CFG.loss_ctx_cls(CFG, kwargs))
            engine.backward(loss, scale_wrt_gas=False)
            if step == 0 and index == number - 1:
                for name, own in named.items():
                    close(full_gradient(own), exact["grads"][name], name)
            engine.step()
        norms.append(torch.as_tensor(engine.get_global_grad_norm()))
    close(torch.stack(norms), exact["norms"], "norms")
    for name, own in named.items():
        close(own.detach(), exact["weights"][name], name)
        first = own.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, own), f"{name} drifted apart"
    engine.eval()
    with torch.no_grad():
        close(engine(*batch(9)[:2]), exact["scored"], "log-probabilities")


def close(found: Tensor, exact: Tensor, name: str) -> None:
    off = float((found.double() - exact.double()).abs().max() / exact.double().abs().max())
    assert off <= TOLERANCE, f"{name}: {off:.1e}"


@pytest.mark.parametrize(
    ("stage", "number", "kind"),
    [(2, 1, "plain"), (2, 2, "plain"), (1, 2, "plain"), (2, 2, "tied"), (2, 2, "lora"), (2, 1, "frozen")],
)
def test_three_steps_are_those_of_one_process(stage: int, number: int, kind: str) -> None:
    run_processes(2, three_steps, stage, number, kind)


def probe(
    rank: int, world: int, stage: int, steps: int, scale_wrt_gas: bool, *, mpu: Any = None, sp_mesh: Any = None
) -> float:
    engine: Any = None
    micro_batch = 0

    def wrap(module: nn.Module) -> Any:
        nonlocal engine
        settings = {"gradient_accumulation_steps": steps}
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        engine = initialized(module, optimizer, rank, stage, mpu=mpu, **settings)
        return engine

    def backward(loss: Tensor) -> None:
        nonlocal micro_batch
        micro_batch += 1
        engine.set_gradient_accumulation_boundary(micro_batch == 3)  # of the probe's three
        engine.backward(loss, scale_wrt_gas=scale_wrt_gas)

    return check_gradient_scale(backward, wrap, gradient=lambda _: full_gradient(engine.module.weight), sp_mesh=sp_mesh)


def probes(rank: int, world: int) -> None:
    for stage in (1, 2):
        assert probe(rank, world, stage, 1, True) == pytest.approx(1, abs=1e-6)
        assert probe(rank, world, stage, 3, False) == pytest.approx(1, abs=1e-6)
        with pytest.raises(LaunchError, match=r"0.333333 times .* divided by 3, as by gradient accum.*scale_wrt_gas"):
            probe(rank, world, stage, 3, True)


def test_probe_finds_the_division_by_accumulation_steps() -> None:
    run_processes(2, probes)


def sequence_parallel(rank: int, world: int, size: int) -> None:
    """ZeRO sums over the ranks that share a sequence, and averages over the others: from_accelerate knows it."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu
    from deepspeed.utils import groups

    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(sp_size=size), distributed_type="DEEPSPEED", num_processes=world
    )
    with pytest.raises(ConfigError, match="call from_accelerate after accelerator"):
        from_accelerate(accelerator)
    deepspeed.init_distributed("gloo")
    mpu.initialize_sequence_parallel(size)
    groups.mpu = mpu  # as deepspeed.initialize will do; the probe's engine comes after its kwargs
    found = from_accelerate(accelerator)
    assert found.sp_mesh is not None
    assert found.divisor == world // size
    assert found.sp_mesh.size() == size
    for stage in (0, 1, 2):
        with found.counting():
            assert probe(rank, world, stage, 1, True, mpu=mpu, sp_mesh=found.sp_mesh) == pytest.approx(1, abs=1e-6)
        with pytest.raises(LaunchError, match=f"are {size} times .* {size} ranks share a sequence"):
            probe(rank, world, stage, 1, True, mpu=mpu, sp_mesh=found.sp_mesh)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2)])
def test_ulysses_groups_and_what_they_average(world: int, size: int) -> None:
    run_processes(world, sequence_parallel, size)


class WithLoss(nn.Module):
    """A causal language model whose forward returns the loss of its last hidden states."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa")).float()
        self.config = self.model.config

    def forward(self, ids: Tensor, positions: Tensor, context: Any) -> Tensor:
        hidden = self.model.model(input_ids=ids, position_ids=positions).last_hidden_state
        return context.forward(hidden, self.model.lm_head.weight)[0]


def row_of(team: int) -> tuple[Tensor, Tensor, Any]:
    torch.manual_seed(10 + team)
    item = random_item((1, 8))
    return torch.randint(0, 11, (1, 8)), torch.arange(8).unsqueeze(0), item


def attention_over_shards(rank: int, world: int, size: int) -> None:
    """A Llama with Ulysses attention, each rank with a half of each sequence, and a loss of whole sequences."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    cfg = grpo("gspo", "seq_mean_token_mean", mode="chunk", chunk_size=3)
    exact, rows = WithLoss(), [row_of(team) for team in range(world // size)]
    with alone():
        kwargs = cfg.loss_ctx_cls.build_batches_loss_kwargs([item for _, _, item in rows], cfg)
        for (ids, positions, _), batch_kwargs in zip(rows, kwargs, strict=True):
            exact(ids, positions, cfg.loss_ctx_cls(cfg, batch_kwargs)).backward()
    deepspeed.init_distributed("gloo")
    module = WithLoss()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        module, core_attn_implementation="sdpa", sequence_parallel_size=size, micro_batch_size=1
    )
    settings = {"seq_parallel_communication_data_type": "fp32"}
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = initialized(module, optimizer, rank, 2, mpu=mpu, **settings)
    config = SimpleNamespace(sp_size=size)
    found = from_accelerate(
        SimpleNamespace(parallelism_config=config, distributed_type="DEEPSPEED", num_processes=world)
    )
    assert found.sp_mesh is not None
    ids, positions, item = rows[rank // size]
    with found.counting():
        shards = [item.sp_split(found.sp_mesh)]
        (batch_kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs(shards, cfg, sp_mesh=found.sp_mesh)
        ids, positions = (sp_split(each, found.sp_mesh, pad=0) for each in (ids, positions))
        engine.backward(engine(ids, positions, cfg.loss_ctx_cls(cfg, batch_kwargs)))
    known = dict(exact.named_parameters())
    assert all(bool((parameter.grad != 0).any()) for parameter in known.values())
    for name, parameter in engine.module.named_parameters():
        close(full_gradient(parameter), known[name].grad, name)


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2)])
def test_ulysses_attention_gives_the_gradients_of_one_process(world: int, size: int) -> None:
    run_processes(world, attention_over_shards, size)


def zero_3(rank: int, world: int) -> None:
    policy = Policy(head_variant("plain"))
    engine = initialized(policy, optimizer_of(policy), rank, 3)
    ((ids, mask, item),) = micro_batches(0, rank, world, 1)
    (kwargs,) = CFG.loss_ctx_cls.build_batches_loss_kwargs([item], CFG)
    with pytest.raises(ConfigError, match="ZeRO-3 partitioned the weights"):
        engine(ids, mask, CFG.loss_ctx_cls(CFG, kwargs))


def test_zero_3_is_refused() -> None:
    run_processes(2, zero_3)
