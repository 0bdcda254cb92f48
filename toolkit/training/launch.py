"""The training command as a function: in a notebook, and under accelerate's ``notebook_launcher``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from toolkit.config import build_config, compose_config
from toolkit.errors import ConfigError
from toolkit.overrides import parse
from toolkit.schemas import conf_dir
from toolkit.training.doors import check_environment, make_output_dir

if TYPE_CHECKING:
    from toolkit.training.report import Summary


def train(overrides: Sequence[str] = ()) -> Summary:
    """Train as ``toolkit-train`` does with the same overrides, and return the summary; needs the extra [train].

    In a notebook ``train(["kl=k3", "seed=1"])`` runs in its process. ``accelerate.notebook_launcher(train, (["kl=k3",
    "seed=1"],), num_processes=2)`` runs it in two and returns nothing: read summary.json in the output directory.

    Args:
        overrides: as on the command line; ``hydra.run.dir=...`` names the output directory.

    Raises:
        ConfigError: an override is wrong; nothing has been started yet.
        LaunchError: the processes do not work together, or would change the scale of the loss.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"train() takes a list of overrides, not a string: train([{overrides!r}])")
    started = time.time()
    cfg = compose_config(overrides)
    config = build_config(cfg)
    check_environment(config)
    output_dir = _output_dir(overrides, cfg)
    if int(os.environ.get("RANK", "0")) == 0:  # the others are told which one it is
        make_output_dir(output_dir)
    from accelerate.state import AcceleratorState, GradientState  # loads torch

    from toolkit.training.run import run

    try:
        return run(config, cfg, started=started, output_dir=output_dir)
    finally:  # the next run may have other settings; notebook_launcher wants no trace of an earlier one
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _output_dir(overrides: Sequence[str], cfg: DictConfig) -> str:
    """Return the output directory that Hydra would make: as the overrides say, else as ``conf/config.yaml`` does."""
    given = [override.value() for override in parse(overrides) if override.key_or_group == "hydra.run.dir"]
    if not given:
        return str(OmegaConf.load(Path(conf_dir(), "config.yaml")).hydra.run.dir)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return str(OmegaConf.create({**settings, "output_dir": str(given[-1])}).output_dir)
