"""A diagnosis with a model and its batch: the trainer's values are the model's.

Legend: B rows, T tokens of a row, n tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type
from toolkit.head.logits import LogitTransform
from toolkit.head.scores import wide_logits
from toolkit.losses.config.base import BaseLossConfig
from toolkit.runner.arguments import labels_of
from toolkit.runner.batches import ModelBatch, model_batch
from toolkit.runner.diagnosis.arrays import diagnose
from toolkit.runner.diagnosis.outcome import Diagnosis
from toolkit.runner.diagnosis.rescoring import sequences_of, with_model
from toolkit.runner.models import ModelCall


@torch.no_grad()
def diagnose_model(
    call: ModelCall, loss_cfg: BaseLossConfig, fields: Mapping[str, Any], *, bos_id: int | None = None
) -> Diagnosis:
    """Say why a sampler's log-probabilities differ from a model's; see `LossRunner.diagnose`.

    Args:
        call: the model.
        loss_cfg: the loss, whose temperature is used.
        fields: the batch, with ``input_ids`` and ``rollout_logprobs``, at position t of token t + 1.
        bos_id: the token that begins every sequence; None: the first token of each row.

    Raises:
        DataError: a field is missing or has the wrong shape.
    """
    batch = model_batch(fields, call.device)
    if batch.position_ids is not None:
        raise DataError("cu_seq_lens: a packed row is not diagnosed; give its sequences as rows [B, T]")
    scored, attended = batch.fields.get("loss_mask"), batch.fields.get("attention_mask")
    if isinstance(scored, Tensor) and isinstance(attended, Tensor) and scored.shape == attended.shape:
        outside = int((scored.bool() & ~attended.bool()).sum())
        if outside:
            words = f"loss_mask is 1 at {outside} tokens that attention_mask leaves out"
            return Diagnosis(("padding_scored",), words, float("nan"), int(scored.sum()), float("nan"))
    trainer = call.logprobs(batch, loss_cfg)
    rollout = _rollout(fields, batch)
    labels = labels_of({name: batch.fields.get(name) for name in LABELS}, None, loss_cfg.ignore_idx)
    labels = torch.nn.functional.pad(labels, (0, trainer.shape[1] - labels.shape[1]), value=loss_cfg.ignore_idx)
    mask = labels != loss_cfg.ignore_idx
    first = diagnose(rollout, trainer, mask, labels.where(mask, 0))
    transform = LogitTransform() if call.policy is None else call.policy.transform
    temperature = getattr(loss_cfg, "temperature", 1.0)

    def logits(ids: Tensor) -> Tensor:
        text = torch.cat([ids, ids[-1:]]).unsqueeze(0)  # the policy reads all but the last token
        hidden, weight, bias = call.head(ModelBatch(text, torch.ones_like(text), None, {}))
        return transform(wide_logits(hidden[0, : len(ids)], weight, bias)) / temperature

    sequences = sequences_of(batch.input_ids, batch.attention_mask, rollout, mask)
    return with_model(first, sequences, logits, bos_id)


LABELS = ("input_ids", "shifted_labels", "loss_mask", "attention_mask")


def _rollout(fields: Mapping[str, Any], batch: ModelBatch) -> Tensor:
    """Return the sampler's values [B, T], NaN where it has none."""
    values, shape = batch.fields.get("rollout_logprobs"), batch.input_ids.shape
    if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] not in (shape[1], shape[1] - 1):
        what = list(values.shape) if isinstance(values, Tensor) else a_type(fields.get("rollout_logprobs"))
        raise DataError(
            f"rollout_logprobs is {what}; give one value for each position, {list(shape)}: at position t that of token "
            "t + 1"
        )
    return torch.nn.functional.pad(values.float(), (0, shape[1] - values.shape[1]), value=float("nan"))
