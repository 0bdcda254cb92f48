"""Wrapping a policy for several processes: DDP through accelerate, or PyTorch's `fully_shard` (FSDP 2).

Both average gradients over ranks, which is what the calibration of the losses expects. accelerate's own FSDP is not
used: on CPU it silently stays DDP, and it shards the language model where the policy around it must be the root.

Under ``fully_shard`` each transformer block is a group of its own; embedding, final norm and head stay with the root.
They are gathered when the policy's forward begins and freed after the last backward of the step, so that a loss in
the forward sees the whole head, and the head travels once each way a step, however many micro-batches it has. After a
forward that no backward follows (scoring, generation) they are freed at once: an optimizer made from
``policy.parameters()`` would take the whole weights for the parameters, and train what the next forward throws away.

Legend: R ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed import world_size
from toolkit.errors import ConfigError, LaunchError, listed
from toolkit.head.adapters import refuse_wrappers
from toolkit.models.policy import Policy

Sharding = Literal["none", "fsdp2"]
Exchange = Literal["step", "micro_batch"]


def prepare_policy(policy: Policy, accelerator: Any, sharding: Sharding = "none") -> Any:
    """Return the policy ready for several processes: call this for the loss, `unwrapped` for everything else.

    Make the optimizer afterwards, from the parameters of what is returned, and between steps (`own_parameters`).

    Args:
        policy: not wrapped; all ranks take over rank 0's weights.
        accelerator: accelerate's Accelerator; its device, and with "none" its own way to wrap.
        sharding: "none": every rank holds all weights (DDP); "fsdp2": each holds 1/R of weights, gradients and
            optimizer state.

    Raises:
        ConfigError: `sharding` is unknown, "fsdp2" comes with fp16, or the policy is wrapped already, or in what hides
            the head from a loss.
        LaunchError: "fsdp2" and the processes are not joined, or DeepSpeed or accelerate's FSDP would shard as well.
    """
    if sharding not in ("none", "fsdp2"):
        raise ConfigError(f"training.sharding={sharding!r} is not known; choose {listed(['none', 'fsdp2'])}")
    refuse_wrappers(policy)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "MEGATRON_LM", "TP") or (kind == "DEEPSPEED" and sharding == "fsdp2"):
        raise LaunchError(
            f"the launcher asks for {kind}, which would shard the language model behind the policy's back; launch with "
            "plain processes (accelerate launch --multi_gpu, or torchrun) and set training.sharding=fsdp2"
        )
    if sharding == "none":
        return accelerator.prepare_model(policy)
    _check_joined()
    precision = getattr(accelerator, "mixed_precision", "no")
    if precision == "fp16":
        raise ConfigError(
            "training.sharding=fsdp2 with mixed_precision=fp16: the loss scale would have to be agreed over shards of "
            "the gradient; choose bf16"
        )
    policy = shard_policy(policy.to(accelerator.device))
    if precision == "bf16":  # as accelerate does for what it wraps itself
        policy.forward = _under_autocast(policy.forward, accelerator)  # type: ignore[method-assign]
    return policy


def prepare_probe(module: nn.Module, accelerator: Any, sharding: Sharding) -> Any:
    """Return a small module prepared as the policy will be: what happens to its gradients happens to the policy's.

    Raises:
        LaunchError: "fsdp2" and the processes are not joined.
    """
    if sharding == "none":
        return accelerator.prepare_model(module)
    _check_joined()
    return fully_shard(module, mesh=_mesh(accelerator.device))


def _check_joined() -> None:
    if not dist.is_initialized():
        raise LaunchError(
            "training.sharding=fsdp2 needs processes that are joined; start them with torchrun --nproc_per_node N -m "
            "toolkit.train (N = 1 works, too)"
        )


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (world_size(),))


def shard_policy(policy: Policy) -> Policy:
    """Shard a policy over all ranks with `fully_shard`, in place: each transformer block, and the rest as the root.

    Args:
        policy: on its device; all ranks take over rank 0's weights.
    """
    device = next(policy.parameters()).device
    for tensor in [*policy.parameters(), *policy.buffers()]:
        if tensor.is_floating_point():
            dist.broadcast(tensor.data, 0)
    skeleton = _skeleton(policy)
    _shard(policy, device)
    policy._skeleton = [skeleton]  # type: ignore[assignment]  # in a list: no module of this one
    return policy


def _shard(policy: Policy, device: torch.device) -> None:
    mesh = _mesh(device)
    tied = _shared_parameters(policy)
    for block in blocks_of(policy):
        if not tied & {id(parameter) for parameter in block.parameters()}:  # a shared one stays with the root
            fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for name in ("inside", "hidden_states", "logits"):
        register_fsdp_forward_method(policy, name)
        setattr(policy, name, _freeing(policy, getattr(policy, name), always=name == "inside"))
    policy.register_forward_hook(_free_root)


def _free_root(policy: Any, *_: Any) -> None:
    """Free the root's whole weights, unless a backward is to come; one that comes all the same gathers them again."""
    if not (policy.training and torch.is_grad_enabled()):
        policy.reshard()


