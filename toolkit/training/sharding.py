"""Wrapping a policy for several processes: DDP through accelerate, or PyTorch's `fully_shard` (FSDP 2).

Both average gradients over ranks, which is what the calibration of the losses expects. accelerate's FSDP is not used:
on CPU it silently stays DDP, and it shards the language model, but the policy around it must be the root.

Under ``fully_shard`` each transformer block is a separate group; embedding, final norm and head stay with the root.
They are gathered when the policy's forward begins and freed after the last backward of the step. So a loss in the
forward sees the full head, and the head is sent once each way per step, however many micro-batches it has. After a
forward without a backward (scoring, generation) they are freed at once: an optimizer created from
``policy.parameters()`` would take the gathered weights for the parameters, and train what the next forward discards.

Legend: R ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed import world_size
from toolkit.errors import ConfigError, LaunchError, listed
from toolkit.head.adapters import refuse_wrappers
from toolkit.metrics import unsharded
from toolkit.models.policy import Policy

Sharding = Literal["none", "fsdp2"]
Exchange = Literal["step", "micro_batch"]


def prepare_policy(policy: Policy, accelerator: Any, sharding: Sharding = "none") -> Any:
    """Return the policy ready for several processes: call this for the loss, `unwrapped` for everything else.

    Create the optimizer afterwards and between steps, from the `local_parameters` of the result.

    Args:
        policy: not wrapped; all ranks receive rank 0's weights.
        accelerator: accelerate's Accelerator, for its device and, with "none", its wrapper.
        sharding: "none": every rank holds all weights (DDP); "fsdp2": each holds 1/R of weights, gradients and
            optimizer state.

    Raises:
        ConfigError: `sharding` is unknown, "fsdp2" comes with fp16, or the policy is wrapped already, or in something
            that hides the head from a loss.
        LaunchError: "fsdp2" without a process group, or DeepSpeed or accelerate's FSDP would shard as well.
    """
    if sharding not in get_args(Sharding):
        raise ConfigError(f"training.sharding={sharding!r} is not known; choose {listed(get_args(Sharding))}")
    refuse_wrappers(policy)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "MEGATRON_LM", "TP") or (kind == "DEEPSPEED" and sharding == "fsdp2"):
        raise LaunchError(
            f"the launcher asks for {kind}, which would shard the model without the Policy wrapper knowing; launch "
            "with plain processes (accelerate launch --multi_gpu, or torchrun) and set training.sharding=fsdp2"
        )
    if sharding == "none":
        return accelerator.prepare_model(policy)
    mesh = _mesh(accelerator.device)
    precision = getattr(accelerator, "mixed_precision", "no")
    if precision == "fp16":
        raise ConfigError(
            "training.sharding=fsdp2 with mixed_precision=fp16: the loss scale would have to be agreed between shards "
            "of the gradient; choose bf16"
        )
    for tensor in [*policy.to(accelerator.device).parameters(), *policy.buffers()]:
        if tensor.is_floating_point():
            dist.broadcast(tensor.data, 0)
    skeleton = _skeleton(policy)
    _shard(policy, mesh)
    policy._skeleton = [skeleton]  # type: ignore[assignment]  # in a list, so it is not a submodule
    if precision == "bf16":  # as accelerate does for what it wraps itself
        policy.forward = _under_autocast(policy.forward, accelerator)  # type: ignore[method-assign]
    return policy


def prepare_probe(module: nn.Module, accelerator: Any, sharding: Sharding) -> Any:
    """Return a small module prepared as the policy will be, so its gradients are treated like the policy's."""
    if sharding == "none":
        return accelerator.prepare_model(module)
    return fully_shard(module, mesh=_mesh(accelerator.device))


def _mesh(device: torch.device) -> DeviceMesh:
    if not dist.is_initialized():
        raise LaunchError(
            "training.sharding=fsdp2 needs a process group; start the processes with torchrun --nproc_per_node N -m "
            "toolkit.train (N = 1 works, too)"
        )
    return init_device_mesh(device.type, (world_size(),))


def _shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard a policy over all ranks, in place: each transformer block, and the rest as the root."""
    tied = _shared_parameters(policy)
    for block in blocks_of(policy):
        if not tied & {id(parameter) for parameter in block.parameters()}:  # a shared one stays with the root
            fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "inside")
    policy.inside = _freeing(policy, policy.inside)  # type: ignore[method-assign]
    policy.register_forward_hook(_free_root)


def _free_root(policy: Any, *_: Any) -> None:
    """Free the root's gathered weights unless a backward is expected; an unexpected one gathers them again."""
    if not (policy.training and torch.is_grad_enabled()):
        policy.reshard()


