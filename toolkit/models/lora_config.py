"""Config of LoRA adapters; no torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from toolkit.errors import ConfigError
from toolkit.schema import Config


class LoraConfig(Config):
    """LoRA adapters by PEFT: the model's weights stay as they are, and only low-rank additions to them are trained."""

    r: PositiveInt | None = None
    """Rank of the adapters, such as 8; None: no adapters, all weights are trained."""
    alpha: PositiveFloat = 16.0
    """An adapter is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of what enters an adapter, in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: names, or a regular expression for full names; all-linear: all but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Layers that are trained as they are, beside the adapters, such as [lm_head]."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> LoraConfig:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.r is None and changed:
            raise ConfigError(
                f"model.lora.{changed[0]} has no effect without adapters; set their rank, e.g. model.lora.r=8, or "
                "remove it"
            )
        return self
