"""Configs of the training loop; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from toolkit.errors import ConfigError, listed
from toolkit.functional.advantages import Advantage, advantage, advantage_names
from toolkit.functional.names import KLEstimator
from toolkit.schema import Config, FrozenDict

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

Decay = Annotated[float, Field(ge=0, lt=1)]
AUTO = "auto"
"""Value of `TrainingConfig.resume`: what is in the output directory."""
TRAINING_HAS = ("lengths", "mask")
"""What the training command gives to an advantage estimator besides rewards and groups."""
OF_TURNS = ("token_rewards", "input_lengths", "num_turns")
"""What it also gives with an environment."""


class AdvantageConfig(Config):
    """From rewards to advantages: a registered estimator, with its options next to it or in `options`."""

    estimator: str = "grpo"
    """Name of the estimator."""
    options: Mapping[str, Any] = Field(default_factory=dict, validate_default=True)
    """All options of the estimator; those not set have its defaults."""

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        beside = {name: value for name, value in settings.items() if name not in cls.model_fields}
        name = settings.get("estimator", cls.model_fields["estimator"].default)
        options = advantage(name).options({**(settings.get("options") or {}), **beside})
        return {"estimator": name, "options": options}

    @field_validator("options", mode="after")
    @classmethod
    def _freeze_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return FrozenDict(options)

    def compute(self, terms: RewardTerms) -> Tensor:
        """Return the advantages of `terms`: [S] one per sequence, or [S, T] one per token, by the estimator's level.

        Raises:
            DataError: `terms` lacks a field that the estimator needs.
        """
        return advantage(self.estimator).compute(terms, **self.options)

    def check_training(self, group_size: int, *, with_turns: bool = False) -> None:
        """Raise if the training command cannot serve the estimator; `with_turns` if there is an environment.

        Raises:
            ConfigError: it needs fields that a run does not have, or several completions per prompt, but there is one.
        """
        estimator = advantage(self.estimator)
        missing = [need for need in estimator.needs if need not in TRAINING_HAS + OF_TURNS * with_turns]
        if missing and set(missing) <= set(OF_TURNS):
            raise ConfigError(
                f"advantage={self.estimator} needs {listed(missing, 'and')}, which only episodes have; set "
                "task.environment=my_environment.py:step"
            )
        if missing:
            raise ConfigError(
                f"advantage={self.estimator} needs {listed(missing, 'and')}, which the training command does not "
                f"provide; choose {listed(_served())}, or call it in your training loop (toolkit.functional.advantages)"
            )
        if group_size == 1 and estimator.within_group:
            raise ConfigError(
                f"advantage={self.estimator} compares the completions of one prompt, but rollout.group_size=1 leaves "
                "nothing to compare: every advantage would be 0; set rollout.group_size=2 or more, or choose "
                f"advantage={' or '.join(_served(lambda estimator: not estimator.within_group))}"
            )


def _served(is_wanted: Callable[[Advantage], bool] = lambda _: True) -> list[str]:
    """Return the estimators that need only what a run has."""
    estimators = [advantage(name) for name in advantage_names()]
    return [e.name for e in estimators if set(e.needs) <= set(TRAINING_HAS) and is_wanted(e)]


class KLControlConfig(Config):
    """KL(policy || reference) in the reward, and a coefficient that adapts."""

    reward_type: KLEstimator | None = None
    """Subtract reward_coef x this estimate, summed over a completion, from its reward; None: no KL in the reward."""
    reward_coef: PositiveFloat = 0.001
    """Coefficient of the KL in the reward; 0.001 as in verl."""
    target: PositiveFloat | None = None
    """KL of a completion, in nats, that the coefficient (of the reward or of the loss) is steered to; None: fixed."""
    horizon: PositiveInt = 10_000
    """Completions over which an error of 10 % changes the coefficient by 10 %; 10,000 as in verl."""


class OptimizerConfig(Config):
    """AdamW."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of the RL phase."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment; PyTorch's default."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger norm are scaled down to it."""
    max_nonfinite_updates: PositiveInt = 5
    """Updates in a row with a gradient that is NaN or infinite before the run stops; each of them is skipped."""


