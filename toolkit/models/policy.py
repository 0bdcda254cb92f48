"""The policy: trunk and head in ONE forward.

DDP and FSDP hook the forward of the module they wrap. A loss that called the trunk alone would skip these hooks, and
the weights of the ranks would drift apart without an error; so the loss runs inside.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ConfigError, DataError
from toolkit.head import token_logprobs
from toolkit.head.adapters import Head, find_head, transforms_of
from toolkit.head.logits import LogitTransform
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.context import BaseLossContext
from toolkit.metrics import Mean
from toolkit.models import router
from toolkit.models.fit import difference, fitted_transform
from toolkit.models.packed import attention_masks

Result = TypeVar("Result")
AnyLossConfig = TypeVar("AnyLossConfig", bound=BaseLossConfig)

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Rounding of logits in these dtypes, over the largest logit; 1e-4 in wider ones."""


class Policy(nn.Module):
    """A causal language model whose forward returns a loss or log-probabilities, never logits.

    Wrap it (DDP, `fully_shard`; see `toolkit.training.sharding`), not the language model in it. The head may be plain,
    tied to the embedding, biased or frozen, with PEFT's LoRA on it or fully trained as one of `modules_to_save`.
    """

    def __init__(self, lm: Any, transform: LogitTransform | None = None) -> None:
        """Wrap a causal language model, or PEFT's wrapper of one.

        Args:
            lm: as `toolkit.head.adapters.find_head` takes it.
            transform: what the model does to its logits after the head; None: from its config.

        Raises:
            ConfigError: `lm` has no trunk and head that a loss can use; says why.
        """
        super().__init__()
        self.lm = lm
        self.generation_config = getattr(lm, "generation_config", None)
        """What the model is exported with; that of `lm` may be another one while it is trained."""
        head = find_head(lm)
        self.is_transform_explicit = transform is not None
        self.transform = head.transform if transform is None else transform

    @property
    def head(self) -> Head:
        """Trunk and head as they are now: adapters may be added and removed."""
        return find_head(self.lm)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_ctx: BaseLossContext[Any] | None = None,
        *,
        score_chunk: int = 4096,
        temperature: float = 1.0,
        auxiliary_weight: Tensor | float | None = None,
        position_ids: Tensor | None = None,
        entropy: bool = False,
    ) -> Any:
        """Return ``(loss, metrics)`` of `loss_ctx`, or without one the log-probabilities of the text.

        Args:
            input_ids: [B, T] token ids, padded on either side.
            attention_mask: [B, T], 1 at real tokens.
            loss_ctx: its kwargs refer to positions 0 .. T - 2, each predicting the next token.
            score_chunk: tokens whose logits are held at once when there is no `loss_ctx`.
            temperature: temperature of the softmax when there is no `loss_ctx`.
            auxiliary_weight: factor of this micro-batch's router loss (`toolkit.losses.auxiliary.auxiliary_weights`),
                0-dim, besides the model's coefficient; only read if the model's config asks for a router loss.
            position_ids: [1, T] for a packed row, sequences end to end: the position of each token in its sequence,
                starting again at 0 in each. Attention then stays within a sequence, and `attention_mask` only says
                which tokens a router loss counts. None: a row is a sequence.
            entropy: also return entropies, without gradient, when there is no `loss_ctx`.

        Returns:
            What ``loss_ctx.forward`` returns, the router loss added to both; or [B, T - 1] log-probabilities of tokens
            1 .. T - 1 in nats; with `entropy` a `TokenScores` of these and of entropies.

        Raises:
            ConfigError: `loss_ctx` scales or caps logits differently from the model, or the policy is wrapped in
                DataParallel.
            DataError: `position_ids` are not those of one row.
        """
        if getattr(self, "_is_replica", False):
            raise ConfigError("torch.nn.DataParallel is not supported; use torchrun --nproc_per_node N and DDP")
        head, mask = self.head, attention_mask[:, :-1]
        if loss_ctx is not None:
            self._check_transform(loss_ctx.loss_cfg)
        has_router_loss = loss_ctx is not None and self.training and router.wants_router_loss(head.lm)
        positions = None if position_ids is None else _of_one_row(position_ids, input_ids)[:, :-1]
        output = self._trunk_output(head, input_ids[:, :-1], mask, positions, with_router=has_router_loss)
        hidden, weight, bias = head.inputs(output.last_hidden_state)
        if loss_ctx is None:
            return token_logprobs(
                hidden,
                weight,
                input_ids[:, 1:],
                bias,
                chunk_size=score_chunk,
                temperature=temperature,
                entropy="metric" if entropy else False,
                **self._settings,
            )
        loss, metrics = loss_ctx.forward(hidden, weight, bias)
        if not has_router_loss:
            return loss, metrics
        return _with_router_loss(loss, metrics, head.lm, output.router_logits, mask, auxiliary_weight)

    def inside(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Return ``function(lm, *args, **kwargs)`` with the full weights gathered, as in a forward: for generation.

        Under `fully_shard` the embedding and the head are complete only inside a forward of the policy, so calling
        ``policy.lm`` directly fails with mixed tensors; this method counts as a forward. All ranks must call it.
        """
        return function(self.lm, *args, **kwargs)

    def fitted(self, loss_cfg: AnyLossConfig) -> AnyLossConfig:
        """Return `loss_cfg` with the logit transform of this model filled in.

        Raises:
            ConfigError: it has another scale or soft cap than the model.
        """
        defaults = {name: type(loss_cfg).model_fields[name].default for name in self._settings}
        unset = {name: value for name, value in self._settings.items() if getattr(loss_cfg, name) == defaults[name]}
        missing = {name: value for name, value in unset.items() if value != defaults[name]}
        fitted = loss_cfg.model_copy(update=missing) if missing else loss_cfg
        self._check_transform(fitted)
        return fitted

    @property
    def _settings(self) -> dict[str, Any]:
        return {"logit_scale": self.transform.scale, "softcap": self.transform.softcap}

    def _check_transform(self, loss_cfg: Any) -> None:
        for name, value in self._settings.items():
            configured = getattr(loss_cfg, name, value)
            if configured != value:
                raise ConfigError(
                    f"loss.{name}={configured}, but {type(self.head.lm).__name__} has {name}={value}; do not set "
                    f"loss.{name} (the training command fills it in), or in a custom loop use loss_cfg = "
                    "policy.fitted(loss_cfg)"
                )

    def _raw_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        head = self.head
        return F.linear(*head.inputs(self._trunk_output(head, input_ids, attention_mask).last_hidden_state))

    def _trunk_output(
        self, head: Head, input_ids: Tensor, mask: Tensor, packed: Tensor | None = None, *, with_router: bool = False
    ) -> Any:
        """Return what the trunk makes of a batch; `packed` are the positions of a packed row."""
        options: dict[str, Any] = {
            "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0) if packed is None else packed,
            "use_cache": False,  # nothing is generated, so keys and values are not needed
        }
        if with_router:
            options["output_router_logits"] = True
        accepted = inspect.signature(getattr(head.trunk, "forward", head.trunk)).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        options = {name: value for name, value in options.items() if takes_any or name in accepted}
        attended = mask if packed is None else attention_masks(head.trunk, packed)
        return head.trunk(input_ids=input_ids, attention_mask=attended, **options)


def _of_one_row(position_ids: Tensor, input_ids: Tensor) -> Tensor:
    if len(input_ids) != 1 or position_ids.shape != input_ids.shape:
        raise DataError(
            f"position_ids has shape {list(position_ids.shape)}, but input_ids has {list(input_ids.shape)}; packed "
            "sequences lie end to end in one row, so both must be [1, T]"
        )
    return position_ids


def _with_router_loss(
    loss: Tensor, metrics: Any, lm: Any, router_logits: Any, mask: Tensor, weight: Tensor | float | None
) -> tuple[Tensor, Any]:
    """Add the model's load-balancing loss, times its coefficient and the weight of this micro-batch."""
    if router.balancing_loss_of(lm) is None or weight is None:
        router.warn_left_out(lm)
        return loss, metrics
    unscaled, tokens = router.router_loss(lm, router_logits, mask), mask.sum()
    if not bool(tokens):  # a rank without tokens: the mean over them is 0/0
        unscaled = sum((part.sum() * 0 for part in router_logits), loss.new_zeros(()))
    share = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device) * router.router_coef(lm)
    tokens = tokens * (share != 0)  # an empty micro-batch has one attended row only to run the trunk
    measured = {"router_loss": Mean(unscaled.detach().double() * tokens, tokens.double())}
    return loss + share * unscaled.to(loss), {**(metrics or {}), **measured}


