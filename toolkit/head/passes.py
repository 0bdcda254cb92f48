"""The two kinds of passes of the head: scores for a loss elsewhere, and a loss computed while logits are in memory.

Where the vocabulary is split over ranks, they communicate only in the first pass over a chunk and once for the gradient
of the hidden states, never in the second pass: each rank may skip different rows there, so a collective would deadlock.

Both run with autocast disabled (their dtypes are explicit) and without saved-tensor hooks inside: under activation
checkpointing the small graph of a loss must not be packed while its gradient is being taken.

Legend: T positions, N scored tokens, n tokens of a group of chunks, D hidden width, V vocabulary (local
entries where it is split).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.autograd import Gradients, quiet, refuse_other_leaves, refuses_second_derivative, total_of
from toolkit.head.cost import Group, Job, kept_of
from toolkit.head.inputs import Needs
from toolkit.head.scores import TokenScores
from toolkit.head.softmax import RowStats
from toolkit.head.work import Chunk, HeadWork

ScoreLoss = Callable[[TokenScores, Tensor], tuple[Tensor, Any]]
"""``f(scores of n tokens, their positions [n]) -> (scalar loss, anything to keep)``."""


def score_without_grad(job: Job) -> TokenScores:
    """Return log-probabilities and entropies of the scored tokens, [N] each."""
    with quiet(job.inputs.hidden):
        return _score(job, HeadWork(job), job.chunks, num_kept=0)[0]


class Scores(torch.autograd.Function):
    """Log-probabilities and entropies of the scored tokens, for a loss that is computed elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities and entropies, [N] each, from `hidden` [T, D], `weight` [V, D] and `bias` [V]."""
        ctx.set_materialize_grads(False)
        job = _with_tensors(job, hidden, weight, bias)
        work = HeadWork(replace(job, needs=Needs(False, False, False)))
        is_frozen = job.name == "frozen"
        slopes = hidden.new_empty(len(job.inputs.positions) * is_frozen, hidden.shape[1], dtype=work.hidden_grad_dtype)

        def store_slopes(chunk: Chunk, span: slice) -> None:
            slopes[span] = work.keep_input_gradient(chunk)

        with quiet(hidden):
            scores, ctx.kept, ctx.seen = _score(
                job, work, job.chunks, num_kept=job.retained, store_slopes=store_slopes if is_frozen else None
            )
        if is_frozen:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias)
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.job = _with_tensors(job, hidden.new_empty(0), weight.new_empty(0), None)
        if scores.entropy is not None and job.entropy == "metric":
            ctx.mark_non_differentiable(scores.entropy)
        return scores.logprobs, scores.entropy

    @staticmethod
    @refuses_second_derivative
    def backward(ctx: Any, logprob_grads: Tensor | None, entropy_grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the inputs of `forward`, given `logprob_grads` [N] and `entropy_grads` [N]."""
        job: Job = ctx.job
        if logprob_grads is None:
            if entropy_grads is None:
                return None, None, None, None
            logprob_grads = torch.zeros_like(entropy_grads)
        if job.name == "frozen":
            (slopes,) = ctx.saved_tensors
            grad = slopes.new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype)
            for span in job.chunks:
                rows = (slopes[span] * -logprob_grads[span].unsqueeze(1)).to(ctx.hidden_dtype)
                grad.index_copy_(0, job.inputs.positions[span], rows)
            return job.inputs.vocab.sum_rows_(grad, job.inputs.positions), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        job = _with_tensors(job, hidden, weight, bias)
        needs = Needs(*ctx.needs_input_grad[:3])
        work = HeadWork(replace(job, needs=needs, entropy=entropy_grads is not None))
        with quiet(hidden):
            # The retained chunks first, so the others can reuse one of their buffers.
            for index, span in sorted(enumerate(job.chunks), key=lambda item: item[0] not in ctx.kept):
                upstream = logprob_grads[span], None if entropy_grads is None else entropy_grads[span]
                _second_pass(work, span, ctx.kept.pop(index, None), ctx.seen[index], *upstream)
        pairs = zip(work.gradients(), (hidden, weight, bias), strict=True)
        return (*(None if grad is None else grad.to(tensor.dtype) for grad, tensor in pairs), None)


def fused_run(
    job: Job,
    loss_fn: ScoreLoss,
    extras: list[Any],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *others: Tensor,
) -> tuple[Tensor, Gradients]:
    """Compute a loss and its gradients, group of chunks by group; see `loss_with_gradients`.

    Takes `hidden` [T, D], `weight` [V, D], `bias` [V] and `others` [...], and returns a 0-dim loss.
    """
    job = _with_tensors(job, hidden, weight, bias)
    work = HeadWork(job)
    other_grads = [torch.zeros_like(other) for other in others]
    losses = []
    with quiet(hidden):
        for index in range(len(job.groups)):
            loss, extra = _run_group(job, work, index, loss_fn, others, other_grads)
            losses.append(loss)
            extras.append(extra)
    return total_of(losses, job.inputs.wide), [*work.gradients(), *other_grads]


