"""What a `LossRunner` is called with, brought to tensors: outputs of models, LM heads as modules, lists and arrays.

Legend: B rows, T positions that have hidden states, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import DataError, a_type, first_line, warn_once
from toolkit.head.adapters import Head, HeadTensors
from toolkit.head.logits import LogitTransform
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem, is_token_ids
from toolkit.losses.record import PerToken
from toolkit.losses.shift import shift_labels

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
    for name, value in (("hidden_states", hidden), ("head_weight", getattr(head_weight, "weight", head_weight))):
        refuse_meta(name, value)
    if head_bias is not None and not (isinstance(head_bias, Tensor) and head_bias.is_floating_point()):
        what = head_bias.dtype if isinstance(head_bias, Tensor) else a_type(head_bias)
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
            f"head_weight is {a_type(head_weight)}; pass the weight [V, D] of the LM head as a tensor, or the "
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
    if isinstance(head_weight, nn.Embedding):
        warn_once(
            "head_weight is an Embedding, which is the head only of a model that ties the two "
            "(config.tie_word_embeddings); model.get_output_embeddings() is the head of any model"
        )
    return Head(head_weight, head_weight, head_weight, LogitTransform()).inputs(hidden)


def refuse_meta(name: str, value: Any) -> None:
    """Raise `DataError` if `value` is a tensor on the device meta."""
    if isinstance(value, Tensor) and value.is_meta:
        raise DataError(
            f"{name} is on device meta, where tensors have shapes but no values; load the weights (or create the "
            "tensor) on cpu or cuda first"
        )


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
            f"hidden_states is {a_type(outputs)} with logits but without hidden states; call the model with "
            "output_hidden_states=True, or pass the output of its trunk (model.model(...))"
        )
    parts = f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else ""
    raise DataError(
        f"hidden_states is {a_type(outputs)}{parts}; pass the last hidden states [B, T, D] as a "
        "floating-point tensor with its graph, such as outputs.hidden_states[-1] or outputs.last_hidden_state"
    )


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def call_forward(forward: Callable[[Any], Any], batch: Mapping[str, Any]) -> Any:
    """Return ``forward(batch)``.

    Raises:
        DataError: it is a model, which takes tensors and not a batch.
    """
    if not isinstance(forward, nn.Module):
        return forward(batch)
    hint = (
        f"forward is {a_type(forward)}; step() calls it with the batch, a mapping of fields. For a model write "
        "step(batches, model=model), or lambda batch: (trunk(batch['input_ids']), lm_head), e.g. with model.model and "
        "model.lm_head"
    )
    if callable(getattr(forward, "get_output_embeddings", None)):
        raise DataError(hint)
    try:
        return forward(batch)
    except (AttributeError, TypeError) as error:
        raise DataError(f"{hint} ({first_line(error)})") from error


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
            f"forward returned {a_type(forward_output)}{shape}{number}; it must return {RETURNS}, such as "
            "lambda batch: (trunk(batch), model.lm_head)"
        )
    return head_tensors(*parts, *([None] if len(parts) == 2 else []))


def check_has_graph(loss: Tensor | None, where: str, reason: str = "") -> None:
    """Check that a loss can be differentiated.

    Args:
        loss: 0-dim; None: one that is computed now, so only the grad mode is checked.
        where: who was called, for the message.
        reason: what `why_without_graph` says.

    Raises:
        DataError: gradients are switched off, or nothing that the loss was computed from requires one.
    """
    if not torch.is_grad_enabled():
        raise DataError(
            f"{where} runs under torch.no_grad() (or inference_mode), so there is no gradient; call it outside"
        )
    if loss is not None and not loss.requires_grad:
        raise DataError(f"{where}: the loss has no gradient, because {reason}")


def why_without_graph(hidden_states: Tensor, head_weight: Tensor, context: str) -> str:
    """Say why a loss that is computed now has no gradient.

    Args:
        hidden_states: [B, T, D].
        head_weight: [V, D].
        context: the class that computed its values.
    """
    if not torch.is_grad_enabled():
        return "the runner was called under torch.no_grad() (or inference_mode); call it outside"
    if hidden_states.requires_grad or head_weight.requires_grad:
        return (
            f"the values that {context} returned have none, although hidden states or head require one; leave out "
            ".detach(), .item(), .data and numpy there"
        )
    return (
        "neither the hidden states nor the head require one; run the model without torch.no_grad() and .detach(), or "
        "train the head (head_weight.requires_grad_())"
    )


def labels_of(fields: Mapping[str, Any], num_positions: int | None, ignore_idx: int) -> Tensor:
    """Return the shifted labels [B, T] of a batch.

    Args:
        fields: of the batch; its tensors are tensors already.
        num_positions: how many have hidden states; None: not known yet.
        ignore_idx: label of positions without one.

    Raises:
        DataError: it has both or neither of ``input_ids`` and ``shifted_labels``, or they or a mask are invalid.
    """
    input_ids, labels, mask = (fields.get(name) for name in ("input_ids", "shifted_labels", "loss_mask"))
    if (input_ids is None) == (labels is None):
        raise DataError("give exactly one of input_ids (shifted here) and shifted_labels")
    if labels is not None:
        if mask is not None:
            raise DataError("loss_mask goes with input_ids; in shifted_labels mark unscored positions by ignore_idx")
        return labels
    if not is_token_ids(input_ids) or input_ids.dim() not in (1, 2):
        kind = f"{list(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids)
        raise DataError(f"input_ids is {kind}; give token ids as integers, [B, T]")
    if mask is not None and not isinstance(mask, Tensor):
        raise DataError(f"loss_mask is {a_type(mask)}; give [B, T], 1 on the tokens that count")
    if mask is not None and mask.dim() == 2 and input_ids.dim() == 1:
        raise DataError(
            f"input_ids has shape {list(input_ids.shape)}, but loss_mask {list(mask.shape)}; give one row as [1, T]: "
            "input_ids[None]"
        )
    shifted = shift_labels(
        input_ids, mask, fields.get("cu_seq_lens"), attention_mask=padding_of(fields), ignore_idx=ignore_idx
    )
    # Hidden states without the last position: its label is ignored anyway.
    return shifted[..., :-1] if num_positions == input_ids.shape[-1] - 1 else shifted


def padding_of(fields: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask [B, T] of a batch; None for [B, 1, T, T] or a mapping, which the model alone reads."""
    mask, input_ids = fields.get("attention_mask"), fields.get("input_ids")
    is_of_tokens = isinstance(mask, Tensor) and isinstance(input_ids, Tensor) and mask.dim() == input_ids.dim()
    return mask if is_of_tokens else None


def as_tensor(name: str, value: Any, device: torch.device | None) -> Any:
    """Return the field `name` as a tensor if it is a list or an array; other objects unchanged.

    Raises:
        DataError: it cannot be converted, e.g. because its rows differ in length, or it has no values.
    """
    refuse_meta(name, value)
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
            f"{name} is {a_type(value)} that cannot be converted to a tensor ({first_line(error)}); "
            f"give a tensor of {'integers' if is_integer else 'numbers'}, with rows of one length"
        ) from None


def check_alike(items: Sequence[LossContextInputItem], ignore_idx: int) -> None:
    """Check that all batches of a step with scored tokens have ``old_logprobs``, or none.

    A batch without them counts as on-policy, which a loop that builds items may mean, and a list of mappings hardly.

    Raises:
        DataError: some have them.
    """
    having = [getattr(item, "old_logprobs", None) is not None for item in items]
    if all(having) or not any(having):
        return
    for index, item in enumerate(items):
        if not having[index] and bool((item.shifted_labels != ignore_idx).any()):
            raise DataError(
                f"batches[{index}] has no old_logprobs, but batches[{having.index(True)}] has; give them for all "
                "batches of a step, or for none (on-policy)"
            )


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