@torch.no_grad()
def check_head(policy: Policy, vocab_size: int) -> None:
    """Compare head(trunk(x)) with the model's logits on a few tokens, and set ``policy.transform``.

    Some models scale or cap their logits after the head (Granite, Cohere, Gemma 2). The settings of the
    config are tried first: multiplied, divided, with and without. A soft cap far above all logits of these tokens
    changes them by less than rounding does; then the config is trusted.

    Args:
        policy: not yet wrapped or sharded.
        vocab_size: vocabulary size of the tokenizer; some of its first tokens are used.

    Raises:
        ConfigError: they differ; names the transform that would make them equal, if there is one.
    """
    device = next(policy.parameters()).device
    input_ids = torch.arange(1, 6, device=device).remainder(vocab_size).unsqueeze(0)
    mask = torch.ones_like(input_ids)
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()  # dropout would draw twice
    try:
        raw = policy._raw_logits(input_ids, mask)
        theirs = policy.lm(input_ids=input_ids, attention_mask=mask).logits
    finally:
        for module, was_training in modes:  # some may be frozen in evaluation on purpose
            module.training = was_training
    tolerance = TOLERANCE.get(raw.dtype, 1e-4)
    raw, theirs = raw.float(), theirs.float()
    if raw.shape != theirs.shape or not bool(raw.isfinite().all() & theirs.isfinite().all()):
        raise DataError(
            f"{type(policy.lm).__name__} gives logits {list(theirs.shape)}, its head {list(raw.shape)}; they must have "
            "the same shape and be finite"
        )
    candidates = [policy.transform]
    if not policy.is_transform_explicit:
        candidates += [*transforms_of(policy.head.lm), LogitTransform()]
    for candidate in candidates:
        if difference(candidate(raw), theirs) <= tolerance:
            policy.transform = candidate
            return
    raise ConfigError(_mismatch_message(policy, raw, theirs, tolerance))


