"""The two autograd functions of the head: scores for a loss elsewhere, and a loss computed while logits are in memory.

Where the vocabulary is split over ranks, they communicate only in the first pass over a chunk and once for the gradient
of the hidden states, never in the second pass: each rank may skip different rows there, so a collective would deadlock.

Both run with autocast disabled (their dtypes are explicit) and without saved-tensor hooks inside: under activation
checkpointing the small graph of a loss must not be packed while its gradient is being taken.

Legend: T positions, N scored tokens, n tokens of a group of chunks, D hidden width, V vocabulary (local
entries where it is split).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.head.autograd import quiet, refuses_second_derivative, rescaled
from toolkit.head.cost import Group, kept_of
from toolkit.head.gradients import leaves_of
from toolkit.head.inputs import HeadInputs
from toolkit.head.kernel import RowStats
from toolkit.head.options import Entropy
from toolkit.head.plan import HeadPlan, Needs, has_free_entropy
from toolkit.head.scores import TokenScores
from toolkit.head.work import Chunk, HeadWork

ScoreLoss = Callable[[TokenScores, Tensor], tuple[Tensor, Any]]
"""``f(scores of n tokens, their positions [n]) -> (scalar loss, anything to keep)``."""


@dataclass(frozen=True)
class Job:
    """Everything a pass needs besides tensors with a gradient."""

    inputs: HeadInputs
    plan: HeadPlan
    needs: Needs
    entropy: Entropy

    @property
    def with_entropy(self) -> bool:
        """Whether the softmax pass computes entropies; the frozen pass has them from its products."""
        return bool(self.entropy) and not self.has_free_entropy

    @property
    def has_free_entropy(self) -> bool:
        """Whether entropies come from the products of the frozen pass."""
        return has_free_entropy(self.inputs, self.plan.name, self.entropy)


def score_without_grad(job: Job) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities and entropies of the scored tokens, [N] each."""
    work = HeadWork(job.inputs, job.needs, job.plan, with_entropy=job.with_entropy)
    logprobs, entropy = _empty_scores(job)
    with quiet(job.inputs.hidden):
        for span in job.plan.chunks:
            chunk = work.score(span)
            _write(logprobs, entropy, span, chunk)
            work.release(chunk)
    return logprobs, entropy


