"""XTuner's loss config and context with any loss of this toolkit inside.

Legend: T positions of a packed row, D hidden width, V vocabulary, S sequences.

Source: XTuner v1, October 2026: ``xtuner/v1/loss/base_loss_ctx.py`` and ``xtuner/v1/rl/loss/base_loss.py``. A config
builds a context for each packed row (``build``), the contexts of an optimizer step are calibrated together
(``build_batches``), and the LM head calls ``forward``, which returns the loss of all ranks, whose gradients FSDP
averages.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from xtuner.v1.rl.loss import BaseRLLossConfig, BaseRLLossContext, BaseRLLossKwargs

from toolkit.distributed import world_size
from toolkit.errors import ConfigError, warn_once
from toolkit.losses.config.policy import BaseRLLossConfig as OurConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import metrics_in, to_floats
from toolkit.runner import LossRunner

FIELDS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
"""Fields of XTuner's kwargs that our items have under the same names."""


class ToolkitLossConfig(BaseRLLossConfig):
    """XTuner's config of an RL loss; ``loss`` describes it in our words, ``use_kl_loss`` follows from it."""

    policy_loss_cfg: dict[str, Any] = {}  # noqa: RUF012 - a field of pydantic
    """Not read: ``loss`` has it."""
    loss: str = "loss=grpo"
    """Overrides as on the command line: ``"policy_loss=gspo aggregation=seq_mean_token_mean kl=k3"``."""

    def model_post_init(self, context: Any, /) -> None:
        """Check the loss.

        Raises:
            ConfigError: it does not exist, or XTuner does not have what it reads.
        """
        super().model_post_init(context)
        cfg = self.toolkit_config
        if self.policy_loss_cfg:
            raise ConfigError("policy_loss_cfg has no effect beside loss; write loss='policy_loss=gspo'")
        if cfg.not_in_training is not None:
            raise ConfigError(f"the loss reads {cfg.not_in_training}, which XTuner does not compute")
        if cfg.use_kl_loss != self.use_kl_loss:
            raise ConfigError(
                f"use_kl_loss={self.use_kl_loss}, but loss has {'a' if cfg.use_kl_loss else 'no'} KL term; XTuner "
                f"computes a reference by that setting: set use_kl_loss={cfg.use_kl_loss}"
            )

    @property
    def toolkit_config(self) -> OurConfig:
        """Our config of the loss, with the mode and chunk size of this one."""
        loss_cfg = LossRunner.from_overrides(shlex.split(self.loss)).loss_cfg
        if not isinstance(loss_cfg, OurConfig):
            raise ConfigError(f"loss={self.loss!r} has no policy loss; choose loss=grpo or a preset")
        settings = {"mode": self.mode, "ignore_idx": self.ignore_idx, "chunk_size": self.chunk_size or 1024}
        return loss_cfg.model_copy(update=settings)

    @property
    def loss_ctx_cls(self) -> type[ToolkitLossContext]:
        """The context with our losses."""
        return ToolkitLossContext

    @property
    def _loss_kwargs_cls(self) -> type[Any]:
        return BaseRLLossKwargs


class ToolkitLossContext(BaseRLLossContext):
    """XTuner's context of one packed row; `build_batches` gives it the weights of the step."""

    loss_cfg: ToolkitLossConfig

    @staticmethod
    def build_batches(
        loss_ctx_list: list[ToolkitLossContext],
        cu_seq_lens_list: Sequence[Tensor] | None = None,
        sp_mesh: Any = None,
    ) -> list[ToolkitLossContext]:
        """Return the contexts of an optimizer step, calibrated over all of them and over all ranks.

        Args:
            loss_ctx_list: one for each packed row of this rank.
            cu_seq_lens_list: [S + 1] boundaries of each row; XTuner's RL trainer passes none: a loss that looks at
                sequences then takes each run of scored tokens as one.
            sp_mesh: ranks that share the rows; their contexts hold shards.

        Raises:
            ConfigError: the loss looks at sequences, but ranks share them.
            DataError: a context lacks what the loss reads.
        """
        cfg = loss_ctx_list[0].loss_cfg.toolkit_config
        reads_sequences = cfg.loss_ctx_cls.reads_sequences(cfg) or any(
            term.average.name not in ("token_mean", "token_sum", "per_component") for term in cfg.checked_terms
        )
        if reads_sequences and sp_mesh is not None and sp_mesh.size() > 1:
            raise ConfigError(
                "the loss looks at whole sequences, but XTuner has split them over ranks; set sp_size=1, or choose a "
                "loss of tokens with aggregation=token_mean"
            )
        labels = [context.loss_kwargs.shifted_labels for context in loss_ctx_list]
        if reads_sequences and cu_seq_lens_list is None:
            warn_once(
                "the loss looks at whole sequences, but XTuner passes no boundaries of its packed rows: each run of "
                "scored tokens is taken as a sequence, which a conversation of several turns is not; pass "
                "cu_seq_lens_list to build_batches"
            )
            cu_seq_lens_list = [ends_of_runs(each != cfg.ignore_idx) for each in labels]
        items = [
            RLLossContextInputItem(
                shifted_labels=each,
                **{name: value for name in FIELDS if (value := getattr(context.loss_kwargs, name)) is not None},
            )
            for each, context in zip(labels, loss_ctx_list, strict=True)
        ]
        built = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list)
        for context, kwargs in zip(loss_ctx_list, built, strict=True):
            weights = context.loss_kwargs.is_weights
            if weights is not None and cfg.correction:
                raise ConfigError("the loss has a correction, and XTuner's rollout_is another; leave out one of them")
            if weights is not None:
                kwargs = kwargs.replace(importance=weights)
            context.ours = cfg.loss_ctx_cls(cfg, kwargs)
        return loss_ctx_list

    def loss_fn(self, hidden_states: Any, head_weight: Any, head_bias: Any, loss_kwargs: Any) -> Any:
        """Not called: `forward` has our head.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("ToolkitLossContext computes its loss in forward; call forward after build_batches")

    def forward(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[None, dict[str, Any]]]:
        """Return the loss of this micro-batch over all ranks, 0-dim, and XTuner's ``(logits, extra_info)``.

        The gradient carries the factor that FSDP's average removes, as that of XTuner's losses.

        Args:
            hidden_states: [1, T, D].
            head_weight: [V, D].
            head_bias: [V].

        Raises:
            ConfigError: the context was not calibrated.
        """
        ours = getattr(self, "ours", None)
        if ours is None:
            raise ConfigError("the weights of the step are missing; call build_batches before forward")
        loss, extra = ours.forward(hidden_states, head_weight, head_bias)
        metrics = metrics_in(extra)
        total = loss.detach().clone()
        if world_size() > 1:
            torch.distributed.all_reduce(total)
            total /= world_size()
        extra_info: dict[str, Any] = {f"toolkit/{name}": value for name, value in to_floats(metrics).items()}
        extra_info |= {"max_ratio": extra_info.get("toolkit/ratio_max", 0.0)}
        extra_info |= {"local_base_loss": loss.detach() / world_size()}
        return loss + (total - loss.detach()), (None, extra_info)


def ends_of_runs(is_scored: Tensor) -> Tensor:
    """Return boundaries [S + 1] of a packed row `is_scored` [1, T]: each run of scored tokens ends a sequence."""
    flat = is_scored.reshape(-1)
    following = torch.cat([flat[1:], flat.new_zeros(1)])
    ends = (flat & ~following).nonzero().squeeze(-1) + 1
    return torch.cat([ends.new_zeros(1), ends]) if len(ends) else ends.new_tensor([0, len(flat)])
