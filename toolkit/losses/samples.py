"""Random items and batches for layouts, checks, the rehearsal and measurements; no other module makes them.

The values of a field follow from its declaration (`PerToken`) and, for log-probabilities and candidates, from the end
of its name. All declared fields are filled, those of custom items included.

Legend: B rows (a sequence each), T positions of a row, K candidates, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.head import token_logprobs
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import LossContextInputItem, RLLossContextInputItem
from toolkit.losses.record import PerToken
from toolkit.losses.step.builder import item_class

GARBAGE = 3.0
"""Value at positions that are not scored, unless the caller wants another one, such as NaN."""
HOLES = 0.25
"""Share of the positions inside a sequence that are not scored, such as a tool's answer."""
SPREAD = 0.4
"""Of log-probabilities around those of the policy, in nats: wide enough for clips, masks and vetoes to act."""
NUM_VALUES = 2
"""Values per position of custom fields that have several."""
NEAR = 1e-4
"""Factor of the spread in the first sequence."""
LARGEST_LOGPROB = -1e-3
ONE, TWIN = 1, 3
"""Rows of two one-token sequences with the same label and different other fields: a tie for code that sorts sequences
by their tokens alone."""


@dataclass(frozen=True)
class Batch:
    """All sequences of one optimizer step, a row each, with what the trunk computed and the head."""

    item: LossContextInputItem
    """Of any class; fields [B, T]. It is cut by its declared fields."""
    hidden_states: Tensor
    """[B, T, D]"""
    head_weight: Tensor
    """[V, D]"""
    head_bias: Tensor | None = None
    """[V]"""
    lengths: tuple[int, ...] | None = None
    """Positions of each row before padding; None: all T. Packing skips the others."""
    garbage: float = GARBAGE
    """Value of padding, and of every position of an idle micro-batch."""

    def __post_init__(self) -> None:
        shape = self.item.shifted_labels.shape
        if len(shape) != 2 or self.hidden_states.shape[:-1] != shape:
            raise DataError(
                f"the batch has labels {list(shape)} and hidden states {list(self.hidden_states.shape)}; give a padded "
                "batch, one sequence in each row: labels [B, T] and hidden states [B, T, D]"
            )
        if self.lengths is not None and (len(self.lengths) != shape[0] or max(self.lengths, default=0) > shape[1]):
            raise DataError(
                f"lengths={self.lengths} must hold the length of each of {shape[0]} rows, at most {shape[1]}"
            )

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Positions of each row before padding."""
        rows, width = self.item.shifted_labels.shape
        return (width,) * rows if self.lengths is None else self.lengths

    def with_dtype(self, dtype: torch.dtype) -> Batch:
        """Return a copy whose floating-point tensors are of `dtype`."""
        floats = {name: value.to(dtype) for name, value in self.item.tensors() if value.is_floating_point()}
        return replace(
            self,
            item=self.item.replace(**floats),
            hidden_states=self.hidden_states.to(dtype),
            head_weight=self.head_weight.to(dtype),
            head_bias=None if self.head_bias is None else self.head_bias.to(dtype),
        )

    def with_current_logprobs(self, cfg: BaseLossConfig) -> Batch:
        """Return a copy whose item has the policy's log-probabilities before the step, from a separate forward."""
        logprobs = token_logprobs(
            self.hidden_states.detach(),
            self.head_weight.detach(),
            self.item.shifted_labels,
            None if self.head_bias is None else self.head_bias.detach(),
            options=cfg.head_options,
        )
        logprobs = logprobs.masked_fill(self.item.shifted_labels == cfg.ignore_idx, self.garbage)
        return replace(self, item=self.item.replace(current_logprobs=logprobs.detach()))