class Scores(torch.autograd.Function):
    """Log-probabilities and entropies of the scored tokens, for a loss that is computed elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities and entropies, [N] each, from `hidden` [T, D], `weight` [V, D] and `bias` [V]."""
        ctx.set_materialize_grads(False)
        job = _with_tensors(job, hidden, weight, bias)
        work = HeadWork(job.inputs, Needs(False, False, False), job.plan, with_entropy=job.with_entropy)
        logprobs, entropy = _empty_scores(job)
        is_frozen, chunks = job.plan.name == "frozen", job.plan.chunks
        kept: dict[int, Chunk] = {}
        seen: list[RowStats] = []
        slopes = hidden.new_empty(job.plan.tokens if is_frozen else 0, hidden.shape[1], dtype=work.hidden_grad_dtype)
        with quiet(hidden):
            for index, span in enumerate(chunks):
                chunk = work.score(span)
                seen += [chunk.stats] if job.inputs.vocab.is_split else []
                _write(logprobs, entropy, span, chunk)
                if is_frozen:
                    slopes[span] = work.keep_input_gradient(chunk)
                    _write_free_entropy(job, entropy, span, chunk, slopes[span])
                if not is_frozen and index >= len(chunks) - job.plan.retained:
                    kept[index] = chunk
                else:
                    work.release(chunk)
        if is_frozen:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias)
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        ctx.job, ctx.kept = _with_tensors(job, hidden.new_empty(0), weight.new_empty(0), None), kept
        ctx.seen = dict(enumerate(seen))
        if entropy is not None and job.entropy == "metric":
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @refuses_second_derivative
    def backward(ctx: Any, logprob_grads: Tensor | None, entropy_grads: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the inputs of `forward`, given `logprob_grads` [N] and `entropy_grads` [N]."""
        job: Job = ctx.job
        if logprob_grads is None:
            if entropy_grads is None:
                return None, None, None, None
            logprob_grads = torch.zeros_like(entropy_grads)
        if job.plan.name == "frozen":
            (slopes,) = ctx.saved_tensors
            grad = slopes.new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype)
            for span in job.plan.chunks:
                rows = (slopes[span] * -logprob_grads[span].unsqueeze(1)).to(ctx.hidden_dtype)
                grad.index_copy_(0, job.inputs.positions[span], rows)
            return job.inputs.vocab.sum_rows_(grad, job.inputs.positions), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        job = _with_tensors(job, hidden, weight, bias)
        needs = Needs(*ctx.needs_input_grad[:3])
        work = HeadWork(job.inputs, needs, job.plan, with_entropy=entropy_grads is not None)
        with quiet(hidden):
            # The retained chunks first, so the others can reuse one of their buffers.
            for index, span in sorted(enumerate(job.plan.chunks), key=lambda item: item[0] not in ctx.kept):
                upstream = logprob_grads[span], None if entropy_grads is None else entropy_grads[span]
                _second_pass(work, span, ctx.kept.pop(index, None), ctx.seen.get(index), *upstream)
        return (*_in_dtypes(work.gradients(), (hidden, weight, bias)), None)


class FusedLoss(torch.autograd.Function):
    """A loss over log-probabilities, group of chunks by group; the gradient is complete when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: Job,
        loss_fn: ScoreLoss,
        extras: list[Any],
        *others: Tensor,
    ) -> Tensor:
        """Return the 0-dim loss over `hidden` [T, D], `weight` [V, D], `bias` [V] and other leaves of any shape."""
        job = _with_tensors(job, hidden, weight, bias)
        work = HeadWork(job.inputs, job.needs, job.plan, with_entropy=job.with_entropy)
        other_grads = [torch.zeros_like(other) for other in others]
        losses = []
        with quiet(hidden):
            for index, group in enumerate(job.plan.groups):
                try:
                    loss, extra = _run_group(job, work, group, loss_fn, others, other_grads)
                except OtherLeaves as new:
                    new.group = index
                    raise
                losses.append(loss)
                extras.append(extra)
        grads = (*work.gradients(), *other_grads)
        tensors = (hidden, weight, bias, *others)
        ctx.dtypes = [
            None if grad is None or tensor is None else tensor.dtype
            for grad, tensor in zip(grads, tensors, strict=True)
        ]
        ctx.save_for_backward(*[grad for grad in grads if grad is not None])
        return total_of(losses, job)

    @staticmethod
    @refuses_second_derivative
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        """Return the gradients of hidden [T, D], weight [V, D], bias [V] and other leaves, times 0-dim `grad_loss`."""
        saved = iter(ctx.saved_tensors)
        grads = [None if dtype is None else rescaled(next(saved), grad_loss).to(dtype) for dtype in ctx.dtypes]
        return (*grads[:3], None, None, None, *grads[3:])


class OtherLeaves(Exception):
    """The loss depends on leaves that autograd does not know of; they must become inputs before the first chunk."""

    def __init__(self, leaves: list[Tensor], group: int) -> None:
        super().__init__()
        self.leaves, self.group = leaves, group


def checked_loss(result: Any) -> tuple[Tensor, Any]:
    """Check what a `loss_fn` returned.

    Raises:
        DataError: it is not ``(scalar tensor, extra)``.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(f"loss_fn returned {type(result).__name__}; return (loss, extra)")
    loss, extra = result
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        actual = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f"loss_fn returned a loss of {actual}; return the scalar sum over its tokens")
    return loss, extra


def check_progress(before: OtherLeaves | None, new: OtherLeaves) -> None:
    """Raise if leaves are new in every call: the call before already had new ones in this group.

    Raises:
        DataError: the message says where such a leaf may come from.
    """
    if before is not None and new.group <= before.group:
        raise DataError(
            "loss_fn depends on a tensor that requires a gradient and is a new one in every call (one that it makes, "
            "or the scores of another chunk that it kept); detach it"
        )


def total_of(losses: Sequence[Tensor], job: Job) -> Tensor:
    """Return the 0-dim sum of the groups' `losses` ([] each) in fp32 or wider; 0 without groups."""
    wide = torch.promote_types(job.inputs.compute_dtype, torch.float32)
    if not losses:
        return torch.zeros((), dtype=wide, device=job.inputs.hidden.device)
    return torch.stack([loss.to(torch.promote_types(loss.dtype, wide)) for loss in losses]).sum()


