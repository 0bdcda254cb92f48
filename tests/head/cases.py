"""One call of the head in all its variants, and the same by plain autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.head import HeadPlan, TokenScores, explain, fused_loss, token_logprobs
from toolkit.head.logits import LogitTransform
from toolkit.head.scores import eager_scores

UPSTREAM = -1.7
SEQUENCES = 6


@dataclass(frozen=True)
class Case:
    """Which variant; `draw` makes its tensors."""

    scope: str | None = None
    leaves: str = "all"
    """"all", "hidden" (frozen head), "head" (frozen trunk), "weight", "bias" or "none"."""
    entropy: Any = False
    chunk: int = 4
    retained: int = 0
    has_bias: bool = True
    softcap: float | None = None
    scale: float = 1.0
    temperature: Any = 1.0
    """A number, or "token"."""
    is_masked: bool = False

    @property
    def passes(self) -> str:
        """The pass that is meant to serve a draw of 33 positions, whose longest sequence has 5 tokens."""
        fits = {None: True, "token": True, "sequence": self.chunk >= 8, "batch": self.chunk >= 100}[self.scope]
        if self.leaves == "none":
            return "no-grad"
        if self.leaves == "hidden" and (self.entropy is not True or (self.scope is not None and fits)):
            return "frozen"
        return "one-pass" if self.scope is not None and fits else "two-pass"


@dataclass(frozen=True)
class Draw:
    """The tensors of a case, float64 unless `to` changed that."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: Any
    vocab_mask: Tensor | None
    ids: Tensor
    c: Tensor
    d: Tensor

    def to(self, dtype: torch.dtype) -> Draw:
        """Round everything of the head; fresh leaves that ask for gradients where the old ones do."""
        fresh = {
            name: None if tensor is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias))
        }
        wide = torch.promote_types(dtype, torch.float32)
        is_number = not isinstance(self.temperature, Tensor)
        return replace(self, **fresh, temperature=self.temperature if is_number else self.temperature.to(wide))

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None and leaf.requires_grad]

    @property
    def active(self) -> Tensor:
        return (self.labels != -100).nonzero().squeeze(1)


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    grads: list[Tensor]
    logprobs: Tensor
    entropy: Tensor | None
    plan: HeadPlan | None = None

    def error(self, exact: Outcome) -> float:
        """The largest relative error of loss, scores and gradients, each by its norm."""
        pairs = [(self.logprobs, exact.logprobs), *zip(self.grads, exact.grads, strict=True)]
        if self.entropy is not None:
            assert exact.entropy is not None
            pairs.append((self.entropy, exact.entropy))
        # The terms of a loss are of order 1 and may cancel.
        difference, size = (self.loss.double() - exact.loss).detach().abs(), exact.loss.detach().abs()
        loss_error = float(difference) / max(1.0, float(size))
        return max(loss_error, *(relative(ours, theirs) for ours, theirs in pairs))


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    if not bool(exact.any()):
        return float(ours.norm())
    error = float((ours - exact).norm() / exact.norm())
    return error if error == error else float("inf")  # max() would pass over a NaN


