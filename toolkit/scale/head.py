"""Memory of the head on one rank, planned for any size without allocating it.

The engine plans from shapes alone (`toolkit.head.explain`), and a tensor that repeats one number has the shape of a
large one but the memory of a single element. So a laptop can plan a head of 163,840 x 7,168 with the same code that
decides on a GPU.

Legend: N scored tokens of a micro-batch, D hidden width, V vocabulary, P ranks that share the vocabulary, F ranks that
share the head under FSDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.head import explain
from toolkit.head.logits import LogitTransform
from toolkit.head.plan import GPU_CHUNK_BYTES, HeadPlan, Scope, autograd_plan
from toolkit.head.scores import logit_copies

ADAM_BYTES = 12
"""Of each parameter under mixed precision: an fp32 copy, and two fp32 moments."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its head and its gradient depend on."""

    name: str
    vocabulary: int
    width: int
    parameters: float
    """Of the whole model."""
    source: str


MODELS = (
    ModelShape("8B", 151_936, 4_096, 8.19e9, "Qwen3-8B, config.json"),
    ModelShape("70B", 128_256, 8_192, 70.6e9, "Llama-3.1-70B, config.json"),
    ModelShape("1T", 163_840, 7_168, 1.04e12, "Kimi-K2, config.json"),
)
"""One of each class, with the sizes that their authors publish."""


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of the head on one rank, in a forward and backward of one micro-batch."""

    weight: int
    """As the loss sees it: gathered under FSDP, this rank's rows under vocabulary parallelism."""
    gradients: int
    """Of the weight and of the hidden states, as they are returned."""
    logits: int
    """Of the largest chunk."""
    other: int
    """What else the pass needs: fp32 sums, blocks of rows."""
    kept: int
    """Between the steps: Adam's states, and under FSDP this rank's shard of the weight."""
    plan: HeadPlan

    @property
    def peak(self) -> int:
        """The maximum during the loss, without the hidden states: the sum of the above."""
        return self.weight + self.gradients + self.logits + self.other + self.kept


def head_memory(
    vocabulary: int,
    width: int,
    tokens: int,
    *,
    vocab_parallel: int = 1,
    fsdp: int = 1,
    is_eager: bool = False,
    is_frozen: bool = False,
    scope: Scope | None = "token",
    dtype: torch.dtype = torch.bfloat16,
    chunk_size: int | Literal["auto"] = "auto",
) -> HeadMemory:
    """Plan the head of one rank.

    Args:
        vocabulary: V.
        width: D.
        tokens: N of one micro-batch on this rank; ranks that share the vocabulary score the same tokens.
        vocab_parallel: P, ranks that hold V / P rows of the weight each.
        fsdp: F, ranks over which FSDP2 shards what is kept between steps; the weight is still gathered for the loss.
        is_eager: whether the logits of all tokens are held at once (``mode=eager``), for comparison.
        is_frozen: whether the weight gets no gradient and so no optimizer state.
        scope: of the loss; None for log-probabilities that leave the head.
        dtype: of weight and hidden states.
        chunk_size: tokens of a chunk; "auto": as many as the engine's budget on a GPU holds.

    Raises:
        ConfigError: a number of ranks is not positive, or there are more ranks than rows.
    """
    if not 1 <= vocab_parallel <= vocabulary or fsdp < 1:
        raise ConfigError(
            f"vocab_parallel={vocab_parallel}, fsdp={fsdp}: give 1 or more ranks, and no more than the {vocabulary:,} "
            "rows of the vocabulary"
        )
    rows = -(-vocabulary // vocab_parallel)
    hidden = weightless((tokens, width), dtype).requires_grad_()
    weight = weightless((rows, width), dtype).requires_grad_(not is_frozen)
    if is_eager:
        why, copies = "the logits of all tokens at once", logit_copies(LogitTransform())
        plan = autograd_plan("eager", why, hidden, weight, None, [slice(0, tokens)], copies=copies)
    else:
        labels = torch.zeros(tokens, dtype=torch.int64)
        ids = torch.zeros_like(labels) if scope == "sequence" else None
        size = {"chunk_size": chunk_size, "chunk_bytes": GPU_CHUNK_BYTES if chunk_size == "auto" else None}
        plan = explain(hidden, weight, labels, scope=scope, sequence_ids=ids, **size)
    trained = 0 if is_frozen else -(-rows * width // fsdp) * ADAM_BYTES
    logits = plan.largest * rows * dtype.itemsize
    return HeadMemory(
        weight=weight.nbytes,
        gradients=plan.gradient_bytes,
        logits=logits,
        other=max(0, plan.peak_bytes - plan.gradient_bytes - logits),
        kept=trained + (-(-weight.nbytes // fsdp) if fsdp > 1 else 0),
        plan=plan,
    )


def weightless(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros of any shape that takes the memory of one element."""
    return torch.zeros((), dtype=dtype).expand(shape).detach()
