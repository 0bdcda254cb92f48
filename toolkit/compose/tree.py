"""Composing the Hydra tree and checking a command line, with errors that name the nearest valid key; no torch here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from toolkit.compose.build import build_config, build_loss
from toolkit.compose.checks import check_settings, check_targets, check_where_options_are
from toolkit.compose.diagnosis import (
    choices_composed,
    diagnose,
    groups_in,
    unknown_choice,
    unreadable_file,
    what_hydra_says,
)
from toolkit.compose.grammar import check_repeated, check_values, is_list
from toolkit.compose.overrides import (
    adapted,
    check_policy_loss_keys,
    config_folders_in,
    is_of_loss,
    parse,
    plugins_in,
    sweep_jobs,
    with_folder,
)
from toolkit.compose.plugins import load_plugins
from toolkit.compose.schemas import BEHAVIOUR, conf_dir, register_schemas
from toolkit.compose.screen import adds_what_exists, choices_of, missing_keys, with_values
from toolkit.compose.settings import settings_in
from toolkit.compose.sweepers import check_sweepers
from toolkit.errors import ConfigError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.schema import Config
from toolkit.training.run_config import RunConfig


@dataclass(frozen=True)
class Root:
    """What a command composes."""

    name: str
    """Name of the YAML file in ``conf/``."""
    keys: tuple[str, ...] = tuple(RunConfig.model_fields)
    """Its top-level settings."""
    groups: tuple[str, ...] | None = None
    """Groups that it composes; None: all but those in `OF_ONE_COMMAND`."""
    schemas: tuple[type[Config], ...] = ()
    """Config classes that only this command uses."""


class Folder(NamedTuple):
    """Where the results of a command go."""

    path: str | None
    """None: only Hydra knows, because it depends on the number of a job."""
    is_dated: bool
    """Whether the time is part of the path, so every run gets a new folder."""


class Composed(NamedTuple):
    """A composed configuration."""

    cfg: DictConfig
    overrides: list[str]
    """In the form that Hydra accepts."""
    run_dir: Folder
    sweep_dir: Folder


class CommandLine(NamedTuple):
    """What a checked command line asks for."""

    configs: list[RunConfig]
    """The configuration of each job, at most `MAX_CHECKED_JOBS`; none for a sweep that only its sweeper can list."""
    overrides: list[str]
    """In the form that Hydra accepts."""
    folder: Folder
    """Of the run, or of all jobs of a multirun."""


Build = Callable[[DictConfig], object]
TRAIN = Root("config")
LOSS_ONLY = Root("loss_only")
OF_ONE_COMMAND = ("bench",)
"""Groups that only one command composes."""
MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra raises for a wrong override or YAML file."""
OF_COMMANDS = ("launcher", "sweeper", "help", "hydra_help", "hydra_logging", "output")
"""Groups of Hydra that a command needs and a configuration does not; each takes time to compose."""
MAX_CHECKED_JOBS = 32
"""Jobs of a multirun that are checked in advance; each job checks itself again when it starts."""


def compose_config(
    overrides: Sequence[str], *, root: Root = TRAIN, config_dir: str | os.PathLike[str] | None = None
) -> DictConfig:
    """Compose ``conf/`` with `overrides`; may be called repeatedly in one process, inside Hydra or not.

    `root` is what the command composes, and `config_dir` a folder with additional YAML files, as ``--config-dir``.

    Raises:
        ConfigError: an override names a choice or a key that does not exist; the message names the nearest valid one.
    """
    return compose_run(overrides, root=root, config_dir=config_dir).cfg


def compose_run(
    overrides: Sequence[str],
    *,
    root: Root = TRAIN,
    config_dir: str | os.PathLike[str] | None = None,
    build: Build | None = None,
) -> Composed:
    """Compose as `compose_config`, and say where the results go.

    `build` makes objects of a configuration: called before Hydra composes, it reports a wrong value at once.
    """
    return _compose(with_folder(overrides, config_dir), root, build)


