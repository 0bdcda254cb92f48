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
from toolkit.tasks.config import DatasetConfig, TaskConfig
from toolkit.training.config import (
    AdvantageConfig,
    EvaluationConfig,
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
    evaluation: EvaluationConfig
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
        self._evaluation_measures()
        self._rate_fits_the_model()
        self._kl_control_has_a_kl()
        self._loss_can_be_served()
        self._loop_settings_have_an_effect()
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
        shaping = (self.task.environment is not None) + (self.rollout.overlong_buffer is not None)
        has_parts = len(rewards) + shaping > 1
        if has_parts and self.advantage.estimator == "gdpo" and self.kl_control.reward_type is not None:
            raise ConfigError(
                "advantage=gdpo takes each reward by itself, so it would not see the KL in the reward; put the KL into "
                "the loss (kl=k3)"
            )

    @property
    def tells_right_from_wrong(self) -> bool:
        """Whether a held-out completion passes or fails, so accuracy and pass@k can be measured."""
        by_verifier = self.task.has_verifier and set(self.task.rewards) <= {"verifier", "coin_flip"}
        by_itself = by_verifier and bool(self.task.rewards) and self.task.environment is None
        return by_itself or (self._has_rewards and self.evaluation.passing_reward is not None)

    @property
    def _has_rewards(self) -> bool:
        return bool(self.task.rewards) or self.task.environment is not None

    def _evaluation_measures(self) -> None:
        cfg, task = self.evaluation, self.task
        if self.training.keep_best and not cfg.every:
            raise ConfigError(
                "training.keep_best has no effect without evaluations on the way; set evaluation.every=10, for example"
            )
        if not self._has_rewards:
            for name in ("samples", "passing_reward"):
                if getattr(cfg, name):
                    raise ConfigError(f"evaluation.{name} has no effect without a reward; set task.reward")
        elif cfg.ks is not None and not self.tells_right_from_wrong:
            raise ConfigError(
                f"evaluation.ks: task.reward={task.reward} does not say which completions pass; set "
                "evaluation.passing_reward, e.g. 1 for rewards of 0 and 1"
            )
        holds_out = not isinstance(task, DatasetConfig) or task.heldout or task.heldout_path or task.heldout_column
        if cfg.every and not holds_out:
            raise ConfigError(
                f"evaluation.every={cfg.every} has no effect with task.heldout=0; set task.heldout=0.1 or "
                "task.heldout_path, or remove it"
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
                f"it in your training loop ({lacking} of the items), or let a reference teach: loss=opd "
                "loss.teacher=reference training.reference_path=FOLDER"
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
        is_padded = self.training.micro_batch_tokens is None  # packed, the groups are scored before the step
        if chosen.scope == "group" and is_padded and self.training.micro_batch_size < size:
            raise ConfigError(
                f"policy loss {name!r} needs the {size} completions of a prompt in one micro-batch; set "
                f"training.micro_batch_size={size} or more"
            )

    def _loop_settings_have_an_effect(self) -> None:
        rollout, training = self.rollout, self.training
        if isinstance(self.loss, CELossConfig):
            without = "loss=ce, which samples nothing; remove it"
            for part, name in (
                ("training", "epochs"),
                ("training", "refresh_reference_every"),
                ("training", "reference_path"),
                ("rollout", "max_sampling_rounds"),
                ("rollout", "truncated"),
                ("rollout", "overlong_buffer"),
                ("rollout", "old_logprobs"),
            ):
                config = getattr(self, part)
                value = getattr(config, name)
                if value != type(config).model_fields[name].default:
                    raise ConfigError(f"{part}.{name}={value} has no effect with {without}")
            return
        if rollout.max_sampling_rounds > 1 and not rollout.skip_uniform_groups:
            raise ConfigError(
                f"rollout.max_sampling_rounds={rollout.max_sampling_rounds} has no effect with "
                "rollout.skip_uniform_groups=false: no group is skipped; remove one of them"
            )
        in_loss = isinstance(self.loss, BaseRLLossConfig) and self.loss.needs_reference
        for name in ("refresh_reference_every", "reference_path"):
            value = getattr(training, name)
            if value is not None and not in_loss and self.kl_control.reward_type is None:
                raise ConfigError(
                    f"training.{name}={value} has no effect: nothing reads a reference policy; add a KL to it (kl=k3 "
                    "in the loss, kl=k1_in_reward in the reward), or remove it"
                )
