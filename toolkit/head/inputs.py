"""The inputs of every pass: checked, flattened, and the scored tokens selected.

Legend: T positions, [...] their shape in the caller's tensors, N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from toolkit.errors import ConfigError, DataError, a_type
from toolkit.head.logits import LogitTransform
from toolkit.head.options import HeadOptions
from toolkit.head.vocabulary import VocabGroup, local_part, replicated

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadInputs:
    """Flat views of the caller's tensors."""

    hidden: Tensor
    """[T, D]."""
    weight: Tensor
    """[V, D]; local rows only where the vocabulary is split."""
    bias: Tensor | None
    """[V], or local entries only."""
    positions: Tensor
    """[N] int64, the scored tokens among the T positions."""
    targets: Tensor
    """[N] int64, their labels."""
    transform: LogitTransform
    """Its temperature, if a tensor, has one value for each of the T positions."""
    compute_dtype: torch.dtype
    """Dtype of the matrix products."""
    vocab: VocabGroup
    """Which rows `weight` holds."""

    @property
    def wide(self) -> torch.dtype:
        """Dtype of log-probabilities, entropies and their arithmetic: fp32 or float64."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def hidden_sum_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the hidden states is computed.

        fp16 has no number below 6e-8: its gradients wait in fp32 for the loss scale that backward brings.
        """
        return torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype

    def weight_sum_dtype(self, num_chunks: int) -> torch.dtype:
        """Dtype in which the weight gradient is added up.

        `wide` where more than one low-precision product is summed, or where small values would be lost.
        """
        dtype = self.compute_dtype
        is_direct = num_chunks == 1 and dtype == self.weight.dtype and dtype != torch.float16
        return dtype if is_direct else self.wide


