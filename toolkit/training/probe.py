"""Start-up check of the gradient's scale: a known gradient goes through the loop and must come out unchanged.

Between a loss and the gradient that the optimizer reads, wrappers average or sum over processes, launchers divide by
accumulation steps, and scalers multiply, all silently. The probe sends the toolkit's calibrated loss of a module with
one parameter the same way, and compares.

The module's loss is a cross-entropy over tokens that are spread unevenly over ranks and micro-batches. Each token's
hidden state marks its origin (micro-batch, even or odd rank), so the gradient shows the factor of each origin. This
distinguishes a mean of means, or a gradient that was never exchanged, from a constant factor.

Legend: R ranks, M micro-batches, P = 2 M origins, N tokens in all, T of them in a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.distributed import all_gather_objects, rank, reduce_metrics, sp_split, world_size
from toolkit.distributed.sequence import SPMesh, multiple_of, padded
from toolkit.errors import ConfigError, LaunchError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.items import CELossContextInputItem
from toolkit.metrics import Max, unsharded

FIRST = (3, 1)
"""Tokens of the micro-batches before the last; three in all, so M is not the usual number of processes."""
MEAN_TOKENS = 16
"""Tokens of a rank on average: a power of two, so weights are exact in any dtype."""
UNEVEN = 8
"""Tokens that an even rank has above the mean, and its odd neighbour below it."""
MARK = 1 / 16
"""Hidden states; small, so gradients in half precision stay finite at the usual loss scale of 65,536."""
TOLERANCE = 1e-6
"""Of the factor, in fp32: sums of at most 24 numbers, then a mean over ranks."""
IGNORED = -100


class ProbeModule(nn.Module):
    """A head whose weights are all 0, with the loss inside the forward, as in the policy."""

    def __init__(self, num_origins: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, num_origins))

    def forward(self, hidden: Tensor, context: Any) -> Tensor:
        """Return the loss of `context`, 0-dim, for `hidden` [1, T, P]."""
        return context.forward(hidden, self.weight)[0]


class Batch(NamedTuple):
    """What one rank sees of the probe's data."""

    hidden: list[Tensor]
    """[1, T, P] for each micro-batch: `MARK` at the token's origin."""
    items: list[CELossContextInputItem]
    counts: list[int]
    """[P] tokens of each origin over all ranks."""


