"""Composing and checking the Hydra tree, with errors that name the nearest right key; no torch here.

A YAML file in ``conf/`` starts from ``/schema/<class>@_here_``: a node made from the config class, so that a default or
a field is written down once, in the class.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.benchmark.config import BenchConfig
from toolkit.diagnosis import choices_shown, diagnose, groups_in
from toolkit.errors import ConfigError, listed
from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.registry import policy_loss, policy_loss_names
from toolkit.losses.aggregation import AggregationConfig
from toolkit.losses.config import BaseLossConfig, BaseRLLossConfig, CELossConfig, GRPOLossConfig
from toolkit.losses.config_opd import OPDLossConfig
from toolkit.losses.config_oreal import OrealLossConfig
from toolkit.models.config import PretrainedConfig, TinyLlamaConfig
from toolkit.overrides import adapted, check_policy_loss_keys, own_folders, parse, plugins_in, sweep_jobs
from toolkit.plugins import load_plugins
from toolkit.rollout.config import RolloutConfig
from toolkit.run_config import RunConfig
from toolkit.schema import Config, located
from toolkit.tasks.config import SpellBackwardConfig
from toolkit.training.config import (
    AdvantageConfig,
    KLControlConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrackerConfig,
    TrainingConfig,
    WarmupConfig,
)

SCHEMAS: tuple[type[Config], ...] = (
    CELossConfig,
    GRPOLossConfig,
    OrealLossConfig,
    OPDLossConfig,
    SpellBackwardConfig,
    TinyLlamaConfig,
    PretrainedConfig,
    KLControlConfig,
    RolloutConfig,
    WarmupConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
    TrackerConfig,
    BenchConfig,
)
PARTS: tuple[type[Config], ...] = (AggregationConfig,)
"""Configs inside of others: their schema nodes are plain values."""
ROOTS = {"config": "", "bench": "bench"}
"""The configurations that a command composes, and the group that belongs to that command alone."""
BENCH_GROUPS = ("aggregation", "bench", "kl", "loss", "policy_loss")
BENCH_KEYS = ("bench", "loss", "plugins", "rollout")
NOT_IN_BENCH = ("temperature", "logit_scale", "softcap", "ignore_idx", "entropy_coef", "drop_zero_advantage")
READ_BY = {
    "policy_loss": "policy_loss_cfg",
    "kl": "use_kl_loss",
    "aggregation": "aggregation",
    "correction": "correction",
}
"""The field of a loss config that a group of choices is for."""
MAX_CHECKED_JOBS = 32
"""Jobs of a multirun that are checked beforehand; each checks itself again when it starts."""


def conf_dir() -> str:
    """Return the folder of the configuration: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise ConfigError(f"no conf/config.yaml beside {here}: the installation is incomplete; reinstall the package")


def register_schemas() -> None:
    """Put every config class, policy loss and advantage estimator where YAML files find them; safe to call again."""
    store = ConfigStore.instance()
    OmegaConf.register_new_resolver("toolkit_choices", _choices_text, replace=True)
    for schema in SCHEMAS:
        target = f"{schema.__module__}.{schema.__name__}"
        store.store(group="schema", name=schema.__name__, node={"_target_": target, **schema.defaults()})
    for part in PARTS:
        store.store(group="schema", name=part.__name__, node=part.defaults())
    own_files = {path.stem for path in Path(conf_dir(), "policy_loss").glob("*.yaml")}
    for name in policy_loss_names():
        node = {"loss_type": name, **policy_loss(name).options_model.defaults()}
        store.store(group="schema/policy_loss", name=name, node=node)
        if name not in own_files:  # a plugin's loss is a choice without a file
            store.store(group="policy_loss", name=name, node=node)
    target = f"{AdvantageConfig.__module__}.{AdvantageConfig.__name__}"
    own_files = {path.stem for path in Path(conf_dir(), "advantage").glob("*.yaml")}
    for name in advantage_names():
        node = {"_target_": target, "estimator": name, **advantage(name).options_model.defaults()}
        store.store(group="schema/advantage", name=name, node=node)
        if name not in own_files:
            store.store(group="advantage", name=name, node=node)


def compose_config(overrides: Sequence[str], *, root: str = "config") -> DictConfig:
    """Compose ``conf/`` with `overrides`; may be called again and again in one process, inside Hydra or not.

    Args:
        overrides: as on the command line.
        root: which of `ROOTS`.

    Raises:
        ConfigError: an override names a choice or a key that does not exist; the message names the nearest right one.
    """
    parsed = parse(overrides)
    check_policy_loss_keys(parsed)
    load_plugins(plugins_in(parsed))
    register_schemas()
    with _own_hydra():
        try:
            cfg = compose(root, overrides=adapted(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            groups = _groups(root, *own_folders(parsed))
            raise ConfigError(diagnose(parsed, error, groups, root)) from None
    _check_unread(parsed, cfg, BENCH_KEYS if root == "bench" else list(RunConfig.model_fields))
    return cfg


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Initialise Hydra for our folder, also inside a program that uses Hydra itself, and leave that as it was."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=conf_dir(), version_base="1.3"):
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
    target = _target_class(name, values)
    assert isinstance(values, dict)
    fields = {str(key): value for key, value in values.items() if key != "_target_"}
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
        return get_class(target)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{name}._target_={target!r} is not a class that can be imported: {first}") from None


def check_overrides(overrides: Sequence[str], *, multirun: bool = False) -> list[RunConfig]:
    """Check a command line as far as possible without torch: choices, keys, types and ranges.

    Returns:
        The configuration of each job; of the first `MAX_CHECKED_JOBS` of a multirun, of none for a sweep that only its
        sweeper can list.

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
    return [build_config(compose_config(job)) for job in jobs]


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
    for override in parsed:
        group = str(override.key_or_group).split(".")[0]
        if group == "advantage" and issubclass(target, (OPDLossConfig, CELossConfig)):
            raise ConfigError(f"{override.input_line} has no effect: {target.__name__} reads no advantages")
        if group in READ_BY and READ_BY[group] not in fields and override.value() not in ("none", None):
            raise ConfigError(
                f"{override.input_line} has no effect: {cfg.loss._target_.rpartition('.')[2]} has no "
                f"{READ_BY[group]}; leave it out, or choose a loss that has, such as loss=grpo"
            )


def _choices(group: str) -> list[str]:
    return groups_in(conf_dir()).get(group, [])


def _groups(root: str, *folders: str) -> dict[str, list[str]]:
    """Return the groups of a command with their choices: of the benchmark those that it composes, else all others."""
    found = groups_in(conf_dir(), *folders)
    if root == "bench":
        return {group: found[group] for group in BENCH_GROUPS}
    return {group: choices for group, choices in found.items() if group not in ROOTS.values()}


def _choices_text(root: str = "config") -> str:
    """Return the choices for --help; Hydra's own list would show the schema nodes, too."""
    return "\n".join(f"{group}: {', '.join(choices_shown(found))}" for group, found in _groups(root).items())
