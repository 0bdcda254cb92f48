"""Find the trunk and the head of a causal language model, and the weight that the head multiplies by.

Duck-typed for models of transformers and adapters of PEFT; imports neither.

Legend: T positions, D hidden width, V vocabulary, r summed rank of the active LoRA adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ConfigError, DataError
from toolkit.head.logits import LogitTransform

HeadTensors = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [..., D], weight [V, D] and bias [V] or None, for `token_logprobs` or a loss context."""

_SCALES = (("logits_scaling", -1), ("logit_scale", 1), ("lm_head_multiplier", 1), ("output_multiplier", 1))
"""Config fields for a factor on the logits; -1 where the model divides by it."""
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
"""Config fields for a soft cap of the logits."""
_WRAPPERS = {
    "FullyShardedDataParallel": "FullyShardedDataParallel (FSDP 1) flattens the head's weight; use FSDP 2: "
    "training.sharding=fsdp2, or torch.distributed.fsdp.fully_shard on the Policy",
    "DataParallel": "torch.nn.DataParallel copies the model to each device in every forward and gathers the losses; "
    "use one process for each device: torchrun --nproc_per_node N",
    "DistributedDataParallel": "the language model is already wrapped in DistributedDataParallel, whose hooks would "
    "not see the head; create Policy(lm) first and wrap that",
}
"""Wrappers that hide the head's weight from the loss, and what to do instead."""


