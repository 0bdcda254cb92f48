"""Where a model is loaded from, and whether all of its files are there; loads no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import ConfigError, a_type, did_you_mean, first_line

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has one."""
POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has not replaced by its content."""
INSTALL = {
    "peft": 'model.lora and adapters need the package peft: pip install "rl-loss-toolkit[lora]"',
    "bitsandbytes": "model.quantization needs the package bitsandbytes, and a GPU: pip install bitsandbytes",
}
HUB_TIMEOUT = 10.0
"""Seconds that the hub may take to answer whether it has a model."""
MOST_NAMED = 6
"""Files in a message."""
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


class Source(NamedTuple):
    """What is loaded: a folder or a hub id each."""

    model: str
    """Model and, without adapters, tokenizer."""
    adapter: str | None = None
    """Adapters on it, and the tokenizer."""

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: beside the adapters, if there is one."""
        adapter = self.adapter
        return self.model if adapter is None or not _has_any(Path(adapter), TOKENIZER) else adapter


def require(package: str) -> None:
    """Raise if a package is missing.

    Raises:
        ConfigError: it is; says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(INSTALL[package])


def locate(path: str, base_path: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Return the model, and the adapters if `path` holds adapters, after checking that their files are there.

    Args:
        path: folder or hub id of a model or of adapters.
        base_path: of the model that the adapters belong to; None: the one that their config names.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        ConfigError: there is no such folder or hub id, or a file is missing or cannot be read.
    """
    where = f"model.path={path}"
    folder = _folder(path, where)
    config = _adapter_config(path, folder, where)
    if config is None:
        if folder is not None:
            _check_model(folder, where, trust_remote_code)
            _check_tokenizer(folder, where)
        return Source(str(folder or path))
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where} holds adapters of type {config.get('peft_type')}; only LoRA can be trained here")
    if folder is not None and not list(folder.glob("adapter_model.*")):
        raise ConfigError(f"{where} has no adapter_model.safetensors; save the adapters again (save_pretrained)")
    base = base_path or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{where} holds adapters that name no base model; set model.base_path=...")
    of_base = f"model.base_path={base}" if base_path else f"{where}: its adapters belong to {base}, which"
    try:
        base_folder = _folder(base, of_base)
        is_adapter = _adapter_config(base, base_folder, of_base) is not None
    except ConfigError as error:
        hint = "" if base_path else "; if the model has moved, set model.base_path=..."
        raise ConfigError(f"{error}{hint}") from None
    if is_adapter:
        raise ConfigError(f"{of_base} holds adapters itself; merge them into their model first (merge_and_unload)")
    if base_folder is not None:
        _check_model(base_folder, of_base, trust_remote_code)
        if folder is not None and not _has_any(folder, TOKENIZER):
            _check_tokenizer(base_folder, of_base)
    return Source(str(base_folder or base), str(folder or path))


