"""Composing and checking the Hydra tree, with errors that name the nearest right key; no torch here.

A YAML file in ``conf/`` starts from ``/schema/<class>@_here_``: a node made from the config class, so that a default or
a field is written down once, in the class.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from toolkit.errors import ConfigError, did_you_mean, listed, nearest
from toolkit.functional.registry import policy_loss, policy_loss_names
from toolkit.losses.config import BaseLossConfig, CELossConfig, GRPOLossConfig
from toolkit.models.config import ModelConfig, PretrainedConfig, TinyLlamaConfig
from toolkit.rollout.config import RolloutConfig
from toolkit.schema import Config, located
from toolkit.tasks.config import SpellBackwardConfig, TaskConfig
from toolkit.training.config import (
    AdvantageConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrackerConfig,
    TrainingConfig,
    WarmupConfig,
)

SCHEMAS: tuple[type[Config], ...] = (
    CELossConfig,
    GRPOLossConfig,
    SpellBackwardConfig,
    TinyLlamaConfig,
    PretrainedConfig,
    AdvantageConfig,
    RolloutConfig,
    WarmupConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
    TrackerConfig,
)
READ_BY = {"policy_loss": "policy_loss_cfg", "kl": "use_kl_loss"}
"""The field of a loss config that a group of choices is for."""
MAX_CHECKED_JOBS = 32
"""Jobs of a multirun that are checked beforehand; each checks itself again when it starts."""


class RunConfig(Config):
    """Everything a training run needs, each part an instance of its config class."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of data, weights and sampling."""
    plugins: tuple[str, ...] = ()
    """Python files or modules that register losses, tasks or models of the user's own."""
    task: TaskConfig
    model: ModelConfig
    loss: BaseLossConfig
    advantage: AdvantageConfig
    rollout: RolloutConfig
    warmup: WarmupConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    training: TrainingConfig
    tracker: TrackerConfig


def conf_dir() -> str:
    """Return the folder of the configuration: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise ConfigError(f"no conf/config.yaml beside {here}: the installation is incomplete; reinstall the package")


def register_schemas() -> None:
    """Put every config class and every policy loss where the YAML files find them; safe to call again."""
    store = ConfigStore.instance()
    OmegaConf.register_new_resolver("toolkit_choices", _choices_text, replace=True)
    for schema in SCHEMAS:
        target = f"{schema.__module__}.{schema.__name__}"
        store.store(group="schema", name=schema.__name__, node={"_target_": target, **schema.defaults()})
    own_files = {path.stem for path in Path(conf_dir(), "policy_loss").glob("*.yaml")}
    for name in policy_loss_names():
        node = {"loss_type": name, **policy_loss(name).options_model.defaults()}
        store.store(group="schema/policy_loss", name=name, node=node)
        if name not in own_files:  # a plugin's loss is a choice without a file
            store.store(group="policy_loss", name=name, node=node)


def load_plugins(plugins: Iterable[str]) -> None:
    """Import the user's files or modules, once each.

    Raises:
        ConfigError: there is no such file or module.
    """
    for plugin in plugins:
        path = Path(plugin)
        name = path.stem if plugin.endswith(".py") else plugin
        if name in sys.modules:
            continue
        spec = None
        if plugin.endswith(".py"):
            spec = importlib.util.spec_from_file_location(name, path.resolve()) if path.is_file() else None
        else:
            try:
                spec = importlib.util.find_spec(name)
            except ModuleNotFoundError:
                spec = None
        if spec is None or spec.loader is None:
            raise ConfigError(
                f"plugins: {plugin!r} is neither a Python file nor a module that can be imported from here"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose ``conf/`` with `overrides`; may be called again and again in one process, inside Hydra or not.

    Raises:
        ConfigError: an override names a choice or a key that does not exist; the message names the nearest right one.
    """
    parsed = _parse(overrides)
    load_plugins(_plugins_in(parsed))
    register_schemas()
    with initialize_config_dir(config_dir=conf_dir(), version_base="1.3"):
        try:
            cfg = compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_diagnose(parsed, error)) from None
    _check_unread(parsed, cfg)
    return cfg


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
    given = OmegaConf.to_container(cfg.policy_loss, resolve=True)
    assert isinstance(given, dict)
    with located("policy_loss"):
        loss = policy_loss(given.pop("loss_type"))
        loss.options({str(key): value for key, value in given.items()}, where="policy_loss")
    return _build_part(cfg, "loss", BaseLossConfig)


def _build_part(cfg: DictConfig, name: str, expected: Any) -> Any:
    try:
        values = OmegaConf.to_container(cfg[name], resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or "_target_" not in values:
        choices = f"; choose {listed(_choices(name))}" if _choices(name) else ""
        raise ConfigError(f"{name}={values!r} is not a configuration of {name}{choices}")
    fields = {str(key): value for key, value in values.items() if key != "_target_"}
    missing = [key for key, value in fields.items() if value == "???"]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} has no default; set it: {name}.{missing[0]}=...")
    try:
        target = get_class(values["_target_"])
    except Exception as error:
        raise ConfigError(f"{name}._target_={values['_target_']!r} cannot be imported: {error}") from None
    if not issubclass(target, expected):
        raise ConfigError(f"{name}._target_={values['_target_']!r} is not a {expected.__name__}")
    with located(name):
        return target(**fields)