@dataclass(frozen=True)
class Head:
    """A causal language model in two parts: the trunk, which computes hidden states, and the head."""

    lm: Any
    """The model itself, without PEFT's wrapper."""
    trunk: Callable[..., Any]
    """Takes the model's arguments and returns an object with `last_hidden_state`, [B, T, D]."""
    module: nn.Module
    """The head as the model calls it, including adapters."""
    transform: LogitTransform
    """Scale and soft cap of the logits, from the model's config."""

    def inputs(self, hidden: Tensor) -> HeadTensors:
        """Return hidden states, weight and bias whose product is the head's output for `hidden` [..., D].

        Call it inside each forward of the wrapped model: adapters may be switched, merged or disabled, and a sharded
        weight is gathered only there. A LoRA adapter widens hidden states and weight by its rank: ``[h, s A h] [W,
        B]^T = h W^T + s h A^T B^T``. So its dropout works, and a small update is not lost by rounding ``W + s B A`` to
        bf16 (there, an update of 1 % of the weight's size kept 73 % of its effect on the logits). It costs a copy of
        the weight, V (D + r) elements, in each forward; and the gradient of the widened weight is accumulated in fp32,
        V (D + r) more, although W itself is frozen and keeps none.

        Raises:
            ConfigError: the head has another kind of adapter, or its weight is quantized or sharded by a back-end that
                is not supported.
            DataError: the weight is a shard, because this is not inside the wrapped model's forward.
        """
        layer, adapters = _unwrapped(self.module)
        weight, bias = self._checked(layer)
        if not adapters:
            return hidden, weight, bias
        parts, columns = [hidden], [weight]
        for lora in adapters:
            low = lora.down(lora.dropout(hidden.to(lora.down.weight.dtype))) * lora.scaling
            parts.append(low.to(hidden.dtype))
            columns.append(lora.up.weight.to(weight.dtype))
            if lora.up.bias is not None:
                more = lora.scaling * lora.up.bias.to(weight.dtype)
                bias = more if bias is None else bias + more
        return torch.cat(parts, -1), torch.cat(columns, -1), bias

    def _checked(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = layer.weight, getattr(layer, "bias", None)
        _refuse_sharded(weight)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ConfigError(
                f"the head {type(layer).__name__} has a weight of {list(weight.shape)} {weight.dtype}; it must be a "
                "floating-point [V, D]; exclude the head from quantization (llm_int8_skip_modules=['lm_head'])"
            )
        if hasattr(weight, "device_mesh") and any(type(m).__name__.startswith("FSDP") for m in self.lm.modules()):
            raise DataError(
                "the head is sharded by FSDP and was not gathered; call the loss inside the wrapped model's forward "
                "(toolkit.models.policy.Policy), or call another of its methods through Policy.inside"
            )
        return weight, bias


@dataclass(frozen=True)
class _Lora:
    down: nn.Linear
    """[r, D], the paper's A."""
    up: nn.Linear
    """[V, r], the paper's B; may have a bias."""
    scaling: float
    dropout: nn.Module


def find_head(lm: Any) -> Head:
    """Find trunk, head and logit transform of a causal language model.

    `lm` is a model like those of transformers, with `base_model` (or `get_decoder`) and `get_output_embeddings`; or
    PEFT's wrapper of one.

    Raises:
        ConfigError: the model has no trunk or no head, PEFT changes the input (prompt learning), or an adapter or the
            back-end that wraps the model is not supported.
    """
    refuse_wrappers(lm)
    inner = lm
    if hasattr(lm, "get_base_model"):  # PEFT: its `base_model` is the tuner, which is not the trunk
        if getattr(getattr(lm, "active_peft_config", None), "is_prompt_learning", False):
            raise ConfigError(
                "PEFT's prompt learning puts virtual tokens before the text, and the trunk alone does not; use LoRA"
            )
        inner = lm.get_base_model()
    # OPT's get_decoder() skips a projection of its base model.
    trunk = getattr(inner, "base_model", None)
    if trunk is None or trunk is inner:
        trunk = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if trunk is None or trunk is inner or module is None:
        missing = "head (get_output_embeddings)" if module is None else "trunk (base_model)"
        raise ConfigError(
            f"{type(inner).__name__} has no {missing}; use a causal language model (AutoModelForCausalLM), or call "
            "the loss with hidden states and a weight"
        )
    head = Head(inner, trunk, module, next(iter(transforms_of(inner)), LogitTransform()))
    _unwrapped(module)
    return head


def transforms_of(lm: Any) -> Iterator[LogitTransform]:
    """Yield the transforms that the model's config may mean, the likeliest first; nothing if it sets none.

    A name alone is ambiguous: most models divide by `logits_scaling`, a few multiply. The start-up check
    (`toolkit.models.policy.check_head`) picks the one that reproduces the model's logits.
    """
    config = getattr(lm, "config", None)
    if config is None:
        return
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    scales = [(float(s), sign) for name, sign in _SCALES if (s := getattr(config, name, None)) not in (None, 0, 1)]
    # An attribute of the model: Cohere reads its config once, when it is built.
    model_scale = getattr(lm, "logit_scale", None)
    if isinstance(model_scale, float | int) and model_scale not in (0, 1):
        scales = [(float(model_scale), 1), *[(scale, sign) for scale, sign in scales if scale != model_scale]]
    for scale, sign in scales:
        yield LogitTransform(scale**sign, softcap)
    for scale, sign in scales:
        yield LogitTransform(scale**-sign, softcap)
    if softcap is not None:
        yield LogitTransform(1.0, softcap)


def refuse_wrappers(module: Any) -> None:
    """Raise if a wrapper or back-end hides the head's weight from the loss.

    Raises:
        ConfigError: FSDP 1, DataParallel or ZeRO-3 holds the weights; the message suggests an alternative.
    """
    if not isinstance(module, nn.Module):
        return
    for part in module.modules():
        names = {kind.__name__ for kind in type(part).__mro__}
        for name, message in _WRAPPERS.items():
            if name in names:
                raise ConfigError(message)
    for parameter in module.parameters():
        _refuse_sharded(parameter)


def _refuse_sharded(weight: Tensor) -> None:
    if hasattr(weight, "ds_id") and hasattr(weight, "ds_status"):
        raise ConfigError(
            "DeepSpeed ZeRO-3 partitioned the weights and gathers them only in the forward of each module, not for "
            "the head's backward; use ZeRO-1 or ZeRO-2, or training.sharding=fsdp2, which shards as much"
        )
    if getattr(weight, "_fsdp_flattened", False):
        raise ConfigError("FullyShardedDataParallel (FSDP 1) holds the head; use FSDP 2: training.sharding=fsdp2")


def _unwrapped(module: Any) -> tuple[Any, list[_Lora]]:
    """Return the layer that holds the weight, and the LoRA adapters that are active on it."""
    adapters: list[_Lora] = []
    while True:
        is_off = bool(getattr(module, "disable_adapters", False))
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            module = module.original_module if is_off or not active else module.modules_to_save[active[0]]
        elif hasattr(module, "base_layer"):
            if module.merged and is_off:
                module.unmerge()  # as its forward does
            if not is_off and not module.merged:
                adapters += _lora_adapters(module)
            module = module.base_layer
        elif hasattr(module, "token_adapter"):
            raise _unsupported("trainable_token_indices")
        elif isinstance(getattr(module, "weight", None), Tensor):
            return module, adapters
        else:
            raise ConfigError(
                f"the head is a {type(module).__name__} without a weight [V, D]; it must be a linear layer, with or "
                "without LoRA"
            )


def _lora_adapters(layer: Any) -> list[_Lora]:
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or hasattr(layer, "lora_E"):
        raise _unsupported(type(layer).__name__)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            raise _unsupported("DoRA" if layer.use_dora.get(name) else type(variant).__name__)
    return [_Lora(layer.lora_A[n], layer.lora_B[n], float(layer.scaling[n]), layer.lora_dropout[n]) for n in names]


def _unsupported(kind: str) -> ConfigError:
    return ConfigError(
        f"the adapter on the head ({kind}) is not a plain LoRA adapter, and the loss cannot use its weight; exclude "
        "the head (exclude_modules=['lm_head']), train all of it (modules_to_save=['lm_head']) or merge the adapter"
    )