def checked_loss(result: Any, who: str = "loss_fn") -> tuple[Tensor, Any]:
    """Check what a function that computes a loss, `who` in messages, returned.

    Raises:
        DataError: it is not ``(scalar tensor, extra)``.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(f"{who} returned {type(result).__name__}; return (loss, extra)")
    loss, extra = result
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        actual = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"{who} returned a loss of {actual}; return the scalar sum of weight times loss over its tokens"
        )
    return loss, extra


def _score(
    job: Job,
    work: HeadWork,
    spans: Sequence[slice],
    *,
    num_kept: int,
    store_slopes: Callable[[Chunk, slice], None] | None = None,
) -> tuple[TokenScores, dict[int, Chunk], list[RowStats | None]]:
    """Score consecutive chunks; return the scores, the `num_kept` last chunks, and statistics for a second pass.

    The frozen pass keeps no chunk: `store_slopes` stores d(-log p)/d(hidden) of a chunk, whose slice counts from the
    first one.
    """
    first, last = spans[0].start, spans[-1].stop
    new = job.inputs.hidden.detach().new_empty
    logprobs = new(last - first, dtype=job.inputs.wide)
    entropy = new(last - first, dtype=job.inputs.wide) if job.entropy else None
    kept: dict[int, Chunk] = {}
    seen: list[RowStats | None] = []
    for index, span in enumerate(spans):
        local = slice(span.start - first, span.stop - first)
        chunk = work.score(span)
        seen.append(chunk.stats if job.inputs.vocab.is_split else None)
        logprobs[local] = chunk.stats.logprobs
        if entropy is not None and chunk.stats.entropy is not None:
            entropy[local] = chunk.stats.entropy
        if store_slopes is not None:
            store_slopes(chunk, local)
        if store_slopes is None and index >= len(spans) - num_kept:
            kept[index] = chunk
        else:
            work.release(chunk)
    return TokenScores(logprobs, entropy), kept, seen


def _run_group(
    job: Job,
    work: HeadWork,
    number: int,
    loss_fn: ScoreLoss,
    others: Sequence[Tensor],
    other_grads: Sequence[Tensor],
) -> tuple[Tensor, Any]:
    """Score a group, differentiate its loss, and take the gradients of its chunks."""
    group: Group = job.groups[number]
    is_frozen = job.name == "frozen" and len(group) > 1

    def store_slopes(chunk: Chunk, local: slice) -> None:
        work.set_hidden_gradient(chunk.positions, work.keep_input_gradient(chunk))

    num_kept = kept_of(group, job.retained)
    scores, kept, seen = _score(job, work, group, num_kept=num_kept, store_slopes=store_slopes if is_frozen else None)
    base = group[0].start
    positions = job.inputs.positions[base : group[-1].stop]
    loss, extra, logprob_grads, entropy_grads = _differentiate(
        loss_fn, scores, positions, others, other_grads, number, is_live=job.entropy is True
    )
    for index in reversed(range(len(group))):
        local = slice(group[index].start - base, group[index].stop - base)
        if is_frozen:
            work.scale_hidden_gradient(job.inputs.positions[group[index]], -logprob_grads[local])
        else:
            upstream = logprob_grads[local], None if entropy_grads is None else entropy_grads[local]
            _second_pass(work, group[index], kept.pop(index, None), seen[index], *upstream)
    return loss, extra


def _second_pass(
    work: HeadWork,
    span: slice,
    chunk: Chunk | None,
    known: RowStats | None,
    logprob_grads: Tensor,
    entropy_grads: Tensor | None,
) -> None:
    """Take the gradients of a chunk; if it was not kept, compute it again without the rows that have no coefficient."""
    if chunk is None:
        is_live = logprob_grads != 0
        if entropy_grads is not None:
            is_live |= entropy_grads != 0
        rows = is_live.nonzero().squeeze(1)
        if len(rows) == 0:
            return
        logprob_grads = logprob_grads.index_select(0, rows)
        entropy_grads = None if entropy_grads is None else entropy_grads.index_select(0, rows)
        chunk = work.score(span, keep_rows=rows, known=known)
    work.differentiate(chunk, logprob_grads, entropy_grads)
    work.release(chunk)


def _differentiate(
    loss_fn: ScoreLoss,
    scores: TokenScores,
    positions: Tensor,
    others: Sequence[Tensor],
    other_grads: Sequence[Tensor],
    group: int,
    *,
    is_live: bool,
) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    """Return the loss of a group, what else `loss_fn` returned, and gradients of log-probabilities and entropies."""
    with torch.enable_grad():
        logprobs = scores.logprobs.requires_grad_()
        entropy = scores.entropy if scores.entropy is None else scores.entropy.requires_grad_(is_live)
        loss, extra = checked_loss(loss_fn(TokenScores(logprobs, entropy), positions.clone()))
    targets = [logprobs, *([entropy] if is_live and entropy is not None else []), *others]
    refuse_other_leaves(loss, targets, group)
    if not loss.requires_grad:
        return loss.detach(), extra, torch.zeros_like(logprobs), None
    grads = list(torch.autograd.grad(loss, targets, allow_unused=True, retain_graph=bool(others)))
    for total, grad in zip(other_grads, grads[len(grads) - len(others) :], strict=True):
        if grad is not None:
            total.add_(grad)
    logprob_grads = grads[0] if grads[0] is not None else torch.zeros_like(logprobs)
    entropy_grads = grads[1] if is_live and entropy is not None else None
    return loss.detach(), extra, logprob_grads, entropy_grads


def _with_tensors(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Job:
    """Return `job` with the tensors that autograd passed in; a job keeps no tensors alive."""
    return replace(job, inputs=replace(job.inputs, hidden=hidden, weight=weight, bias=bias))
