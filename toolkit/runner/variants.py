"""A loss with something changed: one override, or several, on top of a runner's loss."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.errors import ConfigError, a_type
from toolkit.losses.config.base import BaseLossConfig
from toolkit.runner.mistakes import not_of_loss

CLASSES = ("grpo", "ce", "oreal", "opd")
"""Choices of ``loss=`` with a class each."""


def named_variants(
    losses: Any, loss_cfg: BaseLossConfig, overrides: Sequence[str] | None, config_dir: str | os.PathLike[str] | None
) -> dict[str, BaseLossConfig]:
    """Return the losses to compare, by name.

    Args:
        losses: a list of overrides (or of lists of overrides, or of configs), or a mapping from names to such.
        loss_cfg: what they change.
        overrides: that `loss_cfg` was composed of; None: it is a config of Python.
        config_dir: of these overrides.

    Raises:
        ConfigError: an override is mistyped, or cannot change this loss.
    """
    if isinstance(losses, (str, BaseLossConfig)) or not isinstance(losses, (Sequence, Mapping)):
        raise ConfigError(
            f"losses is {a_type(losses)}; give a list, such as ['policy_loss=vanilla', 'policy_loss=gspo']"
        )
    if not losses:
        raise ConfigError("losses is empty; give at least one, such as ['policy_loss=vanilla', 'policy_loss=gspo']")
    pairs = losses.items() if isinstance(losses, Mapping) else [(_name(each), each) for each in losses]
    result: dict[str, BaseLossConfig] = {}
    for name, change in pairs:
        if name in result:
            raise ConfigError(f"losses has {name!r} twice; give a mapping with a name for each")
        config = getattr(change, "loss_cfg", change)
        result[name] = (
            config if isinstance(config, BaseLossConfig) else _changed(config, loss_cfg, overrides, config_dir)
        )
    return result


def _name(change: Any) -> str:
    if isinstance(change, (list, tuple)):
        return " ".join(map(str, change)) or "unchanged"
    config = getattr(change, "loss_cfg", change)
    if isinstance(config, BaseLossConfig):
        policy = getattr(config, "policy", None)
        return type(config).__name__ if policy is None else f"{type(config).__name__} {policy.name}"
    return str(change)


def _changed(
    change: Any, loss_cfg: BaseLossConfig, overrides: Sequence[str] | None, config_dir: str | os.PathLike[str] | None
) -> BaseLossConfig:
    from toolkit.compose.overrides import is_of_loss, parse
    from toolkit.compose.tree import load_loss

    changes = [change] if isinstance(change, str) else change
    if not isinstance(changes, Sequence) or not all(isinstance(each, str) for each in changes):
        raise ConfigError(f"losses holds {a_type(change)}; give overrides such as 'policy_loss=gspo', or loss configs")
    parsed = parse(list(changes))
    for override in parsed:
        if not is_of_loss(override):
            raise ConfigError(not_of_loss(override.input_line or "", str(override.key_or_group), loss_cfg))
    keys = {str(override.key_or_group) for override in parsed}
    if overrides is not None:
        kept = [line for line in overrides if str(parse([line])[0].key_or_group) not in keys]
        return load_loss([*kept, *changes], config_dir=config_dir)
    if not keys - {"loss"}:
        return load_loss(list(changes), config_dir=config_dir)
    start = _start(loss_cfg, load_loss)
    with_start = [line for line in start if line.partition("=")[0] not in keys]
    before, after = load_loss(start), load_loss([*with_start, *changes])
    names = [name for name in type(before).model_fields if getattr(before, name) != getattr(after, name)]
    updates = {name: getattr(after, name) for name in names}
    options, old = updates.get("policy_loss_cfg"), getattr(loss_cfg, "policy_loss_cfg", None)
    if options is not None and old is not None and "policy_loss" not in keys:  # only single options of it
        first = before.policy_loss_cfg  # type: ignore[attr-defined]
        updates["policy_loss_cfg"] = {**old, **{key: value for key, value in options.items() if value != first[key]}}
    kept_fields = {name: getattr(loss_cfg, name) for name in loss_cfg.model_fields_set}
    return type(loss_cfg)(**{**kept_fields, **updates})


def _start(loss_cfg: BaseLossConfig, load_loss: Any) -> list[str]:
    """Return overrides that give a config of the same class and policy loss."""
    for name in CLASSES:
        if type(load_loss([f"loss={name}"])) is type(loss_cfg):
            policy = getattr(loss_cfg, "policy_loss_cfg", None) if name == "grpo" else None
            return [f"loss={name}", *([] if policy is None else [f"policy_loss={policy['loss_type']}"])]
    raise ConfigError(
        f"overrides cannot change {type(loss_cfg).__name__}, which is not a class of the command line; give configs, "
        f"such as {{'a': {type(loss_cfg).__name__}(...), 'b': ...}}"
    )
