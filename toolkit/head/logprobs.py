"""Log-probabilities of given tokens under an LM head, whole or in chunks.

Legend: N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.head.gradients import HeadGradients


class TokenScores(NamedTuple):
    """What the head says of each token."""

    logprobs: Tensor
    """[N] log-probability of the label in nats, fp32 or wider."""
    entropy: Tensor | None
    """[N] entropy of the distribution in nats, fp32 or wider; None unless asked for."""


def token_logprobs(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenScores:
    """Score each label under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Both results are differentiable in hidden states, weight and bias.

    Args:
        hidden_states: [N, D].
        head_weight: [V, D].
        labels: [N] int64 in 0 .. V - 1.
        head_bias: [V], optional.
        chunk_size: hold the logits of at most this many tokens; they are computed again in backward. None holds all.
        temperature: of the softmax; that of the sampling, to score tokens as they were sampled.
        with_entropy: also return the entropies.

    Returns:
        `TokenScores` of [N] tensors, fp32 (float64 for float64 inputs).
    """
    if chunk_size is None or len(labels) <= chunk_size:
        return TokenScores(*_score(hidden_states, head_weight, labels, head_bias, temperature, with_entropy))
    logprobs, entropy = _ChunkedScores.apply(
        hidden_states, head_weight, head_bias, labels, chunk_size, temperature, with_entropy
    )
    return TokenScores(logprobs, entropy if with_entropy else None)


def _score(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    all_logprobs = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A logit of -inf has probability 0 and adds nothing to the entropy; 0 * -inf would be NaN.
    entropy = -(all_logprobs.exp() * all_logprobs.clamp(min=-1e4)).sum(-1) if with_entropy else None
    return logprobs, entropy


class _ChunkedScores(torch.autograd.Function):
    """Two passes: scores chunk by chunk, and in backward each chunk once more with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _score(h, weight, y, bias, temperature, with_entropy)
            for h, y in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = chunk_size, temperature, with_entropy
        ctx.autocast = autocast_state(hidden.device.type)
        logprobs = torch.cat([part[0] for part in parts])
        entropies = [part[1] for part in parts if part[1] is not None]
        return logprobs, torch.cat(entropies) if entropies else logprobs.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        chunk_size, temperature, with_entropy = ctx.options
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        start = 0
        for hidden_chunk, label_chunk in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            span = slice(start, start + len(label_chunk))
            inputs = grads.leaves(hidden_chunk)
            # The second pass must compute what the first did, so under the autocast of the first.
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                scores = _score(inputs[0], inputs[1], label_chunk, inputs[2], temperature, with_entropy)
            outputs = [score for score in scores if score is not None]
            upstream = [grad[span] for grad in grad_scores[: len(outputs)]]
            grads.add(outputs, upstream, inputs, span)
            start = span.stop
        return (*grads.results(), None, None, None, None)


def autocast_state(device_type: str) -> dict[str, Any]:
    """Return the arguments that bring the present autocast back."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }
