"""A loss of this toolkit for Tinker's ``forward_backward_custom``; tested with tinker 0.38.0.

from toolkit.integrations.tinker import make_loss_fn
future = training_client.forward_backward_custom(data, make_loss_fn("policy_loss=gspo aggregation=seq_mean_token_mean"))

Legend: B data, each a sequence of N positions; T the longest.

Source: tinker 0.38.0, ``lib/public_interfaces/training_client.py``: the function gets all data of the call with a
gradient-tracking tensor of log-probabilities [N] for each, and the gradient of its loss becomes the weights of a
cross-entropy on the server. Formulas of the presets: tinker-docs.thinkingmachines.ai/tinker/losses.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toolkit.errors import ConfigError, DataError, a_type
from toolkit.head import TokenScores
from toolkit.integrations.versions import check_version
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import to_floats
from toolkit.runner import LossRunner

TESTED = "0.38.0"
"""The version of tinker that the tests ran with."""
UNBOUNDED = "loss.log_ratio_range=[null,null] aggregation=token_sum"
PRESETS = {
    "importance_sampling": f"policy_loss=is_reinforce {UNBOUNDED}",
    "ppo": f"policy_loss=vanilla policy_loss.clip_ratio_c=null {UNBOUNDED}",
    "cispo": f"policy_loss=cispo policy_loss.weight_min=0 policy_loss.weight_max=4 {UNBOUNDED}",
    "dro": f"policy_loss=dro policy_loss.tau=0.05 {UNBOUNDED}",
    "gspo": f"policy_loss=gspo {UNBOUNDED}",
}
"""Tinker's losses by their names, sums over tokens as there. ``tau`` is its ``beta``, in the example of its
documentation; of its ``gspo`` no formula is published: here it is the paper's."""
SAMPLED = "logprobs"
"""What Tinker calls the sampler's log-probabilities."""
OPTIONAL = ("old_logprobs", "ref_logprobs", "teacher_logprobs")
"""Further fields [N] of ``loss_fn_inputs`` that a loss may read, by our names."""
LossFn = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]


