"""What one optimizer step communicates because of the loss, and what it communicates in any case.

Every function returns the `Collective` calls of one cause, for one rank and one step. The formulas describe this
package's code: `toolkit.scale.measure` counts the same calls in real processes.

Arguments that several functions have:
    ranks: R, of the step.
    mesh: P, ranks of a mesh within it, which share each row or the vocabulary.
    micro_batches: M, of a rank; where a function does not have it, the exchange does not depend on it.
    positions: T, of one micro-batch's rows together, before any cut.
    tokens: N, scored in one micro-batch, over the whole mesh.
    parameters: of the whole model.
    itemsize: bytes of an element of what the function is about.
"""

from __future__ import annotations

from typing import Literal

from toolkit.distributed.exchange import PACKET
from toolkit.losses.step.totals import ROOM, numbers_exchanged
from toolkit.scale.collectives import Collective

FLOAT64, FLOAT32 = 8, 4
"""Bytes."""
FIXED_COUNTS = 3
"""Micro-batches, those with log-probabilities of the current policy, those with scored tokens."""
FINGERPRINT = 24
"""Bytes with which the ranks of a mesh check that they hold the same fields."""
SAME_CALL = 144
"""Bytes with which the ranks that share a vocabulary check that their calls are the same."""


def counting(ranks: int, *, numbers: int) -> list[Collective]:
    """Return the exchange of counts before the first forward: one, of a few float64 numbers (`numbers_counted`).

    The size does not depend on tokens or micro-batches, because each rank counts them first.
    """
    return [Collective("counts of the step", "all_reduce", numbers_exchanged(numbers) * FLOAT64, ranks)]


def counting_prompts(ranks: int, *, numbers: int, prompts: int, tables: int = 1) -> list[Collective]:
    """Return the exchange of counts if prompts are compared: every rank gets the table of every other.

    `prompts` are those of the rank that has the most; of the `tables` the aggregation ``prompt_mean`` has 1, and a loss
    of groups 1.
    """
    table_size = numbers_exchanged(numbers) + tables * (1 + 2 * prompts)
    first = Collective("counts of the step", "all_gather", (1 + ROOM) * FLOAT64, ranks)
    more = max(0, table_size - ROOM)
    return [first, Collective("counts of more prompts", "all_gather", more * FLOAT64, ranks)] if more else [first]


def numbers_counted(*, terms: int = 1, corrections: int = 0) -> int:
    """Return K, the numbers that a policy loss counts.

    Args:
        terms: that are counted separately: the policy loss (two under the aggregation ``per_component``), KL and
            entropy with ``per_component``, a likelihood of good tokens next to another one, a ``kl_aggregation``.
        corrections: of sampler and trainer, with or without weights divided by a mean.
    """
    return FIXED_COUNTS + terms + 2 * corrections


def metrics(ranks: int, *, numbers: int) -> list[Collective]:
    """Return the exchange of metrics at the end of the step: `numbers` of a rank, of which a mean has two.

    Every rank gets the packet of every other; only this part of a step grows with the ranks. A packet is 1 KiB.
    """
    packet = Collective("metrics", "all_gather", PACKET * FLOAT64, ranks)
    more = numbers - (PACKET - 2)
    beyond = Collective("metrics beyond one packet", "all_gather", more * FLOAT64, ranks)
    return [packet, beyond] if more > 0 else [packet]


