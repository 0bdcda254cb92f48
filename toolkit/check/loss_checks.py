"""Checks that run the loss on a small LM head, with items, micro-batches, packed rows and chunks.

Legend: B rows, T positions of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.check.subject import Failed, NotApplicable, Subject
from toolkit.errors import described
from toolkit.losses.config.policy import GRPOLossConfig
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.samples import Batch, random_batch
from toolkit.testing.evaluation import REFERENCE, hidden_gradient, toolkit_loop
from toolkit.testing.layout import Layout, part_of

ROWS, POSITIONS = 8, 7
RTOL, ATOL = 1e-9, 1e-12
"""All checks here run in float64, except `low_precision`."""
MICRO_BATCHES = (2, 3, ROWS)
CHUNKS = (1, 3, 5, 1000)
TRASH = (float("nan"), float("inf"), float("-inf"), 1e30)


@cache
def problem() -> Batch:
    """Return the same batch every time; ratios are spread widely enough for clips and masks to bind."""
    return random_batch(seed=1, num_sequences=ROWS, longest=POSITIONS, width=5, vocabulary=11)


def config(s: Subject, **settings: Any) -> GRPOLossConfig:
    """Return a config of this loss, under the aggregation of its paper."""
    wanted: Any = s.loss.aggregation or "token_mean"
    if wanted == "constant":
        wanted = {"name": wanted, "length": POSITIONS}
    chosen = {"loss_type": s.loss.name, **s.options}
    return GRPOLossConfig(policy_loss_cfg=chosen, aggregation=wanted, **settings)


def loss_and_grads(batch: Batch, cfg: GRPOLossConfig, layout: Layout = REFERENCE) -> list[Tensor]:
    """Return the loss of a step, 0-dim, and its gradients for hidden states [B, T, D] and head [V, D]."""
    part = part_of(batch, cfg, layout, 0, None)
    loss, _ = toolkit_loop(part)
    assert part.head_weight.grad is not None
    return [loss, hidden_gradient(batch, part), part.head_weight.grad]


NAMES = ("loss", "gradient of the hidden states", "gradient of the head")


def _agree(actual: list[Tensor], reference: list[Tensor], what: str, remedy: str) -> None:
    for name, ours, theirs in zip(NAMES, actual, reference, strict=True):
        if not torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL):
            off = float((ours - theirs).abs().max())
            raise Failed(f"{what}: the {name} differs by {off:.1e}; {remedy}")


# -------------------------------------------------------------------- checks


def masked_positions(s: Subject) -> None:
    """Values at positions that are not scored change nothing, not by a bit."""
    batch, cfg = problem(), config(s)
    is_masked = batch.item.shifted_labels == cfg.ignore_idx

    def filled(value: float) -> Batch:
        fields = [
            (name, field) for name, field in batch.item.tensors() if field.is_floating_point() and field.dim() == 2
        ]
        changes = {name: field.masked_fill(is_masked, value) for name, field in fields}
        return replace(batch, item=batch.item.replace(**changes))

    clean = loss_and_grads(filled(0.0), cfg)
    for trash in TRASH:
        for name, ours, theirs in zip(NAMES, loss_and_grads(filled(trash), cfg), clean, strict=True):
            if not torch.equal(ours, theirs):
                raise Failed(
                    f"{trash} at positions that are not scored changes the {name}; read per-token values only from t, "
                    "which holds scored tokens only"
                )


def partition(s: Subject) -> None:
    """Micro-batches of a step add up to the step in one batch, padded and packed."""
    if s.loss.scope == "batch" and "entropies" in s.loss.needs:
        raise NotApplicable("scope='batch' with entropies: a step in several micro-batches is an error")
    batch, cfg = problem(), config(s)
    if s.loss.scope in ("group", "batch"):
        batch = batch.with_current_logprobs(cfg)
    reference = loss_and_grads(batch, cfg)
    remedy = (
        "a token's loss must not depend on how many tokens or sequences there are (no mean, sum or N over the batch); "
        "leave averaging to the aggregation"
    )
    for number in MICRO_BATCHES:
        actual = loss_and_grads(batch, cfg, Layout(micro_batches=number))
        _agree(actual, reference, f"{number} micro-batches instead of one", remedy)
    remedy = "use t.segment_mean(x) and related methods for sequences, t.positions for distances inside them"
    actual = loss_and_grads(batch, cfg, Layout(is_packed=True))
    _agree(actual, reference, "one packed row instead of padded ones", remedy)


def eager_equals_chunk(s: Subject) -> None:
    """The head may compute log-probabilities in chunks of any size."""
    batch = problem()
    reference = loss_and_grads(batch, config(s))
    if not any(bool((value != 0).any()) for value in reference):
        raise Failed("loss and gradients are 0 on all made-up tokens, so there is nothing to compare")
    for size in CHUNKS:
        actual = loss_and_grads(batch, config(s, mode="chunk", chunk_size=size))
        remedy = "register it with the scope it needs: scope='sequence', 'group' or 'batch'"
        _agree(actual, reference, f"mode='chunk' with chunk_size={size} instead of mode='eager'", remedy)


def nothing_to_score(s: Subject) -> None:
    """A micro-batch without a scored token has loss 0 and gradients 0; some process may get such a micro-batch."""
    batch = problem()
    labels = torch.full_like(batch.item.shifted_labels, config(s).ignore_idx)
    empty = replace(batch, item=batch.item.replace(shifted_labels=labels))
    for mode in ("eager", "chunk"):
        try:
            results = loss_and_grads(empty, config(s, mode=mode))
        except (IndexError, RuntimeError, ZeroDivisionError) as error:
            raise Failed(
                f"it fails without tokens ({described(error)}), but some process may "
                "get an empty micro-batch; return t.logprobs * 0 where len(t.logprobs) == 0"
            ) from None
        for name, value in zip(NAMES, results, strict=True):
            if not bool((value == 0).all()):
                raise Failed(f"without a scored token the {name} is not 0; return one loss for each token, and no more")


def low_precision(s: Subject) -> None:
    """bfloat16 hidden states, head and advantages give an fp32 loss and finite gradients."""
    wide, batch = problem().with_dtype(torch.float32), problem().with_dtype(torch.bfloat16)
    item = wide.item.replace(advantages=batch.item.advantages)  # type: ignore[attr-defined]
    cfg = config(s)
    part = part_of(replace(batch, item=item), cfg, REFERENCE, 0, None)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs(part.items, cfg)
    leaves = (part.hidden_states[0], part.head_weight)
    loss, _ = GRPOLossContext(cfg, kwargs).forward(*leaves, part.head_bias)
    grads = torch.autograd.grad(loss, leaves)
    if loss.dtype != torch.float32:
        raise Failed(f"with bfloat16 hidden states the loss is {loss.dtype}; leave log-probabilities in float32")
    if not all(bool(value.isfinite().all()) for value in (loss, *grads)):
        raise Failed("with bfloat16 hidden states and advantages the loss or its gradients are not finite")
