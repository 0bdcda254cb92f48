"""Composing and checking the Hydra tree, with errors that name the nearest right key; no torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from toolkit.benchmark.config import BenchConfig
from toolkit.diagnosis import choices_composed, diagnose, first_line, groups_in, unknown_choice
from toolkit.errors import ConfigError, listed
from toolkit.functional.registry import policy_loss
from toolkit.losses.config import BaseLossConfig, BaseRLLossConfig, CELossConfig
from toolkit.losses.config_opd import OPDLossConfig
from toolkit.overrides import (
    adapted,
    check_policy_loss_keys,
    is_of_loss,
    own_folders,
    parse,
    plugins_in,
    policy_loss_has_a_group,
    sweep_jobs,
    with_folder,
)
from toolkit.plugins import class_at, load_plugins, why_it_failed
from toolkit.run_config import RunConfig
from toolkit.schema import located
from toolkit.schemas import BEHAVIOUR, conf_dir, register_schemas
from toolkit.settings import settings_in

ROOTS = {"config": "", "loss_only": "", "bench": "bench"}
"""The configurations that a command composes, and the group that belongs to that command alone."""
MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
"""What Hydra raises over an override or a YAML file that is wrong."""
BENCH_GROUPS = ("aggregation", "bench", "kl", "loss", "policy_loss")
BENCH_KEYS = ("bench", "loss", "plugins", "rollout")
NOT_IN_BENCH = ("temperature", "logit_scale", "softcap", "ignore_idx", "entropy_coef", "drop_zero_advantage")
OF_COMMANDS = ("launcher", "sweeper", "help", "hydra_help", "hydra_logging", "output")
"""Hydra's own groups, which a command needs and a configuration does not; each takes time to compose."""
READ_BY = {
    "policy_loss": "policy_loss_cfg",
    "kl": "use_kl_loss",
    "aggregation": "aggregation",
    "correction": "correction",
}
"""The field of a loss config that a group of choices is for."""
MAX_CHECKED_JOBS = 32
"""Jobs of a multirun that are checked beforehand; each checks itself again when it starts."""


def compose_config(
    overrides: Sequence[str], *, root: str = "config", config_dir: str | os.PathLike[str] | None = None
) -> DictConfig:
    """Compose ``conf/`` with `overrides`; may be called again and again in one process, inside Hydra or not.

    Args:
        overrides: as on the command line.
        root: which of `ROOTS`.
        config_dir: a folder with configuration of the user's own beside ours, as ``--config-dir``.

    Raises:
        ConfigError: an override names a choice or a key that does not exist; the message names the nearest right one.
    """
    return _compose(with_folder(overrides, config_dir), root)[0]


def compose_loss(overrides: Sequence[str], *, config_dir: str | os.PathLike[str] | None = None) -> DictConfig:
    """Compose as `compose_config` does, but of the groups that say something of the loss alone if that is enough.

    It takes half the time, and the loss is the same. The whole is composed where an override is about something else,
    and where ``conf/local/default.yaml``, which may set anything, is there.
    """
    overrides = with_folder(overrides, config_dir)
    is_enough = all(map(is_of_loss, parse(overrides))) and not Path(conf_dir(), "local", "default.yaml").is_file()
    return _compose(overrides, "loss_only" if is_enough else "config")[0]


_losses: dict[tuple[str, ...], tuple[int, BaseLossConfig]] = {}
"""Losses composed before: overrides -> the state of the registries then, and the loss."""


def load_loss(overrides: Sequence[str], *, config_dir: str | os.PathLike[str] | None = None) -> BaseLossConfig:
    """Return the loss that `overrides` pick; the same list again takes no composing.

    Raises:
        ConfigError: as `compose_config` and `build_config`.
    """
    key = tuple(overrides)
    # Files of the user's own may change between two calls, and so may the environment that an interpolation reads.
    is_fixed = config_dir is None and not any("$" in one or "hydra." in one for one in key)
    if is_fixed and key in _losses:
        load_plugins(plugins_in(parse(key)))
        if _losses[key][0] == register_schemas():
            return _losses[key][1]
    loss = build_loss(compose_loss(overrides, config_dir=config_dir))
    if is_fixed:
        _losses[key] = register_schemas(), loss
    return loss


