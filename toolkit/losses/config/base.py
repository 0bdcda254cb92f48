"""The base of every loss config; no torch here, so the command line checks configs in a moment."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from toolkit.errors import ConfigError
from toolkit.head.options import HeadOptions
from toolkit.losses.config.term import LossTerm, checked_terms
from toolkit.schema import PLAIN, Config, answer, checked_chunk_size

_module = cache(importlib.import_module)
"""Kept, because every call of `import_module` takes the import lock; what it holds may still be reloaded."""


class BaseLossConfig(Config):
    """The settings of every loss. Subclass it, add fields, list the `terms` and name the `context` computing them."""

    model_config = ConfigDict(
        ignored_types=(*PLAIN, LossTerm, tuple, list)
    )  # a class may write terms = (LossTerm(...), ...)
    context: ClassVar[str | type | None] = None
    """The context class that computes this loss, or its path: ``"toolkit.losses.ce:CELossContext"``."""

    ignore_idx: int = -100
    """Label of a position that is not scored; -100 as in PyTorch's cross-entropy."""
    mode: Literal["eager", "chunk"] = "eager"
    """eager holds the logits of all tokens; chunk those of `chunk_size` tokens at a time. Loss and gradient agree."""
    chunk_size: Annotated[int | Literal["auto"] | None, BeforeValidator(checked_chunk_size)] = 1024
    """Tokens in a chunk when mode is chunk, 1024 as in XTuner; auto: as many as fit a budget of memory."""
    retain_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory in bytes to keep chunks of a sequence (or batch) longer than a chunk, so they are not computed twice."""
    logit_scale: float = 1.0
    """Logits are first multiplied by it (Cohere's logit_scale, 1 / logits_scaling of Granite)."""
    softcap: Annotated[float, Field(gt=0)] | None = None
    """Then they become softcap * tanh(logits / softcap) (Gemma 2's final_logit_softcapping)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Then they are divided by it: the sampling temperature of the completions."""
    gradient_reduction: Literal["mean", "sum"] = "mean"
    """What the training back-end does to gradients over ranks: DDP and FSDP average ("mean")."""

    @property
    def loss_ctx_cls(self) -> Any:
        """The context class that computes this loss.

        Raises:
            ConfigError: the class does not name a context.
        """
        named = None if _has_field_context(type(self)) else type(self).context
        if isinstance(named, str) and ":" in named:
            module, _, name = named.partition(":")
            try:
                named = getattr(_module(module), name)
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    f"{type(self).__name__}.context={named!r}: {error}; give the context class itself, or its path "
                    "'my_module:YourContext'"
                ) from None
        if isinstance(named, type) and not hasattr(named, "build_batches_loss_kwargs"):
            raise ConfigError(
                f"{type(self).__name__}.context is {named.__name__}, which is not a context; give a class that extends "
                "BaseLossContext, ScoredLossContext or GRPOLossContext"
            )
        if not isinstance(named, type):
            raise ConfigError(
                f"{type(self).__name__} does not name a context; write context = YourContext in its body, a class "
                "(without an annotation), or its path: context = 'my_module:YourContext'"
            )
        return named

    @property
    def head_options(self) -> HeadOptions:
        """The options of the head that this config sets."""
        return HeadOptions(
            chunk_size=self.chunk_size or "auto",
            ignore_idx=self.ignore_idx,
            temperature=self.temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            retain_bytes=self.retain_bytes,
        )

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The summands of the loss; by default one, a mean over all scored tokens of the step."""
        return (LossTerm(),)

    @answer
    def checked_terms(self) -> tuple[LossTerm, ...]:
        """`terms`, checked.

        Raises:
            ConfigError: as `toolkit.losses.config.term.checked_terms`.
        """
        return checked_terms(self.terms, type(self).__name__)

    @answer
    def shared_settings(self) -> dict[str, str]:
        """What must be equal on all ranks, as text; how each computes its logits may differ."""
        settings = self.model_dump(exclude={"mode", "chunk_size", "retain_bytes"})
        return {"loss": type(self).__name__, **{name: _as_text(value) for name, value in settings.items()}}

    @answer
    def step_settings(self) -> dict[str, Any]:
        """What `build_batches_loss_kwargs` fixes for a step, by name, to compare with the config of a context."""
        settings: dict[str, Any] = {"ignore_idx": self.ignore_idx, "gradient_reduction": self.gradient_reduction}
        for term in self.checked_terms:
            chosen = term.average.model_dump(exclude_defaults=True)
            settings[f"aggregation of {term.name}"] = {"name": term.average.name, **chosen}
            # A function written in a property is new in every config; its code is not.
            settings[f"token_filter of {term.name}"] = getattr(term.token_filter, "__code__", term.token_filter)
            settings[f"use_correction of {term.name}"] = term.use_correction
        return settings

    def needs_current(self, num_parts: int) -> bool:
        """Whether items need `current_logprobs` if a step has `num_parts` micro-batches (over all ranks)."""
        return False

    @field_validator("logit_scale")
    @classmethod
    def _scale_is_not_zero(cls, value: float) -> float:
        if value == 0:
            raise ValueError("it must not be 0: all tokens would be equally likely")
        return value

    @model_validator(mode="after")
    def _chunk_mode_needs_a_size(self) -> BaseLossConfig:
        if self.mode == "chunk" and self.chunk_size is None:
            raise ConfigError(
                "mode='chunk' needs chunk_size, the number of tokens in a chunk, or 'auto'; 1024 is a good start"
            )
        return self


@cache
def _has_field_context(config: type[BaseLossConfig]) -> bool:
    """Whether `context` is a setting of a config, by mistake."""
    return "context" in config.model_fields


def _as_text(value: Any) -> str:
    """Return a setting as text that is the same in every process: without addresses, and without rounding errors."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_text, value))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value) if isinstance(value, (str, int, type(None))) else type(value).__name__
