"""The options of a loss in verl: from the actor's config where verl has the option, else from an environment variable.

verl's config classes take no further fields, so ``TOOLKIT_VERL_LOSS`` holds overrides as on our command line:
``TOOLKIT_VERL_LOSS="policy_loss.cliprange_low=3e-4 policy_loss.cliprange_high=4e-4"``.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.compose.overrides import parse
from toolkit.compose.tree import load_loss
from toolkit.errors import ConfigError, warn_once
from toolkit.functional.policy.registry import policy_loss
from toolkit.losses.config.policy import BaseRLLossConfig

LOSS = "TOOLKIT_VERL_LOSS"
ADVANTAGE = "TOOLKIT_VERL_ADVANTAGE"
OF_VERL = {
    "kl": "actor.use_kl_loss, actor.kl_loss_type and actor.kl_loss_coef",
    "aggregation": "actor.loss_agg_mode",
    "correction": "algorithm.rollout_correction",
    "mode": "verl's own head: log-probabilities are computed before the loss is called",
}
"""What verl does itself around the loss, and where it is set there."""
AGGREGATIONS = {
    "token_mean": "token-mean",
    "token_sum": "token-sum",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
"""verl's names of aggregations."""
ABSENT = {
    "teacher_logprobs": "a teacher's log-probabilities",
    "ref_logprobs": "the reference's log-probabilities",
    "rollout_logprobs": "the sampler's log-probabilities (algorithm.rollout_correction comes as weights)",
    "entropies": "entropies",
}
"""What verl does not pass to a policy loss."""


def loss_of(name: str | None, config: Any) -> BaseRLLossConfig:
    """Return the loss called ``toolkit/<name>`` with its options; None: the one that the variable describes.

    Args:
        name: of a policy loss.
        config: verl's ``ActorConfig``.

    Raises:
        ConfigError: the variable holds an override that is wrong or that verl decides, or verl does not pass what the
            loss reads.
    """
    return _loss_of(name, () if name is None else tuple(options_of(name, config)), os.environ.get(LOSS, ""))


@functools.cache
def _loss_of(name: str | None, options: tuple[str, ...], text: str) -> BaseRLLossConfig:
    chosen = shlex.split(text)
    for override in parse(chosen):
        key = str(override.key_or_group)
        part = key.partition(".")[0]
        if part in OF_VERL:
            raise ConfigError(f"{LOSS}: {override.input_line} has no effect in verl; set {OF_VERL[part]}")
        if name is not None and key in ("policy_loss", "loss"):
            raise ConfigError(
                f"{LOSS}: {override.input_line} chooses a loss, but actor.policy_loss.loss_mode=toolkit/{name} did; "
                "set loss_mode=toolkit, or give options alone (policy_loss.cliprange_low=3e-4)"
            )
    if name is None and not any(each.startswith(("policy_loss=", "loss=")) for each in chosen):
        raise ConfigError(f"actor.policy_loss.loss_mode=toolkit needs {LOSS}, such as {LOSS}='policy_loss=gspo'")
    cfg = load_loss([*([] if name is None else [f"policy_loss={name}"]), *options, *chosen])
    if not isinstance(cfg, BaseRLLossConfig):
        raise ConfigError(f"{LOSS}: {type(cfg).__name__} has no policy loss; choose loss=grpo or a preset")
    check_fields(cfg)
    if os.environ.get("RANK", "0") == "0":  # once: the result is kept
        shown = ", ".join(f"{key}={value}" for key, value in cfg.policy_options.items())
        print(f"toolkit in verl: policy loss {cfg.policy.name} with {shown or 'no options'}", flush=True)
    return cfg


def check_fields(cfg: BaseRLLossConfig) -> None:
    """Raise `ConfigError` if the policy loss reads what verl does not pass to it."""
    missing = next(iter(cfg.policy.fields_read(cfg.policy_options)), None)
    if missing is not None:
        raise ConfigError(f"policy loss {cfg.policy.name!r} reads {missing}, but verl does not pass {ABSENT[missing]}")
    if cfg.scope_of_terms == "group":
        raise ConfigError(
            f"policy loss {cfg.policy.name!r} compares the completions of a prompt, but verl passes no prompts and "
            "splits them over micro-batches"
        )


def options_of(name: str, config: Any) -> Iterator[str]:
    """Yield the options of a loss that the actor's `config` has, as overrides."""
    low, high = (
        config.clip_ratio if value is None else value for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    of_policy = config.policy_loss
    theirs: Mapping[str, Any] = {
        "cliprange_low": low,
        "cliprange_high": high,
        "threshold_low": low,
        "threshold_high": high,
        "clip_ratio_c": config.get("clip_ratio_c", 3.0),
        "tau_pos": config.get("tau_pos"),
        "tau_neg": config.get("tau_neg"),
        "clip_cov_ratio": of_policy.get("clip_cov_ratio"),
        "cov_low": of_policy.get("clip_cov_lb"),
        "cov_high": of_policy.get("clip_cov_ub"),
        "kl_cov_ratio": of_policy.get("kl_cov_ratio"),
        "kl_coef": of_policy.get("ppo_kl_coef"),
        **({"tau": of_policy.get("dro_beta")} if name == "dro" else {}),
    }
    known = policy_loss(name).options({})
    for option, value in theirs.items():
        # verl's dual clip is on in its PPO alone.
        if option in known and value is not None and (option != "clip_ratio_c" or known[option] is not None):
            yield f"policy_loss.{option}={value}"


def check_aggregation(cfg: BaseRLLossConfig, mode: str) -> None:
    """Warn once if verl's aggregation is not that of the loss."""
    wanted = cfg.policy.aggregation
    theirs = AGGREGATIONS.get(wanted or "")
    if theirs is not None and theirs != mode:
        warn_once(
            f"policy loss {cfg.policy.name!r} is defined with the aggregation {wanted}, but verl has "
            f"loss_agg_mode={mode!r}; set actor.loss_agg_mode={theirs}"
        )


@functools.cache
def advantage_options(text: str) -> Mapping[str, Any]:
    """Return options of an estimator from overrides such as ``advantage.std=none``.

    Raises:
        ConfigError: an override is not of an estimator.
    """
    options: dict[str, Any] = {}
    for override in parse(shlex.split(text)):
        group, _, option = str(override.key_or_group).partition(".")
        if group != "advantage" or not option:
            raise ConfigError(
                f"{ADVANTAGE}: {override.input_line} is not an option of an estimator; write advantage.std=none, and "
                "choose the estimator by algorithm.adv_estimator"
            )
        options[option] = override.value()
    return options