def _run_group(
    job: Job,
    work: HeadWork,
    group: Group,
    loss_fn: ScoreLoss,
    others: Sequence[Tensor],
    other_grads: Sequence[Tensor],
) -> tuple[Tensor, Any]:
    """Score a group, differentiate its loss, and take the gradients of its chunks."""
    base = group[0].start
    length = group[-1].stop - base
    logprobs, entropy = _empty_scores(job, length)
    is_frozen = job.plan.name == "frozen" and (len(group) > 1 or job.has_free_entropy)
    kept: dict[int, Chunk] = {}
    seen: list[RowStats | None] = []
    for index, span in enumerate(group):
        local = slice(span.start - base, span.stop - base)
        chunk = work.score(span)
        seen.append(chunk.stats if job.inputs.vocab.is_split else None)
        _write(logprobs, entropy, local, chunk)
        if is_frozen:
            slopes = work.keep_input_gradient(chunk)
            _write_free_entropy(job, entropy, local, chunk, slopes)
            work.set_hidden_gradient(chunk.positions, slopes)
        if not is_frozen and index >= len(group) - kept_of(group, job.plan.retained):
            kept[index] = chunk
        else:
            work.release(chunk)
    positions = job.inputs.positions[base : base + length]
    loss, extra, logprob_grads, entropy_grads = _differentiate(
        loss_fn, TokenScores(logprobs, entropy), positions, others, other_grads, is_live=job.entropy is True
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
    *,
    is_live: bool,
) -> tuple[Tensor, Any, Tensor, Tensor | None]:
    """Return the loss of a group, what else `loss_fn` returned, and gradients of log-probabilities and entropies."""
    with torch.enable_grad():
        logprobs = scores.logprobs.requires_grad_()
        entropy = scores.entropy if scores.entropy is None else scores.entropy.requires_grad_(is_live)
        loss, extra = checked_loss(loss_fn(TokenScores(logprobs, entropy), positions.clone()))
    targets = [logprobs, *([entropy] if is_live and entropy is not None else []), *others]
    known = {id(tensor) for tensor in targets}
    unknown = {id(leaf): leaf for leaf in leaves_of(loss) if id(leaf) not in known}
    if unknown:
        raise OtherLeaves(list(unknown.values()), group=0)
    if not loss.requires_grad:
        return loss.detach(), extra, torch.zeros_like(logprobs), None
    grads = list(torch.autograd.grad(loss, targets, allow_unused=True, retain_graph=bool(others)))
    for total, grad in zip(other_grads, grads[len(grads) - len(others) :], strict=True):
        if grad is not None:
            total.add_(grad)
    logprob_grads = grads[0] if grads[0] is not None else torch.zeros_like(logprobs)
    entropy_grads = grads[1] if is_live and entropy is not None else None
    return loss.detach(), extra, logprob_grads, entropy_grads


def _in_dtypes(grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def _with_tensors(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Job:
    """Return `job` with the tensors that autograd passed in; a job keeps no tensors alive."""
    return replace(job, inputs=replace(job.inputs, hidden=hidden, weight=weight, bias=bias))


def _empty_scores(job: Job, length: int | None = None) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(job.inputs.compute_dtype, torch.float32)
    length = job.plan.tokens if length is None else length
    new = job.inputs.hidden.detach().new_empty
    return new(length, dtype=wide), new(length, dtype=wide) if job.entropy else None


def _write(logprobs: Tensor, entropy: Tensor | None, span: slice, chunk: Chunk) -> None:
    logprobs[span] = chunk.stats.logprobs
    if entropy is not None and chunk.stats.entropy is not None:
        entropy[span] = chunk.stats.entropy


def _write_free_entropy(job: Job, entropy: Tensor | None, span: slice, chunk: Chunk, slope: Tensor) -> None:
    if entropy is not None and job.has_free_entropy:
        product = job.inputs.vocab.sum_((chunk.inputs * slope).sum(1))
        entropy[span] = (-chunk.stats.logprobs - product).clamp(min=0)
