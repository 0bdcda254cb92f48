"""The configuration of a training run, and checks that its parts fit together; no torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from toolkit.errors import ConfigError, warn_once
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.models.config import CausalLMConfig, ModelConfig
from toolkit.rollout.config import RolloutConfig
from toolkit.schema import Config
from toolkit.tasks.config import TaskConfig
from toolkit.training.config import (
    AdvantageConfig,
    KLControlConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrackerConfig,
    TrainingConfig,
    WarmupConfig,
)


class RunConfig(Config):
    """Everything a training run needs, each part an instance of its config class."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Seed of data, weights and sampling."""
    plugins: tuple[str, ...] = ()
    """Python files or modules that register your policy losses."""
    task: TaskConfig
    model: ModelConfig
    loss: BaseLossConfig
    kl_control: KLControlConfig
    advantage: AdvantageConfig
    rollout: RolloutConfig
    warmup: WarmupConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    training: TrainingConfig
    tracker: TrackerConfig

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        if self.loss.ignore_idx >= 0:
            raise ConfigError(
                f"loss.ignore_idx={self.loss.ignore_idx} is the id of a token, which would then never be scored; "
                "use a negative number"
            )
        if self.loss.logit_scale != 1 or self.loss.softcap is not None:
            raise ConfigError(
                "loss.logit_scale and loss.softcap are for your training loops; here the model samples and scores "
                "without them; leave both at their defaults"
            )
        if not isinstance(self.loss, CELossConfig):
            self.advantage.check_training(self.rollout.group_size, with_turns=self.task.environment is not None)
        self._rewards_are_served()
        self._rate_fits_the_model()
        self._kl_control_has_a_kl()
        self._loss_can_be_served()
        sampled_at, scored_at = self.rollout.temperature, self.loss.temperature
        if not isinstance(self.loss, CELossConfig) and sampled_at != scored_at:
            raise ConfigError(
                f"rollout.temperature={sampled_at} but loss.temperature={scored_at}: tokens must be scored as they "
                "were sampled; set both to the same value (with loss=grpo set rollout.temperature alone; the loss "
                "follows)"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """Most steps of the warm-up: by default none for a task that makes no demonstrations by itself."""
        if self.warmup.steps is not None:
            return self.warmup.steps
        return self.warmup.usual_steps if self.task.demonstrates else 0

    @property
    def imitates(self) -> bool:
        """Whether the run learns from demonstrations, in a warm-up or in its main phase."""
        return self.warmup_steps > 0 or isinstance(self.loss, CELossConfig)

    def _rewards_are_served(self) -> None:
        rewards = self.task.rewards
        if isinstance(self.loss, CELossConfig):
            return
        if not rewards and self.task.environment is None:
            raise ConfigError(
                "task.reward is missing: RL needs one; name a built-in reward (task.reward=exact_match) or your "
                "function (task.reward=my_reward.py:score), or fine-tune on completions with loss=ce"
            )
        number = len(rewards) + (self.task.environment is not None)
        if number > 1 and self.advantage.estimator == "gdpo" and self.kl_control.reward_type is not None:
            raise ConfigError(
                "advantage=gdpo takes each reward by itself, so it would not see the KL in the reward; put the KL into "
                "the loss (kl=k3)"
            )

    def _rate_fits_the_model(self) -> None:
        usual = OptimizerConfig.model_fields["lr"].default
        if isinstance(self.model, CausalLMConfig) and self.optimizer.lr == usual:
            warn_once(
                f"optimizer.lr={usual} suits the tiny model, which starts from random weights; a "
                "pretrained model usually takes 1e-6 to 1e-5, its LoRA adapters 1e-5 to 1e-4: set optimizer.lr, and "
                "warmup.lr or warmup=none"
            )

    def _kl_control_has_a_kl(self) -> None:
        control, in_loss = self.kl_control, getattr(self.loss, "use_kl_loss", False)
        in_reward = control.reward_type is not None
        if in_reward and not isinstance(self.loss, BaseRLLossConfig):
            raise ConfigError("kl_control.reward_type has no effect without rewards; choose a policy loss (loss=grpo)")
        if control.reward_coef != KLControlConfig.model_fields["reward_coef"].default and not in_reward:
            raise ConfigError(
                f"kl_control.reward_coef={control.reward_coef} has no effect without KL in the reward; choose one, "
                "e.g. kl=k1_in_reward (the coefficient of a KL in the loss is loss.kl_loss_coef)"
            )
        if control.target is None:
            if control.horizon != KLControlConfig.model_fields["horizon"].default:
                raise ConfigError(
                    f"kl_control.horizon={control.horizon} has no effect without a target; choose one, e.g. "
                    "kl_control=adaptive kl_control.target=1.0 kl=k2, or remove it"
                )
            return
        if in_loss == in_reward:
            which = "both kl_control.reward_type and the loss have a KL" if in_loss else "there is no KL to steer"
            raise ConfigError(
                f"kl_control.target={control.target}: {which}; choose one, e.g. kl=k2 (in the loss) or kl=k1_in_reward"
            )
        if in_loss and getattr(self.loss, "kl_loss_coef", 1.0) == 0:
            raise ConfigError("loss.kl_loss_coef=0 stays 0: an adaptive coefficient is multiplied; start it above 0")
        number = self.rollout.prompts_per_step * self.rollout.group_size
        if number >= 5 * control.horizon:
            raise ConfigError(
                f"kl_control.horizon={control.horizon} is too short for {number} completions a step: the coefficient "
                f"could reach 0; make it more than {number // 5}"
            )

    def _loss_can_be_served(self) -> None:
        if not isinstance(self.loss, BaseRLLossConfig):
            return
        chosen = self.loss.policy
        name = chosen.name
        lacking = self.loss.not_in_training
        if lacking is not None and lacking.startswith("teacher"):
            raise ConfigError(
                f"policy loss {name!r} learns from a teacher's log-probabilities, and this command has no teacher; use "
                f"it in your training loop ({lacking} of the items), or distil the policy as it was after the warm-up: "
                "loss=opd loss.teacher=reference"
            )
        if lacking is not None:
            raise ConfigError(
                f"loss.kl_loss_type={self.loss.kl_loss_type} reads {lacking} of the items, which this command does not "
                "make; use it in your training loop, or choose a KL estimated from the sampled token (kl=k2 or kl=k3)"
            )
        if self.loss.aggregation.count_empty:
            # Presets of other projects' losses set it as part of their definition.
            warn_once("loss.aggregation.count_empty=true has no effect here: every completion has a token")
        size = self.rollout.group_size
        if chosen.scope == "group" and self.training.micro_batch_size < size:
            raise ConfigError(
                f"policy loss {name!r} needs the {size} completions of a prompt in one micro-batch; set "
                f"training.micro_batch_size={size} or more"
            )
