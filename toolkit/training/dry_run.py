"""What a run would do: prompts as the model sees them, completions with their rewards, tokens and memory."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import psutil
import torch
from rich.console import Console

from toolkit.losses.config.ce import CELossConfig
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example
from toolkit.training.experience import IGNORED, rows_from_answers
from toolkit.training.sharding import unwrapped
from toolkit.training.trainer import Trainer

DRY_RUN = "dry_run.txt"
"""What a dry run has printed, in its output directory; another run may go there."""
NUM_PROMPTS = 3
NUM_MEASURED = 1000
"""Demonstrations whose length is measured."""
MEBIBYTE = 2**20
MOST_LINES = 24
"""Lines of a prompt or completion that are shown."""
INDENT = " " * 14
KEPT_FOR_BACKWARD = 22
"""Numbers that a block keeps for backward, for each token and unit of hidden width, without attention probabilities:
21.1 to 21.9 measured on Llamas of width 64 to 512 in fp32 (Korthikanti et al. 2022, arXiv 2205.05198: 17 for GPT)."""


@dataclass(frozen=True)
class Memory:
    """What one process needs at least, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / MEBIBYTE:,.1f}" for name, size in vars(self).items() if size)
        return f"{self.total / MEBIBYTE:,.0f} MiB for each process ({parts})"


def show_dry_run(trainer: Trainer, console: Console) -> None:
    """Print what a run would do, and train nothing; all processes call it together."""
    prompts = trainer.task.draw_at(0, NUM_PROMPTS, trainer.draws.rng("main", 0, "data"))
    if isinstance(trainer.config.loss, CELossConfig):
        _show_demonstrations(trainer, console)
    else:
        _show_completions(trainer, prompts, console)
    task = trainer.task
    console.print(f"examples: {len(task.train):,} to train on, {len(task.heldout):,} held out")
    for line in _size(trainer):
        console.print(line, soft_wrap=True, markup=False)
    console.print("dry run: nothing was trained; leave out debug=dry_run to train", style="bold")


def _show_demonstrations(trainer: Trainer, console: Console) -> None:
    """Show demonstrations with the tokens that are scored in marks."""
    examples = trainer.task.demonstrate_at(0, NUM_PROMPTS, trainer.draws.rng("main", 0, "data"))
    rows = rows_from_answers(examples, trainer.tokenizer, trainer.accelerator.device)
    for number, (ids, mask, labels) in enumerate(
        zip(rows.input_ids, rows.attention_mask, rows.shifted_labels, strict=True), 1
    ):
        is_scored = torch.cat([torch.zeros(1, dtype=torch.bool, device=ids.device), labels != IGNORED])
        pieces: list[str] = []
        for scored in (False, True):
            text = trainer.tokenizer.decode(ids[mask.bool() & (is_scored == scored)].tolist())
            pieces.append(f"  {'scored' if scored else 'read':<12}{_quoted(text)}")
        _print(console, f"demonstration {number}", *pieces)


def _show_completions(trainer: Trainer, prompts: list[Example], console: Console) -> None:
    """Show a completion of each prompt as it is sampled in training, and its rewards."""
    completions = trainer.generator.sample(prompts, range(len(prompts)), 0, group_size=1)
    flips = [trainer.draws.key("main", 0, "reward", index) for index in range(len(prompts))]
    rewarded = trainer.rewarder(prompts, completions, flips)
    scores = rewarded.scores
    assert scores is not None
    for index, example in enumerate(prompts):
        prompt, *pieces = _pieces(completions, index, trainer.tokenizer)
        values = {name: values[index] for name, values in scores.parts.items() if not math.isnan(values[index])}
        parts = [f"{name} {value:.3f}" for name, value in values.items() if len(scores.parts) > 1]
        end = "" if completions.finished[index] else f"  (cut after {trainer.generator.max_new_tokens} tokens)"
        if completions.episodes is not None:
            end += f"  (ended by: {completions.episodes[index].end})"
        _print(
            console,
            f"prompt {index + 1}: {prompt.num_tokens} tokens",
            f"  prompt      {_quoted(prompt.text)}",
            *_shown_pieces(pieces, completions.episodes is not None, end),
            "  reward      "
            + ("none applies" if math.isnan(scores.totals[index]) else f"{scores.totals[index]:.3f}")
            + (f"  ({', '.join(parts)})" if parts else ""),
            *([f"  answer      {example.answer!r}"] if example.answer else []),
        )
    for name, failure in scores.failures[:1]:
        _print(console, f"{trainer.rewarder.called(name)} failed: {failure.reason}")


@dataclass(frozen=True)
class _Piece:
    """Neighbouring tokens that are all scored or all read."""

    text: str
    num_tokens: int
    is_scored: bool


