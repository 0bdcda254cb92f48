"""A batch, and the loss and gradient that our own loop gives for it; trainers are compared with these.

Legend: B rows, T positions, V vocabulary. The head is the identity, so the gradient is that of the logits.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit import LossRunner

ROWS, LENGTH, VOCABULARY = 4, 9, 7
LOSSES = {
    "vanilla": "policy_loss=vanilla policy_loss.cliprange_high=0.28",
    "gspo": "policy_loss=gspo policy_loss.cliprange_low=0.1 policy_loss.cliprange_high=0.1",
    "cispo": "policy_loss=cispo policy_loss.weight_max=1.3",
    "sapo": "policy_loss=sapo",
    "dro": "policy_loss=dro policy_loss.tau=0.2",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
DTYPES = [torch.float64, torch.float32]


def batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Return logits [B, T, V] and fields [B, T]: one row has a gap, one no scored token."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = noise(ROWS, LENGTH, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = torch.arange(LENGTH) < torch.tensor([9, 5, 0, 7])[:, None]
    mask[:, 0] = False
    mask[0, 3:5] = False  # a tool's result
    fields = {
        "logits": logits,
        "advantages": torch.tensor([1.0, -0.6, 0.3, -1.4], dtype=torch.float64)[:, None].repeat(1, LENGTH),
        "old_logprobs": logprobs + 0.3 * noise(ROWS, LENGTH),
        "ref_logprobs": logprobs + 0.5 * noise(ROWS, LENGTH),
    }
    return {name: values.to(dtype) for name, values in fields.items()} | {"labels": labels, "mask": mask}


@functools.cache
def runner_of(*overrides: str) -> LossRunner:
    """Return a runner; composing its config takes longer than the loss of a small batch."""
    return LossRunner.from_overrides(list(overrides))


def of_our_loop(given: dict[str, Tensor], loss: str, *, fields: Sequence[str] = (), **changes: Any) -> list[Tensor]:
    """Return loss and gradient of the logits of a step in our loop."""
    runner = runner_of(*shlex.split(loss))
    leaf = given["logits"].clone().requires_grad_()
    passed = {name: given[name] for name in ("advantages", "old_logprobs", *fields)} | changes
    head = torch.eye(VOCABULARY, dtype=leaf.dtype)
    result = runner(leaf, head, shifted_labels=given["labels"].masked_fill(~given["mask"], -100), **passed)
    result.backward()
    assert leaf.grad is not None
    return [result.loss.detach(), leaf.grad]


def of_a_trainer(given: dict[str, Tensor], loss_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return loss and gradient of the logits where a trainer computes log-probabilities [B, T] and passes them on."""
    leaf = given["logits"].clone().requires_grad_()
    logprobs = leaf.log_softmax(-1).gather(-1, given["labels"].unsqueeze(-1)).squeeze(-1)
    loss = loss_of(logprobs)
    loss.backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


def check_equal(mine: list[Tensor], other: list[Tensor], tolerance: float | None = None) -> None:
    for ours, theirs in zip(mine, other, strict=True):
        bound = TOLERANCE[ours.dtype] if tolerance is None else tolerance
        assert ours.any()
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=bound, atol=bound)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Put a stand-in for the module `name`, and for the packages above it, where ``import`` looks first."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:length]))
        module.__path__ = []
        if length == len(parts):
            module.__dict__.update(contents)
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)


def namespace(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)
