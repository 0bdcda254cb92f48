"""Every config class, policy loss and advantage estimator as a node that YAML files start from; no torch here.

A YAML file in ``conf/`` starts from ``/schema/<class>@_here_``: a node made from the config class, so a default or a
field is written down once, in the class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore

from toolkit.errors import ConfigError
from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.schema import Config
from toolkit.training.config import AdvantageConfig
from toolkit.training.run_config import RunConfig


def _classes_of(annotation: Any) -> Iterator[type[Config]]:
    """Yield a config class and its subclasses in this package."""
    if isinstance(annotation, type) and issubclass(annotation, Config) and annotation.__module__.startswith("toolkit."):
        yield annotation
        for subclass in annotation.__subclasses__():
            yield from _classes_of(subclass)


SCHEMAS = tuple(schema for field in RunConfig.model_fields.values() for schema in _classes_of(field.annotation))
"""What the parts of a run may be."""
IS_HYDRA_1_3 = hydra.__version__.startswith("1.3.")
BEHAVIOUR: dict[str, Any] = {"version_base": "1.3"} if IS_HYDRA_1_3 else {}
"""Arguments of Hydra: without ``version_base``, 1.3 behaves like older versions; with it, 1.4 warns."""
REPLACE: dict[str, Any] = {} if IS_HYDRA_1_3 else {"replace": True}
"""Arguments that make a node replace an earlier one: 1.3 always does, 1.4 needs them."""

_registered: dict[tuple[str, str], list[type[Config]]] = {}
"""The stored nodes: (group, name) -> the classes that the node was made from, newest last."""
_nodes: dict[tuple[str, str], dict[str, Any]] = {}
"""The newest of them: (group, name) -> what it holds."""


@functools.cache
def conf_dir() -> str:
    """Return the configuration folder: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "_conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise ConfigError(f"no conf/config.yaml beside {here}: the installation is incomplete; reinstall the package")


def register_schemas(schemas: tuple[type[Config], ...] = ()) -> int:
    """Store every config class, policy loss and advantage estimator as a node for YAML files.

    May be called repeatedly: later calls store only what plugins have registered or replaced since. `schemas` are
    additional config classes of one command.

    Returns:
        How many nodes have been stored; if the number has not changed, neither have the choices.
    """
    for schema in (*SCHEMAS, *schemas):
        _store("schema", schema.__name__, schema, _target_=_path_of(schema))
    _store("schema", AggregationConfig.__name__, AggregationConfig)  # inside other configs: plain values
    for name in policy_loss_names():
        _store_choice("policy_loss", name, policy_loss(name).options_model, loss_type=name)
    target = _path_of(AdvantageConfig)
    for name in advantage_names():
        _store_choice("advantage", name, advantage(name).options_model, _target_=target, estimator=name)
    return sum(len(sources) for sources in _registered.values())


def _store_choice(group: str, name: str, options: type[Config], **fixed: str) -> None:
    """Store the schema of a registered function, and its choice if it comes from a plugin and has no YAML file."""
    _store(f"schema/{group}", name, options, **fixed)
    if not Path(conf_dir(), group, f"{name}.yaml").is_file():
        _store(group, name, options, **fixed)


def _store(group: str, name: str, source: type[Config], **fixed: Any) -> None:
    sources = _registered.setdefault((group, name), [])
    if not sources or sources[-1] is not source:
        _nodes[group, name] = node = {**fixed, **source.defaults()}
        ConfigStore.instance().store(group=group, name=name, node=node, **REPLACE)
        sources.append(source)


def stored_node(group: str, name: str) -> dict[str, Any] | None:
    """Return the stored node of a class or a registered function; None if there is none."""
    node = _nodes.get((group, name))
    return None if node is None else dict(node)


def _path_of(schema: type[Config]) -> str:
    return f"{schema.__module__}.{schema.__name__}"
