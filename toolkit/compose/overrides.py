"""Reading overrides of the command line before anything is composed; no torch here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from toolkit.errors import ConfigError

PRESET = "preset/"
"""What the names of losses that are another project's definition begin with."""
LOSS_GROUPS = ("loss", "policy_loss", "kl", "aggregation", "correction", "mode", "plugins", "hydra")
"""Overrides that say something of the loss; the sampler's temperature is its own, too."""


def adapted(overrides: Sequence[str]) -> list[str]:
    """Return overrides as Hydra takes them: an option that a preset's file does not name is added to its policy loss.

    The registry knows all options of a loss, and refuses others.
    """
    if not any(own.startswith(f"loss={PRESET}") for own in overrides):
        return list(overrides)
    return [f"++{own}" if own.startswith("loss.policy_loss_cfg.") else own for own in overrides]


def options_first(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return a command line with its options before its overrides: argparse takes them in one piece only.

    Args:
        words: the command line without the program.
        parser: has a positional argument ``overrides`` that takes any number.
    """
    read, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest):
        return list(words)  # an option that does not exist; the parser says so
    overrides = [*read.overrides, *rest]
    options = list(words)
    for override in reversed(overrides):  # from the end: a word of an option stands before
        del options[len(options) - 1 - options[::-1].index(override)]
    return [*options, *overrides]


def policy_loss_has_a_group(override: Override) -> ConfigError:
    """Return the error of a policy loss's option that is looked for inside the loss, where the group's is read."""
    option = str(override.key_or_group).partition("policy_loss_cfg")[2].lstrip(".") or "<option>"
    return ConfigError(
        f"{override.input_line}: on the command line the policy loss has a group of its own; "
        f"write policy_loss=<name> and policy_loss.{option}=..."
    )


def check_policy_loss_keys(parsed: Sequence[Override], is_shipped: Callable[[str], bool]) -> None:
    """Refuse the way to a policy loss's options that is not read: presets have them inside, other losses beside.

    Args:
        parsed: the overrides.
        is_shipped: whether a loss is one of this package; of the user's own only its file says where they are.
    """
    loss = next((str(o.value()) for o in parsed if o.key_or_group == "loss"), "grpo")
    preset = loss if loss.startswith(PRESET) else None
    for override in parsed:
        group, _, option = str(override.key_or_group).partition(".")
        value = override.value()
        chosen = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if group == "correction" and not option and (len(set(chosen)) < len(chosen) or "none" in chosen[1:]):
            raise ConfigError(f"{override.input_line}: name each correction once, and none by itself")
        if group == "correction" and "bypass" in chosen and (preset is not None or loss == "opd"):
            where = "loss.policy_loss_cfg.anchor" if preset is not None else "loss.anchor"
            raise ConfigError(
                f"correction=bypass sets policy_loss.anchor, which loss={loss} does not read; write {where}=rollout"
            )
        if preset is None and str(override.key_or_group).startswith("loss.policy_loss_cfg") and is_shipped(loss):
            raise policy_loss_has_a_group(override)
        if preset is not None and group == "policy_loss":
            raise ConfigError(
                f"{override.input_line} has no effect: loss={preset} brings its policy loss along; change its options "
                f"by loss.policy_loss_cfg.{option or '<option>'}=..., or take loss=grpo and choose all parts yourself"
            )


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return the parsed overrides.

    Raises:
        ConfigError: one is not of the form that Hydra reads.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{first}; an override looks like key.subkey=value or group=choice") from None


def is_of_loss(override: Override) -> bool:
    """Whether an override says something of the loss alone."""
    key = str(override.key_or_group)
    if key == "kl" and str(override.value()).endswith("_in_reward"):
        return False
    return key.partition(".")[0] in LOSS_GROUPS or key == "rollout.temperature"


def with_folder(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> list[str]:
    """Return the overrides with a configuration folder of the user's own added to those that they name.

    Raises:
        ConfigError: there is no such folder.
    """
    if config_dir is None:
        return list(overrides)
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={os.fspath(config_dir)}: there is no such folder (looked for {folder})")
    parsed = parse(overrides)
    rest = [text for text, one in zip(overrides, parsed, strict=True) if one.key_or_group != "hydra.searchpath"]
    folders = ", ".join(_quoted(f"file://{one}") for one in [*own_folders(parsed), folder])
    return [*rest, f"hydra.searchpath=[{folders}]"]


def _quoted(text: str) -> str:
    """Return a text as an override may hold it whatever signs it has."""
    return "'" + text.replace("'", "\\'") + "'"


def own_folders(parsed: Iterable[Override]) -> list[str]:
    """Return the configuration folders that the command line adds to ours (``--config-dir``, ``hydra.searchpath``)."""
    found = [o.value() for o in parsed if o.key_or_group == "hydra.searchpath"]
    return [str(folder).removeprefix("file://") for folders in found if isinstance(folders, list) for folder in folders]


def output_dir_in(overrides: Sequence[str]) -> str | None:
    """Return the output directory that the command line asks for, None when it leaves that to the configuration."""
    for override in parse(overrides):
        if override.key_or_group == "hydra.run.dir":
            value = str(override.value())
            return None if "${" in value else value
    return None


def plugins_in(parsed: Iterable[Override]) -> list[str]:
    """Return the plugins that the command line names."""
    for override in parsed:
        if override.key_or_group == "plugins":
            value = override.value()
            return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return []


def sweep_jobs(overrides: Sequence[str]) -> Iterable[Sequence[str]] | None:
    """Return the jobs of a multirun, or None for kinds of sweep that only their sweeper can list."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        batches = BasicSweeper.split_arguments(parse(overrides), max_batch_size=None)
    except (HydraException, AssertionError, AttributeError, TypeError):
        return None
    return (job for batch in batches for job in batch)
