"""The public functions of the head: log-probabilities, a loss over them, and the cost of either.

Legend: T positions, N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.autograd import loss_with_gradients, not_compiled, quiet, total_of
from toolkit.head.cost import Job, PassName
from toolkit.head.inputs import HeadInputs, head_inputs
from toolkit.head.options import HeadOptions, takes_head_options
from toolkit.head.passes import ScoreLoss, Scores, checked_loss, fused_run, score_without_grad
from toolkit.head.plan import HeadPlan, Scope, job_of, plan_of
from toolkit.head.scores import TokenScores


@overload
def token_logprobs(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    entropy: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def token_logprobs(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    entropy: Literal[True, "metric"],
    **options: Any,
) -> TokenScores: ...
@not_compiled
@takes_head_options
def token_logprobs(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    options: HeadOptions,
) -> Tensor | TokenScores:
    """Score each label under the head's softmax, without ever holding the logits of all tokens.

    Differentiable in hidden states, weight and bias, for any loss: 4 matrix products (backward computes the logits
    again), 2 if the head is frozen, 1 without gradient. Ignored positions are skipped, may hold NaN, and come back as
    0. Backward skips tokens with a gradient of exactly 0. A loss that can be computed in one go should use
    `fused_loss`: 3 products.

    The vocabulary may be split over ranks: a DTensor `head_weight` whose rows are sharded by ``Shard(0)`` over a
    one-dimensional mesh, with the same hidden states, labels and options on all its ranks. Each rank holds the logits
    of its local rows only; all get the same result. Forward sends 4 or 5 numbers a token, and backward sends the
    gradient of the scored hidden states once. The gradient of the weight is a DTensor, computed without communication;
    that of hidden states, or of a plain bias, is the full one on every rank (do not add it up over the mesh); in low
    precision each rank rounds its part of it, as column-parallel layers do.

    Args:
        hidden_states: [..., D], fp64, fp32, bf16 or fp16.
        head_weight: [V, D], or a DTensor of these, see above.
        labels: [...] int64 in 0 .. V - 1, or `ignore_idx`.
        head_bias: [V], optional; a DTensor sharded as the weight, or plain.
        options: a `HeadOptions`, or its fields as keywords (``temperature=0.7``).

    Returns:
        [...] log-probabilities in nats, never above 0, fp32 (float64 for float64 inputs); with `entropy` a
        `TokenScores` of log-probabilities and entropies, each [...].

    Raises:
        DataError: shapes or dtypes do not fit, a label lies outside the vocabulary, the weight is sharded in another
            way, or the ranks that share it have different labels or options.
        ConfigError: an option is not valid.
        RuntimeError: on a second derivative, which is not supported.
    """
    inputs = head_inputs(hidden_states, head_weight, labels, head_bias, options)
    job = job_of(inputs, options, scope=None)
    _check_ranks(job, labels)
    if job.needs:
        scores = TokenScores(*Scores.apply(inputs.hidden, inputs.weight, inputs.bias, job))
    else:
        scores = score_without_grad(job)
    logprobs = _scattered(scores.logprobs, inputs, labels)
    return logprobs if scores.entropy is None else TokenScores(logprobs, _scattered(scores.entropy, inputs, labels))


@not_compiled
@takes_head_options
def fused_loss(
    loss_fn: ScoreLoss,
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    scope: Scope = "token",
    sequence_ids: Tensor | None = None,
    options: HeadOptions,
) -> tuple[Tensor, list[Any]]:
    """Compute a loss over log-probabilities together with its gradient: 3 matrix products for most losses.

    The loss is a sum over groups of tokens that `scope` describes; `loss_fn` is called once for each group, and its
    gradient is taken at once, while the group's logits are in memory. Any upstream gradient is respected. The
    gradient also reaches other leaves that `loss_fn` depends on; where the vocabulary is split over ranks, each rank
    has the full one, and `loss_fn` must return the same loss on all of them.

    Args:
        loss_fn: ``f(scores, positions) -> (scalar, extra)`` with `TokenScores` of [n] tokens and their positions [n]
            in the flattened labels. If it depends on other leaves, it is called once more for each group with new
            ones; it must not keep scores with their graph from one call to the next.
        hidden_states: [..., D]; this and the other tensors are as in `token_logprobs`.
        head_weight: [V, D].
        labels: [...] int64.
        head_bias: [V], optional.
        scope: what one token's loss depends on. "token": itself, so any chunk is a group. "sequence": tokens of the
            same sequence; a group holds complete sequences, as many as fit a chunk. "batch": all tokens, one group.
            Only a group larger than a chunk is computed twice, except for its last chunk.
        sequence_ids: [...] int64, the sequence of each position; for scope "sequence".
        options: a `HeadOptions`, or its fields as keywords; ``entropy=True`` gives `loss_fn` entropies with gradient,
            "metric" without.

    Returns:
        The summed scalar loss, fp32 or wider, and what else `loss_fn` returned, a list with one entry per group.

    Raises:
        DataError, ConfigError, RuntimeError: as `token_logprobs`.
    """
    inputs = head_inputs(hidden_states, head_weight, labels, head_bias, options)
    inputs, ids = _by_sequence(inputs, scope, sequence_ids, labels)
    job = job_of(inputs, options, scope=scope, sequence_ids=ids)
    _check_ranks(job, labels)
    if not job.needs:
        return _loss_without_grad(job, loss_fn)
    return loss_with_gradients(partial(fused_run, job, loss_fn), inputs.hidden, inputs.weight, inputs.bias)


@takes_head_options
def explain(
    hidden_states: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    scope: Scope | None = None,
    sequence_ids: Tensor | None = None,
    options: HeadOptions,
) -> HeadPlan:
    """Return which pass this call would use, why, and what it will cost; ``print`` it.

    All arguments are as in `token_logprobs` (with ``scope=None``) and `fused_loss`.
    """
    inputs = head_inputs(hidden_states, head_weight, labels, head_bias, options)
    inputs, ids = _by_sequence(inputs, scope, sequence_ids, labels)
    return plan_of(job_of(inputs, options, scope=scope, sequence_ids=ids))


def _check_ranks(job: Job, labels: Tensor) -> None:
    """Raise if ranks that share the vocabulary would process it differently."""
    flags = [*job.needs, job.entropy is True, job.entropy == "metric"]
    job.inputs.vocab.check_same(labels, len(job.chunks), get_args(PassName).index(job.name), *flags)


def _by_sequence(
    inputs: HeadInputs, scope: Scope | None, sequence_ids: Tensor | None, labels: Tensor
) -> tuple[HeadInputs, Tensor | None]:
    """Return the scored tokens in the order of their sequences, and the sequence of each."""
    if scope != "sequence" or sequence_ids is None:
        return inputs, None
    if sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool:
        raise DataError(f"sequence_ids has dtype {sequence_ids.dtype}; it must be an integer tensor")
    if sequence_ids.shape != labels.shape:
        raise DataError(
            f"sequence_ids has shape {list(sequence_ids.shape)}; it must be that of the labels, {list(labels.shape)}"
        )
    ids = sequence_ids.reshape(-1).index_select(0, inputs.positions)
    if bool((ids.diff() >= 0).all()):
        return inputs, ids
    order = ids.argsort(stable=True)
    positions, targets = inputs.positions.index_select(0, order), inputs.targets.index_select(0, order)
    return replace(inputs, positions=positions, targets=targets), ids.index_select(0, order)


def _loss_without_grad(job: Job, loss_fn: ScoreLoss) -> tuple[Tensor, list[Any]]:
    all_scores, losses, extras = score_without_grad(job), [], []
    with quiet(job.inputs.hidden):
        for group in job.groups:
            span = slice(group[0].start, group[-1].stop)
            entropy = None if all_scores.entropy is None else all_scores.entropy[span]
            scores = TokenScores(all_scores.logprobs[span], entropy)
            loss, extra = checked_loss(loss_fn(scores, job.inputs.positions[span].clone()))
            losses.append(loss)
            extras.append(extra)
    return total_of(losses, job.inputs.wide), extras


def _scattered(values: Tensor, inputs: HeadInputs, labels: Tensor) -> Tensor:
    """Return [N] values at their positions among the labels, 0 elsewhere."""
    if len(values) == labels.numel():
        return values.reshape(labels.shape)
    return values.new_zeros(labels.numel()).index_copy(0, inputs.positions, values).reshape(labels.shape)
