"""What happens to logits between the head's product and the softmax, in one fixed order.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``scale`` -> ``softcap`` -> ``temperature`` -> vocabulary mask, after the head's bias.

    The order is that of the models that have these (Granite and Cohere scale, Gemma 2 caps) and of the sampler, which
    divides by its temperature last. Entries that the mask excludes have probability exactly 0.
    """

    scale: float = 1.0
    """Logits are multiplied by it (Cohere's ``logit_scale``; 1 / ``logits_scaling`` of Granite)."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2's ``final_logit_softcapping``)."""
    temperature: float | Tensor = 1.0
    """Logits are divided by it: one number, or [N] one for each token."""
    vocab_mask: Tensor | None = None
    """[V] bool, False where a vocabulary entry cannot be sampled (padding of the vocabulary, for example)."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the transformed logits, [N, V], differentiable."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if isinstance(self.temperature, Tensor):
            logits = logits / self.temperature.to(logits.dtype).unsqueeze(-1)
        elif self.temperature != 1:
            logits = logits / self.temperature
        return logits if self.vocab_mask is None else logits.masked_fill(~self.vocab_mask, -torch.inf)

    def at(self, positions: Tensor) -> LogitTransform:
        """Return the transform of the tokens at `positions` [n]."""
        if not isinstance(self.temperature, Tensor):
            return self
        return replace(self, temperature=self.temperature.index_select(0, positions))

    def row_factors(self) -> tuple[float | Tensor, float | Tensor]:
        """Return what multiplies a row of logits before the softcap, and after it ([n] or a number each)."""
        if self.softcap is None:
            return self.scale / self.temperature, 1.0
        return self.scale, 1.0 / self.temperature