def _compose(overrides: Sequence[str], root: str) -> tuple[DictConfig, list[str]]:
    """Compose one job; return also its overrides as Hydra takes them."""
    parsed = parse(overrides)
    check_policy_loss_keys(parsed, lambda loss: Path(conf_dir(), "loss", f"{loss}.yaml").is_file())
    load_plugins(plugins_in(parsed))
    register_schemas()
    known = BENCH_KEYS if root == "bench" else list(RunConfig.model_fields)
    with _own_hydra():
        taken = adapted(overrides)
        touched = any(str(o.key_or_group).startswith("hydra") and o.key_or_group != "hydra.searchpath" for o in parsed)
        spared = [] if touched else [f"~hydra/{group}" for group in OF_COMMANDS]
        try:
            cfg = compose(root, overrides=[*taken, *spared])
        except MISTAKES as error:
            groups = groups_of(root, *own_folders(parsed))
            wrong = unknown_choice(parsed, groups)
            if wrong is not None:
                raise ConfigError(wrong) from None
            base = choices_composed(parsed, groups, root)
            _check_targets(parsed, base)
            _check_where_options_are(parsed, base)
            again = _with_unlisted(taken, parsed, base)
            mistake = diagnose(parsed, error, groups, base)
            if again == taken:
                raise ConfigError(mistake) from None
            try:
                taken, cfg = again, compose(root, overrides=[*again, *spared])
            except MISTAKES:
                raise ConfigError(mistake) from None
    _check_where_options_are(parsed, cfg)  # Hydra 1.4 follows the interpolation and sets them
    if "loss_type" not in cfg.policy_loss:
        raise ConfigError(
            "policy_loss has no loss_type; write in its file which policy loss its options are for, such as "
            "loss_type: vanilla"
        )
    _check_unread(parsed, cfg, known)
    return cfg, taken


def _check_targets(parsed: Sequence[Override], base: DictConfig) -> None:
    """Raise if the class of a part that an override sets cannot be imported: its settings are not known then."""
    for group in {str(override.key_or_group).partition(".")[0] for override in parsed}:
        node = base.get(group)
        if isinstance(node, DictConfig) and "_target_" in node:
            _target_class(group, node)


def _check_where_options_are(parsed: Sequence[Override], base: DictConfig) -> None:
    """Raise if an option of the policy loss is looked for inside a loss whose file takes it from the group."""
    for override in parsed:
        is_inside = str(override.key_or_group).startswith("loss.policy_loss_cfg")
        if is_inside and OmegaConf.is_interpolation(base.loss, "policy_loss_cfg"):
            raise policy_loss_has_a_group(override)


def _with_unlisted(overrides: list[str], parsed: Sequence[Override], base: DictConfig) -> list[str]:
    """Let Hydra add the fields that a config class has and the YAML file of the choice does not list."""
    unlisted = {setting.key for setting in settings_in(base) if not setting.is_listed}
    result = []
    for text, override in zip(overrides, parsed, strict=True):
        key = str(override.key_or_group)
        is_bare = not (override.is_add() or override.is_force_add() or override.is_delete() or text.startswith("++"))
        result.append(f"++{text}" if is_bare and key in unlisted else text)
    return result


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Initialise Hydra for our folder, also inside a program that uses Hydra itself, and leave that as it was."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=conf_dir(), **BEHAVIOUR):
            yield
    finally:
        GlobalHydra.instance().hydra = outer  # fetched anew: Hydra may have put another instance in place


def build_config(cfg: DictConfig) -> RunConfig:
    """Instantiate every part of a composed configuration.

    Raises:
        ConfigError: a value has the wrong type, is out of range or conflicts with another; names the override.
    """
    parts: dict[str, Any] = {"seed": cfg.seed, "plugins": tuple(cfg.plugins)}
    parts["loss"] = build_loss(cfg)
    for name, field in RunConfig.model_fields.items():
        if name not in parts:
            parts[name] = _build_part(cfg, name, field.annotation)
    return RunConfig(**parts)


def build_loss(cfg: DictConfig) -> BaseLossConfig:
    """Instantiate the loss of a composed configuration, its policy loss checked first and named by its own key."""
    chosen = OmegaConf.to_container(cfg.policy_loss, resolve=True)
    assert isinstance(chosen, dict)
    with located("policy_loss"):
        loss = policy_loss(chosen["loss_type"])
        loss.options({str(key): value for key, value in chosen.items() if key != "loss_type"}, where="policy_loss")
    fields = getattr(_target_class("loss", cfg.loss), "model_fields", {})
    is_unlisted = "policy_loss_cfg" in fields and "policy_loss_cfg" not in cfg.loss  # in a file of the user's own
    return _build_part(cfg, "loss", BaseLossConfig, **({"policy_loss_cfg": chosen} if is_unlisted else {}))


def _build_part(cfg: DictConfig, name: str, expected: Any, **unlisted: Any) -> Any:
    try:
        values = OmegaConf.to_container(cfg[name], resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {first_line(error)}") from None
    target = _target_class(name, values)
    assert isinstance(values, dict)
    fields = {**unlisted, **{str(key): value for key, value in values.items() if key != "_target_"}}
    missing = [key for key, value in fields.items() if value == "???"]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} has no default; set it: {name}.{missing[0]}=...")
    if not issubclass(target, expected):
        raise ConfigError(f"{name}._target_={values['_target_']!r} is not a {expected.__name__}")
    with located(name):
        return target(**fields)


def _target_class(name: str, values: Any) -> type:
    target = values.get("_target_") if isinstance(values, (dict, DictConfig)) else None
    if target is None:
        raise ConfigError(f"{name} is empty or has no _target_; choose {listed(_choices(name))}")
    try:
        return class_at(str(target))
    except (Exception, SystemExit) as error:
        why = first_line(error) if isinstance(error, ImportError) else why_it_failed(error)
        raise ConfigError(f"{name}._target_={target!r} is not a class that can be imported: {why}") from None