def compose_loss(
    overrides: Sequence[str], *, config_dir: str | os.PathLike[str] | None = None, build: Build = build_loss
) -> DictConfig:
    """Compose like `compose_config`, but only the groups that affect the loss if that is enough.

    This takes half the time and gives the same loss. Everything is composed if an override is about something else,
    or if ``conf/local/default.yaml`` exists, because that file may set anything.
    """
    overrides = with_folder(overrides, config_dir)
    is_enough = all(map(is_of_loss, parse(overrides))) and not Path(conf_dir(), "local", "default.yaml").is_file()
    return _compose(overrides, LOSS_ONLY if is_enough else TRAIN, build).cfg


_losses: dict[tuple[str, ...], tuple[int, BaseLossConfig]] = {}
"""Losses composed earlier: overrides -> (`register_schemas()` at that time, the loss)."""


def load_loss(overrides: Sequence[str], *, config_dir: str | os.PathLike[str] | None = None) -> BaseLossConfig:
    """Return the loss that `overrides` select; the same overrides are not composed again.

    Raises:
        ConfigError: as `compose_config` and `build_config`.
    """
    key = tuple(overrides)
    # A user's files may change between two calls, and so may environment variables that an interpolation reads.
    is_fixed = config_dir is None and not any("$" in override or "hydra." in override for override in key)
    if is_fixed and key in _losses:
        load_plugins(plugins_in(parse(key)))
        if _losses[key][0] == register_schemas():
            return _losses[key][1]
    loss = build_loss(compose_loss(overrides, config_dir=config_dir))
    if is_fixed:
        _losses[key] = register_schemas(), loss
    return loss


def _compose(overrides: Sequence[str], root: Root, build: Build | None = None) -> Composed:
    """Compose one job; `build` what it describes first from the screened configuration, where that is possible."""
    parsed = parse(overrides)
    check_values(parsed, (*root.keys, "policy_loss"))
    check_policy_loss_keys(parsed)
    load_plugins(plugins_in(parsed))
    register_schemas(root.schemas)
    taken = adapted(overrides)
    screened = _screened(parsed, taken, root)
    if screened is not None and build is not None:
        build(screened)
    with _hydra_of_conf():
        keys = {str(override.key_or_group) for override in parsed} - {"hydra.searchpath"}
        sets_hydra = any(key.startswith("hydra") for key in keys)
        removed = [] if sets_hydra else [f"~hydra/{group}" for group in OF_COMMANDS]
        try:
            cfg = compose(root.name, overrides=[*taken, *removed], return_hydra_config=True)
        except MISTAKES as error:
            groups = groups_of(root, *config_folders_in(parsed))
            wrong = unknown_choice(parsed, groups) or unreadable_file(parsed, config_folders_in(parsed))
            if wrong is not None:
                raise ConfigError(wrong) from None
            base = choices_composed(parsed, groups, root.name)
            mistake = _wrong_key(parsed, base, root) or what_hydra_says(error)
            again = _with_unlisted(taken, parsed, base)
            if again == taken:
                raise ConfigError(mistake) from None
            try:
                taken, cfg = again, compose(root.name, overrides=[*again, *removed], return_hydra_config=True)
            except MISTAKES:
                raise ConfigError(mistake) from None
        folders = _folder(cfg, "run"), _folder(cfg, "sweep")
        with open_dict(cfg):
            del cfg["hydra"]
    check_settings(parsed, cfg, root.keys)
    return Composed(cfg, taken, *folders)


def _screened(parsed: Sequence[Override], taken: Sequence[str], root: Root) -> DictConfig | None:
    """Return the configuration as `toolkit.compose.screen` composes it; None if only Hydra can.

    Raises:
        ConfigError: an override sets what does not exist, or nothing reads.
    """
    base = choices_of(parsed, root.name, config_folders_in(parsed))
    if base is None:
        return None
    check_where_options_are(parsed, base)
    missing = missing_keys(base, [o for o, text in zip(parsed, taken, strict=True) if not text.startswith("++")])
    if missing or adds_what_exists(base, parsed):
        mistake = _wrong_key(parsed, base, root)
        if mistake is not None:
            raise ConfigError(mistake)
    cfg = with_values(base, parsed)
    check_settings(parsed, cfg, root.keys)
    return cfg


def _wrong_key(parsed: Sequence[Override], base: DictConfig, root: Root) -> str | None:
    """Say which override sets what `base`, composed without values, does not have; None if it is another mistake."""
    check_targets(parsed, base)
    check_where_options_are(parsed, base)
    return diagnose(parsed, groups_of(root, *config_folders_in(parsed)), base)


