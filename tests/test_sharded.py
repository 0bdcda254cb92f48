"""DDP and FSDP 2 give the steps of one process, whatever the head, and their ranks stay equal."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.heads import KINDS, VOCABULARY, head_variant
from tests.processes import run_processes
from toolkit import CELossConfig, GRPOLossConfig, RLLossContextInputItem
from toolkit.errors import ConfigError, DataError, LaunchError
from toolkit.head.adapters import find_head
from toolkit.models.policy import Policy
from toolkit.training.full_state import (
    check_optimizer,
    full_optimizer_state,
    load_full_optimizer_state,
    load_weights,
    save_weights,
)
from toolkit.training.sharding import (
    accumulating,
    blocks_of,
    clip_grad_norm,
    copy_weights,
    frozen_copy,
    local_parameters,
    prepare_policy,
    unwrapped,
)

ROWS, LENGTH, STEPS, MAX_NORM = 4, 9, 3, 0.5
CFG = GRPOLossConfig(mode="chunk", chunk_size=4, use_kl_loss=True, kl_loss_type="k2", kl_loss_coef=0.1)
ROOT_BYTES = (2 * VOCABULARY * 12 + 12) * 8
"""Embedding, head and final norm."""
Batch = tuple[Tensor, Tensor, RLLossContextInputItem]


def batch(step: int) -> Batch:
    """Ragged rows, padded on the left, the third without anything to learn from."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((3, 0, 1, 5)):
        mask[row, :padding] = 0
    labels = ids[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    labels[2] = -100
    shape = labels.shape
    return ids, mask, RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.randn(shape, generator=draw, dtype=torch.float64),
        old_logprobs=(-2.4 + 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)).clamp(max=0),
        ref_logprobs=(-2.4 + 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)).clamp(max=0),
    )  # fmt: skip


def rows_of(whole: Batch, rows: slice) -> Batch:
    ids, mask, item = whole
    return ids[rows], mask[rows], RLLossContextInputItem(**{name: value[rows] for name, value in item.tensors()})


def micro_batches(step: int, rank: int, world: int, number: int) -> list[Batch]:
    own = ROWS // world
    size = own // number
    starts = [rank * own + index * size for index in range(number)]
    return [rows_of(batch(step), slice(start, start + size)) for start in starts]


def forward_backward(policy: Any, parts: list[Batch], **options: Any) -> None:
    batches_kwargs = CFG.loss_ctx_cls.build_batches_loss_kwargs([item for _, _, item in parts], CFG)
    for index, ((ids, mask, _), kwargs) in enumerate(zip(parts, batches_kwargs, strict=True)):
        with accumulating(policy, index == len(parts) - 1, **options):
            loss, _ = policy(ids, mask, CFG.loss_ctx_cls(CFG, kwargs))
            loss.backward()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(policy: Any) -> dict[str, Tensor]:
    named = unwrapped(policy).named_parameters()
    return {name: whole(p.grad).clone() for name, p in named if p.grad is not None}


def optimizer_of(policy: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)


