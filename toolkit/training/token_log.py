"""Records of tokens for samples.jsonl: what the sampler, the policy and the loss made of each.

A record is a dict of lists with one value for each token from the first sampled one to the end of the row: ``id``,
``text``, ``rollout`` (log-probability by the sampler), ``advantage``, and of rows that an update has used, as the last
update that used them saw them, ``current``, ``old`` and ``ref`` (log-probabilities in nats by the policy that was
updated, by that before the step, by the reference), ``ratio``, ``entropy``, ``weight``, ``coefficient`` and ``status``
(`toolkit.losses.token_records`). None stands for what a token has not, such as an observation of an environment.

Legend: R rows, T tokens of a row; B rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.head import TokenScores
from toolkit.losses.grpo import GRPOLossContext
from toolkit.losses.token_records import CODES, STATUSES, TokenRecords, token_records
from toolkit.rollout.sampler import Completions
from toolkit.training.experience import IGNORED, Rows
from toolkit.training.packing import MicroBatch, Plan

DIGITS = 6
"""Significant digits of a value."""
NO_UPDATE = "no_update"
"""Status of the tokens of a row that no update used: all rewards of its group were the same."""
FIELDS = {"old": "old_logprobs", "ref": "ref_logprobs", "rollout": "rollout_logprobs"}
"""Log-probabilities that rows may have, by their names in a record."""


class TokenLog:
    """Takes what the updates of a step see of each token, and keeps the last."""

    def __init__(self) -> None:
        self._values: dict[Hashable, dict[str, list[Any]]] = {}

    @torch.no_grad()
    def add(self, policy: Any, plan: Plan, rows: Rows, batches: Sequence[MicroBatch], contexts: Sequence[Any]) -> None:
        """Take the rows of an update, before it changes the policy; all processes call it together.

        Args:
            policy: not wrapped.
            plan: how the rows were cut into the micro-batches.
            rows: of this process, perhaps none.
            batches: micro-batches of the rows.
            contexts: their losses.
        """
        policy.eval()
        scores = [
            batch.forward(policy, temperature=context.loss_cfg.temperature, entropy=True)
            for batch, context in zip(batches, contexts, strict=True)
        ]
        if not len(rows):
            return
        records = [_records(context, each) for context, each in zip(contexts, scores, strict=True)]
        values = {"current": [each.logprobs for each in scores], "entropy": [each.entropy for each in scores]}
        if all(each is not None for each in records):
            for name in ("ratio", "weight", "coefficient", "status"):
                values[name] = [getattr(each, name) for each in records]
        columns = {name: plan.put_back(each, rows).cpu() for name, each in values.items() if each[0] is not None}
        columns |= {
            name: values.cpu() for name, field in FIELDS.items() if (values := getattr(rows, field)) is not None
        }
        is_scored = (rows.shifted_labels != IGNORED).cpu()
        if "status" in columns:  # an early correction takes the label away
            is_rejected = is_scored & (columns["status"] == CODES["unscored"])
            columns["status"] = columns["status"].masked_fill(is_rejected, CODES["rejected"])
        for row, key in enumerate(row_keys(rows)):
            self._values[key] = {name: _listed(name, column[row], is_scored[row]) for name, column in columns.items()}

    def completed(self, key: Hashable, record: Mapping[str, list[Any]], first: int) -> dict[str, list[Any]]:
        """Return the record of a row with what the last update that used it saw.

        Args:
            key: of the row.
            record: `first_record` of it.
            first: where in the row the record begins.
        """
        number, values = len(record["id"]), self._values.get(key)
        if values is None:
            return {**record, "status": [NO_UPDATE] * number}
        return {**record, **{name: each[first : first + number] for name, each in values.items()}}


def first_record(
    rows: Rows, completions: Completions, row: int, advantages: Tensor, tokenizer: Any
) -> dict[str, list[Any]]:
    """Return what is known of the tokens of a row when it has been sampled.

    Args:
        rows: of the completions; they need not have the sampler's log-probabilities any more.
        completions: R rows.
        row: its number.
        advantages: [R, 1] or [R, T - 1].
        tokenizer: gives each token's text.
    """
    is_sampled = completions.is_new[row, 1:].cpu()
    first = first_sampled(is_sampled)
    span = slice(first, first + int(rows.attention_mask[row, 1:][first:].sum()))
    ids = rows.input_ids[row, 1:][span].tolist()
    of_tokens = {"rollout": completions.logprobs[row, 1:], "advantage": advantages[row].expand(len(is_sampled))}
    values = {name: _listed(name, each.cpu()[span], is_sampled[span]) for name, each in of_tokens.items()}
    return {"id": ids, "text": [tokenizer.decode([token]) for token in ids], **values}


def first_sampled(is_sampled: Tensor) -> int:
    """Return the first position that was sampled, of `is_sampled` [T - 1] bool; 0 if there is none."""
    return int(is_sampled.int().argmax())


def row_keys(rows: Rows) -> list[Hashable]:
    """Return what tells rows apart, also when they are shuffled and padded: group and tokens."""
    assert rows.group_ids is not None
    groups = rows.group_ids.amax(-1).tolist()
    return [
        (group, tuple(ids[mask.bool()].tolist()))
        for group, ids, mask in zip(groups, rows.input_ids, rows.attention_mask, strict=True)
    ]


def _records(context: Any, scores: TokenScores) -> TokenRecords | None:
    """Return the records of a policy loss; a loss of another kind has none."""
    return token_records(context, scores) if isinstance(context, GRPOLossContext) else None


def _listed(name: str, values: Tensor, is_scored: Tensor) -> list[Any]:
    """Return the values of a row as JSON has them, None where nothing is scored."""
    if name == "status":
        names = list(STATUSES)
        return [names[code] for code in values.tolist()]
    return [
        _short(value) if scored else None for value, scored in zip(values.tolist(), is_scored.tolist(), strict=True)
    ]


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") + 0.0 if math.isfinite(value) else None  # no -0.0
