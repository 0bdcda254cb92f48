"""Reading overrides of the command line before anything is composed; no torch here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from toolkit.compose.grammar import LOOKS_LIKE, is_override, quoted, why_not_parsed
from toolkit.compose.schemas import conf_dir
from toolkit.errors import ConfigError, listed, nearest

FIXED = ("--config-name", "-cn", "--config-path", "-cp")
"""Options of Hydra that choose another root of the configuration."""
PRESET = "preset/"
"""Prefix of losses that follow another project's definition."""
LOSS_GROUPS = ("loss", "policy_loss", "kl", "aggregation", "correction", "mode", "plugins", "hydra")
"""Keys whose overrides affect only the loss, as does ``rollout.temperature``, which the loss reads, too."""


def adapted(overrides: Sequence[str]) -> list[str]:
    """Return overrides as Hydra accepts them: options that a preset's file does not list are added to its policy loss.

    The registry knows all options of a loss, and rejects others.
    """
    if not any(override.startswith(f"loss={PRESET}") for override in overrides):
        return list(overrides)
    return [f"++{override}" if override.startswith("loss.policy_loss_cfg.") else override for override in overrides]


def options_first(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return a command line with its options before its overrides, because argparse needs the overrides in one piece.

    The parser has a positional argument ``overrides`` that takes any number.

    Raises:
        ConfigError: there is no such option; or an override is written as one: ``--policy_loss=gspo``.
    """
    check_options(arguments, parser)
    read, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("-"):
            index = list(arguments).index(argument)
            following = next(iter(arguments[index + 1 :]), None)
            if "=" in argument or is_override(argument.lstrip("-")):
                raise ConfigError(why_not_parsed(argument, following))
    if any(argument.startswith("-") for argument in rest):
        return list(arguments)  # an unknown one-letter option, which the parser reports
    overrides = [*read.overrides, *rest]
    options = list(arguments)
    for override in reversed(overrides):  # from the end: an equal value of an option comes earlier
        del options[len(options) - 1 - options[::-1].index(override)]
    return [*options, *overrides]


def check_options(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise if an option does not exist, or is the beginning of several.

    Raises:
        ConfigError: the message says what to write instead.
    """
    options = parser._option_string_actions
    for argument, following in zip_longest(arguments, arguments[1:]):
        option = argument.partition("=")[0]
        name = option.lstrip("-")
        if option in FIXED and option in options:
            value = argument.partition("=")[2] or following or "..."
            raise ConfigError(
                f"{option} is fixed; try: experiment={value} or loss={value} for a choice, --config-dir for a folder "
                "with your YAML files"
            )
        if not option.startswith("--") or option in options or not name:
            continue
        begun = [each for each in options if each.startswith(option)]
        if len(begun) == 1:
            continue  # argparse completes it
        as_option = f"--{name.replace('_', '-')}"
        if as_option in options:
            raise ConfigError(f"{option} is not an option; try: {as_option}")
        if is_override(name):
            raise ConfigError(why_not_parsed(argument, following))
        best = nearest(option, options)
        names = listed(begun or [best]) if begun or best else ""
        hint = f" (did you mean {names}?)" if names else ""
        raise ConfigError(
            f"{option} is not an option{hint}; --help lists all, and settings are written without dashes: key=value"
        )


def policy_loss_has_a_group(override: Override) -> ConfigError:
    """Return the error for an option of the policy loss that is set inside a loss that reads it from the group."""
    option = str(override.key_or_group).partition("policy_loss_cfg")[2].lstrip(".") or "<option>"
    return ConfigError(
        f"{override.input_line} has no effect: this loss reads its policy loss from the group policy_loss; "
        f"write policy_loss=<name> and policy_loss.{option}=..."
    )


def check_policy_loss_keys(parsed: Sequence[Override]) -> None:
    """Raise if options of the policy loss are set where nothing reads them: presets read loss.*, others policy_loss.*.

    For a custom loss only its file shows where they are, so it is checked after composing.
    """
    loss = next((str(o.value()) for o in parsed if o.key_or_group == "loss"), "grpo")
    preset = loss if loss.startswith(PRESET) else None
    is_shipped = Path(conf_dir(), "loss", f"{loss}.yaml").is_file()
    for override in parsed:
        group, _, option = str(override.key_or_group).partition(".")
        value = override.value()
        chosen = [str(choice) for choice in value] if isinstance(value, list) else [str(value)]
        if group == "correction" and not option and (len(set(chosen)) < len(chosen) or "none" in chosen[1:]):
            raise ConfigError(f"{override.input_line}: name each correction once; 'none' cannot be combined")
        if group == "correction" and "bypass" in chosen and (preset is not None or loss == "opd"):
            where = "loss.policy_loss_cfg.anchor" if preset is not None else "loss.anchor"
            raise ConfigError(
                f"correction=bypass sets policy_loss.anchor, which loss={loss} does not read; write {where}=rollout"
            )
        if preset is None and str(override.key_or_group).startswith("loss.policy_loss_cfg") and is_shipped:
            raise policy_loss_has_a_group(override)
        if preset is not None and group == "policy_loss":
            raise ConfigError(
                f"{override.input_line} has no effect: loss={preset} defines its policy loss; change its options with "
                f"loss.policy_loss_cfg.{option or '<option>'}=..., or use loss=grpo and choose each part yourself"
            )


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return the parsed overrides.

    Raises:
        ConfigError: Hydra cannot parse one of them.
    """
    parser = OverridesParser.create()
    parsed = []
    for text, following, after in zip_longest(overrides, overrides[1:], overrides[2:]):
        following = f"= {after or 'value'}" if following == "=" else following
        if text.startswith("="):
            raise ConfigError(f"{text} has no key; {LOOKS_LIKE}")
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            raise ConfigError(why_not_parsed(text, following)) from None
    return parsed


def is_of_loss(override: Override) -> bool:
    """Whether an override affects only the loss."""
    key = str(override.key_or_group)
    if key == "kl" and str(override.value()).endswith("_in_reward"):
        return False
    return key.partition(".")[0] in LOSS_GROUPS or key == "rollout.temperature"


def with_folder(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> list[str]:
    """Return the overrides with a configuration folder added to those that they name.

    Raises:
        ConfigError: the folder does not exist.
    """
    if config_dir is None:
        return list(overrides)
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={os.fspath(config_dir)} is not a folder (looked for {folder})")
    parsed = parse(overrides)
    rest = [text for text, o in zip(overrides, parsed, strict=True) if o.key_or_group != "hydra.searchpath"]
    folders = ", ".join(quoted(f"file://{path}") for path in [*config_folders_in(parsed), folder])
    return [*rest, f"hydra.searchpath=[{folders}]"]


def config_folders_in(parsed: Iterable[Override]) -> list[str]:
    """Return the configuration folders that the command line adds (``--config-dir``, ``hydra.searchpath``)."""
    return [folder.removeprefix("file://") for folder in _values_of("hydra.searchpath", parsed)]


def plugins_in(parsed: Iterable[Override]) -> list[str]:
    """Return the plugins that the command line names."""
    return _values_of("plugins", parsed)


def _values_of(key: str, parsed: Iterable[Override]) -> list[str]:
    """Return what the overrides set `key` to, each element of a list by itself."""
    values = [override.value() for override in parsed if override.key_or_group == key]
    return [str(element) for value in values for element in (value if isinstance(value, list) else [value])]


def sweep_jobs(overrides: Sequence[str]) -> Iterable[Sequence[str]] | None:
    """Return the jobs of a multirun, or None for a sweep that only its sweeper can list."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        batches = BasicSweeper.split_arguments(parse(overrides), max_batch_size=None)
    except (HydraException, AssertionError, AttributeError, TypeError):
        return None
    return (job for batch in batches for job in batch)
