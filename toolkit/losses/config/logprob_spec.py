"""The settings that log-probabilities were computed with; no torch here.

A ratio of probabilities is meaningful only if both come from the same distribution: with another temperature, or with a
softmax over fewer tokens, an unchanged policy has ratios far from 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.schema import Config


class LogprobSpec(Config):
    """How a sampler drew its tokens and computed their log-probabilities."""

    mode: Literal["processed", "raw"] = "processed"
    """processed: of the distribution that was sampled from (vLLM's ``processed_logprobs``); raw: of the bare logits."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1: off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample only the k most probable tokens; 0: off."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sample only tokens of at least this share of the largest probability; 0: off."""

    def mismatch(self, temperature: float) -> str | None:
        """Return why these log-probabilities cannot be compared with a trainer's at `temperature`; None if they can."""
        who = "the tokens were sampled" if self.temperature != 1 else "the loss scores"
        other = self.temperature if self.temperature != 1 else temperature
        if self.mode == "raw" and other != 1:
            return (
                f"they are raw (a softmax of the bare logits), but {who} at temperature {other:g}; ask the sampler for "
                "processed log-probabilities"
            )
        if self.mode == "processed" and self.temperature != temperature:
            return (
                f"they were taken at temperature {self.temperature:g}, but the loss scores tokens at {temperature:g}; "
                f"set temperature={self.temperature:g} in the loss"
            )
        cuts = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        cut = next((name for name, is_on in cuts.items() if is_on), None)
        if cut is None:
            return None
        return (
            f"the sampler kept only part of the vocabulary ({cut}={getattr(self, cut):g}), while the loss normalises "
            "over all of it: every ratio would be off by the mass that was cut; sample without it"
        )
