"""The formulas combined for one step of training, and printed as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import ConfigError
from toolkit.explain.tables import aligned
from toolkit.scale import step
from toolkit.scale.collectives import Collective, total_calls, total_sent
from toolkit.scale.head import MODELS, HeadMemory, ModelShape, head_memory

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
BANDWIDTH = 50e9
"""Bytes a second of one rank: a 400 Gbit/s network card, assumed for the column of times."""
USUAL_MESH = 8
"""Ranks of one machine."""
METRIC_NUMBERS = 60
"""Of a step of GRPO with every metric; up to 126 fit in one packet."""
FIELDS = 5
"""Per-token tensors: labels, advantages, old, reference and rollout log-probabilities."""


@dataclass(frozen=True)
class Setup:
    """How one optimizer step is distributed."""

    ranks: int = 1024
    model: ModelShape = MODELS[0]
    micro_batches: int = 8
    tokens: int = 16_384
    """Scored in the rows of one micro-batch, before any split."""
    sequence_parallel: int = 1
    vocab_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("ranks", "micro_batches", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("sequence_parallel", "vocab_parallel"):
            mesh = getattr(self, name)
            if mesh < 1 or self.ranks % mesh:
                raise ConfigError(
                    f"{name}={mesh} must divide ranks={self.ranks}, because every rank belongs to one mesh; change "
                    f"--{name.replace('_', '-')}"
                )


def usual_mesh(ranks: int) -> int:
    """Return how many ranks share a row, or the vocabulary, by default: the largest divisor of `ranks` up to 8."""
    return max(mesh for mesh in range(1, USUAL_MESH + 1) if ranks % mesh == 0)


def causes(setup: Setup) -> list[Collective]:
    """Return what a step of a loss of whole sequences communicates, its gradient last: FSDP2, bf16, once a step."""
    mesh, vocab, model = setup.sequence_parallel, setup.vocab_parallel, setup.model
    local_tokens = -(-setup.tokens // mesh)
    collectives = step.counting(setup.ranks, numbers=step.numbers_counted())
    collectives += step.metrics(setup.ranks, numbers=METRIC_NUMBERS)
    if mesh > 1:
        collectives += step.small_fields(mesh, positions=setup.tokens, fields=FIELDS, micro_batches=setup.micro_batches)
        collectives += step.row_logprobs(mesh, tokens=setup.tokens, micro_batches=setup.micro_batches)
    if vocab > 1:
        plan = head_memory(model.vocabulary, model.width, local_tokens, vocab_parallel=vocab).plan
        collectives += step.vocabulary_parallel(
            vocab,
            tokens=local_tokens,
            width=model.width,
            chunks=len(plan.chunks),
            micro_batches=setup.micro_batches,
        )
    return collectives + step.sharded_gradient(
        setup.ranks, parameters=model.parameters, micro_batches=setup.micro_batches, reduce_itemsize=2
    )


def step_table(setup: Setup) -> str:
    """Return calls, bytes and time of every cause, as text."""
    collectives = causes(setup)
    rows = [("cause", "ranks", "calls", "a rank sends", "time if alone")]
    for cause in collectives:
        seconds = cause.seconds(bandwidth=BANDWIDTH)
        time = f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"
        rows.append((cause.what, f"{cause.ranks:,}", f"{total_calls([cause]):,}", in_words(cause.sent), time))
    of_gradient = total_sent(cause for cause in collectives if cause.what.endswith("(FSDP2)"))
    of_loss = total_sent(cause for cause in collectives if not cause.what.endswith("(FSDP2)"))
    title = (
        f"One step of a {setup.model.name} model on {setup.ranks:,} ranks: {setup.micro_batches} micro-batches of "
        f"{setup.tokens:,} tokens, sequence parallel {setup.sequence_parallel}, vocabulary parallel "
        f"{setup.vocab_parallel}"
    )
    share = f"because of the loss: {in_words(of_loss)}; weights and gradient: {in_words(of_gradient)}"
    share += "\nThe gradient is sent once a step, as in the training command; FSDP2's default is every micro-batch."
    return "\n".join([title, "", aligned(rows), "", share])


def head_table(tokens: int = 16_384, vocab_parallel: int = 8, fsdp: int = 64) -> str:
    """Return the memory of the head of every model in `MODELS`, as text; `layouts_of` says in which layouts."""
    rows: list[Sequence[str]] = [("head", "layout", "weight", "kept", "gradients", "logits", "other", "peak")]
    for model in MODELS:
        for name, memory in layouts_of(model, tokens, vocab_parallel, fsdp).items():
            parts = (memory.weight, memory.kept, memory.gradients, memory.logits, memory.other, memory.peak)
            rows.append((f"{model.name} [{model.vocabulary:,} x {model.width:,}]", name, *map(in_words, parts)))
    title = f"Memory of the head on one rank, bf16 with Adam, {tokens:,} tokens"
    return "\n".join([title, "", aligned(rows, left=2)])


def layouts_of(model: ModelShape, tokens: int, vocab_parallel: int, fsdp: int) -> dict[str, HeadMemory]:
    """Return the memory of a model's head in four layouts, by name.

    In the third `fsdp` ranks share what is kept between steps, in the last `vocab_parallel` ranks the vocabulary.
    """
    shape = (model.vocabulary, model.width, tokens)
    return {
        "all logits": head_memory(*shape, is_eager=True),
        "chunks": head_memory(*shape),
        f"chunks, FSDP2 over {fsdp}": head_memory(*shape, fsdp=fsdp),
        f"chunks, vocabulary over {vocab_parallel}": head_memory(*shape, vocab_parallel=vocab_parallel),
    }


def in_words(size: float) -> str:
    """Return bytes in the unit that leaves at most four digits before the decimal point."""
    unit = 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.{0 if unit == 0 or size >= 100 else 1}f} {UNITS[unit]}"