def _with_unlisted(overrides: list[str], parsed: Sequence[Override], base: DictConfig) -> list[str]:
    """Let Hydra add the fields that a config class has but the YAML file of the choice does not list."""
    unlisted = {setting.key for setting in settings_in(base) if not setting.is_listed}
    result = []
    for text, override in zip(overrides, parsed, strict=True):
        key = str(override.key_or_group)
        is_bare = not (override.is_add() or override.is_force_add() or override.is_delete() or text.startswith("++"))
        result.append(f"++{text}" if is_bare and key in unlisted else text)
    return result


def _folder(cfg: DictConfig, kind: str) -> Folder:
    """Return the folder ``hydra.<kind>.dir``.

    Raises:
        ConfigError: it is empty.
    """
    written = OmegaConf.to_container(cfg.hydra[kind], resolve=False)
    assert isinstance(written, dict)
    try:
        path = cfg.hydra[kind].dir
    except (OmegaConfBaseException, ValueError):
        return Folder(None, is_dated=False)
    if path in (None, ""):
        raise ConfigError(f"hydra.{kind}.dir is empty; name a folder, or leave it out for a new one in outputs/")
    return Folder(str(path), is_dated="${now:" in str(written["dir"]))


@contextlib.contextmanager
def _hydra_of_conf() -> Iterator[None]:
    """Initialise Hydra for ``conf/``, also inside a program that uses Hydra, and restore its Hydra afterwards."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=conf_dir(), **BEHAVIOUR):
            yield
    finally:
        GlobalHydra.instance().hydra = outer  # looked up again: Hydra may have replaced the instance


def check_command_line(
    overrides: Sequence[str], *, multirun: bool = False, check: Callable[[RunConfig], object] | None = None
) -> CommandLine:
    """Check a command line as far as possible without torch: choices, keys, types and ranges.

    `check` raises for a valid configuration that cannot run here; it is called before Hydra composes, if possible, so
    call it for each of the configurations, too.

    Raises:
        ConfigError: something is wrong; the message is about the first mistake.
    """
    jobs: Iterable[Sequence[str]] = [overrides]
    sweeps = [override.input_line for override in parse(overrides) if override.is_sweep_override()]
    if sweeps and not multirun:
        key, _, values = str(sweeps[0]).partition("=")
        if "." in key and re.fullmatch(r"-?\d+,\d+", values):
            raise ConfigError(f"{sweeps[0]}: a decimal has a point; try: {key}={values.replace(',', '.')}")
        if is_list(key):
            raise ConfigError(f"{sweeps[0]}: a list has square brackets; try: {key}=[{values}]")
        both = f"write {key}=[{values}] to apply all, or " if key == "correction" else ""
        raise ConfigError(f"{sweeps[0]} names several values; {both}add -m to run one job for each")
    if multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m runs one job after another in one process, but WORLD_SIZE is above 1; start each job separately"
        )
    check_repeated(parse(overrides))
    check_sweepers(parse(overrides))
    if multirun:
        jobs = islice(sweep_jobs(overrides) or [], MAX_CHECKED_JOBS)

    def build(cfg: DictConfig) -> None:
        config = build_config(cfg)
        if check is not None:
            check(config)

    configs, added, folder = [], set(), Folder(None, is_dated=False)
    for job in jobs:
        composed = _compose(job, TRAIN, build)
        configs.append(build_config(composed.cfg))
        added |= {text.removeprefix("++").partition("=")[0] for text in composed.overrides if text.startswith("++")}
        folder = composed.sweep_dir if multirun else composed.run_dir
    as_added = [f"++{text}" if text.partition("=")[0] in added else text for text in overrides]
    return CommandLine(configs, as_added, folder)


def groups_of(root: Root, *folders: str) -> dict[str, list[str]]:
    """Return the groups of a command with their choices, those of additional configuration folders included."""
    groups = groups_in(conf_dir(), *folders)
    if root.groups is not None:
        return {group: groups[group] for group in root.groups}
    return {group: choices for group, choices in groups.items() if group not in OF_ONE_COMMAND}
