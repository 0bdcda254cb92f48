"""The configs of all losses; no torch here, so that the command line can check them in a moment."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from toolkit.errors import ConfigError
from toolkit.functional.registry import policy_loss
from toolkit.schema import Config, FrozenDict, checked_chunk_size

if TYPE_CHECKING:
    from toolkit.losses.base import BaseLossContext
    from toolkit.losses.ce import CELossContext
    from toolkit.losses.grpo import GRPOLossContext


class BaseLossConfig(Config):
    """What every loss can be told. Subclass it, add fields and say which context computes the loss."""

    ignore_idx: int = -100
    """Label of a position that is not scored; -100 as in PyTorch's cross-entropy."""
    mode: Literal["eager", "chunk"] = "eager"
    """eager holds the logits of all tokens; chunk those of `chunk_size` tokens at a time. Loss and gradient agree."""
    chunk_size: Annotated[int | Literal["auto"] | None, BeforeValidator(checked_chunk_size)] = 1024
    """Tokens in a chunk when mode is chunk, 1024 as in XTuner; auto: as many as fit a budget of memory."""
    retain_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory for chunks of a sequence (or batch) longer than a chunk that are then not computed twice."""
    logit_scale: float = 1.0
    """Logits are multiplied by it first (Cohere's logit_scale, 1 / logits_scaling of Granite)."""
    softcap: Annotated[float, Field(gt=0)] | None = None
    """Then they become softcap * tanh(logits / softcap) (Gemma 2's final_logit_softcapping)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Then they are divided by it: the temperature that the completions were sampled at."""
    gradient_reduction: Literal["mean", "sum"] = "mean"
    """What the training back-end does to gradients over ranks: DDP and FSDP average ("mean")."""

    @property
    @abstractmethod
    def loss_ctx_cls(self) -> type[BaseLossContext[Any]]:
        """The context class that computes this loss."""
        raise NotImplementedError(f"{type(self).__name__} must define the property loss_ctx_cls")

    @field_validator("logit_scale")
    @classmethod
    def _scale_is_not_zero(cls, given: float) -> float:
        if given == 0:
            raise ValueError("it must not be 0: all tokens would be equally likely")
        return given

    @model_validator(mode="after")
    def _chunk_mode_needs_a_size(self) -> BaseLossConfig:
        if self.mode == "chunk" and self.chunk_size is None:
            raise ConfigError(
                "mode='chunk' needs chunk_size, the number of tokens in a chunk, or 'auto'; 1024 is a good start"
            )
        return self


class CELossConfig(BaseLossConfig):
    """Cross-entropy with the labels: supervised fine-tuning."""

    loss_reduction: Literal["token", "sample", "square"] = "token"
    """token: mean over tokens; sample: mean over sequences of their token means; square: weight 1/sqrt(length)."""

    @property
    def loss_ctx_cls(self) -> type[CELossContext]:
        """`CELossContext`."""
        from toolkit.losses.ce import CELossContext

        return CELossContext


class GRPOLossConfig(BaseLossConfig):
    """A policy loss weighted by advantages, plus an optional KL term: the mean over all scored tokens of both."""

    policy_loss_cfg: Mapping[str, Any] = Field(default_factory=lambda: {"loss_type": "vanilla"})
    """``loss_type``, the name of a registered policy loss, and the options of that loss."""
    use_kl_loss: bool = False
    """Add ``kl_loss_coef`` x KL(policy || reference); the items then need ``ref_logprobs``."""
    kl_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    """Coefficient of the KL term; 0.001 as in XTuner."""
    kl_loss_type: Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"] | None = None
    """Estimator of the KL term; kl = k1, mse = k2 and low_var_kl = k3."""
    use_entropy_metric: bool = False
    """Report the policy's mean entropy; about 3 % more time in the head."""
    entropy_coef: float = 0.0
    """Subtract ``entropy_coef`` x mean entropy from the loss: above 0 the policy is kept broad."""
    drop_zero_advantage: bool = False
    """Leave tokens with advantage 0 out of the forward, too; they are then missing in the metrics."""

    @field_validator("policy_loss_cfg", mode="after")
    @classmethod
    def _check_policy_loss(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if "loss_type" not in given:
            raise ConfigError("policy_loss_cfg has no loss_type; name a policy loss, e.g. dict(loss_type='vanilla')")
        loss = policy_loss(given["loss_type"])
        options = loss.options({key: value for key, value in given.items() if key != "loss_type"})
        return FrozenDict({"loss_type": loss.name, **options})

    @model_validator(mode="after")
    def _kl_needs_an_estimator(self) -> GRPOLossConfig:
        if self.kl_loss_type is not None and not self.use_kl_loss:
            warnings.warn(
                f"kl_loss_type={self.kl_loss_type!r} has no effect with use_kl_loss=False", UserWarning, stacklevel=2
            )
        if self.use_kl_loss and self.kl_loss_type is None:
            raise ConfigError(
                "use_kl_loss=True needs kl_loss_type, one of 'k1', 'k2', 'k3' or 'abs' (on the command line: kl=k3)"
            )
        return self

    @property
    def loss_ctx_cls(self) -> type[GRPOLossContext]:
        """`GRPOLossContext`."""
        from toolkit.losses.grpo import GRPOLossContext

        return GRPOLossContext
