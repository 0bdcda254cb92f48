"""The inputs of every pass: checked, flattened, and the scored tokens selected.

Legend: T positions, [...] their shape in the caller's tensors, N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.head.logits import LogitTransform
from toolkit.head.options import HeadOptions
from toolkit.head.vocabulary import VocabGroup, local_part, replicated


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

    def reordered(self, order: Tensor) -> HeadInputs:
        """Return the same with the scored tokens in another `order`, indices [N]."""
        return HeadInputs(
            self.hidden,
            self.weight,
            self.bias,
            self.positions.index_select(0, order),
            self.targets.index_select(0, order),
            self.transform,
            self.compute_dtype,
            self.vocab,
        )


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
    """
    hidden_states, ignore_idx = replicated(hidden_states), options.ignore_idx
    transform = LogitTransform(options.logit_scale, options.softcap, options.temperature, options.vocab_mask)
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
        transform=_checked_transform(transform, labels, targets, head_weight, hidden_states, ignore_idx),
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
    if not hidden_states.is_floating_point():
        raise DataError(f"hidden_states has dtype {hidden_states.dtype}; it must be a floating-point tensor")
    is_cast = torch.is_autocast_enabled(hidden_states.device.type)
    if hidden_states.dtype != head_weight.dtype and not is_cast:
        raise DataError(
            f"hidden_states are {hidden_states.dtype}, head_weight is {head_weight.dtype}; cast both to one "
            "dtype, or run under torch.autocast"
        )
    vocabulary, labels = head_weight.shape[0], labels.long()
    if head_bias is not None and not head_bias.is_floating_point():
        raise DataError(f"head_bias has dtype {head_bias.dtype}; it must be a floating-point tensor")
    if head_bias is not None and head_bias.shape != (vocabulary,):
        raise DataError(f"head_bias has shape {list(head_bias.shape)}; it must be [{vocabulary}]")
    if is_inside:
        return
    ids = labels.masked_fill(labels == ignore_idx, 0)
    if labels.numel() and not _are_inside(ids, vocabulary):
        where = ((ids < 0) | (ids >= vocabulary)).nonzero()[0].tolist()
        raise DataError(
            f"{labels_name}{where} = {int(labels[tuple(where)])} lies outside the vocabulary of {vocabulary} "
            f"(0 .. {vocabulary - 1}); use ignore_idx={ignore_idx} for positions that are not scored"
        )


def _are_inside(ids: Tensor, vocabulary: int) -> bool:
    lowest, highest = torch.stack(ids.aminmax()).tolist()  # waits for the device once
    return lowest >= 0 and highest < vocabulary


def _checked_transform(
    transform: LogitTransform, labels: Tensor, targets: Tensor, weight: Tensor, hidden: Tensor, ignore_idx: int
) -> LogitTransform:
    temperature, mask = transform.temperature, transform.vocab_mask
    if not math.isfinite(transform.scale) or transform.scale == 0:
        raise ConfigError(f"logit_scale={transform.scale} must be a finite number other than 0")
    if transform.softcap is not None and not (math.isfinite(transform.softcap) and transform.softcap > 0):
        raise ConfigError(f"softcap={transform.softcap} must be a number above 0, or None for no soft cap")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape[:1]):
        raise DataError(f"vocab_mask is {mask.dtype} {list(mask.shape)}; it must be bool [{weight.shape[0]}]")
    if mask is not None and not bool(mask.index_select(0, targets).all()):
        excluded = int(targets[~mask.index_select(0, targets)][0])
        raise DataError(f"label {excluded} is excluded by vocab_mask: it could not have been sampled")
    if not isinstance(temperature, Tensor):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature={temperature} must be a number above 0")
        return transform
    if temperature.requires_grad:
        raise DataError("temperature requires a gradient, but gets none; pass temperature.detach()")
    if temperature.dim() == 0:
        return _checked_transform(
            _with_temperature(transform, float(temperature)), labels, targets, weight, hidden, ignore_idx
        )
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
    return _with_temperature(transform, copied)


def _with_temperature(transform: LogitTransform, temperature: float | Tensor) -> LogitTransform:
    mask = None if transform.vocab_mask is None else transform.vocab_mask.clone()
    return LogitTransform(transform.scale, transform.softcap, temperature, mask)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in here, autocast respected."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
