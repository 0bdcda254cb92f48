"""The loss that a user chooses for another trainer, fitted to the trainer's arguments; no trainer is imported here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from toolkit.compose.overrides import is_of_loss, parse
from toolkit.compose.tree import compose_config
from toolkit.errors import ConfigError
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.peers import words_of
from toolkit.runner import LossRunner

TEMPERATURE = ("temperature", "rollout.temperature", "loss.temperature")
"""Overrides of the temperature; the last two are those of the command line."""
LENGTH = ("loss.aggregation.length", "aggregation.length")
"""Overrides of the length that ``aggregation=constant`` divides by."""
CONSTANT = {"aggregation": "constant", "loss.aggregation.name": "constant"}
"""Overrides that choose it, beside presets."""


@dataclass(frozen=True)
class Trainer:
    """What messages say of a trainer."""

    name: str
    project: str
    """Its name in presets and in the table of words."""
    asked_in: str
    """Where a user chooses the loss, such as ``loss=...``."""
    advantages: str
    """Its arguments that choose the advantages."""
    kl_in_reward: str
    """Its arguments that put a KL into the rewards."""
    cispo_cap: tuple[str, ...]
    """Its arguments that cap the weight of CISPO itself, where other losses read them as a range."""


def chosen_config(loss: Any, args: Any, trainer: Trainer) -> BaseRLLossConfig:
    """Return the config of a loss that a trainer can run, with what its arguments say where the loss says nothing.

    These are the temperature, the length of ``aggregation=constant`` and whether entropies are measured.

    Args:
        loss: overrides in one string or a list, or a config.
        args: of the trainer, with ``temperature`` and ``max_completion_length``.
        trainer: it.

    Raises:
        ConfigError: the loss does not exist, or has another temperature than the trainer.
    """
    if isinstance(loss, BaseRLLossConfig):
        cfg, remedy = _completed(loss, args), "set temperature={} in the config"
    else:
        cfg = from_overrides(_listed(loss), args, trainer)
        remedy = f"leave it out of the loss, or give {trainer.name} that temperature"
    if cfg.temperature != args.temperature:
        raise ConfigError(
            f"the loss scores tokens at temperature {cfg.temperature:g}, but {trainer.name} samples them and computes "
            f"old_per_token_logps at {args.temperature:g}; {remedy.format(f'{args.temperature:g}')}"
        )
    if cfg.gradient_reduction != "mean":
        raise ConfigError(
            f"gradient_reduction='sum': {trainer.name}'s processes average their gradients; leave it at 'mean'"
        )
    return cfg


def check_loss(loss: Any, trainer: Trainer) -> None:
    """Raise `ConfigError` if a loss is none, whatever the trainer's arguments are."""
    if not isinstance(loss, BaseRLLossConfig):
        from_overrides(_listed(loss), SimpleNamespace(temperature=1.0, max_completion_length=1), trainer)


def from_overrides(overrides: list[str], args: Any, trainer: Trainer) -> BaseRLLossConfig:
    """Return the loss that `overrides` choose, completed from the trainer's `args`.

    Raises:
        ConfigError: they are mistyped, or choose what the trainer decides.
    """
    if not overrides:
        raise ConfigError(
            f"the loss is empty; write one in {trainer.asked_in}, such as 'policy_loss=gspo "
            "aggregation=seq_mean_token_mean'"
        )
    _check_not_of_trainer(overrides, trainer)
    values = {key: value.strip() for key, _, value in (each.lstrip("+").partition("=") for each in overrides)}
    if not values.keys() & {*TEMPERATURE}:
        overrides = [*overrides, f"rollout.temperature={args.temperature}"]
    says_length = bool(values.keys() & {*LENGTH})
    if not says_length and any(values.get(key) == constant for key, constant in CONSTANT.items()):
        overrides, says_length = [*overrides, f"loss.aggregation.length={args.max_completion_length}"], True
    cfg = LossRunner.from_overrides(overrides).loss_cfg
    if not isinstance(cfg, BaseRLLossConfig):
        raise ConfigError(
            f"{type(cfg).__name__} has no policy loss; choose loss=grpo or a preset "
            f"(loss=preset/{trainer.project}/dapo)"
        )
    if cfg.aggregation.name == "constant" and not says_length:  # of a preset, which cannot know it
        changed = cfg.aggregation.model_copy(update={"length": float(args.max_completion_length)})
        return cfg.model_copy(update={"aggregation": changed})
    return cfg


