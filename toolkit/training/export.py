"""The trained model as a folder that transformers (or PEFT) loads: weights, config, generation config, tokenizer."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from toolkit.distributed import rank
from toolkit.models import lora
from toolkit.models.bars import without_bars
from toolkit.training.disk import flush_tree, replace_folder
from toolkit.training.full_state import full_weights
from toolkit.training.output_dir import MODEL
from toolkit.training.sharding import is_sharded, unwrapped
from toolkit.training.trainer import Trainer


def check_export(trainer: Trainer) -> None:
    """Raise if the model cannot be exported as configured, before any work.

    Raises:
        ConfigError: its adapters cannot be merged, or there are none.
    """
    if trainer.config.training.export_merged:
        lora.check_mergeable(unwrapped(trainer.policy).lm)


def export_model(output_dir: Path, trainer: Trainer) -> None:
    """Write the model as it is now to the folder ``model`` of a run, replacing an older one; all ranks call it.

    ``AutoModelForCausalLM.from_pretrained`` loads it, or ``AutoPeftModelForCausalLM`` adapters that are not merged.
    It is written under another name and renamed, so a crash leaves the older one.
    """
    policy, is_merged = trainer.policy, trainer.config.training.export_merged
    is_part = lora.has_adapters(unwrapped(policy).lm) and not is_merged
    weights = full_weights(policy, trained_only=is_part)  # all processes: sharded weights are gathered
    if rank() == 0:
        fresh = output_dir / f"{MODEL}.writing"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with without_bars():
                _write(policy, {name.removeprefix("lm."): tensor for name, tensor in weights.items()}, fresh, is_merged)
            trainer.tokenizer.save_pretrained(fresh)
            mode = (fresh / "tokenizer_config.json").stat().st_mode  # safetensors writes for the user alone
            for file in fresh.iterdir():
                file.chmod(mode)
            flush_tree(fresh)
        except BaseException:  # a full disk
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        replace_folder(fresh, output_dir / MODEL)
    trainer.accelerator.wait_for_everyone()


def _write(policy: Any, weights: dict[str, Any], folder: Path, is_merged: bool) -> None:
    generation_config = unwrapped(policy).generation_config
    lm = policy._skeleton[0].lm if is_sharded(policy) else unwrapped(policy).lm
    if is_merged:
        if is_sharded(policy):
            lm = copy.deepcopy(lm)
            lm.load_state_dict(weights, assign=True)
        else:
            lm = lora.on_cpu(lm)
        lora.merged(lm).save_pretrained(folder)
    elif lora.has_adapters(lm):
        settings = lm.peft_config[lm.active_adapter]
        base = Path(settings.base_model_name_or_path or "")
        if base.is_dir():  # the folder may be read from elsewhere
            settings.base_model_name_or_path = str(base.resolve())
        lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form for a description, not filled in
    else:
        lm.save_pretrained(folder, state_dict=weights)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
