"""What a `LossRunner` is called with, brought to tensors: outputs of models, LM heads as modules, lists and arrays.

Legend: B rows, T positions that have hidden states, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import DataError, first_line
from toolkit.head.adapters import Head, HeadTensors
from toolkit.head.logits import LogitTransform
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem
from toolkit.losses.record import PerToken

INTEGERS = ("input_ids", "shifted_labels", "loss_mask", "attention_mask", "cu_seq_lens")
"""Fields of a batch, besides those of items, that hold integers (masks: or booleans)."""
RETURNS = "(hidden_states, head_weight) or (hidden_states, head_weight, head_bias)"
"""What the forward of `LossRunner.step` returns."""


def head_tensors(hidden_states: Any, head_weight: Any, head_bias: Tensor | None) -> HeadTensors:
    """Return hidden states [B, T, D], weight [V, D] and bias [V] or None from what the caller has.

    Args:
        hidden_states: a tensor, or the output of a model, of which the last hidden states are taken.
        head_weight: a tensor, or the LM head itself, such as an ``nn.Linear``, with or without LoRA.
        head_bias: [V]; a module has its own.

    Raises:
        DataError: one of them is something else; the message says what to pass.
        ConfigError: the head's adapter is not supported.
    """
    hidden = last_hidden(hidden_states)
    if head_bias is not None and not (isinstance(head_bias, Tensor) and head_bias.is_floating_point()):
        what = head_bias.dtype if isinstance(head_bias, Tensor) else f"a {type(head_bias).__name__}"
        by_name = "**dict(item)" if isinstance(head_bias, LossContextInputItem) else "input_ids=..., advantages=..."
        raise DataError(
            f"head_bias is {what}; it must be a floating-point tensor [V]. The fields of the batch are given by name: "
            f"{by_name}"
        )
    if isinstance(head_weight, Tensor):
        _check_widths(hidden, head_weight)
        return hidden, head_weight, head_bias
    if not isinstance(head_weight, nn.Module):
        raise DataError(
            f"head_weight is a {type(head_weight).__name__}; pass the weight [V, D] of the LM head as a tensor, or the "
            "head itself, such as model.lm_head"
        )
    if callable(getattr(head_weight, "get_output_embeddings", None)):
        raise DataError(
            f"head_weight is a whole model ({type(head_weight).__name__}); pass its LM head: "
            "model.get_output_embeddings()"
        )
    if head_bias is not None:
        raise DataError(
            f"head_bias is given, but head_weight is a module ({type(head_weight).__name__}), whose bias is used; "
            "leave out head_bias, or pass module.weight"
        )
    return Head(head_weight, head_weight, head_weight, LogitTransform()).inputs(hidden)


def _check_widths(hidden: Tensor, weight: Tensor) -> None:
    """Raise `DataError` if `hidden` are logits, or `weight` is transposed, or they are swapped."""
    if hidden.dim() == 2 and weight.dim() == 3 and hidden.shape[-1] == weight.shape[-1]:
        raise DataError(
            f"hidden_states has shape {list(hidden.shape)} and head_weight {list(weight.shape)}: they are swapped; "
            "give the hidden states [B, T, D] first, then the weight [V, D] of the head"
        )
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] == weight.shape[1] or hidden.shape[-1] != len(weight):
        return
    raise DataError(
        f"hidden_states has shape {list(hidden.shape)} and head_weight {list(weight.shape)}, but it must be [V, D]; "
        f"give head_weight.T if it is [D, V], or, if these are logits over a vocabulary of {len(weight)}, the hidden "
        "states that they were computed from"
    )


def last_hidden(outputs: Any) -> Tensor:
    """Return the last hidden states [B, T, D] of `outputs`: a tensor, a model's output, or a tuple of all layers.

    Raises:
        DataError: it is not clear which they are.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, (tuple, list)) and outputs and all(isinstance(part, Tensor) for part in outputs):
        first, last = outputs[0], outputs[-1]
        if last.is_floating_point() and all(part.shape == first.shape for part in outputs):
            return last  # one for each layer
    last = _part(outputs, "last_hidden_state")
    layers = _part(outputs, "hidden_states")
    if isinstance(last, Tensor):
        return last
    if isinstance(layers, (tuple, list)) and layers and isinstance(layers[-1], Tensor):
        return layers[-1]
    if _part(outputs, "logits") is not None:
        raise DataError(
            f"hidden_states is a {type(outputs).__name__} with logits but without hidden states; call the model with "
            "output_hidden_states=True, or pass the output of its trunk (model.model(...))"
        )
    parts = f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else ""
    raise DataError(
        f"hidden_states is a {type(outputs).__name__}{parts}; pass the last hidden states [B, T, D] as a "
        "floating-point tensor with its graph, such as outputs.hidden_states[-1] or outputs.last_hidden_state"
    )


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def returned_by(forward_output: Any) -> HeadTensors:
    """Return hidden states, weight and bias (or None) from what the forward of `LossRunner.step` returned.

    Raises:
        DataError: it does not return two or three values.
    """
    parts = forward_output if type(forward_output) in (tuple, list) else None
    if parts is None or not 2 <= len(parts) <= 3:
        shape = f" of shape {list(forward_output.shape)}" if isinstance(forward_output, Tensor) else ""
        number = "" if parts is None else f" of {len(parts)}"
        raise DataError(
            f"forward returned a {type(forward_output).__name__}{shape}{number}; it must return {RETURNS}, such as "
            "lambda batch: (trunk(batch), model.lm_head)"
        )
    return head_tensors(*parts, *([None] if len(parts) == 2 else []))


