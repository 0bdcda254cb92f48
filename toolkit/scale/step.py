"""What one optimizer step communicates because of the loss, and what it communicates anyway.

Every function gives the `Collective` calls of one cause, for one rank and one step. The numbers are those of this
package's code, not of an idea of it: `toolkit.scale.measure` counts the calls of real processes and finds the same.

Legend: R ranks of the step, P ranks of a mesh within it, M micro-batches, T positions of a micro-batch's rows (all rows
together, before any cut), N scored tokens of a micro-batch, D hidden width.
"""

from __future__ import annotations

from typing import Literal

from toolkit.distributed import PACKET
from toolkit.losses.step.totals import ROOM
from toolkit.scale.collectives import Collective

FLOAT64, FLOAT32 = 8, 4
"""Bytes."""
CENSUS_FLAGS = 2
"""Numbers with which a rank says that its items were refused."""
CENSUS_HEADS = 3
"""Micro-batches, those with log-probabilities of the current policy, those with anything to score."""
FINGERPRINT = 24
"""Bytes by which the ranks of a mesh make sure that they hold the same fields."""
SAME_CALL = 144
"""Bytes by which the ranks that share a vocabulary make sure that they were called alike."""


def counting(ranks: int, *, numbers: int) -> list[Collective]:
    """Return the exchange of counts before the first forward: one, of a few float64 numbers.

    Neither tokens nor micro-batches enter: they are counted on each rank first.

    Args:
        ranks: R.
        numbers: K, that the loss counts; see `numbers_counted`.
    """
    return [Collective("counts of the step", "all_reduce", (CENSUS_FLAGS + numbers) * FLOAT64, ranks)]


def counting_prompts(ranks: int, *, numbers: int, prompts: int, tables: int = 1) -> list[Collective]:
    """Return the exchange of counts where prompts are compared: every rank gets the table of every other.

    Args:
        ranks: R.
        numbers: K, that the loss counts; see `numbers_counted`.
        prompts: of the rank that has most of them.
        tables: 1 for the aggregation ``prompt_mean``, 1 for a loss of groups.
    """
    own = CENSUS_FLAGS + numbers + tables * (1 + 2 * prompts)
    found = [Collective("counts of the step", "all_gather", (1 + ROOM) * FLOAT64, ranks)]
    more = max(0, own - ROOM)
    return [*found, Collective("counts of more prompts", "all_gather", more * FLOAT64, ranks)] if more else found


def numbers_counted(*, terms: int = 1, corrections: int = 0) -> int:
    """Return K, the numbers that a policy loss counts.

    Args:
        terms: that count in ways of their own: the policy loss (two under the aggregation ``per_component``), KL and
            entropy beside the latter, a likelihood of good tokens beside another one, a ``kl_aggregation``.
        corrections: of sampler and trainer, whether their weights are divided by a mean or not.
    """
    return CENSUS_HEADS + terms + 2 * corrections


def metrics(ranks: int, *, numbers: int) -> list[Collective]:
    """Return the exchange of metrics at the end of the step.

    Every rank gets the packet of every other: the one part of a step that grows with the ranks. A packet is 1 KiB.

    Args:
        ranks: R.
        numbers: that the metrics of a rank consist of; a mean has two.
    """
    found = [Collective("metrics", "all_gather", PACKET * FLOAT64, ranks)]
    more = numbers - (PACKET - 1)
    return [*found, Collective("metrics beyond one packet", "all_gather", more * FLOAT64, ranks)] if more > 0 else found