def check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> None:
    """Check a command line as far as possible without torch: choices, keys, types and ranges.

    Raises:
        ConfigError: the first thing found wrong.
    """
    jobs: Iterable[Sequence[str]] = [overrides]
    if multirun:
        found = _sweep_jobs(overrides)
        if found is None:
            return
        jobs = islice(found, MAX_CHECKED_JOBS)
    for job in jobs:
        build_config(compose_config(job))


def _check_unread(parsed: Iterable[Override], cfg: DictConfig) -> None:
    """Refuse choices that the chosen loss never reads."""
    fields = getattr(get_class(cfg.loss._target_), "model_fields", {}) if "_target_" in cfg.loss else {}
    for override in parsed:
        group = str(override.key_or_group).split(".")[0]
        if group in READ_BY and READ_BY[group] not in fields and override.value() not in ("none", None):
            raise ConfigError(
                f"{override.input_line} has no effect: {cfg.loss._target_.rpartition('.')[2]} has no "
                f"{READ_BY[group]}; leave it out, or choose a loss that has, such as loss=grpo"
            )


def _sweep_jobs(overrides: Sequence[str]) -> Iterable[Sequence[str]] | None:
    """Return the jobs of a multirun, or None for kinds of sweep that only their sweeper can list."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        batches = BasicSweeper.split_arguments(_parse(overrides), max_batch_size=None)
    except (HydraException, AssertionError, AttributeError, TypeError):
        return None
    return (job for batch in batches for job in batch)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{first}; an override looks like key.subkey=value or group=choice") from None


def _plugins_in(parsed: Iterable[Override]) -> list[str]:
    for override in parsed:
        if override.key_or_group == "plugins":
            value = override.value()
            return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return []


def _groups() -> dict[str, list[str]]:
    """Return every group of ``conf/`` with its choices, plugins' losses included."""
    groups: dict[str, list[str]] = {}
    for path in sorted(Path(conf_dir()).glob("*/*.yaml")):
        groups.setdefault(path.parent.name, []).append(path.stem)
    groups["policy_loss"] = sorted({*groups.get("policy_loss", []), *policy_loss_names()})
    return groups


def _choices_text() -> str:
    """Return the choices for --help; Hydra's own list would show the schema nodes, too."""
    return "\n".join(f"{group}: {', '.join(options)}" for group, options in sorted(_groups().items()))


def _choices(group: str) -> list[str]:
    return _groups().get(group, [])


def _diagnose(parsed: list[Override], error: Exception) -> str:
    """Say which override is wrong and which one would work; Hydra's own words when that is not clear."""
    groups = _groups()
    plain = [o for o in parsed if not str(o.key_or_group).startswith("hydra") and not o.is_delete()]
    for override in plain:
        key, value = str(override.key_or_group), override.value()
        if key in groups and value is not None and str(value) not in groups[key]:
            best = nearest(str(value), groups[key])
            hint = f"; try: {key}={best}" if best else ""
            return f"{key}={value} is not a choice of {key}: choose {listed(groups[key])}{hint}"
    known = _known_keys([o for o in plain if str(o.key_or_group) in groups])
    for override in plain:
        key = str(override.key_or_group)
        if key in groups or key in known or override.is_add() or override.is_force_add():
            continue
        return _unknown_key(key, override.get_value_element_as_str(), known, groups)
    return " ".join(str(error).splitlines()[:2])


def _known_keys(group_overrides: list[Override]) -> list[str]:
    """Return every dotted key of the configuration with these choices made."""
    try:
        cfg = compose("config", overrides=[str(o.input_line) for o in group_overrides])
    except (HydraException, OmegaConfBaseException):
        cfg = compose("config")
    return _dotted(OmegaConf.to_container(cfg, resolve=False))


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_dotted(value, f"{prefix}{key}.")]
    return [key for key in keys if not key.endswith("_target_")]


def _unknown_key(key: str, value: str, known: list[str], groups: dict[str, list[str]]) -> str:
    parent, _, last = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    close = nearest(last, [k.rpartition(".")[2] for k in siblings])
    best = f"{parent}.{close}" if close and parent else close
    best = best or nearest(key, [*known, *groups]) or next((k for k in known if k.rpartition(".")[2] == last), None)
    if best:
        return f"{key} is not a setting{did_you_mean(key, [best]) or f' (did you mean {best!r}?)'}; try: {best}={value}"
    here = siblings or [k for k in known if "." not in k]
    return f"{key} is not a setting; {parent or 'the top level'} has: {', '.join(k.rpartition('.')[2] for k in here)}"
