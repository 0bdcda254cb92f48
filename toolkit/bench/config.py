"""What the benchmark measures, and how its command line is composed; does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from omegaconf import DictConfig
from pydantic import BeforeValidator, Field, model_validator

from toolkit.compose.build import build_loss, build_part
from toolkit.compose.tree import Root
from toolkit.errors import ConfigError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.schema import Config, checked_chunk_size

Size = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class BenchConfig(Config):
    """A problem and how to measure it."""

    shape: tuple[Size, Size, Size] = (2048, 1024, 32768)
    """Tokens N, hidden width D, vocabulary V."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of hidden states and head."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    sequence_length: Size = 512
    """Tokens of a row, its prompt included; a divisor of N."""
    ignored: Fraction = 0.5
    """Fraction of every row that is prompt, at its start."""
    zero_advantage: Fraction = 0.0
    """Fraction of the rows whose advantage is 0."""
    frozen_head: bool = False
    """Only the hidden states get a gradient, as with LoRA."""
    chunk_size: Annotated[int | Literal["auto"], BeforeValidator(checked_chunk_size)] = 512
    """Tokens whose logits the chunked variants hold at once."""
    entropy: bool = False
    """Also report the policy's entropy, as the training run does."""
    softcap: Annotated[float, Field(gt=0)] | None = None
    """Soft cap of the logits; variants that do not have one are skipped then."""
    cases: Literal["configured", "all", "overhead", "model"] = "configured"
    """all: the configured loss and every pass of the head, on this shape; overhead: with building kwargs and
    LossRunner, relative to the same loss written by hand; model: a step of a two-layer model with a tied head, relative
    to its trunk alone."""
    peers: bool = True
    """Measure the peers that are installed."""
    memory: bool = True
    """Measure peak memory, one process for each variant."""
    accuracy: bool = True
    """Compare loss and gradients with float64 at a smaller shape."""
    keep_memory: bool = True
    """Keep freed memory in the process (glibc) while time is measured, as jemalloc and tcmalloc do by default."""
    rounds: Size = 5
    """Timed calls of each variant, interleaved, after one warm-up call."""
    threads: Size | None = None
    """CPU threads; None: PyTorch's default."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the made-up tokens."""

    @model_validator(mode="after")
    def _model_has_no_accuracy(self) -> BenchConfig:
        if self.cases == "model" and self.accuracy:
            raise ConfigError("bench.cases=model measures time and memory alone; add bench.accuracy=false")
        return self

    @model_validator(mode="after")
    def _rows_fill_the_tokens(self) -> BenchConfig:
        if self.shape[0] % self.sequence_length:
            raise ConfigError(
                f"bench.shape has {self.shape[0]} tokens, which rows of bench.sequence_length={self.sequence_length} "
                "do not fill; make one a multiple of the other"
            )
        return self


BENCH = Root(
    "bench",
    keys=("bench", "loss", "plugins", "rollout"),
    groups=("aggregation", "bench", "kl", "loss", "policy_loss"),
    schemas=(BenchConfig,),
)
NOT_IN_BENCH = ("temperature", "logit_scale", "softcap", "ignore_idx", "entropy_coef", "drop_zero_advantage")


def build_bench(cfg: DictConfig) -> tuple[BenchConfig, BaseLossConfig]:
    """Instantiate the config objects of a composed configuration.

    Raises:
        ConfigError: as in `build_config`; or the benchmark does not support the loss.
    """
    loss = build_loss(cfg)
    lacking = loss.not_in_training if isinstance(loss, BaseRLLossConfig) else None
    if lacking is not None:
        raise ConfigError(
            f"the loss reads {lacking} of the items, which the benchmark does not create; choose another policy loss, "
            "or a KL estimated from the sampled token"
        )
    for name, field in type(loss).model_fields.items():
        value = getattr(loss, name)
        if name in NOT_IN_BENCH and value != field.default:
            raise ConfigError(
                f"loss.{name}={value} is not in the benchmark, because some variants do not have it; leave "
                f"it at {field.default!r}" + ("; the cap of all variants is bench.softcap" if name == "softcap" else "")
            )
    return build_part(cfg, "bench", BenchConfig), loss