def check_gradient_scale(
    backward: Callable[[Tensor], object] | None = None,
    wrap: Callable[[nn.Module], Any] | None = None,
    *,
    no_sync: Callable[[Any], AbstractContextManager[Any]] | None = None,
    scaler: Any | None = None,
    gradient: Callable[[nn.Parameter], Tensor] | None = None,
    loss_cfg: BaseLossConfig | None = None,
    sp_mesh: SPMesh | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Send a known gradient through the functions of your loop; return its factor, and raise if that is not 1.

    Every rank must call it, before the first step; it takes some milliseconds. Pass what your loop uses::

        check_gradient_scale(accelerator.backward, accelerator.prepare_model, no_sync=accelerator.no_sync,
                             scaler=accelerator.scaler, device=accelerator.device)

    Args:
        backward: takes the loss of a micro-batch; None: ``loss.backward()``.
        wrap: prepares a module as it prepares the policy (`DistributedDataParallel`, ...); None: as it is.
        no_sync: context manager around every micro-batch but the last; None: that of the wrapped module, if it has one.
        scaler: the `torch.amp.GradScaler` that `backward` scales with; its scale is removed as before clipping.
        gradient: reads the gradient of a parameter if it is not in ``.grad`` (DeepSpeed: ``safe_get_full_grad``).
        loss_cfg: config of your loss; the probe's cross-entropy uses its ``gradient_reduction``. A CELossConfig is used
            as it is.
        sp_mesh: ranks that share a sequence.
        device: where the policy is.

    Raises:
        LaunchError: the factor is not 1 up to rounding; names it and its likely cause.
        ConfigError: `loss_cfg` is not a loss config.
    """
    loss_cfg = _probe_cfg(loss_cfg)
    batch = _batch(loss_cfg, sp_mesh, torch.device(device))
    module = ProbeModule(len(batch.counts)).to(device)
    wrapped = module if wrap is None else wrap(module)
    sync_later = no_sync or _default_no_sync
    context = loss_cfg.loss_ctx_cls
    batches_kwargs = context.build_batches_loss_kwargs(batch.items, loss_cfg, sp_mesh=sp_mesh)
    last = len(batches_kwargs) - 1
    for index, (hidden, kwargs) in enumerate(zip(batch.hidden, batches_kwargs, strict=True)):
        with contextlib.nullcontext() if index == last else sync_later(wrapped):
            loss = wrapped(hidden, context(loss_cfg, kwargs))
            loss.backward() if backward is None else backward(loss)
    parameter = next(iter(wrapped.parameters()), module.weight)  # FSDP replaces the parameter
    if scaler is not None:
        _unscale(scaler, parameter)
    grad = parameter.grad if gradient is None else gradient(parameter)
    grad = torch.zeros(1, device=parameter.device) if grad is None else unsharded(grad)
    return _judged(grad, batch.counts, loss_cfg, sp_mesh, scaler)


def _default_no_sync(wrapped: Any) -> AbstractContextManager[Any]:
    # DeepSpeed's engine has one, too, but it raises under ZeRO-2: there `backward` knows the last micro-batch.
    is_deepspeed = hasattr(wrapped, "set_gradient_accumulation_boundary")
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") and not is_deepspeed else contextlib.nullcontext()


def _probe_cfg(loss_cfg: Any) -> CELossConfig:
    """Return the config of the probe's cross-entropy, whose gradients are reduced as those of `loss_cfg`."""
    if loss_cfg is None or isinstance(loss_cfg, CELossConfig):
        return loss_cfg or CELossConfig()
    if not isinstance(loss_cfg, BaseLossConfig):
        raise ConfigError(
            f"check_gradient_scale: loss_cfg of type {type(loss_cfg).__name__} is not a loss config; give the config "
            "of your loss, whose gradient_reduction is read, or omit it for gradient_reduction='mean'"
        )
    return CELossConfig(gradient_reduction=loss_cfg.gradient_reduction)


def _batch(loss_cfg: CELossConfig, sp_mesh: SPMesh | None, device: torch.device) -> Batch:
    """Return this rank's tokens; the ranks of a mesh share the same tokens, and each has its shard of them."""
    leaders = all_gather_objects(_leader(sp_mesh))
    local_data_rank = sorted(set(leaders)).index(_leader(sp_mesh))
    number = len(set(leaders))
    lengths = [_lengths(data_rank, number) for data_rank in range(number)]
    num_origins = 2 * len(lengths[0])
    counts = [0] * num_origins
    for data_rank, of_rank in enumerate(lengths):
        for index, length in enumerate(of_rank):
            counts[2 * index + data_rank % 2] += length
    items, states = [], []
    for index, length in enumerate(lengths[local_data_rank]):
        hidden = torch.zeros(1, length, num_origins, device=device)
        hidden[..., 2 * index + local_data_rank % 2] = MARK
        labels = torch.zeros(1, length, dtype=torch.int64, device=device)
        if sp_mesh is not None:
            multiple = multiple_of(sp_mesh)
            hidden = sp_split(padded(hidden, multiple, dim=1, pad=0.0), sp_mesh, dim=1, pad=0.0)
            labels = padded(labels, multiple, pad=loss_cfg.ignore_idx)
            labels = sp_split(labels, sp_mesh, pad=loss_cfg.ignore_idx)
        states.append(hidden)
        items.append(CELossContextInputItem(shifted_labels=labels))
    return Batch(states, items, counts)


def _leader(sp_mesh: SPMesh | None) -> int:
    """Return the first of the ranks that share a sequence."""
    return rank() if sp_mesh is None else dist.get_process_group_ranks(sp_mesh.get_group())[0]


def _lengths(data_rank: int, number: int) -> list[int]:
    """Return the tokens of each micro-batch of one of `number` data-parallel ranks."""
    has_neighbour = data_rank ^ 1 < number
    tokens = MEAN_TOKENS + ((-UNEVEN if data_rank % 2 else UNEVEN) if has_neighbour else 0)
    return [*FIRST, tokens - sum(FIRST)]


def _unscale(scaler: Any, parameter: nn.Parameter) -> None:
    """Remove the loss scale as a loop does before clipping, and leave the scaler as it was."""
    if scaler.is_enabled():
        scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))
        scaler.update(scaler.get_scale())  # forgets the optimizer


def _judged(
    grad: Tensor, counts: list[int], loss_cfg: CELossConfig, sp_mesh: SPMesh | None, scaler: Any | None
) -> float:
    """Return the factor if it is 1 for every origin and on every rank."""
    num_origins = len(counts)
    values = grad.detach().double().cpu().flatten()
    values = values.view(2, num_origins) if values.numel() == 2 * num_origins else torch.zeros(2, num_origins).double()
    # Logits are 0, so both tokens have probability 1/2: d(-log pi(0))/d(logits) = (-1/2, 1/2).
    num_tokens = torch.tensor(counts, dtype=torch.float64)
    expected = num_tokens / sum(counts) * MARK / 2
    has_tokens = expected > 0
    factors = (torch.stack([-values[0], values[1]])[:, has_tokens] / expected[has_tokens]).mean(0)
    factor = float((factors * expected[has_tokens]).sum() / expected.sum())
    tolerance = max(TOLERANCE, 4 * torch.finfo(grad.dtype).eps)
    error = float((factors - 1).abs().max().nan_to_num(torch.inf, posinf=torch.inf))
    worst = reduce_metrics({"error": Max.of(torch.tensor([error], device=grad.device))})["error"].value()
    if worst <= tolerance:
        return factor
    if error <= tolerance:
        consequence = LaunchError(
            "the gradient of the start-up probe is right here but wrong on another rank; see there"
        )
        consequence.is_from_elsewhere = True
        raise consequence
    if not bool(factors.isfinite().all()):
        scale = f" under a loss scale of {scaler.get_scale():g}" if scaler is not None else ""
        raise LaunchError(
            f"the gradient of the start-up probe is not finite{scale}; start the GradScaler from a smaller init_scale, "
            "or train in bf16"
        )
    origins = has_tokens.nonzero().flatten()
    raise LaunchError(_verdict(factors, origins, num_tokens[origins], loss_cfg, sp_mesh))