def _pieces(completions: Completions, index: int, tokenizer: Any) -> list[_Piece]:
    """Return row `index` in pieces: the prompt, a turn, and with an environment what was read, a turn ..."""
    is_there = completions.attention_mask[index].bool()
    ids, is_new = completions.input_ids[index][is_there].tolist(), completions.is_new[index][is_there].tolist()
    pieces = []
    for is_scored, group in itertools.groupby(zip(ids, is_new, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        pieces.append(_Piece(tokenizer.decode(tokens), len(tokens), is_scored))
    return pieces


def _shown_pieces(pieces: Sequence[_Piece], in_turns: bool, end: str) -> list[str]:
    """Return the lines of all pieces but the prompt; those of a turn are scored."""
    if not in_turns:
        return [f"  completion  {_quoted(piece.text)}{end}" for piece in pieces]
    lines = []
    for number, piece in enumerate(pieces):
        name = f"turn {number // 2 + 1}" if piece.is_scored else "read"
        last = end if number == len(pieces) - 1 else ""
        lines.append(f"  {name:<12}{_quoted(piece.text)}{last}")
    return lines


def _quoted(text: str) -> str:
    """Return a text with its line ends visible, each line below the one before; the middle of a long one left out."""
    lines = [repr(line) for line in text.splitlines(keepends=True)] or [repr(text)]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]
    return f"\n{INDENT}".join(lines)


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _size(trainer: Trainer) -> list[str]:
    """Return lines on the tokens and the memory of a step."""
    config, world = trainer.config, trainer.accelerator.num_processes
    if isinstance(config.loss, CELossConfig):
        number = in_step = config.warmup.batch_size
        shown = trainer.task.demonstrate(min(NUM_MEASURED, len(trainer.task.train) or NUM_MEASURED), Random(0))
        lengths = rows_from_answers(shown, trainer.tokenizer, torch.device("cpu")).attention_mask.sum(-1)
        longest = int(lengths.max())
        what = f"{number} demonstrations of {float(lengths.float().mean()):.0f} tokens on average, at most {longest}"
    else:
        in_step = config.rollout.prompts_per_step
        number = in_step * config.rollout.group_size
        texts = [example.prompt for example in trainer.task.train]
        prompt = [len(ids) for ids in trainer.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        environment = trainer.generator.environment
        turns = 1 if environment is None else environment.max_turns
        longest = max(prompt) + turns * trainer.generator.max_new_tokens
        if trainer.context is not None:
            longest = min(longest, trainer.context)
        what = (
            f"{config.rollout.prompts_per_step} prompts x {config.rollout.group_size} "
            f"{'completions' if environment is None else f'episodes of at most {turns} turns'} of at most "
            f"{trainer.generator.max_new_tokens} tokens; prompts have {sum(prompt) / len(prompt):.0f} on average, "
            f"at most {max(prompt)}{'' if environment is None else '; what the environment says is not counted'}"
        )
    rows, budget = min(config.training.micro_batch_size, -(-number // world)), config.training.micro_batch_tokens
    tokens = rows * longest if budget is None else min(budget, -(-number // world) * longest)
    size = f"{rows:,} sequences, at most" if budget is None else "sequences packed without padding,"
    setting = "micro_batch_size" if budget is None else "micro_batch_tokens"
    memory = expected_memory(trainer, tokens)
    steps, examples = config.training.steps, max(1, len(trainer.task.train))
    lines = [
        f"a run: {steps:,} steps of {in_step:,} examples, each {steps * in_step / examples:,.1f} times on average; "
        f"learning rate {config.optimizer.lr:g}",
        f"a step: {what}: at most {number * longest:,} tokens",
        f"a micro-batch on one process: {size} {tokens:,} tokens "
        f"(training.{setting}={getattr(config.training, setting)})",
        f"memory: about {memory}; without attention probabilities and the sampler's keys and values",
    ]
    free = free_memory(trainer.accelerator.device)
    if memory.total > free:
        lines.append(
            f"that is more than the {free / MEBIBYTE:,.0f} MiB that are free for each process; lower "
            f"training.{setting} (the loss does not depend on it), or set model.gradient_checkpointing=true"
        )
    return lines


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free for each process of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def expected_memory(trainer: Trainer, tokens: int) -> Memory:
    """Return what a process needs for a micro-batch of `tokens`: known for weights, estimated for activations."""
    policy = unwrapped(trainer.policy)
    parameters = list(policy.parameters())
    shards = trainer.accelerator.num_processes if trainer.config.training.sharding != "none" else 1
    weights = sum(p.numel() * p.element_size() for p in parameters) // shards
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad) // shards
    config: Any = policy.head.lm.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = max(p.element_size() for p in parameters)
    per_token = config.num_hidden_layers * config.hidden_size * KEPT_FOR_BACKWARD * width
    loss = trainer.config.loss
    rows = (
        tokens if loss.mode == "eager" else min(tokens, loss.chunk_size if isinstance(loss.chunk_size, int) else 1024)
    )
    needs_reference = trainer.kl_penalty.needs_reference and not isinstance(loss, CELossConfig)
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=2 * trained,  # both moments of Adam
        reference=weights if needs_reference else 0,
        activations=tokens * per_token,
        logits=2 * rows * config.vocab_size * 4,  # and their gradient, in fp32
    )