class Needs(NamedTuple):
    """Which inputs require a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return any(self)

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
        """Look at `requires_grad` of `hidden` [..., D], `weight` [V, D] and `bias` [V], and at the grad mode."""
        is_on = torch.is_grad_enabled()
        return cls(*(is_on and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)))


def head_inputs(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None,
    options: HeadOptions,
) -> HeadInputs:
    """Check and flatten; positions whose label is ``options.ignore_idx`` are dropped here and not used again.

    Takes `hidden_states` [..., D], `head_weight` [V, D], `labels` [...] and `head_bias` [V].

    Raises:
        DataError: shapes or dtypes do not fit, or a label lies outside the vocabulary or its mask.
        ConfigError: a scale, soft cap or temperature is not valid.
        RuntimeError: a tensor has a tangent of forward-mode differentiation.
    """
    for name, value in (("hidden_states", hidden_states), ("head_weight", head_weight), ("labels", labels)):
        if not isinstance(value, Tensor):
            remedy = "give its weight" if isinstance(value, torch.nn.Module) else "give torch.as_tensor(...)"
            raise DataError(f"{name} is {a_type(value)}; it must be a tensor: {remedy}")
    hidden_states, ignore_idx = replicated(hidden_states), options.ignore_idx
    for tensor in (hidden_states, head_weight, head_bias):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "the head does not support forward-mode derivatives: its passes know gradients alone; compute the "
                "logits with torch.nn.functional.linear (mode='eager')"
            )
    check_head(hidden_states, head_weight, labels, head_bias, ignore_idx=ignore_idx)
    weight, bias, vocab = local_part(head_weight, head_bias)
    labels = labels.long()
    flat = labels.reshape(-1)
    positions = (flat != ignore_idx).nonzero().squeeze(-1)
    targets = flat.index_select(0, positions)
    return HeadInputs(
        hidden=hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight=weight,
        bias=bias,
        positions=positions,
        targets=targets,
        transform=_checked_transform(options, labels, targets, head_weight, hidden_states),
        compute_dtype=_compute_dtype(hidden_states),
        vocab=vocab,
    )


def check_head(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None,
    *,
    ignore_idx: int,
    labels_name: str = "labels",
    is_inside: bool = False,
) -> None:
    """Check `hidden_states` [..., D], `head_weight` [V, D], `labels` [...] and their range, and `head_bias` [V].

    `is_inside`: the labels are known to be in the vocabulary, or need not be; looking at them waits for the device.

    Raises:
        DataError: names what does not fit and what is allowed.
    """
    if hidden_states.shape[:-1] != labels.shape:
        raise DataError(
            f"hidden_states has shape {list(hidden_states.shape)}, but {labels_name} has {list(labels.shape)}; "
            "they must agree in all but the last dimension (drop the last position of the text: it has no label)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{labels_name} has dtype {labels.dtype}; it must be int64")
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden_states.shape[-1]:
        raise DataError(
            f"head_weight has shape {list(head_weight.shape)}; it must be [V, {hidden_states.shape[-1]}] "
            f"for hidden states of width {hidden_states.shape[-1]}"
        )
    if hidden_states.dtype not in DTYPES:
        raise DataError(
            f"hidden_states has dtype {hidden_states.dtype}; it must be a floating-point tensor: float64, float32, "
            "bfloat16 or float16"
        )
    _check_devices(hidden_states, head_weight, head_bias)
    is_cast = torch.is_autocast_enabled(hidden_states.device.type)
    if hidden_states.dtype != head_weight.dtype and not is_cast:
        raise DataError(
            f"hidden_states are {hidden_states.dtype}, head_weight is {head_weight.dtype}; cast both to one "
            "dtype, or run under torch.autocast"
        )
    vocabulary = head_weight.shape[0]
    if head_bias is not None and not head_bias.is_floating_point():
        raise DataError(f"head_bias has dtype {head_bias.dtype}; it must be a floating-point tensor")
    if head_bias is not None and head_bias.shape != (vocabulary,):
        raise DataError(f"head_bias has shape {list(head_bias.shape)}; it must be [{vocabulary}]")
    if is_inside:
        return
    labels = labels.long()
    ids = labels.masked_fill(labels == ignore_idx, 0)
    lowest, highest = torch.stack(ids.aminmax()).tolist() if labels.numel() else (0, -1)  # waits for the device once
    if lowest < 0 or highest >= vocabulary:
        where = ((ids < 0) | (ids >= vocabulary)).nonzero()[0].tolist()
        raise DataError(
            f"{labels_name}{where} = {int(labels[tuple(where)])} lies outside the vocabulary of {vocabulary} "
            f"(0 .. {vocabulary - 1}); use ignore_idx={ignore_idx} for positions that are not scored"
        )


def _check_devices(hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
    """Raise unless `hidden_states` [..., D], `head_weight` [V, D] and `head_bias` [V] have values, on one device."""
    for name, tensor in (("hidden_states", hidden_states), ("head_weight", head_weight), ("head_bias", head_bias)):
        if tensor is not None and (tensor.device != hidden_states.device or tensor.is_meta):
            raise DataError(
                f"{name} is on device {tensor.device}, hidden_states are on {hidden_states.device}; move all to one "
                "device that holds values (a tensor on meta has none: load it first)"
            )


def _checked_transform(
    options: HeadOptions, labels: Tensor, targets: Tensor, weight: Tensor, hidden: Tensor
) -> LogitTransform:
    scale, softcap, temperature, mask = options.logit_scale, options.softcap, options.temperature, options.vocab_mask
    if not math.isfinite(scale) or scale == 0:
        raise ConfigError(f"logit_scale={scale} must be a finite number other than 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ConfigError(f"softcap={softcap} must be a number above 0, or None for no soft cap")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape[:1]):
        raise DataError(f"vocab_mask is {mask.dtype} {list(mask.shape)}; it must be bool [{weight.shape[0]}]")
    if mask is not None and not bool(mask.index_select(0, targets).all()):
        excluded = int(targets[~mask.index_select(0, targets)][0])
        raise DataError(f"label {excluded} is excluded by vocab_mask: it could not have been sampled")
    mask = None if mask is None else mask.clone()  # backward reads it again
    if isinstance(temperature, Tensor):
        temperature = _copied_temperature(temperature, labels, hidden, options.ignore_idx)
    if not isinstance(temperature, Tensor) and not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature={temperature} must be a number above 0")
    return LogitTransform(scale, softcap, temperature, mask)


def _copied_temperature(temperature: Tensor, labels: Tensor, hidden: Tensor, ignore_idx: int) -> float | Tensor:
    """Return a checked copy of the temperatures of all positions, [T], as a number if there is one."""
    if temperature.requires_grad:
        raise DataError("temperature requires a gradient, but gets none; pass temperature.detach()")
    if temperature.dim() == 0:
        return float(temperature)
    if temperature.shape != labels.shape:
        raise DataError(
            f"temperature has shape {list(temperature.shape)}; it must be one number or, like the labels, "
            f"{list(labels.shape)}"
        )
    wide = torch.promote_types(_compute_dtype(hidden), torch.float32)
    copied = temperature.detach().reshape(-1).to(hidden.device, wide).clone()  # backward reads it again
    scored = copied[(labels != ignore_idx).reshape(-1)]
    if bool((~((scored > 0) & scored.isfinite())).any()):
        raise DataError("temperature is 0, negative or not finite at a scored position; it must be above 0")
    return copied


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in here, autocast respected."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
