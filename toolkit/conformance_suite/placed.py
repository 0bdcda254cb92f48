"""Checks that put the loss under a small LM head, with items, micro-batches, packed rows and chunks.

Legend: B rows, T positions of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.conformance_suite.subject import Failed, NotApplicable, Subject, fields_declared
from toolkit.losses.config import GRPOLossConfig
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.items import RLLossContextInputItem

ROWS, POSITIONS, WIDTH, VOCABULARY = 6, 7, 5, 11
LENGTHS = (6, 3, 7, 1, 5, 4)
"""Positions of each row before padding."""
GROUPS = (0, 0, 1, 1, 2, 2)
"""The prompt of each row."""
HOLES = ((0, 2), (2, 3), (4, 1))
"""(row, position) inside a sequence that are not scored, such as a tool's answer: they cut it into turns."""
IGNORED = -100
RTOL, ATOL = 1e-9, 1e-12
"""Everything here runs in float64."""
CHUNKS = (1, 3, 5, 1000)
TRASH = (float("nan"), float("inf"), float("-inf"), 1e30)
FIELDS = ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "teacher_logprobs")


@dataclass(frozen=True)
class Problem:
    """Made-up sequences under a head."""

    hidden: Tensor
    """[B, T, D]"""
    weight: Tensor
    """[V, D]"""
    labels: Tensor
    """[B, T]"""
    values: dict[str, Tensor]
    """[B, T] each."""
    groups: Tensor
    """[B, 1]"""