def _mismatch_message(policy: Policy, raw: Tensor, theirs: Tensor, tolerance: float) -> str:
    name = type(policy.head.lm).__name__
    fit = fitted_transform(raw, theirs, tolerance)
    if fit is None:
        return (
            f"{name} changes its logits after the head in a way that is neither a scale nor a soft cap (largest "
            f"difference {difference(raw, theirs):.2g} of the largest logit); its log-probabilities would be wrong "
            "here; use another model, or pass hidden states and weight to the losses in a custom loop"
        )
    settings, does = [], []
    if fit.scale != 1:
        is_division = abs(fit.scale) < 1 and abs(1 / fit.scale - round(1 / fit.scale)) < 1e-3
        does.append(f"divides its logits by {1 / fit.scale:.4g}" if is_division else f"scales them by {fit.scale}")
        settings.append(("logit_scale", fit.scale))
    if fit.softcap is not None:
        does.append(f"caps its logits at {fit.softcap}")
        settings.append(("softcap", fit.softcap))
    model_settings = " and ".join(f"model.{key}={value}" for key, value in settings or [("logit_scale", 1.0)])
    loss_settings = " and ".join(f"loss.{key}={value}" for key, value in settings or [("logit_scale", 1.0)])
    explicit = f", unlike transform={policy.transform} of Policy" if policy.is_transform_explicit else ""
    return (
        f"{name} changes its logits after the head: it {' and '.join(does) or 'leaves them alone'}{explicit}; set "
        f"{model_settings} (Policy(lm, transform=...)); in a custom loop without Policy, {loss_settings}"
    )
