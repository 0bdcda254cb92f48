"""Several losses on one batch: their values, gradients, and how far these point in one direction.

Legend: B rows, T positions, D hidden width, V vocabulary, n losses, P parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.display import html_table
from toolkit.errors import DataError, ToolkitError
from toolkit.explain.tables import aligned
from toolkit.head.adapters import HeadTensors
from toolkit.losses.config.base import BaseLossConfig
from toolkit.metrics import metrics_in, to_floats

SHOWN = ("clip_fraction_low", "clip_fraction_high")
"""Metrics that have a column."""
NAMES = ("loss", "gradient norm", "clipped low", "clipped high", "time (ms)", "peak (MiB)")


@dataclass(frozen=True)
class Compared:
    """One loss on the batch."""

    name: str
    loss: float
    """Scalar loss of the batch."""
    gradient_norm: float
    """L2 norm of the gradient."""
    seconds: float
    """Of forward and backward of head and loss, without the model below."""
    peak_bytes: int
    """Memory over the inputs: measured on CUDA, else as planned by the head."""
    metrics: Mapping[str, float]
    """All metrics of the loss."""

    def cells(self) -> list[str]:
        """Return the columns of a table, as text."""
        clipped = [self.metrics.get(name) for name in SHOWN]
        shares = ["-" if share is None or share != share else f"{100 * share:.1f} %" for share in clipped]
        numbers = [f"{self.loss:.5g}", f"{self.gradient_norm:.4g}", *shares]
        return [*numbers, f"{1e3 * self.seconds:.1f}", f"{self.peak_bytes / 2**20:.1f}"]


@dataclass(frozen=True)
class Comparison:
    """Losses on one batch; ``comparison["policy_loss=gspo"].loss`` is a number of it."""

    losses: tuple[Compared, ...]
    cosines: Tensor
    """[n, n] cosine between the gradients of two losses; NaN where one is 0."""
    of: str
    """What the gradients are of."""

    def __getitem__(self, name: str) -> Compared:
        for each in self.losses:
            if each.name == name:
                return each
        raise DataError(f"{name!r} was not compared; there are {', '.join(each.name for each in self.losses)}")

    def _tables(self) -> tuple[list[list[str]], list[list[str]]]:
        rows = [["", *NAMES], *([each.name, *each.cells()] for each in self.losses)]
        numbers = [str(index + 1) for index in range(len(self.losses))]
        cosines = [["cosine", *numbers]]
        for number, each, values in zip(numbers, self.losses, self.cosines.tolist(), strict=True):
            cosines.append([f"{number} {each.name}", *(f"{value:.3f}" if value == value else "-" for value in values)])
        return rows, cosines

    def __repr__(self) -> str:
        rows, cosines = self._tables()
        return f"{aligned(rows)}\n\n{aligned(cosines)}\ngradients of {self.of}"

    def _repr_html_(self) -> str:
        rows, cosines = self._tables()
        one = html_table("losses on one batch", rows[0], rows[1:])
        return one + html_table("cosine between gradients", cosines[0], cosines[1:], note=f"gradients of {self.of}")


Build = Callable[[BaseLossConfig], Any]
"""From a loss config to its context on the batch, which takes hidden states, weight and bias."""


def compare_losses(
    configs: Mapping[str, BaseLossConfig], build: Build, head: HeadTensors, parameters: list[Tensor], of: str
) -> Comparison:
    """Return the losses on one batch; nothing is left in ``.grad``.

    Args:
        configs: by name.
        build: the context of each.
        head: hidden states [B, T, D], weight [V, D] and bias [V] or None, with their graphs.
        parameters: what the gradients are of, any shapes; empty: of the hidden states and of the head if it requires
            one. Each loss holds its gradient, P numbers in fp32.
        of: what to call these.

    Raises:
        DataError: the batch lacks a field that a loss needs; its name is in the message.
    """
    results, gradients = [], []
    for index, (name, config) in enumerate(configs.items()):
        try:
            context = build(config)
            if index == 0:
                _measured(context, head)  # the first call also loads kernels
            loss, extra, leaves, taken, seconds, peak = _measured(context, head)
        except ToolkitError as error:
            error.args = (f"{name}: {error}",)
            raise
        chained = _through_model(head, leaves, taken, parameters) if parameters else taken
        flat = torch.cat([part.reshape(-1).float() for part in chained])
        gradients.append(flat)
        metrics = to_floats(metrics_in(extra))
        results.append(Compared(name, loss, float(flat.norm()), seconds, peak, metrics))
    norms = torch.stack([gradient.norm() for gradient in gradients])
    products = torch.stack([torch.stack([torch.dot(a, b) for b in gradients]) for a in gradients])
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    cosines = (products / scale).where(scale > 0, float("nan")).clamp(-1, 1).cpu()
    return Comparison(tuple(results), cosines, of)


def _measured(context: Any, head: HeadTensors) -> tuple[float, Any, list[Tensor], list[Tensor], float, int]:
    """Return loss, metrics, the inputs [...] that have a gradient, these gradients, seconds and peak bytes."""
    hidden, weight, bias = head
    copies = [
        None if part is None else part.detach().requires_grad_(part is hidden or part.requires_grad)
        for part in (hidden, weight, bias)
    ]
    is_cuda = hidden.is_cuda
    if is_cuda:
        torch.cuda.synchronize(hidden.device)
        torch.cuda.reset_peak_memory_stats(hidden.device)
    before = torch.cuda.memory_allocated(hidden.device) if is_cuda else 0
    started = time.perf_counter()
    loss, extra = context.forward(*copies)
    leaves = [part for part in copies if part is not None and part.requires_grad]
    zeros = [torch.zeros_like(leaf) for leaf in leaves] if not loss.requires_grad else []
    gradients = zeros or [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    ]
    if is_cuda:
        torch.cuda.synchronize(hidden.device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(hidden.device) - before if is_cuda else context.explain(*copies).peak_bytes
    return float(loss.detach()), extra, leaves, gradients, seconds, int(peak)


def _through_model(
    head: HeadTensors, leaves: list[Tensor], gradients: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of a model's parameters from those of hidden states and head."""
    outputs = [part for part in head if part is not None and (part is head[0] or part.requires_grad)]
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
    taken = torch.autograd.grad(
        [out for out, _ in pairs], parameters, [grad for _, grad in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, taken, strict=True)]
