"""A head of which one token leads by a given number of nats, and what float64 gives for its very logits.

Legend: n tokens, V vocabulary, D = n + 3 hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MARGINS = (5.0, 20.0, 24.0, 30.0, 80.0)
TOP, OTHER = 1, 0
BACKGROUND = 64
"""Logits are multiples of 1 / 64, which fp32 adds and bf16 mostly stores without rounding."""


@dataclass(frozen=True)
class Peaked:
    """Hidden states are unit vectors, so that a row's logits are a column of the weight, whatever the dtype.

    The last three columns of the weight are unit vectors of the entries `probes`: there the gradient of the hidden
    states is the gradient of these three logits. In the first half of the tokens the label leads, in the second half
    another entry does.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    probes: Tensor

    @classmethod
    def draw(cls, vocabulary: int, dtype: torch.dtype = torch.float32) -> Peaked:
        rows = 2 * len(MARGINS)
        generator = torch.Generator().manual_seed(vocabulary)
        weight = torch.randint(-BACKGROUND, 1, (vocabulary, rows + 3), generator=generator) / BACKGROUND
        weight[TOP, :rows] = torch.tensor(MARGINS * 2)
        probes = torch.tensor([TOP, OTHER, vocabulary - 1])
        weight[:, rows:] = 0
        weight[probes, torch.arange(rows, rows + 3)] = 1
        labels = torch.tensor([TOP] * len(MARGINS) + [OTHER] * len(MARGINS))
        return cls(torch.eye(rows, rows + 3).to(dtype), weight.to(dtype), labels, probes)

    @property
    def logits(self) -> Tensor:
        """[n, V] in float64."""
        return self.weight[:, : len(self.labels)].double().t()


@dataclass(frozen=True)
class Exact:
    """Scores [n] and gradients [n, V] in float64; no sum has terms of both signs."""

    logprobs: Tensor
    entropy: Tensor
    logprob_grads: Tensor
    entropy_grads: Tensor
    entropy_sizes: Tensor
    """p (|log p| + H): where log p is close to -H, the gradient -p (log p + H) is not as exact as its terms."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Exact:
        """Of `logits` [n, V] after all transforms."""
        rows = torch.arange(len(labels))
        largest, top = logits.max(1)
        exps = (logits - largest.unsqueeze(1)).exp()
        exps[rows, top] = 0
        log_sum = exps.sum(1).log1p()
        logs = logits - largest.unsqueeze(1) - log_sum.unsqueeze(1)
        probs, gaps = logs.exp(), largest.unsqueeze(1) - logits
        logprobs, entropy = logs[rows, labels], log_sum + (probs * gaps).sum(1)
        grads = -probs
        grads[rows, labels] = -logprobs.expm1()
        of_entropy, sizes = -probs * (logs + entropy.unsqueeze(1)), probs * (entropy.unsqueeze(1) - logs)
        return cls(logprobs, entropy, grads, of_entropy, sizes)


def worst(ours: Tensor, exact: Tensor, sizes: Tensor | None = None) -> float:
    """The largest error of `ours` relative to `sizes` (or `exact`), [...] each, where these are normal fp32 numbers."""
    sizes = exact.abs() if sizes is None else sizes
    is_normal = sizes >= torch.finfo(torch.float32).tiny
    assert is_normal.any()
    return float(((ours.detach().double() - exact).abs() / sizes)[is_normal].max().nan_to_num(torch.inf))


def probed(hidden_grad: Tensor, data: Peaked, *exact: Tensor) -> tuple[Tensor, ...]:
    """The gradients of three logits of each token, [n, 3], as the head gives them, and those of `exact` [n, V]."""
    count = min(3, len(data.weight))  # two of the three are the same if the vocabulary has two entries
    return hidden_grad[:, -count:], *(values[:, data.probes[-count:]] for values in exact)