def small_fields(mesh: int, *, positions: int, fields: int, micro_batches: int = 1) -> list[Collective]:
    """Return what sequence parallelism exchanges before the first forward, once: the fields of all micro-batches.

    `fields` counts the per-token tensors of an item: labels, advantages, log-probabilities ... A rank holds T / P
    positions of each (rounded up).
    """
    local_positions = -(-positions // mesh)
    return [
        Collective("fields of the items agree", "all_gather", FINGERPRINT, mesh),
        Collective("fields of the items", "all_gather", micro_batches * fields * local_positions * FLOAT64, mesh),
    ]


def row_logprobs(mesh: int, *, tokens: int, micro_batches: int = 1, with_entropy: bool = False) -> list[Collective]:
    """Return what a loss of whole sequences sums over a sequence-parallel mesh: one fp32 number a token in forward.

    Another one if the policy loss also uses entropies (`with_entropy`). Nothing in backward: each rank differentiates
    the loss of the full row with respect to its tokens.
    """
    calls = micro_batches * (1 + with_entropy)
    return [Collective("log-probabilities of whole rows", "all_reduce", tokens * FLOAT32, mesh, calls=calls)]


def gathered_tokens(ranks: int, *, tokens: int, bytes_per_token: int) -> list[Collective]:
    """Return what a loss of the whole batch (or of split groups) gathers: the fields of all tokens, on every rank.

    Only this exchange grows with the batch of all ranks: every rank sends its tokens and receives those of all others.
    The tensors are pickled, which adds some hundred bytes for each of them; these are not included here. `tokens` are
    those of all micro-batches of a rank, with `bytes_per_token` (about 60) in all per-token tensors of the kwargs.
    """
    return [
        Collective("sizes", "all_gather", FLOAT64, ranks),
        Collective("tokens of the whole step", "all_gather", tokens * bytes_per_token, ranks),
    ]


def vocabulary_parallel(
    mesh: int,
    *,
    tokens: int,
    width: int,
    chunks: int = 1,
    micro_batches: int = 1,
    with_entropy: bool = True,
    itemsize: int = 2,
    is_trunk_trained: bool = True,
) -> list[Collective]:
    """Return what ranks that share the head's vocabulary exchange: a few numbers a token, and a gradient [N, D].

    For each of the `chunks` (of equal length) of a micro-batch two all-reduces: the largest logit, then the sum of
    the other exponentials, the ranks that have the largest, the label's logit, and the entropy's part if it is a metric
    or a term (`with_entropy`). Once for each micro-batch the gradient of the hidden states [N, width], as for any
    column-parallel layer, unless `is_trunk_trained` is False. Logits and the gradient of the weight are never sent.
    """
    wide = max(FLOAT32, itemsize)
    numbers = (3 + with_entropy) * wide
    calls = micro_batches * chunks
    collectives = [
        Collective("calls of the head agree", "all_reduce", SAME_CALL, mesh, calls=micro_batches),
        Collective("largest logits", "all_reduce", tokens * wide // chunks, mesh, calls=calls),
        Collective("softmax over all parts", "all_reduce", tokens * numbers // chunks, mesh, calls=calls),
    ]
    gradient = Collective(
        "gradient of hidden states", "all_reduce", tokens * width * itemsize, mesh, calls=micro_batches
    )
    return [*collectives, gradient] if is_trunk_trained else collectives


def data_parallel_gradient(ranks: int, *, parameters: float, itemsize: int = FLOAT32) -> list[Collective]:
    """Return DDP's all-reduce of the gradient: once a step for any number of micro-batches (in buckets of 25 MiB)."""
    return [Collective("gradient (DDP)", "all_reduce", round(parameters) * itemsize, ranks)]


def sharded_gradient(
    ranks: int,
    *,
    parameters: float,
    micro_batches: int = 1,
    itemsize: int = 2,
    reduce_itemsize: int = FLOAT32,
    exchange: Literal["step", "micro_batch"] = "step",
) -> list[Collective]:
    """Return what FSDP2 sends: every micro-batch gathers the weights in forward and in backward.

    The gradient (`reduce_itemsize` bytes an element) is reduced and sharded once, in the last backward, as in the
    training command; a rank holds the full gradient until then. With `exchange` "micro_batch", the default of FSDP2, it
    is sent in every one. The shards of all ranks are equal.
    """
    shard = -(-round(parameters) // ranks)
    times = micro_batches if exchange == "micro_batch" else 1
    return [
        Collective("weights (FSDP2)", "all_gather", shard * itemsize, ranks, calls=2 * micro_batches),
        Collective("gradient (FSDP2)", "reduce_scatter", shard * ranks * reduce_itemsize, ranks, calls=times),
    ]
