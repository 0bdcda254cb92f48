"""Whether something reads every setting of a composed configuration; no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from toolkit.compose.build import target_class
from toolkit.compose.overrides import policy_loss_has_a_group
from toolkit.errors import ConfigError
from toolkit.functional.policy.registry import policy_loss
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.opd import OPDLossConfig

READ_BY = {
    "policy_loss": "policy_loss_cfg",
    "kl": "use_kl_loss",
    "aggregation": "aggregation",
    "correction": "correction",
}
"""Group of choices -> the field of a loss config that reads it."""


def check_settings(parsed: Sequence[Override], cfg: DictConfig, known: Sequence[str]) -> None:
    """Check a configuration that was composed with these overrides.

    `known` are the settings of the top level.

    Raises:
        ConfigError: nothing reads what an override sets, or the policy loss has no name.
    """
    check_where_options_are(parsed, cfg)  # Hydra 1.4 follows the interpolation and sets them
    if "loss_type" not in cfg.policy_loss:
        raise ConfigError(
            "policy_loss has no loss_type; add the policy loss that its options are for to its file, such as "
            "loss_type: vanilla"
        )
    _check_unread(parsed, cfg, known)


def check_targets(parsed: Sequence[Override], base: DictConfig) -> None:
    """Raise if an override sets a part whose class cannot be imported, because its settings are then unknown."""
    for group in {str(override.key_or_group).partition(".")[0] for override in parsed}:
        node = base.get(group)
        if isinstance(node, DictConfig) and "_target_" in node:
            target_class(group, node)


def check_where_options_are(parsed: Sequence[Override], base: DictConfig) -> None:
    """Raise if an override sets an option of the policy loss inside a loss that reads it from the group."""
    for override in parsed:
        is_inside = str(override.key_or_group).startswith("loss.policy_loss_cfg")
        if is_inside and OmegaConf.is_interpolation(base.loss, "policy_loss_cfg"):
            raise policy_loss_has_a_group(override)


def _check_unread(parsed: Iterable[Override], cfg: DictConfig, known: Sequence[str]) -> None:
    """Check that something reads every setting of `cfg`, which was composed with the overrides.

    `known` are the settings of the top level.

    Raises:
        ConfigError: nothing reads one of them.
    """
    stray = [str(key) for key in cfg if key not in known and key != "policy_loss"]
    if stray:
        from toolkit.peers import counterpart  # only a mistake needs it

        value = next((str(o.input_line).partition("=")[2] for o in parsed if o.key_or_group == stray[0]), None)
        elsewhere = counterpart(stray[0], value)
        if elsewhere is not None:
            raise ConfigError(f"{stray[0]} is not a setting; {elsewhere}")
        raise ConfigError(f"{stray[0]} is not a setting; the top level has: {', '.join(known)}")
    target = target_class("loss", cfg.loss)
    fields = getattr(target, "model_fields", {})
    if "bypass" in str(next((o.value() for o in parsed if o.key_or_group == "correction"), "")):
        name = str(cfg.policy_loss.loss_type)
        if "anchor" not in policy_loss(name).options_model.model_fields:
            raise ConfigError(
                f"correction=bypass takes ratios to the sampler's probabilities, but policy loss {name!r} has no "
                "option 'anchor'; remove it, or choose a policy loss with that option"
            )
    has_fixed_policy = "policy_loss_cfg" in cfg.loss and not OmegaConf.is_interpolation(cfg.loss, "policy_loss_cfg")
    for override in parsed:
        group = str(override.key_or_group).split(".")[0]
        if group == "policy_loss" and has_fixed_policy:
            raise ConfigError(
                f"{override.input_line} has no effect: the file of this loss defines its policy loss; change its "
                "options with loss.policy_loss_cfg.<option>=..., or write policy_loss_cfg: ${policy_loss} in that file"
            )
        if group == "advantage" and issubclass(target, (OPDLossConfig, CELossConfig)):
            raise ConfigError(f"{override.input_line} has no effect: {target.__name__} does not read advantages")
        if group in READ_BY and READ_BY[group] not in fields and override.value() not in ("none", None):
            of_a_term = f"; or write in your config: terms = (LossTerm(aggregation={override.value()!r}),)"
            is_custom = group == "aggregation" and not cfg.loss._target_.startswith("toolkit.")
            raise ConfigError(
                f"{override.input_line} has no effect: {cfg.loss._target_.rpartition('.')[2]} has no "
                f"{READ_BY[group]}; remove it, or choose a loss that has it, such as loss=grpo"
                + (of_a_term if is_custom else "")
            )