def make_loss_fn(loss: Any = "ppo") -> LossFn:
    """Return a function for ``forward_backward_custom(data, loss_fn)``.

    Its means are those of one call, so make one call for each optimizer step; sums (the presets, and
    ``aggregation=token_sum``) add up over calls.

    Args:
        loss: a name in `PRESETS`; or overrides as on the command line, in one string or a list; or a config.

    Raises:
        ConfigError: the loss does not exist, or reads what Tinker does not return.
    """
    check_version("tinker", TESTED)
    cfg = _config_of(loss)
    _check(cfg)

    def loss_fn(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of all data, 0-dim, and metrics.

        Args:
            data: each with ``loss_fn_inputs``: ``target_tokens``, ``logprobs`` (of the sampler), ``advantages``, and
                which positions count, ``mask`` or ``weights``, [N] each; ``old_logprobs``, ``ref_logprobs`` and
                ``teacher_logprobs`` [N] and ``group_ids``, one number, if the loss reads them.
            logprobs_list: [N] for each, in nats, with gradient.

        Raises:
            DataError: a field is missing or has another length.
        """
        item = _item_of(cfg, data, [len(each) for each in logprobs_list])
        context_cls = cfg.loss_ctx_cls
        (kwargs,) = context_cls.build_batches_loss_kwargs([item], cfg)
        positions = (kwargs.shifted_labels.reshape(-1) != cfg.ignore_idx).nonzero().squeeze(-1)
        wide = pad_sequence(list(logprobs_list), batch_first=True)  # every tensor gets a gradient, if only of zeros
        scores = TokenScores(wide.to(torch.promote_types(wide.dtype, torch.float32)).reshape(-1)[positions])
        loss, metrics = context_cls(cfg, kwargs).loss_from_scores(scores, kwargs.take(positions))
        return loss, {f"toolkit/{name}": value for name, value in to_floats(metrics).items()}

    return loss_fn


def _config_of(loss: Any) -> BaseRLLossConfig:
    if isinstance(loss, BaseRLLossConfig):
        return loss
    if isinstance(loss, str):
        loss = shlex.split(PRESETS.get(loss, loss))
    if not (isinstance(loss, Sequence) and all(isinstance(each, str) for each in loss)):
        raise ConfigError(
            f"loss is {a_type(loss)}; give one of {', '.join(PRESETS)}, overrides such as 'policy_loss=gspo', or a "
            "GRPOLossConfig"
        )
    words = [each for each in loss if "=" not in each]
    if words:
        raise ConfigError(f"loss={words[0]!r} is not a preset; choose {', '.join(PRESETS)}, or give overrides")
    cfg = LossRunner.from_overrides(list(loss)).loss_cfg
    if not isinstance(cfg, BaseRLLossConfig):
        raise ConfigError(f"{type(cfg).__name__} has no policy loss; for cross-entropy use Tinker's own cross_entropy")
    return cfg


def _check(cfg: BaseRLLossConfig) -> None:
    """Raise `ConfigError` if the loss reads more than log-probabilities of the sampled tokens."""
    if cfg.candidates is not None:
        raise ConfigError(
            "the loss compares distributions, but Tinker returns log-probabilities of the sampled tokens alone; choose "
            "a KL estimated from them (kl=k3)"
        )
    if cfg.entropy_coef or "entropies" in cfg.policy.needs:
        raise ConfigError("the loss reads entropies, which Tinker does not return; set entropy_coef to 0")


def _item_of(cfg: BaseRLLossConfig, data: Sequence[Any], lengths: Sequence[int]) -> RLLossContextInputItem:
    """Return all data of a call as one item of padded rows, [B, T]."""
    rows = [{name: _tensor(value) for name, value in datum.loss_fn_inputs.items()} for datum in data]
    counts = [row["mask"] if "mask" in row else row.get("weights") for row in rows]
    if any(each is None for each in counts):
        raise DataError(
            f"data[{[each is None for each in counts].index(True)}] does not say which positions count; add mask to "
            "loss_fn_inputs, as a tensor of 0 for the prompt and 1 for the completion"
        )
    labels = [
        row["target_tokens"].long().masked_fill(count == 0, cfg.ignore_idx)
        for row, count in zip(rows, counts, strict=True)
        if count is not None
    ]
    fields: dict[str, Any] = {}
    for name, of_item in {"advantages": "advantages", SAMPLED: "rollout_logprobs", **dict.fromkeys(OPTIONAL)}.items():
        _add(fields, of_item or name, rows, name, lengths)
    if "rollout_logprobs" in fields:
        fields.setdefault("old_logprobs", fields["rollout_logprobs"])
    if "group_ids" in rows[0]:
        fields["group_ids"] = torch.stack([row["group_ids"].reshape(()) for row in rows]).unsqueeze(-1)
    for index, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        if len(label) != length:
            raise DataError(f"data[{index}].target_tokens has {len(label)} positions, but {length} log-probabilities")
    padded = pad_sequence(labels, batch_first=True, padding_value=cfg.ignore_idx)
    return RLLossContextInputItem(shifted_labels=padded, **fields)


def _add(
    fields: dict[str, Any], of_item: str, rows: Sequence[dict[str, Tensor]], name: str, lengths: Sequence[int]
) -> None:
    """Put the rows' field `name` into `fields`, [B, T], if they have it.

    Raises:
        DataError: some have it and others do not, or one has another length.
    """
    known = [name in row for row in rows]
    if not any(known):
        return
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if name not in row or len(row[name]) != length:
            has = f"{len(row[name])} values" if name in row else "none"
            raise DataError(f"data[{index}].loss_fn_inputs[{name!r}] has {has}; give {length}, one for each position")
    pad = math.nan if of_item.endswith("logprobs") else 0.0
    fields[of_item] = pad_sequence([row[name].float() for row in rows], batch_first=True, padding_value=pad)


def _tensor(value: Any) -> Tensor:
    return value.to_torch() if hasattr(value, "to_torch") else torch.as_tensor(value)