def summary(cfg: BaseRLLossConfig) -> str:
    """Return in one line what is trained."""
    return ", ".join(_parts(cfg))


def counterpart(trainer: Trainer, name: str, value: Any, cfg: BaseRLLossConfig, loss: Any) -> str:
    """Return what to do instead of setting an argument of the trainer that describes a loss.

    Args:
        trainer: it.
        name: of the argument.
        value: of the argument.
        cfg: the loss.
        loss: as the user wrote it.
    """
    known = {word.name: word for word in words_of(trainer.project).words}
    answer = known[name].answer_to(str(value)) if name in known else None
    ways = [_without_length(way).replace("{}", str(value)) for way in answer.ways] if answer else []
    if answer is not None and not ways and answer.no:
        return f"leave it out: it has no counterpart here ({answer.no})"
    if cfg.policy.name == "cispo" and name in trainer.cispo_cap:
        ways = [f"policy_loss.weight_max={value}"]
    options = [way for way in ways if name != "loss_type" and not way.startswith(("loss=", "policy_loss="))]
    if _is_preset(loss):
        options = [way.replace("policy_loss.", "loss.policy_loss_cfg.") for way in options]
    if options:
        return f"leave it out, or say it in {trainer.asked_in}: {' or '.join(options)}"
    if ways:
        return f"leave it out, or say in {trainer.asked_in} in the place of your loss: {' or '.join(ways)}"
    return f"leave it out, or say it in {trainer.asked_in}"


def _is_preset(loss: Any) -> bool:
    """Whether a loss is written as a preset, whose options have another path."""
    return not isinstance(loss, BaseRLLossConfig) and any(each.startswith("loss=preset/") for each in _listed(loss))


def _without_length(way: str) -> str:
    """Return overrides without the length of ``aggregation=constant``, which is the trainer's here."""
    return " ".join(each for each in way.split() if each.lstrip("+").partition("=")[0] not in LENGTH)


def _parts(cfg: BaseRLLossConfig) -> Iterator[str]:
    average = cfg.aggregation
    options = ", ".join(f"{name}={value}" for name, value in cfg.policy_options.items() if value is not None)
    yield f"policy_loss={cfg.policy.name}" + (f" ({options})" if options else "")
    yield f"aggregation={average.name}" + (f" with length={average.length:g}" if average.length is not None else "")
    if cfg.use_kl_loss:
        yield f"kl={cfg.kl_loss_type} with kl_loss_coef={cfg.kl_loss_coef:g}"
    if cfg.correction:
        yield f"{len(cfg.correction)} correction{'s' if len(cfg.correction) > 1 else ''}"
    if cfg.entropy_coef:
        yield f"entropy_coef={cfg.entropy_coef:g}"
    yield f"temperature={cfg.temperature:g}"


def _listed(loss: Any) -> list[str]:
    if isinstance(loss, str):
        return shlex.split(loss)
    if isinstance(loss, Sequence) and all(isinstance(each, str) for each in loss):
        return list(loss)
    raise ConfigError(
        f"loss={type(loss).__name__} is not a loss; give overrides, loss='policy_loss=gspo kl=k3', or a GRPOLossConfig"
    )


def _completed(cfg: BaseRLLossConfig, args: Any) -> BaseRLLossConfig:
    """Return a config with what it was not given: the trainer's temperature, and entropies, which trainers log."""
    changes = {"temperature": args.temperature, "use_entropy_metric": True}
    missing = {name: value for name, value in changes.items() if name not in cfg.model_fields_set}
    return cfg.model_copy(update=missing) if missing else cfg


def _check_not_of_trainer(overrides: list[str], trainer: Trainer) -> None:
    """Raise for settings of the training command that the trainer has itself."""
    others = [each for each in parse(overrides) if not is_of_loss(each)]
    if not others:
        return
    key, line = str(others[0].key_or_group), others[0].input_line
    if key == "temperature":
        raise ConfigError(
            f"{line}: the loss has the temperature of {trainer.name}; leave it out, and set temperature among "
            f"{trainer.name}'s arguments"
        )
    compose_config(overrides)  # raises if something is mistyped
    group = key.partition(".")[0]
    arguments = {"advantage": trainer.advantages, "kl": trainer.kl_in_reward, "kl_control": trainer.kl_in_reward}
    what = "a KL in the reward" if group == "kl" else group
    raise ConfigError(
        f"{line}: {trainer.name} decides {what}, not the loss; leave it out"
        + (f", and set {arguments[group]}" if group in arguments else "")
    )