def train(policy: Any, rank: int, world: int, number: int, **options: Any) -> dict[str, Any]:
    """Three optimizer steps; what they were like, and what came of them in evaluation."""
    optimizer, norms, first = optimizer_of(policy), [], {}
    for step in range(STEPS):
        policy.train()
        forward_backward(policy, micro_batches(step, rank, world, number), **options)
        first = first or gradients(policy)
        norms.append(clip_grad_norm(policy, MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    policy.eval()
    ids, mask, _ = batch(9)
    with torch.no_grad():
        scored = policy(ids, mask)
    weights = {name: whole(p).detach().clone() for name, p in unwrapped(policy).named_parameters()}
    return {"grads": first, "norms": torch.stack(norms), "weights": weights, "scored": scored}


def assert_same(ours: dict[str, Any], exact: dict[str, Any]) -> None:
    close = {"rtol": 1e-9, "atol": 1e-12}
    assert ours["grads"].keys() == exact["grads"].keys()
    for part in ("grads", "weights"):
        for name, tensor in exact[part].items():
            torch.testing.assert_close(ours[part][name], tensor, **close, msg=lambda m, name=name: f"{name}: {m}")
    for part in ("norms", "scored"):
        torch.testing.assert_close(ours[part], exact[part], **close)


def assert_equal_over_ranks(weights: dict[str, Tensor], rank: int) -> None:
    for name, tensor in weights.items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), f"{name} drifted apart on rank {rank}"


@contextlib.contextmanager
def counted() -> Any:
    """Count the collectives that move weights and gradients, each by the elements of its larger side."""
    found: dict[str, list[int]] = {"gather": [], "scatter": []}
    kept = {name: getattr(dist, name) for name in NAMES if hasattr(dist, name)}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            found["gather" if "gather" in name else "scatter"].append(max(t.numel() * t.itemsize for t in tensors))
            return kept[name](*args, **kwargs)

        return call

    for name in kept:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


NAMES = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def check_all(rank: int, world: int, expected: dict[str, Any], folder: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    check_rank_zero_wins(rank, accelerator)
    for kind in expected:
        for sharding in ("none", "fsdp2"):
            torch.manual_seed(rank)
            policy = prepare_policy(Policy(head_variant(kind)), accelerator, sharding)
            found = train(policy, rank, world, number=ROWS // world)
            assert_same(found, expected[kind])
            assert_equal_over_ranks(found["weights"], rank)
    check_collectives(rank, world, accelerator)
    check_inside(rank, accelerator)
    if "plain" not in expected:
        return
    check_files(rank, world, accelerator, expected["plain"], folder)
    check_copies(rank, world, accelerator)
    check_precision(rank, world)
    check_refusals(accelerator)


def check_rank_zero_wins(rank: int, accelerator: Any) -> None:
    lm = head_variant("plain")
    with torch.no_grad():
        lm.model.norm.weight.fill_(1.0 + rank)
    policy = prepare_policy(Policy(lm), accelerator, "fsdp2")
    assert float(whole(policy.lm.model.norm.weight).detach().max()) == 1.0


def check_collectives(rank: int, world: int, accelerator: Any) -> None:
    policy = prepare_policy(Policy(head_variant("plain")), accelerator, "fsdp2")
    blocks = len(list(blocks_of(policy)))
    number = ROWS // world
    parts = micro_batches(0, rank, world, number)
    forward_backward(policy, parts)  # the first forward sets things up
    for exchange, scatters in (("step", 1), ("micro_batch", number)):
        policy.zero_grad()
        with counted() as found:
            forward_backward(policy, parts, exchange=exchange)
        assert found["gather"].count(ROOT_BYTES) == 1, found
        assert found["scatter"].count(ROOT_BYTES) == 1, found
        assert len(found["gather"]) == 1 + number * 2 * blocks, found  # forward and backward of each block
        assert len(found["scatter"]) == 1 + scatters * blocks, found


def check_inside(rank: int, accelerator: Any) -> None:
    """Generation of different lengths ends, and a head that was not gathered is not taken for a whole one."""
    policy = prepare_policy(Policy(head_variant("plain")), accelerator, "fsdp2")
    prompts = torch.full((1, 3), 5)

    def generate(lm: Any) -> Tensor:
        size = 2 + 5 * rank
        done = lm.generate(prompts, max_new_tokens=size, do_sample=False, synced_gpus=True, attention_mask=prompts > 0)
        assert find_head(lm).inputs(torch.zeros(1, 12))[1].shape == (VOCABULARY, 12)
        return done

    assert policy.inside(generate).shape[1] <= 5 + 5 * rank
    assert are_shards(policy)
    with torch.no_grad():
        policy(prompts, prompts > 0)
        assert are_shards(policy)
    check_gradients_of_inside(policy, prompts)
    policy(prompts, prompts > 0)  # a backward may follow
    assert not are_shards(policy)
    foreign = torch.optim.AdamW(policy.parameters())
    for use in (check_optimizer, full_optimizer_state):
        with pytest.raises(ConfigError, match=r"3 tensors of the optimizer are not parameters .* \[\d+, 12\]"):
            use(policy, foreign)
    policy(prompts, prompts > 0)
    check_optimizer(policy, torch.optim.AdamW(local_parameters(policy)))
    assert are_shards(policy)
    with pytest.raises(DataError, match="not gathered"):
        policy.head.inputs(torch.zeros(1, 12))


def are_shards(policy: Any) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def check_gradients_of_inside(policy: Any, prompts: Tensor) -> None:
    """Weights that were freed are gathered again for a backward."""

    def scores(lm: Any) -> Tensor:
        logprobs = lm(input_ids=prompts).logits[:, :-1].log_softmax(-1)
        return logprobs.gather(-1, prompts[:, 1:, None])

    policy.inside(scores).square().sum().backward()
    found = gradients(policy)
    policy.zero_grad()
    policy.train()
    policy(prompts, prompts > 0).square().sum().backward()
    for name, exact in gradients(policy).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-12)
    policy.zero_grad()


def check_files(rank: int, world: int, accelerator: Any, expected: dict[str, Any], folder: str) -> None:
    """Weights and optimizer, whole on rank 0 between two steps; then the third step is that of an unbroken run."""
    number = ROWS // world
    for sharding, other in (("none", "fsdp2"), ("fsdp2", "none")):  # what one wrote, the other goes on with
        policy = prepare_policy(Policy(head_variant("plain")), accelerator, sharding)
        optimizer = optimizer_of(policy)
        for step in range(STEPS):
            if step == STEPS - 1:
                path, holder = f"{folder}/plain_{sharding}.safetensors", [full_optimizer_state(policy, optimizer)]
                save_weights(policy, path)
                dist.broadcast_object_list(holder)  # as from a file: unsharded, every rank loads
                torch.manual_seed(rank + 7)
                load_weights(Policy(head_variant("plain")), path)  # the names are those of an unsharded policy
                policy = prepare_policy(Policy(head_variant("plain")), accelerator, other)
                optimizer = optimizer_of(policy)
                load_weights(policy, path)
                load_full_optimizer_state(policy, optimizer, holder[0])
            forward_backward(policy, micro_batches(step, rank, world, number))
            clip_grad_norm(policy, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in unwrapped(policy).named_parameters():
            torch.testing.assert_close(whole(parameter).detach(), expected["weights"][name], rtol=1e-9, atol=1e-12)
    ids, mask, _ = batch(9)
    for kind in ("tied", "lora"):
        seeds = {sharding: Policy(head_variant(kind)) for sharding in ("none", "fsdp2")}
        for sharding, policy in seeds.items():
            if sharding == "none":
                torch.nn.init.normal_(policy.head.lm.model.norm.weight, generator=torch.Generator().manual_seed(4))
            seeds[sharding] = prepare_policy(policy, accelerator, sharding)
        for source, target in (("none", "fsdp2"), ("fsdp2", "none")):
            path = f"{folder}/{kind}_{source}.safetensors"
            save_weights(seeds[source], path)
            dist.barrier()
            if target == "none":
                torch.nn.init.zeros_(unwrapped(seeds[target]).head.lm.model.norm.weight)
            load_weights(seeds[target], path)
            with torch.no_grad():
                torch.testing.assert_close(seeds[source](ids, mask), seeds[target](ids, mask))


def check_copies(rank: int, world: int, accelerator: Any) -> None:
    """A reference is what the policy was, whatever becomes of the policy."""
    ids, mask, _ = batch(9)
    for kind in ("plain", "tied", "lora"):
        policy = prepare_policy(Policy(head_variant(kind)), accelerator, "fsdp2")
        train(policy, rank, world, number=1)
        reference = frozen_copy(policy)
        assert not any(p.requires_grad for p in reference.parameters())
        with torch.no_grad():
            then = policy(ids, mask)
            assert torch.equal(reference(ids, mask), then)
            train_once_more(policy, rank, world)
            now = policy(ids, mask)
            assert torch.equal(reference(ids, mask), then)
            assert not torch.equal(now, then)
            shards = [[p.to_local().clone() for p in local_parameters(each)] for each in (reference, policy)]
            copy_weights(policy, reference, 0.25)
            for mixed, before, source in zip(local_parameters(reference), *shards, strict=True):
                torch.testing.assert_close(mixed.to_local(), 0.75 * before + 0.25 * source)
            copy_weights(policy, reference)
            assert torch.equal(reference(ids, mask), now)


def train_once_more(policy: Any, rank: int, world: int) -> None:
    with torch.enable_grad():
        train(policy, rank, world, number=1)


def check_precision(rank: int, world: int) -> None:
    """Under autocast to bf16 as accelerate does it for DDP."""

    class HalfAccelerator:
        distributed_type, device, mixed_precision = "MULTI_CPU", torch.device("cpu"), "bf16"

        def autocast(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    ids, mask, _ = batch(9)
    policy = prepare_policy(Policy(head_variant("plain").float()), HalfAccelerator(), "fsdp2")
    reference = frozen_copy(policy)
    plain = Policy(head_variant("plain").float())
    with torch.no_grad():
        exact = plain(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            half = plain(ids, mask)
        assert not torch.equal(half, exact)
        assert torch.equal(policy(ids, mask), half)
        assert torch.equal(reference(ids, mask), half)
    HalfAccelerator.mixed_precision = "fp16"
    with pytest.raises(ConfigError, match="choose bf16"):
        prepare_policy(plain, HalfAccelerator(), "fsdp2")


def check_refusals(accelerator: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.sharding='fsdp'"):
        prepare_policy(Policy(head_variant("plain")), accelerator, "fsdp")  # type: ignore[arg-type]
    wrapped = prepare_policy(Policy(head_variant("plain")), accelerator)
    with pytest.raises(ConfigError, match="already wrapped in DistributedDataParallel"):
        prepare_policy(wrapped, accelerator)
    with pytest.raises(ConfigError, match="already wrapped in DistributedDataParallel"):
        find_head(wrapped)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("world", "kinds"), [(2, ("tied", "lora")), (2, KINDS), (4, KINDS)])
def test_ddp_and_fsdp2_give_the_steps_of_one_process(world: int, kinds: tuple[str, ...], tmp_path: Any) -> None:
    expected = {kind: train(Policy(head_variant(kind)), 0, 1, number=1) for kind in kinds}
    for kind, found in expected.items():
        assert float(found["norms"].max()) > MAX_NORM > 0, "clipping binds"
        moved = {name for name, grad in found["grads"].items() if bool(grad.any())}
        assert any("lm_head" in name or (kind == "tied" and "embed" in name) for name in moved) is (kind != "frozen")
    run_processes(world, check_all, expected, str(tmp_path))


def test_without_processes() -> None:
    class Alone:
        distributed_type, device = "NO", torch.device("cpu")

        def prepare_model(self, policy: Policy) -> Policy:
            return policy

    policy = Policy(head_variant("plain"))
    assert prepare_policy(policy, Alone()) is policy
    with accumulating(policy, False):
        pass
    with pytest.raises(LaunchError, match="torchrun"):
        prepare_policy(policy, Alone(), "fsdp2")

    class Sharding(Alone):
        distributed_type = "FSDP"

    with pytest.raises(LaunchError, match="plain processes"):
        prepare_policy(policy, Sharding())
    assert CELossConfig() == policy.fitted(CELossConfig())