def _folder(path: str, where: str) -> Path | None:
    """Return the folder, or None if `path` can only be the id of a model on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ConfigError(f"{where} is a file; give the folder that holds it, with {CONFIG} and the tokenizer")
    if path.startswith(("/", ".", "~")) or path.endswith("/") or _HUB_ID.fullmatch(path) is None:
        raise ConfigError(
            f"{where} does not exist{_meant(folder)}; give a folder with {CONFIG}, weights and "
            "tokenizer, or a hub id such as Qwen/Qwen3-0.6B"
        )
    return None


def _meant(folder: Path) -> str:
    """Name a folder beside it with a similar name, if there is one."""
    return did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])


def _adapter_config(path: str, folder: Path | None, where: str) -> dict[str, Any] | None:
    """Return the config of adapters, None for a model; raise if `path` is the id of neither."""
    if folder is not None:
        file = folder / ADAPTER_CONFIG
        return _read(file, where) if file.is_file() else None
    import huggingface_hub as hub  # comes with transformers

    if isinstance(hub.try_to_load_from_cache(path, CONFIG), str):
        return None
    cached = hub.try_to_load_from_cache(path, ADAPTER_CONFIG)
    if not isinstance(cached, str):
        files = _files_on_hub(path, where)
        if ADAPTER_CONFIG not in files or CONFIG in files:
            return None
        cached = hub.hf_hub_download(path, ADAPTER_CONFIG)
    return _read(Path(cached), where)


def _files_on_hub(name: str, where: str) -> set[str]:
    """Return the files of a model or of adapters on the hub.

    Raises:
        ConfigError: the hub does not have it, does not show it, or cannot be reached.
    """
    import huggingface_hub as hub

    no_folder = f"{where} is not a folder{_meant(Path(name))}, and"
    if hub.constants.is_offline_mode():
        raise ConfigError(
            f"{no_folder} HF_HUB_OFFLINE=1 forbids a download; give a folder, or unset it once to fill the cache"
        )
    try:
        siblings = hub.HfApi().model_info(name, timeout=HUB_TIMEOUT).siblings
    except hub.errors.GatedRepoError:
        raise ConfigError(
            f"{where} is a gated model; accept its terms on its page and log in (hf auth login)"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{no_folder} the hub has no such model, or you may not read it; check the spelling, or log in for a "
            "private one (hf auth login)"
        ) from None
    except hub.errors.HfHubHTTPError as error:
        raise ConfigError(f"{no_folder} the hub answers: {first_line(error)}; give a folder or try again") from None
    except Exception as error:  # of the HTTP client, whose classes differ between versions
        raise ConfigError(
            f"{no_folder} the hub cannot be reached ({first_line(error)}); give the folder of a downloaded model, or "
            "check the network"
        ) from None
    return {file.rfilename for file in siblings or ()}


def _check_model(folder: Path, where: str, trust_remote_code: bool) -> None:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{where} has no {CONFIG}{_what_it_is(folder)}")
    config = _read(folder / CONFIG, where)
    code = config.get("auto_map") or {}
    if "AutoModelForCausalLM" in code and not trust_remote_code:
        module = str(code["AutoModelForCausalLM"]).partition(".")[0]
        raise ConfigError(
            f"{where} brings Python code for its model; read {folder / module}.py, then set "
            "model.trust_remote_code=true"
        )
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        raise ConfigError(f"{where} has no weights (*.safetensors){_what_it_is(folder)}")
    for index in folder.glob("*.index.json"):
        parts = set((_read(index, where).get("weight_map") or {}).values())
        missing = sorted(part for part in parts if not (folder / part).is_file())
        if missing:
            raise ConfigError(f"{where} lacks {_named(missing)}, which {index.name} lists; download it again")
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise ConfigError(f"{where}: {file.name} is a pointer of Git LFS, not the weights; run git lfs pull")


def _check_tokenizer(folder: Path, where: str) -> None:
    if not _has_any(folder, TOKENIZER):
        raise ConfigError(
            f"{where} has no tokenizer (tokenizer.json); save it beside the model: "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


def _what_it_is(folder: Path) -> str:
    """Say what a folder without a model is, if that is known, and what to write instead."""
    inside = [name for name in ("model", "checkpoint/model") if (folder / name / CONFIG).is_file()]
    inside += [name for name in ("model",) if (folder / name / ADAPTER_CONFIG).is_file()]
    if inside:
        return f"; did you mean model.path={folder / inside[0]}?"
    if (folder / "state.json").is_file() or (folder / "checkpoint" / "state.json").is_file():
        return f"; it is a checkpoint: continue its run with training.resume={folder}"
    if list(folder.glob("*.gguf")):
        return "; a GGUF file must be converted first: from_pretrained(folder, gguf_file=...), then save_pretrained"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"; it holds {_named(names)}" if names else "; the folder is empty"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _read(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file.name} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {file.name} must hold an object {{...}}, not {a_type(content)}")
    return content


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def cache_folder() -> Path:
    """Return the toolkit's folder in the user's cache; `XDG_CACHE_HOME` says where caches are."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "rl-loss-toolkit"