def check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> list[RunConfig]:
    """Check a command line as far as possible without torch: choices, keys, types and ranges.

    Returns:
        The configuration of each job; of the first `MAX_CHECKED_JOBS` of a multirun, of none for a sweep that only its
        sweeper can list.

    Raises:
        ConfigError: the first thing found wrong.
    """
    return check_command_line(overrides, multirun=multirun)[0]


def check_command_line(overrides: Sequence[str], *, multirun: bool = False) -> tuple[list[RunConfig], list[str]]:
    """Check as `check_overrides` does; return also the overrides as Hydra takes them.

    Raises:
        ConfigError: the first thing found wrong.
    """
    jobs: Iterable[Sequence[str]] = [overrides]
    sweeps = [override.input_line for override in parse(overrides) if override.is_sweep_override()]
    if sweeps and not multirun:
        raise ConfigError(f"{sweeps[0]} names several values; add -m to run one job for each")
    if multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m runs one job after the other in one process; start each job of several processes by itself"
        )
    if multirun:
        jobs = islice(sweep_jobs(overrides) or [], MAX_CHECKED_JOBS)
    configs, added = [], set()
    for job in jobs:
        cfg, taken = _compose(job, "config")
        configs.append(build_config(cfg))
        added |= {text.removeprefix("++").partition("=")[0] for text in taken if text.startswith("++")}
    as_added = [f"++{text}" if text.partition("=")[0] in added else text for text in overrides]
    return configs, as_added


def build_bench(cfg: DictConfig) -> tuple[BenchConfig, BaseLossConfig]:
    """Instantiate what the benchmark needs of its composed configuration.

    Raises:
        ConfigError: as `build_config`.
    """
    loss = build_loss(cfg)
    lacking = loss.not_in_training if isinstance(loss, BaseRLLossConfig) else None
    if lacking is not None:
        raise ConfigError(
            f"the loss reads {lacking} of the items, which the benchmark does not make up; choose another policy loss, "
            "or a KL estimated from the sampled token"
        )
    for name, field in type(loss).model_fields.items():
        value = getattr(loss, name)
        if name in NOT_IN_BENCH and value != field.default:
            raise ConfigError(
                f"loss.{name}={value} is not in the benchmark, for not every variant has it; leave it at "
                f"{field.default!r}" + ("; the cap of all variants is bench.softcap" if name == "softcap" else "")
            )
    return _build_part(cfg, "bench", BenchConfig), loss


def _check_unread(parsed: Iterable[Override], cfg: DictConfig, known: Sequence[str]) -> None:
    """Refuse settings that nothing reads."""
    stray = [str(key) for key in cfg if key not in known and key != "policy_loss"]
    if stray:
        raise ConfigError(f"{stray[0]} is not a setting; the top level has: {', '.join(known)}")
    target = _target_class("loss", cfg.loss)
    fields = getattr(target, "model_fields", {})
    if "bypass" in str(next((o.value() for o in parsed if o.key_or_group == "correction"), "")):
        name = str(cfg.policy_loss.loss_type)
        if "anchor" not in policy_loss(name).options_model.model_fields:
            raise ConfigError(
                f"correction=bypass takes ratios to the sampler's probabilities, but policy loss {name!r} has none; "
                "leave it out, or choose a policy loss with the option 'anchor'"
            )
    is_its_own = "policy_loss_cfg" in cfg.loss and not OmegaConf.is_interpolation(cfg.loss, "policy_loss_cfg")
    for override in parsed:
        group = str(override.key_or_group).split(".")[0]
        if group == "policy_loss" and is_its_own:
            raise ConfigError(
                f"{override.input_line} has no effect: the file of this loss brings its policy loss along; change its "
                "options by loss.policy_loss_cfg.<option>=..., or write policy_loss_cfg: ${policy_loss} there"
            )
        if group == "advantage" and issubclass(target, (OPDLossConfig, CELossConfig)):
            raise ConfigError(f"{override.input_line} has no effect: {target.__name__} reads no advantages")
        if group in READ_BY and READ_BY[group] not in fields and override.value() not in ("none", None):
            raise ConfigError(
                f"{override.input_line} has no effect: {cfg.loss._target_.rpartition('.')[2]} has no "
                f"{READ_BY[group]}; leave it out, or choose a loss that has, such as loss=grpo"
            )


def _choices(group: str) -> list[str]:
    return groups_in(conf_dir()).get(group, [])


def groups_of(root: str, *folders: str) -> dict[str, list[str]]:
    """Return the groups of a command with their choices: of the benchmark those that it composes, else all others.

    Args:
        root: which of `ROOTS`.
        folders: configuration folders of the user's own.
    """
    found = groups_in(conf_dir(), *folders)
    if root == "bench":
        return {group: found[group] for group in BENCH_GROUPS}
    return {group: choices for group, choices in found.items() if group not in ROOTS.values()}