@cache
def problem() -> Problem:
    """Return the same problem every time; ratios are spread widely enough for clips and masks to bind."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, VOCABULARY, (ROWS, POSITIONS), generator=generator)
    labels = labels.masked_fill(torch.arange(POSITIONS) >= torch.tensor(LENGTHS).unsqueeze(1), IGNORED)
    for row, position in HOLES:
        labels[row, position] = IGNORED
    hidden, weight = 0.5 * noise(ROWS, POSITIONS, WIDTH), 0.5 * noise(VOCABULARY, WIDTH)
    scored = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    spreads = (0.5, 0.5, 0.1, 0.1)
    values = {name: scored + spread * noise(ROWS, POSITIONS) for name, spread in zip(FIELDS[1:], spreads, strict=True)}
    values["advantages"] = noise(ROWS, POSITIONS)
    values["current_logprobs"] = scored
    return Problem(hidden, weight, labels, values, torch.tensor(GROUPS).unsqueeze(1))


def config(s: Subject, **settings: Any) -> GRPOLossConfig:
    """Return a config of this loss, under the aggregation of its paper."""
    wanted: Any = s.loss.aggregation or "token_mean"
    if wanted == "constant":
        wanted = {"name": wanted, "length": POSITIONS}
    chosen = {"loss_type": s.loss.name, **s.options}
    return GRPOLossConfig(policy_loss_cfg=chosen, aggregation=wanted, **settings)


def loss_and_grads(
    s: Subject,
    given: Problem,
    cfg: GRPOLossConfig,
    *,
    batches: Sequence[Sequence[int]] = (tuple(range(ROWS)),),
    is_packed: bool = False,
    with_current: bool = False,
) -> list[Tensor]:
    """Return the loss of a whole step and its gradients of hidden states and head.

    Args:
        s: the loss.
        given: the sequences.
        cfg: of `config`.
        batches: which rows are in each micro-batch.
        is_packed: whether the rows of a micro-batch lie one after the other in a single one.
        with_current: whether the items have `current_logprobs`, with which a loss sees the whole step.
    """
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    items, bounds, states = [], [], []
    wanted = {"advantages", "old_logprobs", *fields_declared(s.loss, s.options)}
    if with_current:
        wanted.add("current_logprobs")
    for rows in batches:
        index = torch.tensor(rows)
        own: dict[str, Any] = {name: value[index] for name, value in given.values.items() if name in wanted}
        own["shifted_labels"] = given.labels[index]
        if "group_ids" in wanted or cfg.aggregation.name == "prompt_mean":
            own["group_ids"] = given.groups[index].expand(-1, POSITIONS)
        state = hidden[index]
        if is_packed:
            own = {name: value.reshape(1, -1) for name, value in own.items()}
            state = state.reshape(1, -1, WIDTH)
        items.append(RLLossContextInputItem(**own))
        states.append(state)
        bounds.append(torch.arange(0, len(rows) + 1) * POSITIONS if is_packed else None)
    kwargs = GRPOLossContext.build_batches_loss_kwargs(items, cfg, bounds if is_packed else None)
    losses = [GRPOLossContext(cfg, own).forward(state, weight)[0] for own, state in zip(kwargs, states, strict=True)]
    loss = torch.stack(losses).sum()
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


NAMES = ("loss", "gradient of the hidden states", "gradient of the head")


def _agree(found: list[Tensor], reference: list[Tensor], what: str, remedy: str) -> None:
    for name, ours, theirs in zip(NAMES, found, reference, strict=True):
        if not torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL):
            off = float((ours - theirs).abs().max())
            raise Failed(f"{what}: the {name} differs by {off:.1e}; {remedy}")


# -------------------------------------------------------------------- checks


def masked_positions(s: Subject) -> None:
    """What stands at positions that are not scored changes nothing, not by a bit."""
    given, cfg = problem(), config(s)
    is_masked = given.labels == IGNORED

    def filled(value: float) -> Problem:
        values = {name: own.masked_fill(is_masked, value) for name, own in given.values.items()}
        return Problem(given.hidden, given.weight, given.labels, values, given.groups)

    clean = loss_and_grads(s, filled(0.0), cfg)
    for trash in TRASH:
        for name, ours, theirs in zip(NAMES, loss_and_grads(s, filled(trash), cfg), clean, strict=True):
            if not torch.equal(ours, theirs):
                raise Failed(
                    f"{trash} at positions that are not scored changes the {name}; read per-token values from t alone, "
                    "which holds scored tokens only"
                )


def partition(s: Subject) -> None:
    """Micro-batches of a step add up to the whole, padded and packed."""
    if s.loss.scope == "batch" and "entropies" in s.loss.needs:
        raise NotApplicable("scope='batch' with entropies: a step may not be cut, which is refused")
    given, cfg, is_wide = problem(), config(s), s.loss.scope in ("group", "batch")
    whole = loss_and_grads(s, given, cfg, with_current=is_wide)
    remedy = (
        "a token's loss must not depend on how many tokens or sequences there are (no mean, sum or N over the batch); "
        "leave averaging to the aggregation"
    )
    layouts: dict[str, tuple[tuple[int, ...], ...]] = {
        "three micro-batches": ((0, 1), (2, 3), (4, 5)),
        "two micro-batches": ((4, 5), (0, 1, 2, 3)),
    }
    layouts["one sequence in each micro-batch"] = tuple((row,) for row in range(ROWS))
    for name, batches in layouts.items():
        found = loss_and_grads(s, given, cfg, batches=batches, with_current=is_wide)
        _agree(found, whole, f"{name} instead of one", remedy)
    remedy = "use t.segment_mean(x) and its kin for sequences, t.positions for distances inside them"
    found = loss_and_grads(s, given, cfg, is_packed=True, with_current=is_wide)
    _agree(found, whole, "one packed row instead of padded ones", remedy)


def eager_equals_chunk(s: Subject) -> None:
    """The head may compute log-probabilities in chunks of any size."""
    given = problem()
    whole = loss_and_grads(s, given, config(s))
    if not any(bool((own != 0).any()) for own in whole):
        raise Failed("loss and gradients are 0 on all made-up tokens: there is nothing to compare")
    for size in CHUNKS:
        found = loss_and_grads(s, given, config(s, mode="chunk", chunk_size=size))
        remedy = "register it with the scope it needs: scope='sequence', 'group' or 'batch'"
        _agree(found, whole, f"mode='chunk' with chunk_size={size} instead of mode='eager'", remedy)


def nothing_to_score(s: Subject) -> None:
    """A micro-batch without a scored token has loss 0 and gradients 0, as happens to some process of many."""
    given = problem()
    empty = Problem(given.hidden, given.weight, torch.full_like(given.labels, IGNORED), given.values, given.groups)
    for mode in ("eager", "chunk"):
        try:
            results = loss_and_grads(s, empty, config(s, mode=mode))
        except (IndexError, RuntimeError, ZeroDivisionError) as error:
            raise Failed(
                f"it cannot do without tokens ({type(error).__name__}: {str(error).splitlines()[0]}), as some "
                "process of many will ask; return t.logprobs * 0 where len(t.logprobs) == 0"
            ) from None
        for name, found in zip(NAMES, results, strict=True):
            if not bool((found == 0).all()):
                raise Failed(f"without a scored token the {name} is not 0; return one loss for each token, and no more")


def low_precision(s: Subject) -> None:
    """bfloat16 hidden states, head and advantages give an fp32 loss and finite gradients."""
    given = problem()
    values = {name: own.bfloat16() if name == "advantages" else own.float() for name, own in given.values.items()}
    low = Problem(given.hidden.bfloat16(), given.weight.bfloat16(), given.labels, values, given.groups)
    loss, *grads = loss_and_grads(s, low, config(s))
    if loss.dtype != torch.float32:
        raise Failed(f"with bfloat16 hidden states the loss is {loss.dtype}; leave log-probabilities in float32")
    if not all(bool(found.isfinite().all()) for found in (loss, *grads)):
        raise Failed("with bfloat16 hidden states and advantages loss or gradients are not finite")
