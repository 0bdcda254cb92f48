"""Configs of the training loop; no torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.schema import Config

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class AdvantageConfig(Config):
    """From rewards to advantages, relative to the other completions of the same prompt."""

    std: Literal["sample", "population", "none"] = "sample"
    """Divide by the group's standard deviation: over G - 1, over G, or not at all (Dr. GRPO)."""
    eps: Rate = 1e-4
    """Added to the standard deviation; 1e-4 as in TRL."""


class OptimizerConfig(Config):
    """AdamW."""

    lr: Rate = 1e-3
    """Peak learning rate of the RL phase."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment; PyTorch's default."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Gradients of a larger norm are scaled down to it."""


class SchedulerConfig(Config):
    """Learning rate over the updates of the main phase."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls."""
    warmup_updates: Count = 0
    """Updates of linear rise from 0."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate after the last update over the peak; without meaning for constant."""


class WarmupConfig(Config):
    """Supervised learning from demonstrations with the toolkit's own cross-entropy: the phase before RL."""

    steps: Count = 300
    """At most so many optimizer steps; 0 leaves the phase out."""
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None = 0.35
    """End the phase when this greedy accuracy is reached on training prompts; None: after `steps`."""
    batch_size: Positive = 64
    """Demonstrations in a step, over all processes; also with loss=ce in the main phase."""
    lr: Rate = 2e-3
    """Learning rate, constant after a rise over 10 updates."""


class TrainingConfig(Config):
    """The loop."""

    steps: Count = 80
    """Rollouts in the RL phase (batches of demonstrations with loss=ce)."""
    minibatches: Positive = 4
    """Optimizer steps for each rollout; more than 1 makes the later ones off-policy, which the clipping is for."""
    micro_batch_size: Positive = 1024
    """Sequences in one forward on one process; the loss does not depend on it."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    log_every: Positive = 10
    """Steps between progress lines when the output is not a terminal."""
    resume: str | None = None
    """Output directory of an earlier run to go on from."""
    num_processes: Positive | None = None
    """Processes that must work together; None: as many as the launcher started."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if there is one."""


class TrackerConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    """An experiment tracker that accelerate knows; its package must be installed."""
    project: str = "rl-loss-toolkit"
    """Project name in the tracker."""
