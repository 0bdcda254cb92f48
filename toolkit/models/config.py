"""Configs of the models; no torch here."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from toolkit.errors import ConfigError
from toolkit.schema import Config

if TYPE_CHECKING:
    from toolkit.models.policy import Policy


class ModelConfig(Config):
    """Base config of a model."""

    cpu_threads: PositiveInt | None = None
    """CPU threads of PyTorch in each process; None: PyTorch's own choice."""

    @abstractmethod
    def build(self, alphabet: str) -> tuple[Policy, Any]:
        """Return the policy and its tokenizer; `alphabet` holds the characters of the task."""


class TinyLlamaConfig(ModelConfig):
    """A small Llama with random weights and one token for each character: no download."""

    hidden_size: PositiveInt = 64
    """Width of the hidden states."""
    intermediate_size: PositiveInt = 128
    """Width inside the MLP."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide hidden_size."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of weights and computation; float64 is for comparing runs to the last digits."""
    cpu_threads: PositiveInt | None = 1
    """Two threads take 29 s for the default run instead of 33 s, but beside two busy processes 92 s instead of 52 s."""

    @model_validator(mode="after")
    def _heads_fit(self) -> TinyLlamaConfig:
        width, rest = divmod(self.hidden_size, self.num_heads)
        if rest or width % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over model.num_heads={self.num_heads} must be an even number: "
                "each head rotates pairs of its channels"
            )
        return self

    def build(self, alphabet: str) -> tuple[Policy, Any]:
        """Return a freshly initialised policy; needs the extra [train]."""
        from toolkit.models.tiny import build_tiny_llama

        return build_tiny_llama(alphabet, **self.model_dump(exclude={"cpu_threads"}))


class PretrainedConfig(ModelConfig):
    """A causal language model in Hugging Face's format, from a directory or the hub."""

    path: str
    """Directory or hub name of model and tokenizer."""
    dtype: str = "float32"
    """Torch dtype of the weights."""
    logit_scale: float | None = None
    """Factor of the model's logits; None: from the model's config (Granite, Cohere)."""
    softcap: PositiveFloat | None = None
    """Soft cap of the model's logits; None: from the model's config (Gemma 2)."""

    def build(self, alphabet: str) -> tuple[Policy, Any]:
        """Load model and tokenizer; needs the extra [train]."""
        from toolkit.models.pretrained import build_pretrained

        return build_pretrained(**self.model_dump(exclude={"cpu_threads"}))