def _verdict(
    factors: Tensor, origins: Tensor, num_tokens: Tensor, loss_cfg: CELossConfig, sp_mesh: SPMesh | None
) -> str:
    """Return the message: the wrong factor and its likely cause."""
    low, high = float(factors.min()), float(factors.max())
    if high - low <= 1e-4 * abs(high):
        cause = _cause_of_factor(float(factors.mean()), loss_cfg, sp_mesh)
        return f"gradients are {factors.mean():.6g} times what they should be: {cause}"
    cause = _cause_of_spread(factors, origins, num_tokens)
    return (
        f"gradients are not the gradient of one loss: between {low:.4g} and {high:.4g} times what they should be, "
        f"depending on the micro-batch and the process that a token is in: {cause}"
    )


def _cause_of_factor(factor: float, loss_cfg: CELossConfig, sp_mesh: SPMesh | None) -> str:
    """Name what multiplies every gradient by `factor`."""
    number, shards = world_size(), 1 if sp_mesh is None else sp_mesh.size()
    causes = []
    if abs(factor) < TOLERANCE:
        return "none arrives; the loss is detached, or backward, wrap or gradient work on another parameter"
    if number > 1 and _is_near(factor, number):
        causes.append(
            f"{number} is the number of processes: the back-end sums gradients over them, but the loss expects one "
            "that averages; set loss.gradient_reduction=sum"
        )
    if number > 1 and _is_near(factor, 1 / number):
        causes.append(
            f"{number} is the number of processes: the back-end averages gradients over them"
            + (", set loss.gradient_reduction=mean" if loss_cfg.gradient_reduction == "sum" else " twice")
        )
    if shards > 1 and (_is_near(factor, shards) or _is_near(factor, 1 / shards)):
        causes.append(
            f"{shards} ranks share a sequence (sp_mesh): their parts are {'counted' if factor > 1 else 'divided'} "
            "twice; the loss needs one exchange over all ranks, including those of the mesh, and a back-end that "
            "averages over them (DeepSpeed sums: toolkit.distributed.from_accelerate, or counting_over with divisor)"
        )
    steps = round(1 / factor) if 0 < factor < 1 else 0
    if steps > 1 and _is_near(factor, 1 / steps):
        causes.append(
            f"every loss is divided by {steps}, as by gradient accumulation (accelerate's gradient_accumulation_steps="
            f"{steps}, DeepSpeed's scale_wrt_gas): set that to 1 (false); the toolkit's loss is that of the full step"
        )
    if factor >= 256 and float(factor).is_integer():
        causes.append("a GradScaler's loss scale is left in; pass scaler=, and call scaler.unscale_ before clipping")
    return "; or ".join(causes) or "something between the loss and the optimizer scales; look at backward and wrap"


def _cause_of_spread(factors: Tensor, origins: Tensor, num_tokens: Tensor) -> str:
    """Name what treats origins differently; origin 2 m + s: micro-batch m, even (s = 0) or odd rank."""
    micro, side = origins // 2, origins % 2
    is_missing = factors.abs() < TOLERANCE
    for value in (0, 1):
        if bool(is_missing.any()) and bool(((side == value) == ~is_missing).all()):
            return (
                "those of other processes are missing: gradients are not exchanged; call the wrapped module itself, "
                "not a module inside of it, and leave no_sync for the last micro-batch"
            )
    last = micro == micro.max()
    if bool((is_missing == ~last).all()):
        return "only the last micro-batch counts; gradients must add up until the optimizer step (zero_grad too often?)"
    of_micro = torch.stack([num_tokens[micro == index].sum() for index in range(int(micro.max()) + 1)])
    if _is_level(factors * num_tokens) or _is_level(factors * of_micro[micro]):
        return (
            "every micro-batch weighs the same, a mean of means; build the kwargs of all micro-batches of a step in "
            "one call, and do not divide by their tokens or number"
        )
    of_side = torch.stack([num_tokens[side == value].sum() for value in (0, 1)])
    if _is_level(factors * of_side[side]):
        return "every process weighs the same, a mean of means; do not divide by the tokens of one process"
    if _is_level(factors[last]) and bool((factors[~last] > factors[last].max()).all()):
        return "earlier micro-batches are exchanged again with later ones; hold them back (no_sync) until the last"
    listed = ", ".join(
        f"micro-batch {index}, {'odd' if is_odd else 'even'} ranks: {factor:.4g}"
        for factor, index, is_odd in zip(factors.tolist(), micro.tolist(), side.tolist(), strict=True)
    )
    return f"{listed}; look at backward, wrap and no_sync"


def _is_near(factor: float, expected: float) -> bool:
    return abs(factor - expected) <= 1e-4 * expected


def _is_level(values: Tensor) -> bool:
    return float(values.max() - values.min()) <= 1e-4 * abs(float(values.max()))