def check_has_graph(loss: Tensor | None, where: str) -> None:
    """Check that a loss can be differentiated.

    Args:
        loss: 0-dim; None: one that is computed now, so only the grad mode is checked.
        where: who was called, for the message.

    Raises:
        DataError: gradients are switched off, or nothing that the loss was computed from requires one.
    """
    if not torch.is_grad_enabled():
        raise DataError(
            f"{where} runs under torch.no_grad() (or inference_mode), so there is no gradient; call it outside"
        )
    if loss is not None and not loss.requires_grad:
        raise DataError(
            f"{where}: the loss has no gradient, because neither the hidden states nor the head require one; run the "
            "model without torch.no_grad() and .detach(), or train the head (head_weight.requires_grad_())"
        )


def as_tensor(name: str, value: Any, device: torch.device | None) -> Any:
    """Return the field `name` as a tensor if it is a list or an array; other objects unchanged.

    Raises:
        DataError: it cannot be converted, e.g. because its rows differ in length.
    """
    if (
        value is None
        or isinstance(value, Tensor)
        or not (isinstance(value, (list, tuple)) or hasattr(value, "__array__"))
    ):
        return value
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        mark = RLLossContextInputItem.layout(name) if name in RLLossContextInputItem.model_fields else None
        is_integer = name in INTEGERS or (isinstance(mark, PerToken) and mark.kind == "integer")
        raise DataError(
            f"{name} is a {type(value).__name__} that cannot be converted to a tensor ({first_line(error)}); "
            f"give a tensor of {'integers' if is_integer else 'numbers'}, with rows of one length"
        ) from None


def spread(name: str, value: Tensor | float | None, labels: Tensor) -> Tensor | None:
    """Return a `value` that is a number in the shape of `labels` [B, T]; others as tensors of any shape [...]."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name == "advantages":
        return torch.as_tensor(value, dtype=torch.get_default_dtype(), device=labels.device).expand(labels.shape)
    values = as_tensor(name, value, labels.device)
    if not isinstance(values, Tensor):
        return values  # the item says what it must be
    if values.dim() == 0:
        return values.to(labels.device).expand(labels.shape)
    return values
