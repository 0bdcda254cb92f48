"""Models in Hugging Face's format: loaded, checked, and prepared for what is trained of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from toolkit.errors import ConfigError, first_line
from toolkit.head.logits import LogitTransform
from toolkit.models import lora as adapters
from toolkit.models.bars import without_bars
from toolkit.models.location import Source
from toolkit.models.lora_config import LoraConfig
from toolkit.models.policy import Policy, check_head
from toolkit.models.tokenizer import LOADING, load_tokenizer


def build_pretrained(
    source: Source,
    *,
    dtype: str,
    attention: str | None,
    gradient_checkpointing: bool,
    freeze_head: bool,
    lora: LoraConfig,
    quantization: str | None,
    pad_token: str | None,
    eos_token: str | None,
    logit_scale: float | None,
    softcap: float | None,
    trust_remote_code: bool,
) -> tuple[Policy, Any]:
    """Load a causal language model and its tokenizer, and check the transform after its head.

    For the settings see `toolkit.models.config.CausalLMConfig`.

    Raises:
        ConfigError: nothing can be loaded, weights or special tokens are missing, or the model changes its logits
            after the head in a way that neither its config nor the arguments name.
    """
    where = f"model.path={source.adapter or source.model}"
    special = {"eos_token": eos_token, "pad_token": pad_token}
    tokenizer = load_tokenizer(source.tokenizer, where, special, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = adapters.quantization(quantization, options["dtype"])
    lm = _language_model(source.model, trust_remote_code=trust_remote_code, **options)
    _check_size(lm, tokenizer, where)
    if gradient_checkpointing:
        if not lm.supports_gradient_checkpointing:
            raise ConfigError(f"model.gradient_checkpointing: {type(lm).__name__} does not support it; remove it")
        enable = (
            getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        )  # its name before
        enable({"use_reentrant": False})
    if source.adapter is not None:
        lm = adapters.with_saved_adapters(lm, source.adapter, source.model)
    elif lora.r is not None:
        lm = adapters.with_new_adapters(lm, lora)
    is_explicit = logit_scale is not None or softcap is not None
    policy = Policy(lm, LogitTransform(logit_scale or 1.0, softcap) if is_explicit else None)
    _sample_what_is_scored(lm)
    if freeze_head:
        policy.head.module.requires_grad_(False)
    _check_trained(policy)
    check_head(policy, len(tokenizer))
    return policy, tokenizer


def _language_model(path: str, **options: Any) -> Any:
    """Load the weights; every weight of the model must be in the files."""
    where = f"model.path={path}"
    try:
        with without_bars(is_wanted_on_terminals=True):
            lm, report = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:
        raise _explained(error, where, options.get("attn_implementation")) from None
    differing = sorted(report["mismatched_keys"])
    if differing:
        name, stored, expected = differing[0]
        raise ConfigError(
            f"{where}: {name} is {list(stored)} in the files, but {list(expected)} by config.json; they do not belong "
            "together: save the model again (save_pretrained)"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{where}: the files lack {len(missing)} weights of {type(lm).__name__} (the first: {missing[0]}), which "
            "would be random; save the whole model, or correct architectures in config.json"
        )
    return lm


def _explained(error: Exception, where: str, attention: str | None) -> Exception:
    """Return a `ConfigError` for an error of loading, and other errors as they are."""
    text = " ".join(str(error).split())
    if "does not recognize this architecture" in text:
        kind = text.partition("model type `")[2].partition("`")[0]
        return ConfigError(
            f"{where}: the installed transformers does not know model_type {kind!r} of its config.json; upgrade "
            "transformers, or correct the name"
        )
    if "Unrecognized configuration class" in text:
        kind = text.partition("class '")[2].partition("'")[0].rpartition(".")[2].removesuffix("Config")
        return ConfigError(
            f"{where} is a {kind or 'model of another kind'}, which is not a causal language model; choose one that "
            "AutoModelForCausalLM loads"
        )
    if attention is not None and re.search("attn_implementation|attention|flash", text, re.IGNORECASE):
        return ConfigError(
            f"model.attention={attention} does not work with this model or machine: {first_line(error).rstrip('.')}; "
            "choose sdpa or eager"
        )
    if isinstance(error, LOADING) or type(error).__name__ == "SafetensorError":
        again = "; download or save it again" if "header" in text else ""
        return ConfigError(f"{where} cannot be loaded: {first_line(error)}{again}")
    return error


def _sample_what_is_scored(lm: Any) -> None:
    """Leave only special tokens in the generation config: penalties and beams would change what is sampled."""
    base = lm.get_base_model() if adapters.has_adapters(lm) else lm
    config = base.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    base.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})


def _check_size(lm: Any, tokenizer: Any, where: str) -> None:
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, but the model knows {rows}; they do not belong "
            "together: save the tokenizer of this model, or resize its embeddings (resize_token_embeddings)"
        )


def _check_trained(policy: Policy) -> None:
    """Raise if weights would be trained in float16, where the squares in Adam's denominator vanish."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise ConfigError(
            "model.dtype=float16: weights cannot be trained in float16 (squared gradients round to 0); choose "
            "bfloat16, or float32 with training.mixed_precision=fp16, or add adapters: model.lora.r=8"
        )
    if not trained:
        raise ConfigError("no weight of the model is trained; remove model.freeze_head or add adapters: model.lora.r=8")
