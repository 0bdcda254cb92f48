"""Configs of the training loop; no torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.schema import Config

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]


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
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Gradients of a larger norm are scaled down to it."""


class SchedulerConfig(Config):
    """Learning rate over the optimizer steps of a phase."""

    shape: Literal["cosine", "constant"] = "cosine"
    """How it falls after the warm-up."""
    warmup_steps: Count = 10
    """Steps of linear rise from 0."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate over the peak, for cosine."""


class WarmupConfig(Config):
    """The supervised phase before RL, with the toolkit's own cross-entropy."""

    steps: Count = 80
    """Optimizer steps; 0 leaves the phase out."""
    batch_size: Positive = 64
    """Labelled texts in a step, over all processes."""
    lr: Rate = 3e-3
    """Peak learning rate."""


class TrainingConfig(Config):
    """The loop."""

    steps: Count = 200
    """Rollouts in the RL phase (batches of labelled text with loss=ce)."""
    minibatches: Positive = 1
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