def _freeing(policy: Any, method: Any) -> Any:
    """Free the weights after each call of a method, which may disable gradients inside, as generation does."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        policy.reshard()
        return result

    return wrapped


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks: the modules in the outermost module lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks_of(child)


def is_sharded(policy: Any) -> bool:
    """Whether each forward gathers weights over ranks, so all must run the same number of forwards."""
    return isinstance(policy, FSDPModule)


def unwrapped(policy: Any) -> Policy:
    """Return the policy without DDP around it: for generation and saving, never for a loss. FSDP 2 wraps nothing."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


@contextlib.contextmanager
def accumulating(policy: Any, is_last: bool, *, exchange: Exchange = "step") -> Iterator[None]:
    """Run one micro-batch (forward and backward) of a step; gradients add up and are averaged over ranks at its end.

    Args:
        policy: from `prepare_policy`, or any module.
        is_last: whether this is the step's last micro-batch; all ranks must have the same number.
        exchange: under FSDP 2, when the blocks' gradients are exchanged: once per "step", where every rank keeps the
            full gradient of all weights until then, or in each "micro_batch", which keeps 1/R of it. The root's (head
            and embedding) are exchanged once per step in either case. Ignored by DDP, which holds full gradients.
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
            policy.reshard()  # a forward without backward in between would leave stale full weights behind
    else:
        yield


@contextlib.contextmanager
def no_sync(policy: Any) -> Iterator[None]:
    """Keep gradients on this rank until a backward outside of this context, for every result of `prepare_policy`."""
    with accumulating(policy, is_last=False):
        yield
    with accumulating(policy, is_last=True):  # FSDP 2 keeps the last setting
        pass


def local_parameters(policy: Any) -> list[nn.Parameter]:
    """Return the parameters for an optimizer: under FSDP 2 this rank's shards, whatever was computed before."""
    if is_sharded(policy):
        policy.reshard()
    return list(policy.parameters())


def clip_grad_norm(policy: Any, max_norm: float, accelerator: Any = None) -> Tensor:
    """Scale all gradients to a norm of at most `max_norm`; return the norm before, 0-dim, the same on all ranks.

    Under FSDP 2 the norm is that of the full gradient, not of this rank's shards. `accelerator` removes its loss scale
    from the gradients first, if it has one.
    """
    clip = torch.nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
    norm = clip(policy.parameters(), max_norm)
    return unsharded(norm)


def frozen_copy(policy: Any) -> Policy:
    """Return a copy of the policy as it is now that is never trained, sharded if the policy is; all ranks call it."""
    if not is_sharded(policy):
        return copy.deepcopy(unwrapped(policy)).eval().requires_grad_(False)
    device = next(policy.parameters()).device
    fresh = copy.deepcopy(policy._skeleton[0]).requires_grad_(False)
    buffers = {name: buffer.clone() for name, buffer in fresh.named_buffers()}
    _shard(fresh, _mesh(device))
    fresh.to_empty(device=device)  # each rank allocates its shards only
    for name, buffer in fresh.named_buffers():
        buffer.copy_(buffers[name])
    copy_weights(policy, fresh)
    if "forward" in vars(policy):  # under autocast
        fresh.forward = _under_autocast(types.MethodType(type(fresh).forward, fresh), policy.forward.accelerator)
    return fresh.eval()


@torch.no_grad()
def copy_weights(source: Any, target: Any, mixup: float = 1.0) -> None:
    """Copy all weights of `source` to `target`, a copy prepared the same way, without communication.

    With a `mixup` below 1 that part of them; the rest of the target's weights stays.
    """
    for policy in (source, target):
        if is_sharded(policy):
            policy.reshard()
    pairs = zip(unwrapped(target).parameters(), unwrapped(source).parameters(), strict=True)
    for parameter, source_parameter in pairs:
        mix_weight(parameter, source_parameter, mixup)


@torch.no_grad()
def mix_weight(target: Tensor, source: Tensor, mixup: float) -> None:
    """Set `target` [...] to ``mixup x source + (1 - mixup) x target``, with `source` [...] of the same shape."""
    if mixup == 1:
        target.copy_(source)
    else:
        target.mul_(1 - mixup).add_(source, alpha=mixup)


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


def _shared_parameters(module: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules hold (a head tied to the embedding)."""
    counts = Counter(id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}