class SchedulerConfig(Config):
    """Learning rate over the updates of the main phase."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which it rises linearly from 0."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate after the last update over the peak; not used by constant."""


class WarmupConfig(Config):
    """Supervised learning from demonstrations with the toolkit's cross-entropy: the phase before RL."""

    steps: NonNegativeInt | None = None
    """Most optimizer steps of the phase; 0 skips it. None: `usual_steps` if the task makes demonstrations up, 0
    for your data."""
    usual_steps: PositiveInt = 300
    """Most steps where `steps` leaves it to the task."""
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None = 0.35
    """End the phase when this greedy accuracy (or mean reward) is reached on training prompts; None: after `steps`."""
    batch_size: PositiveInt = 64
    """Demonstrations per step, over all processes; also with loss=ce in the main phase."""
    lr: PositiveFloat = 2e-3
    """Learning rate, constant after a rise over 10 updates."""


class TrainingConfig(Config):
    """The loop."""

    steps: NonNegativeInt = 80
    """Rollouts in the RL phase (batches of demonstrations with loss=ce)."""
    minibatches: PositiveInt = 4
    """Optimizer steps per rollout and epoch; after the first one they are off-policy, which the clipping is for."""
    epochs: PositiveInt = 1
    """Passes over each rollout, each divided anew into minibatches."""
    refresh_reference_every: PositiveInt | None = None
    """RL steps after which the reference policy is replaced by the policy as it is then; None: never."""
    reference_mixup: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the policy in a refreshed reference; the rest is the reference before. 1: replaced entirely."""
    reference_path: str | None = None
    """Folder or hub id of a model with the policy's tokenizer that is the reference, such as a teacher for loss=opd
    loss.teacher=reference; None: the policy as it was when the main phase began."""
    micro_batch_size: PositiveInt = 1024
    """Sequences per forward on one process; the loss does not depend on it."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward on one process: sequences are packed end to end up to this many, without padding, and the loss
    does not depend on it; None: padded rows, `micro_batch_size` at a time."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    export: Literal["end", "checkpoints", "never"] = "end"
    """When the folder model/ is written, which transformers and `model.path` load: at the end and on Ctrl-C, with every
    checkpoint, or never."""
    export_merged: bool = False
    """Merge LoRA adapters into the model that is exported, instead of writing the adapters alone."""
    log_every: PositiveInt = 10
    """Steps between progress lines when the output is not a terminal."""
    keep_last: PositiveInt = 1
    """Checkpoints that are kept: the current one, and older ones as checkpoint-<phase>-<step>."""
    keep_best: bool = False
    """Keep the checkpoint with the best evaluation, too, as checkpoint-best; needs evaluation.every."""
    resume: str | None = None
    """Output directory of an earlier run to continue; auto: that of this run, if it holds a checkpoint (otherwise the
    run starts anew)."""
    overwrite: bool = False
    """Replace the run that the output directory holds; its files are removed first."""
    dry_run: bool = False
    """Show three prompts as the model sees them, a completion of each with its reward, and the memory; then stop."""
    num_processes: PositiveInt | None = None
    """Processes that must work together; None: as many as the launcher started."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    sharding: Literal["none", "fsdp2"] = "none"
    """none: every process holds all weights (DDP); fsdp2: each holds its share of them (PyTorch's fully_shard)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Forward under autocast, weights and optimizer in the model's dtype; fp16 with a loss scale, on a GPU only.
    None: the launcher's setting, otherwise no."""
    timeout_s: PositiveInt = 600
    """Seconds that a process waits for the others in a collective before the run ends."""

    @model_validator(mode="after")
    def _one_size_of_micro_batches(self) -> TrainingConfig:
        usual = type(self).model_fields["micro_batch_size"].default
        if self.micro_batch_tokens is not None and self.micro_batch_size != usual:
            raise ConfigError(
                f"training.micro_batch_size={self.micro_batch_size} has no effect with "
                f"training.micro_batch_tokens={self.micro_batch_tokens}, which counts tokens instead of sequences; "
                f"remove one of them (training.micro_batch_size={usual} where an experiment sets it)"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TrainingConfig:
        if self.export_merged and self.export == "never":
            raise ConfigError("training.export_merged has no effect with training.export=never; remove one of them")
        if self.keep_last > 1 and self.checkpoint_every == 0:
            raise ConfigError(
                f"training.keep_last={self.keep_last} has no effect with one checkpoint, at the end; set "
                "training.checkpoint_every too"
            )
        return self

    @model_validator(mode="after")
    def _mixup_has_an_effect(self) -> TrainingConfig:
        if self.reference_mixup != 1 and self.refresh_reference_every is None:
            raise ConfigError(
                f"training.reference_mixup={self.reference_mixup} has no effect without "
                "training.refresh_reference_every; set both, or remove it"
            )
        if self.reference_path is not None and self.refresh_reference_every is not None:
            raise ConfigError(
                "training.refresh_reference_every would replace the model of training.reference_path by the policy; "
                "remove one of them"
            )
        if self.reference_path is not None and self.sharding != "none":
            raise ConfigError(
                f"training.reference_path is a whole model on each process, so it does not go with "
                f"training.sharding={self.sharding}; remove one of them"
            )
        return self


class EvaluationConfig(Config):
    """What is measured on held-out prompts, and how often: always before and after the main phase."""

    every: NonNegativeInt = 0
    """Steps of the main phase between two more evaluations; 0: none."""
    max_prompts: PositiveInt | None = None
    """Most held-out prompts of an evaluation, the first ones; None: all."""
    samples: NonNegativeInt = 0
    """Sampled completions of each prompt, besides the greedy one; 0: none."""
    ks: tuple[PositiveInt, ...] | None = None
    """The k of each pass@k, the chance that one of k sampled completions passes; None: 1 and `samples`."""
    temperature: PositiveFloat | None = None
    """Temperature of the sampled completions; None: that of the rollouts."""
    passing_reward: FiniteFloat | None = None
    """Reward from which a completion passes, for accuracy and pass@k. None: 1 with the task's verifier; with other
    rewards nothing passes or fails, and their means alone are measured."""

    @model_validator(mode="after")
    def _samples_serve_the_rest(self) -> EvaluationConfig:
        for name in ("ks", "temperature"):
            if getattr(self, name) is not None and not self.samples:
                raise ConfigError(
                    f"evaluation.{name} has no effect without sampled completions; set evaluation.samples=8"
                )
        if self.ks is not None and (not self.ks or max(self.ks) > self.samples):
            raise ConfigError(
                f"evaluation.ks={list(self.ks)} needs numbers from 1 to evaluation.samples={self.samples}; "
                "pass@k is estimated from k samples or more"
            )
        return self

    @property
    def pass_at(self) -> tuple[int, ...]:
        """The k of each pass@k, in order and each once."""
        return tuple(sorted({1, self.samples} if self.ks is None else set(self.ks)))


class TrackerConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    """An experiment tracker that accelerate knows; its package must be installed."""
    project: str = "rl-loss-toolkit"
    """Project name in the tracker."""
    samples: Literal["none", "some", "all"] = "some"
    """Completions kept in samples.jsonl: those of the first two prompts of every `samples_every`-th step, all of every
    step, or none."""
    samples_every: PositiveInt = 10
    """Steps from one that is kept to the next, with samples=some."""
    tokens_every: NonNegativeInt = 10
    """Steps from one whose completions are kept with records of their tokens (log-probabilities, ratio, gradient
    coefficient, what clipped them) to the next; such a step takes one more forward. 0: no records."""
    samples_mb: PositiveFloat = 100.0
    """Megabytes that samples.jsonl may have; from then on no more samples are kept."""

    @model_validator(mode="after")
    def _samples_are_kept(self) -> TrackerConfig:
        for name in ("samples_mb", "tokens_every"):
            value = getattr(self, name)
            if self.samples == "none" and value != type(self).model_fields[name].default:
                raise ConfigError(f"tracker.{name}={value:g} has no effect with tracker.samples=none")
        if self.samples != "some" and self.samples_every != type(self).model_fields["samples_every"].default:
            raise ConfigError(
                f"tracker.samples_every={self.samples_every} has no effect with tracker.samples={self.samples}; set "
                "tracker.samples=some"
            )
        return self
