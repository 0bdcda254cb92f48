"""LoRA adapters by PEFT on a causal language model: new ones, saved ones, merged ones."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.errors import ConfigError, first_line

if TYPE_CHECKING:
    from toolkit.models.lora_config import LoraConfig


MOST_SHOWN = 200
"""Characters of PEFT's message in ours."""


def has_adapters(lm: Any) -> bool:
    """Whether PEFT wraps the model, so only adapters (and whole layers beside them) are trained."""
    return hasattr(lm, "get_base_model") and hasattr(lm, "peft_config")


def with_new_adapters(lm: Any, config: LoraConfig) -> Any:
    """Return the model with adapters that change nothing yet; the model itself is frozen.

    Raises:
        ConfigError: a name in the config fits no layer.
    """
    import peft

    assert config.r is not None
    known = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    asked = config.target_modules
    names = asked if isinstance(asked, str) and asked not in known else [asked] if isinstance(asked, str) else [*asked]
    linear = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    has = f"its linear layers are {', '.join(sorted(linear))}"
    # PEFT would skip a name that no layer has, without a word.
    for field, listed in (("modules_to_save", config.modules_to_save), ("target_modules", names)):
        missing = [] if isinstance(listed, str) else [n for n in listed if n.rpartition(".")[2] not in known]
        if missing:
            raise ConfigError(f"model.lora.{field}: the model has no layer {missing[0]!r}; {has}")
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        modules_to_save=list(config.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return _quietly(peft.get_peft_model, lm, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules={names}: {first_line(error)[:MOST_SHOWN].rstrip('.')}; {has}"
        ) from None


def with_saved_adapters(lm: Any, path: str, base: str) -> Any:
    """Return the model with the adapters of a folder or hub id, to be trained further; `base` names the model.

    Raises:
        ConfigError: they belong to another model, or cannot be read.
    """
    import peft

    with warnings.catch_warnings():
        # It would start those layers anew, with a warning.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        try:
            return _quietly(peft.PeftModel.from_pretrained, lm, path, is_trainable=True)
        except (RuntimeError, ValueError, OSError, KeyError, UserWarning) as error:
            lines = str(error).strip().splitlines()
            why = next((line.strip() for line in lines if "size mismatch" in line), first_line(error))
    raise ConfigError(
        f"model.path={path}: its adapters do not fit {base} ({why[:MOST_SHOWN]}); set model.base_path "
        "to the model that they were trained on"
    )


def quantization(bits: str, dtype: Any) -> Any:
    """Return the settings of a quantized model: NF4 with double quantization (QLoRA), or LLM.int8.

    Raises:
        ConfigError: there is no GPU.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; 2022, arXiv 2208.07339.
    """
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ConfigError(f"model.quantization={bits} needs a GPU, and there is none; remove it")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _quietly(function: Any, lm: Any, *args: Any, **options: Any) -> Any:
    """Return ``function(lm, ...)`` of PEFT without its use of a name that transformers calls deprecated."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        if getattr(lm, "is_quantized", False):  # norms in float32
            lm = peft.prepare_model_for_kbit_training(lm, use_gradient_checkpointing=False)
        return function(lm, *args, **options)


def check_mergeable(lm: Any) -> None:
    """Raise if adapters cannot become part of the model's weights.

    Raises:
        ConfigError: there are none, the model is quantized, or an adapter is on a head that shares the embedding's
            weight.
    """
    if not has_adapters(lm):
        raise ConfigError("training.export_merged has no effect: the model has no adapters; remove it")
    base = lm.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ConfigError(
            "training.export_merged: adapters are not merged into quantized weights, whose rounding would change them; "
            "export the adapters, and merge them into the model in bfloat16"
        )
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    plain = [getattr(layer, "base_layer", getattr(layer, "original_module", layer)) for layer in (head, embedding)]
    if (head, embedding) != tuple(plain) and plain[0].weight is plain[1].weight:
        raise ConfigError(
            "training.export_merged: an adapter is on the head, which shares its weight with the embedding, and "
            "merging would change both; leave lm_head out of model.lora, or export the adapters"
        )


def merged(lm: Any) -> Any:
    """Return a model without adapters that computes the same; `lm`, which PEFT wraps, is changed."""
    return lm.merge_and_unload(safe_merge=True)


def on_cpu(lm: Any) -> Any:
    """Return a copy of the model on the CPU, without a second copy on the device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=p.requires_grad) for p in lm.parameters()
    }
    memo |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in lm.buffers()}
    return copy.deepcopy(lm, memo)
