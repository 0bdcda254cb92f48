"""Which settings a composed configuration has: the fields of its config classes, whether a YAML file lists them or not.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from toolkit.compose.plugins import class_at
from toolkit.errors import ToolkitError
from toolkit.functional.advantages import advantage
from toolkit.functional.policy.registry import policy_loss
from toolkit.schema import Config
from toolkit.training.run_config import RunConfig

Fields = Mapping[str, FieldInfo]
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
"""Errors of pydantic for a value of the right type."""
CHOSEN_OTHERWISE = ("_target_", "loss_type", "estimator", "options")
"""Keys that ``group=choice`` or other settings set, and that are not settings themselves."""


@dataclass(frozen=True)
class Setting:
    """What ``key=value`` sets."""

    key: str
    """Dotted, such as ``loss.aggregation.name``."""
    value: Any
    """Its current value: plain numbers, strings, lists and dicts."""
    meaning: str | None
    """The docstring of its field; None if no config class has such a field."""
    is_listed: bool = True
    """Whether the YAML file of the choice lists it; if not, only the class has it."""
    field: FieldInfo | None = None
    """Its field; None if no config class has it."""

    def takes(self, value: Any) -> bool:
        """Whether `value` has its type, if perhaps not in its range, and is one of its choices if it has some."""
        if self.field is None:
            return True
        try:
            kind: Any = Annotated[(self.field.annotation, "", *self.field.metadata)]
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            return any(each["type"] in OUT_OF_RANGE for each in error.errors(include_url=False))
        except ToolkitError:
            return False
        except PydanticUserError:  # a type that only its model can check
            return True
        return not (isinstance(value, bool) and self.field.annotation in (int, float))


def settings_in(cfg: DictConfig) -> Iterator[Setting]:
    """Yield the settings of a composed configuration in its order, the listed ones of each part first."""
    values = _plain(cfg)
    # The options of a policy loss are in the group policy_loss, or inside a preset that defines its policy loss.
    loss = values["loss"] if isinstance(values["loss"], dict) else {}
    if "policy_loss_cfg" in loss and OmegaConf.is_interpolation(cfg.loss, "policy_loss_cfg"):
        loss.pop("policy_loss_cfg")
    elif "policy_loss_cfg" in loss:
        values.pop("policy_loss")
    parts = {name: value for name, value in values.items() if isinstance(value, dict)}
    for name, value in values.items():
        if name not in parts:
            field = RunConfig.model_fields.get(name)
            yield Setting(name, value, field.description if field else None, field=field)
    for name, node in parts.items():
        fields = _fields_of(name, node)
        if not fields and name in RunConfig.model_fields:  # a node without a class lists all of its fields
            known = _fields_of(name, node, RunConfig.model_fields[name])
            fields = {child: field for child, field in known.items() if child in node}
        yield from _of_node(name, node, fields)


def _of_node(key: str, node: Mapping[str, Any], fields: Fields, is_listed: bool = True) -> Iterator[Setting]:
    unlisted = {
        name: _default(field) for name, field in fields.items() if name not in node and name != "policy_loss_cfg"
    }
    for name, value in {**node, **unlisted}.items():
        field = fields.get(name)
        inner = _fields_of(name, value, field)
        if inner:
            yield from _of_node(f"{key}.{name}", value, inner, is_listed and name in node)
        elif name not in CHOSEN_OTHERWISE or f"{key}.{name}" == "loss.policy_loss_cfg.loss_type":
            is_known = is_listed and name in node
            yield Setting(f"{key}.{name}", value, field.description if field else None, is_known, field)


def _fields_of(name: str, node: Any, field: FieldInfo | None = None) -> Fields:
    """Return the fields of the config class that a node becomes; empty if it does not become a config."""
    if not isinstance(node, dict):
        return {}
    try:
        if name in ("policy_loss", "policy_loss_cfg"):
            return policy_loss(str(node.get("loss_type"))).options_model.model_fields
        if "_target_" in node:
            fields = getattr(class_at(str(node["_target_"])), "model_fields", {})
            estimator = node.get("estimator")
            return fields if estimator is None else {**fields, **advantage(str(estimator)).options_model.model_fields}
    except (ToolkitError, ImportError):
        return {}
    return next((model.model_fields for model in _models_in(field.annotation)), {}) if field is not None else {}


def _models_in(annotation: Any) -> Iterator[type[Config]]:
    """Yield the config classes that an annotation names, also inside unions."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return "???"  # Hydra's mark for a required value
    value = field.get_default(call_default_factory=True)
    return value.model_dump() if isinstance(value, Config) else value


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as dicts; if it cannot be resolved, interpolations stay as written."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:
        values = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def as_written(value: Any) -> str:
    """Return a value as the command line spells it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{as_written(item)}" for name, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
