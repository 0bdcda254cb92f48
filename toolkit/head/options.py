"""The options of every public function of the head; imports no torch, because configs use it, too.

Legend: V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from toolkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Entropy = Literal[False, "metric", True]
"""No entropies, entropies without gradient, or with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadOptions:
    """What `token_logprobs`, `fused_loss` and `explain` take by keyword, or as one object, ``options``.

    Raises:
        ConfigError: an option is not valid.
    """

    chunk_size: int | Literal["auto"] = "auto"
    """Hold the logits of at most this many tokens; "auto" takes as many as fit `chunk_bytes`."""
    chunk_bytes: int | None = None
    """Memory for a chunk's logits with ``chunk_size="auto"``; by default 128 MiB on a CPU, 1 GiB elsewhere."""
    ignore_idx: int = -100
    """Label of positions that are not scored."""
    temperature: float | Tensor = 1.0
    """Sampling temperature of the scored tokens; a number, or one for each label, [...]. Not differentiable."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``, after `logit_scale` and before `temperature`. In bf16 the
    gradient of logits far beyond the cap (3 times and more) loses its precision."""
    logit_scale: float = 1.0
    """Logits (bias included) are multiplied by it first."""
    vocab_mask: Tensor | None = None
    """[V] bool, False for entries that cannot be sampled."""
    entropy: Entropy = False
    """True for entropies with gradient, "metric" for entropies without."""
    retain_bytes: int = 0
    """Memory for chunks that are kept until their gradient is taken, instead of being computed twice."""

    def __post_init__(self) -> None:
        if not (isinstance(self.entropy, bool) or self.entropy == "metric"):
            raise ConfigError(
                f"entropy={self.entropy!r} is unknown; choose True (with gradient), 'metric' (without) or False"
            )
        if not is_count(self.retain_bytes) and self.retain_bytes != 0:
            raise ConfigError(f"retain_bytes={self.retain_bytes!r} must be a number of bytes, 0 or more")
        if self.chunk_size != "auto" and not is_count(self.chunk_size):
            raise ConfigError(f"chunk_size={self.chunk_size!r} must be a number of tokens above 0, or 'auto'")
        if self.chunk_bytes is None:
            return
        if self.chunk_size != "auto":
            raise ConfigError(
                f"chunk_bytes={self.chunk_bytes!r} goes with chunk_size='auto', not with {self.chunk_size!r}"
            )
        if not is_count(self.chunk_bytes):
            raise ConfigError(f"chunk_bytes={self.chunk_bytes!r} must be a number of bytes above 0")


def is_count(value: object) -> bool:
    """Whether `value` is an integer above 0."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def takes_head_options(function: Callable[..., Any]) -> Any:
    """Let callers of `function` pass the fields of its ``options`` as keywords, and show them in its signature."""

    @functools.wraps(function)
    def call(*args: Any, options: HeadOptions | None = None, **keywords: Any) -> Any:
        chosen = {name: keywords.pop(name) for name in OPTION_NAMES.intersection(keywords)}
        if options is None:
            options = HeadOptions(**chosen)
        elif chosen:
            options = replace(options, **chosen)
        return function(*args, options=options, **keywords)

    signature = inspect.signature(function)
    plain = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    at_once = signature.parameters["options"].replace(default=None, annotation="HeadOptions | None")
    keywords = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(HeadOptions)
    ]
    call.__signature__ = signature.replace(parameters=[*plain, *keywords, at_once])  # type: ignore[attr-defined]
    return call


OPTION_NAMES = frozenset(field.name for field in fields(HeadOptions))