def small_fields(mesh: int, *, positions: int, fields: int, micro_batches: int = 1) -> list[Collective]:
    """Return what sequence parallelism exchanges before the first forward: the per-token fields of all micro-batches.

    Args:
        mesh: P, ranks that share each row.
        positions: T, of one micro-batch; a rank holds T / P of them (rounded up).
        fields: per-token tensors of an item: labels, advantages, log-probabilities ...
        micro_batches: M; the number of exchanges does not depend on it.
    """
    own = -(-positions // mesh)
    return [
        Collective("fields of the items agree", "all_gather", FINGERPRINT, mesh),
        Collective("fields of the items", "all_gather", micro_batches * fields * own * FLOAT64, mesh),
    ]


def whole_rows(mesh: int, *, tokens: int, micro_batches: int = 1, with_entropy: bool = False) -> list[Collective]:
    """Return what a loss of whole sequences sums over a sequence-parallel mesh: one fp32 number a token in forward.

    Nothing in backward: each rank differentiates the loss of the whole row by its own tokens.

    Args:
        mesh: P.
        tokens: N, scored in one micro-batch over the whole mesh.
        micro_batches: M.
        with_entropy: whether the policy loss looks at entropies, too.
    """
    calls = micro_batches * (1 + with_entropy)
    return [Collective("log-probabilities of whole rows", "all_reduce", tokens * FLOAT32, mesh, calls=calls)]


def whole_step(ranks: int, *, tokens: int, bytes_per_token: int) -> list[Collective]:
    """Return what a loss of the whole batch (or of groups that are cut) gathers: the fields of all tokens, everywhere.

    The one exchange that grows with the whole batch: every rank brings its tokens and receives those of all others. The
    tensors travel pickled, which adds some hundred bytes for each of them; these are left out here.

    Args:
        ranks: R.
        tokens: scored on this rank, in all its micro-batches.
        bytes_per_token: of all per-token tensors of the kwargs together, about 60.
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

    For each chunk two all-reduces: the largest logit, then the sum of exponentials with the label's logit (and the
    entropy's part). Once a micro-batch the gradient of the hidden states, as any layer that is cut by columns. Logits
    never travel; nor does the gradient of the weight.

    Args:
        mesh: P.
        tokens: N, scored in one micro-batch; every rank of the mesh has the same.
        width: D.
        chunks: of one micro-batch, of equal length.
        micro_batches: M.
        with_entropy: whether the entropy is a metric (or a term of the loss).
        itemsize: bytes of an element of the hidden states.
        is_trunk_trained: whether hidden states get a gradient.
    """
    wide = max(FLOAT32, itemsize)
    numbers = (2 + with_entropy) * wide
    calls = micro_batches * chunks
    found = [
        Collective("calls of the head agree", "all_reduce", SAME_CALL, mesh, calls=micro_batches),
        Collective("largest logits", "all_reduce", tokens * wide // chunks, mesh, calls=calls),
        Collective("softmax over all parts", "all_reduce", tokens * numbers // chunks, mesh, calls=calls),
    ]
    gradient = Collective(
        "gradient of hidden states", "all_reduce", tokens * width * itemsize, mesh, calls=micro_batches
    )
    return [*found, gradient] if is_trunk_trained else found


def data_parallel_gradient(ranks: int, *, parameters: float, itemsize: int = FLOAT32) -> list[Collective]:
    """Return DDP's all-reduce of the gradient: once a step, however many micro-batches (in buckets of 25 MiB).

    Args:
        ranks: R.
        parameters: of the whole model.
        itemsize: bytes of an element of the gradient.
    """
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
    """Return what FSDP2 moves: every micro-batch gathers the weights in forward and in backward.

    The gradient is added up and cut once, in the last backward, as the training command does it; a rank holds the whole
    gradient until then.

    Args:
        ranks: F, among which the model is cut.
        parameters: of the whole model; shards are equal.
        micro_batches: M.
        itemsize: bytes of a gathered weight.
        reduce_itemsize: bytes of an element of the gradient.
        exchange: when the gradient travels: once a "step", or in every "micro_batch", as FSDP2 does by itself.
    """
    own = -(-round(parameters) // ranks)
    times = micro_batches if exchange == "micro_batch" else 1
    return [
        Collective("weights (FSDP2)", "all_gather", own * itemsize, ranks, calls=2 * micro_batches),
        Collective("gradient (FSDP2)", "reduce_scatter", own * ranks * reduce_itemsize, ranks, calls=times),
    ]