def random_batch(
    loss_cfg: BaseLossConfig | None = None,
    *,
    seed: int = 0,
    num_sequences: int = 6,
    longest: int = 5,
    width: int = 3,
    vocabulary: int = 7,
    num_candidates: int = 3,
    dtype: torch.dtype = torch.float64,
    garbage: float = GARBAGE,
) -> Batch:
    """Make a ragged batch with everything that breaks a layout-dependent loss.

    The first sequence is the longest, the second has one token, the last has no scored token; others are drawn, with
    unscored positions inside. With five or more sequences, two have the same tokens but different prompts, hidden
    states and advantages. Adjacent pairs of sequences answer the same prompt, one sequence has advantage 0 throughout,
    and every field that some loss reads is filled.

    Args:
        loss_cfg: config of the loss: items have the class that its context takes, custom fields included
            (floating-point unless their kind differs), with the candidates that an exact KL of this config compares.
            None: items of a policy loss.
        seed: lengths and numbers depend on it.
        num_sequences: B, at least 3.
        longest: T, positions of the longest sequence, at least 3.
        width: D.
        vocabulary: V.
        num_candidates: K, of teacher and reference; some are missing.
        dtype: of hidden states, head and fields.
        garbage: value wherever nothing is scored; NaN and inf are allowed for losses of this package.

    Raises:
        ConfigError: a size is too small for such a batch.
    """
    if num_sequences < 3 or longest < 3 or vocabulary < 3 or not 1 <= num_candidates <= vocabulary:
        raise ConfigError(
            f"random_batch with num_sequences={num_sequences}, longest={longest}, vocabulary={vocabulary} and "
            f"num_candidates={num_candidates} is too small or has too many candidates; give at least 3 of "
            "each, and 1 to vocabulary candidates"
        )
    draw = torch.Generator().manual_seed(seed)
    ignore_idx = -100 if loss_cfg is None else loss_cfg.ignore_idx
    drawn = torch.randint(1, longest + 1, (num_sequences - 2,), generator=draw).tolist()
    if num_sequences > TWIN + 1:
        drawn[TWIN - 2] = 1
    lengths = (longest, 1, *drawn)
    labels = _labels(lengths, longest, vocabulary, draw, ignore_idx)
    is_scored = labels != ignore_idx
    hidden = torch.randn(num_sequences, longest, width, generator=draw, dtype=torch.float64)
    weight = 0.7 * torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    bias = 0.3 * torch.randn(vocabulary, generator=draw, dtype=torch.float64)
    item_cls = RLLossContextInputItem if loss_cfg is None else item_class(loss_cfg.loss_ctx_cls)
    logprobs = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    candidates = {"teacher": num_candidates, "ref": num_candidates}
    if getattr(loss_cfg, "kl_loss_type", None) == "full":
        candidates["ref"] = vocabulary
    values = sample_fields(item_cls, logprobs, draw=draw, vocabulary=vocabulary, candidates=candidates)
    values.pop("current_logprobs", None)  # they follow from the head: `Batch.with_current_logprobs`
    if "advantages" in values:
        values["advantages"][2] = 0.0
    for name, value in values.items():
        if value.is_floating_point() and not name.endswith("_topk_logprobs"):
            is_garbage = ~is_scored.reshape(*is_scored.shape, *(1,) * (value.dim() - 2))
            values[name] = value.masked_fill(is_garbage, garbage)
    item = item_cls(shifted_labels=labels, **values)
    hidden = hidden.masked_fill(~is_scored.unsqueeze(-1), garbage)
    return Batch(item, hidden, weight, bias, lengths, garbage).with_dtype(dtype)


def sample_fields(
    item_cls: type[LossContextInputItem],
    logprobs: Tensor,
    *,
    draw: torch.Generator,
    names: Collection[str] | None = None,
    spread: float = SPREAD,
    vocabulary: int = 2,
    candidates: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Draw the per-token fields that a class of items declares, except the labels.

    Names that end in ``_topk_logprobs`` get log-probabilities of candidates over the whole vocabulary, in ``_topk_ids``
    the candidates, in ``logprobs`` values near `logprobs` (in the first row closer than any clip range);
    ``group_ids`` number pairs of rows. Other fields follow from the declared kind.

    Args:
        item_cls: class that declares the fields.
        logprobs: [B, T] of the policy, in nats; floating-point fields, [B, T] or [B, T, K], have its dtype.
        draw: generator of the random numbers.
        names: fields to draw; None: all.
        spread: of log-probabilities, in nats.
        vocabulary: V.
        candidates: K of each policy with candidates, such as ``{"ref": 3}``; V: the whole vocabulary, without ids.
    """
    rows = torch.full((len(logprobs), 1), spread, dtype=logprobs.dtype)
    rows[:1] *= NEAR

    def noise(*trailing: int) -> Tensor:
        return torch.randn(*logprobs.shape, *trailing, generator=draw, dtype=logprobs.dtype)

    values: dict[str, Tensor] = {}
    for name in item_cls.model_fields:
        if name == "shifted_labels" or not (names is None or name in names) or not item_cls.is_per_token(name):
            continue
        if name.endswith("_topk_ids"):
            continue  # set together with their log-probabilities
        mark = item_cls.layout(name)
        assert isinstance(mark, PerToken)
        if name.endswith("_topk_logprobs"):
            owner = name.removesuffix("_topk_logprobs")
            of_all = noise(vocabulary).log_softmax(-1)
            number = (candidates or {}).get(owner, vocabulary)
            if number == vocabulary:
                values[name] = of_all
                continue
            ids = torch.rand(of_all.shape, generator=draw).argsort(-1)[..., :number]
            values[name] = of_all.gather(-1, ids)
            if number > 1:
                ids[1::2, :, -1] = -1  # some are missing
            values[f"{owner}_topk_ids"] = ids
        elif name.endswith("logprobs") and not mark.trailing:
            values[name] = (logprobs + rows * noise()).clamp(max=LARGEST_LOGPROB)
        elif name == "group_ids":
            values[name] = (torch.arange(len(logprobs)) // 2).unsqueeze(-1)
        else:
            drawn = noise(*(NUM_VALUES,) * mark.trailing)
            values[name] = {"bool": drawn > 0, "integer": (drawn > 0).long()}.get(mark.kind, drawn)
    return values


def _labels(lengths: tuple[int, ...], longest: int, vocabulary: int, draw: torch.Generator, ignore_idx: int) -> Tensor:
    shape = (len(lengths), longest)
    labels = torch.randint(0, vocabulary, shape, generator=draw)
    if len(lengths) > TWIN + 1:
        labels[TWIN] = labels[ONE]
    is_hole = torch.rand(shape, generator=draw) < HOLES
    is_hole[0] = torch.arange(longest) == 1  # two turns
    is_hole[:, 0] = False
    is_hole[-1] = True
    is_padding = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    return labels.masked_fill(is_hole | is_padding, ignore_idx)
