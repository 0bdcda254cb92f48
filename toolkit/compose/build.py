"""Config objects from a composed Hydra tree, with errors that name the override; no torch here."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.compose.diagnosis import groups_in, why_unreadable
from toolkit.compose.plugins import class_at, why_it_failed
from toolkit.compose.schemas import conf_dir
from toolkit.errors import ConfigError, listed
from toolkit.functional.policy.registry import policy_loss
from toolkit.losses.config.base import BaseLossConfig
from toolkit.rollout.config import RolloutConfig
from toolkit.schema import located
from toolkit.training.run_config import RunConfig


def build_config(cfg: DictConfig) -> RunConfig:
    """Instantiate every part of a composed configuration.

    Raises:
        ConfigError: a value has the wrong type, is out of range or conflicts with another; names the override.
    """
    parts: dict[str, Any] = {"seed": cfg.seed, "plugins": tuple(cfg.plugins)}
    # Before the loss, which reads the temperature of sampling, so a wrong one is reported where it was set.
    parts["rollout"] = build_part(cfg, "rollout", RolloutConfig)
    parts["loss"] = build_loss(cfg)
    for name, field in RunConfig.model_fields.items():
        if name not in parts:
            parts[name] = build_part(cfg, name, field.annotation)
    return RunConfig(**parts)


def build_loss(cfg: DictConfig) -> BaseLossConfig:
    """Instantiate the loss of a composed configuration; errors of its policy loss name the key ``policy_loss``."""
    chosen = OmegaConf.to_container(cfg.policy_loss, resolve=True)
    assert isinstance(chosen, dict)
    with located("policy_loss"):
        loss = policy_loss(chosen["loss_type"])
        loss.options({str(key): value for key, value in chosen.items() if key != "loss_type"}, where="policy_loss")
    fields = getattr(target_class("loss", cfg.loss), "model_fields", {})
    is_unlisted = "policy_loss_cfg" in fields and "policy_loss_cfg" not in cfg.loss  # in a user's file
    return build_part(cfg, "loss", BaseLossConfig, **({"policy_loss_cfg": chosen} if is_unlisted else {}))


def build_part(cfg: DictConfig, name: str, expected: Any, **unlisted: Any) -> Any:
    """Instantiate one part of a composed configuration, with fields that its YAML file does not list.

    Raises:
        ConfigError: as `build_config`; or it is not an instance of the `expected` class.
    """
    try:
        values = OmegaConf.to_container(cfg[name], resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {why_unreadable(error)}") from None
    target = target_class(name, values)
    assert isinstance(values, dict)
    fields = {**unlisted, **{str(key): value for key, value in values.items() if key != "_target_"}}
    missing = [key for key, value in fields.items() if value == "???"]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} has no default; set it: {name}.{missing[0]}=...")
    if not issubclass(target, expected):
        raise ConfigError(f"{name}._target_={values['_target_']!r} is not a {expected.__name__}")
    with located(name):
        return target(**fields)


def target_class(name: str, values: Any) -> type:
    """Return the class that the ``_target_`` of a part names.

    Raises:
        ConfigError: it has no ``_target_``, or the class cannot be imported.
    """
    target = values.get("_target_") if isinstance(values, (dict, DictConfig)) else None
    if target is None:
        keys = [str(key) for key in values] if isinstance(values, (dict, DictConfig)) else []
        choices = [choice for choice in groups_in(conf_dir()).get(name, []) if "/" not in choice]
        if not keys:
            raise ConfigError(f"{name} is empty or has no _target_; choose {listed(choices)}")
        slip = next((f" but {key!r}" for key in keys if key.strip("_") in ("target", "class")), "")
        raise ConfigError(
            f"{name} has no _target_{slip}; its file must name a config class (_target_: "
            f"package.module.Class) or start from one (defaults: [/{name}/{choices[0]}@_here_])"
        )
    try:
        return class_at(str(target))
    except (Exception, SystemExit) as error:
        why = why_unreadable(error) if isinstance(error, ImportError) else why_it_failed(error)
        raise ConfigError(f"{name}._target_={target!r} is not a class that can be imported: {why}") from None