def draw(case: Case, *, positions: int = 33, width: int = 5, vocabulary: int = 11, is_strided: bool = False) -> Draw:
    """Random tensors: 40 % of the positions ignored, 30 % of the coefficients exactly 0, sequences interleaved."""
    grads = {"all": "hwb", "hidden": "h", "head": "wb", "weight": "w", "bias": "b", "none": ""}[case.leaves]
    if is_strided:
        hidden = torch.randn(2 * positions, 2 * width, dtype=torch.float64)[::2, 1::2]
        weight = torch.randn(width, 3 * vocabulary, dtype=torch.float64)[:, ::3].t()
        bias = torch.randn(2 * vocabulary, dtype=torch.float64)[::2]
        assert not any(tensor.is_contiguous() for tensor in (hidden, weight, bias))
    else:
        hidden = torch.randn(positions, width, dtype=torch.float64)
        weight = torch.randn(vocabulary, width, dtype=torch.float64)
        bias = torch.randn(vocabulary, dtype=torch.float64)
    labels = torch.randint(0, vocabulary - 1, (positions,))
    order = torch.randperm(positions)
    labels[order[: positions * 2 // 5]] = -100
    # No sequence lies in one piece or in order; sequence 3 has 5 scored tokens, one more than a chunk of 4.
    ids = torch.empty_like(order)
    ids[order] = torch.arange(positions) % (SEQUENCES - 1)
    ids[ids == 3] = SEQUENCES - 1
    ids[order[-5:]] = 3
    mask = torch.ones(vocabulary, dtype=torch.bool)
    mask[-1] = False
    temperature = case.temperature if case.temperature != "token" else torch.rand(positions, dtype=torch.float64) + 0.5
    return Draw(
        hidden=hidden.requires_grad_("h" in grads),
        weight=weight.requires_grad_("w" in grads),
        bias=bias.requires_grad_("b" in grads) if case.has_bias else None,
        labels=labels,
        temperature=temperature,
        vocab_mask=mask if case.is_masked else None,
        ids=ids,
        c=torch.randn(positions, dtype=torch.float64) * (torch.rand(positions) < 0.7),
        d=torch.randn(positions, dtype=torch.float64) * (torch.rand(positions) < 0.7),
    )


def loss_of(case: Case, data: Draw):
    """A loss, not linear in anything, whose tokens depend on what the scope allows."""

    def loss(scores: TokenScores, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        c = data.c[positions].to(scores.logprobs.dtype)
        total = (c * scores.logprobs.exp()).sum()
        if case.scope == "sequence":
            sums = scores.logprobs.new_zeros(SEQUENCES).index_add(0, data.ids[positions], c * scores.logprobs)
            total = total + (1 + sums).square().sum() / SEQUENCES
        elif case.scope == "batch":
            total = total + (3 + (c * scores.logprobs).sum() / 20).square()
        if case.entropy is True:
            assert scores.entropy is not None
            total = total + (data.d[positions].to(c.dtype) * scores.entropy.square()).sum()
        return total, (positions, scores.logprobs.detach(), None if not case.entropy else scores.entropy.detach())

    if case.scope != "sequence":
        return loss

    def sequence_loss(scores: TokenScores, positions: Tensor) -> tuple[Tensor, Any]:
        # Empty sequences add (1 + 0)^2 in every group: take it off again, so that groups add up.
        total, extra = loss(scores, positions)
        return total - (SEQUENCES - len(data.ids[positions].unique())) / SEQUENCES, extra

    return sequence_loss


def options(case: Case, data: Draw) -> dict[str, Any]:
    item = data.hidden.dtype.itemsize
    return dict(
        chunk_size=case.chunk,
        temperature=data.temperature,
        softcap=case.softcap,
        logit_scale=case.scale,
        vocab_mask=data.vocab_mask,
        entropy=case.entropy,
        retain_bytes=case.retained * case.chunk * data.weight.shape[0] * item,
    )


def evaluate(case: Case, data: Draw, upstream: float = UPSTREAM) -> Outcome:
    """Through the engine."""
    loss_fn, opts = loss_of(case, data), options(case, data)
    scope = {} if case.scope is None else {"scope": case.scope}
    if case.scope == "sequence":
        scope["sequence_ids"] = data.ids
    plan = explain(*data.head, **scope, **opts)
    if case.scope is None:
        found = token_logprobs(*data.head, **opts)
        scores = TokenScores(found, None) if isinstance(found, Tensor) else found
        entropy = None if scores.entropy is None else scores.entropy[data.active]
        loss, (_, logprobs, entropy) = loss_fn(TokenScores(scores.logprobs[data.active], entropy), data.active)
    else:
        loss, extras = fused_loss(loss_fn, *data.head, **scope, **opts)
        order = torch.cat([positions for positions, _, _ in extras]).argsort()
        logprobs = torch.cat([part for _, part, _ in extras])[order]
        entropy = torch.cat([part for _, _, part in extras])[order] if case.entropy else None
    grads = list(torch.autograd.grad(upstream * loss, data.leaves)) if data.leaves else []
    return Outcome(upstream * loss, grads, logprobs, entropy, plan)


def eager(case: Case, data: Draw, upstream: float = UPSTREAM) -> Outcome:
    """By autograd through the logits of all tokens at once, in the dtype of `data`."""
    temperature = data.temperature[data.active] if isinstance(data.temperature, Tensor) else data.temperature
    transform = LogitTransform(case.scale, case.softcap, temperature, data.vocab_mask)
    active = data.active
    scores = eager_scores(
        data.hidden[active], data.weight, data.labels[active], data.bias, transform, entropy=case.entropy
    )
    loss, (_, logprobs, entropy) = loss_of(case, data)(scores, active)
    grads = list(torch.autograd.grad(upstream * loss, data.leaves)) if data.leaves else []
    return Outcome(upstream * loss, grads, logprobs, entropy)