def _freeing(policy: Any, method: Any, *, always: bool) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if always:  # generation switches gradients off further inside
            policy.reshard()
        else:
            _free_root(policy)
        return result

    return wrapped


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks: what lies in the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def is_sharded(policy: Any) -> bool:
    """Whether each forward gathers weights over ranks, so that all must make as many forwards."""
    return isinstance(policy, FSDPModule)


def unwrapped(policy: Any) -> Policy:
    """Return the policy without DDP around it: for generation and saving, never for a loss. FSDP 2 wraps nothing."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


@contextlib.contextmanager
def accumulating(policy: Any, is_last: bool, *, exchange: Exchange = "step") -> Iterator[None]:
    """Run one micro-batch (forward and backward) of a step; gradients add up and are averaged over ranks at its end.

    Args:
        policy: from `prepare_policy`, or any module.
        is_last: whether this is the step's last micro-batch; all ranks must have as many.
        exchange: under FSDP 2, when the blocks' gradients travel: once a "step", for which every rank keeps the whole
            gradient of all weights meanwhile, or in each "micro_batch", which keeps 1/R of it. The root's (head and
            embedding) travel once a step in either case. Ignored by DDP, which holds them whole anyway.
    """
    if isinstance(policy, DistributedDataParallel):
        with contextlib.nullcontext() if is_last else policy.no_sync():
            yield
    elif isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(is_last or exchange == "micro_batch")
        policy.set_requires_gradient_sync(is_last, recurse=False)
        policy.set_reshard_after_backward(is_last, recurse=False)
        yield
        if is_last:
            policy.reshard()  # a forward without backward in between would leave stale whole weights behind
    else:
        yield


@contextlib.contextmanager
def no_sync(policy: Any) -> Iterator[None]:
    """Keep gradients on this rank until a backward outside of this context, whatever `prepare_policy` made of it."""
    with accumulating(policy, is_last=False):
        yield
    with accumulating(policy, is_last=True):  # FSDP 2 keeps to what it was told last
        pass


def own_parameters(policy: Any) -> list[nn.Parameter]:
    """Return the parameters for an optimizer: under FSDP 2 this rank's shards, whatever was computed before."""
    if is_sharded(policy):
        policy.reshard()
    return list(policy.parameters())


def clip_grad_norm(policy: Any, max_norm: float, accelerator: Any = None) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; return the norm before, the same on all ranks.

    Under FSDP 2 the norm is that of the whole gradient, not of this rank's shards.

    Args:
        policy: from `prepare_policy`, or any module.
        max_norm: norm that gradients are scaled down to.
        accelerator: takes its loss scale out of the gradients first, if it has one.
    """
    clip = torch.nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
    norm = clip(policy.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def frozen_copy(policy: Any) -> Policy:
    """Return a copy of the policy as it is now that is never trained, sharded if the policy is; all ranks call it."""
    if not is_sharded(policy):
        return copy.deepcopy(unwrapped(policy)).eval().requires_grad_(False)
    device = next(policy.parameters()).device
    fresh = copy.deepcopy(policy._skeleton[0]).requires_grad_(False)
    buffers = {name: buffer.clone() for name, buffer in fresh.named_buffers()}
    _shard(fresh, device)
    fresh.to_empty(device=device)  # each rank makes room for its shards alone
    for name, buffer in fresh.named_buffers():
        buffer.copy_(buffers[name])
    copy_weights(policy, fresh)
    if "forward" in vars(policy):  # under autocast
        fresh.forward = _rebound(policy.forward, fresh)
    return fresh.eval()


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Copy all weights of `source` to `target`, a copy prepared the same way; nothing travels between ranks."""
    for policy in (source, target):
        if is_sharded(policy):
            policy.reshard()
    ours, theirs = unwrapped(target).parameters(), unwrapped(source).parameters()
    for mine, other in zip(ours, theirs, strict=True):
        mine.copy_(other)


def _skeleton(policy: Policy) -> Policy:
    """Return a copy without weights (on the meta device), for a copy of the policy once it is sharded."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in policy.parameters()
    }
    return copy.deepcopy(policy, memo)


def _under_autocast(forward: Any, accelerator: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    wrapped.accelerator = accelerator  # type: ignore[attr-defined]
    return wrapped


def _rebound(forward: Any, policy: Policy) -> Any:
    return _under_autocast(types.MethodType(type(policy).forward, policy), forward.accelerator)


def _shared_parameters(module: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules hold (a head tied to the embedding)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
