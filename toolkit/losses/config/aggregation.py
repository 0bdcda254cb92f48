"""Config of the aggregation; no torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from toolkit.errors import ConfigError
from toolkit.functional.names import PER_SEQUENCE, Aggregation
from toolkit.schema import Config

PER_COMPONENT = "per_component"
"""The aggregation that is two terms: one over the tokens with A > 0, one over the others."""
Factor = Annotated[float, Field(ge=0)]


class AggregationConfig(Config):
    """How token losses become one number: the weight of each token and the divisor of the sum."""

    name: Aggregation = "token_mean"
    """See `toolkit.functional.aggregation` for the divisor of each."""
    length: Annotated[float, Field(gt=0)] | None = None
    """L of ``constant``, in tokens: as a rule the longest completion allowed (Dr. GRPO)."""
    count_empty: bool = False
    """Whether sequences (prompts) without a scored token count; TRL, SkyRL and ms-swift count them, verl does not."""
    positive_weight: Factor = 1.0
    """Factor of the tokens with A > 0 under ``per_component``."""
    negative_weight: Factor = 1.0
    """Factor of the other tokens under ``per_component``."""

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> AggregationConfig:
        if self.name == "constant" and self.length is None:
            raise ConfigError(
                "aggregation 'constant' divides by a fixed length and needs it: give length, in tokens "
                "(on the command line: aggregation=constant loss.aggregation.length=1024)"
            )
        readers: dict[str, tuple[str, ...]] = {
            "length": ("constant",),
            "count_empty": (*PER_SEQUENCE, "prompt_mean"),
            "positive_weight": (PER_COMPONENT,),
            "negative_weight": (PER_COMPONENT,),
        }
        for field, names in readers.items():
            without = f"on aggregation {self.name!r}; it is read by {', '.join(names)}"
            check_effect(self, field, self.name in names, without)
        return self


def check_effect(config: Config, field: str, is_read: bool, without: str) -> None:
    """Raise `ConfigError` if a field that is not read has another value than its default; `without` says why."""
    value = getattr(config, field)
    if not is_read and value != type(config).model_fields[field].default:
        raise ConfigError(f"{field}={value!r} has no effect {without}")


def aggregation_from(value: Any) -> Any:
    """Return the fields of an aggregation if `value` is a name; anything else, unchanged, for validation."""
    return {"name": value} if isinstance(value, str) else value
