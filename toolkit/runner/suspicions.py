"""Warnings of inputs that are valid but probably not what was meant: each once, and only in the first step of a runner.

They wait for the device, which a loop should not do in every step.

Legend: B rows, T positions of a row, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import warn_once
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.context import BaseLossContext
from toolkit.losses.items import LossContextInputItem
from toolkit.metrics import Metrics, to_floats
from toolkit.runner.neighbours import LABELS, NEIGHBOURS, better_labels, better_neighbour

REPEATED = 3
"""Equal tokens at the end (or start) of a row that look like padding, and equal first tokens of two rows that look like
a prompt: random tokens of a vocabulary of 1,000 do this once in a million rows."""
MISMATCH = {
    "log_ratio_abs": ("old_logprobs", 0.5, "of the weights before the step"),
    "rollout_mismatch": ("rollout_logprobs", 0.5, "that the sampler reported"),
    "current_mismatch": ("current_logprobs", 0.1, "of a forward with the same weights"),
}
"""Metric -> the field that it judges, the largest usual value in nats, and what the field holds. A step changes the
policy by less than its clip range of about 0.2, and samplers differ by about 0.02; log-probabilities of another token
are off by about an entropy or more, 0.5 to 3 nats. Current ones differ by rounding only, about 0.02 in bf16."""


def warn_of_masks(
    input_ids: Tensor, loss_mask: Tensor | None, attention_mask: Tensor | None, *, is_policy_loss: bool
) -> None:
    """Warn if tokens are scored that look like padding or a prompt.

    Args:
        input_ids: [B, T] of padded rows.
        loss_mask: [B, T], the tokens that count; None: all.
        attention_mask: [B, T], which leaves out padding; None: nothing is left out.
        is_policy_loss: whether a prompt should not be scored; cross-entropy may be meant to learn it.
    """
    if input_ids.dim() != 2 or input_ids.shape[-1] <= REPEATED:
        return
    if any(mask is not None and mask.shape != input_ids.shape for mask in (loss_mask, attention_mask)):
        return  # reported as an error
    if loss_mask is None:
        _warn_of_unmasked(input_ids, attention_mask, is_policy_loss=is_policy_loss)
        return
    scored = loss_mask.bool()
    is_outside = (scored & ~attention_mask.bool()).sum() if attention_mask is not None else scored.new_zeros(())
    left_out = input_ids.masked_select(~scored)
    is_one_token = len(left_out) > 0 and bool((left_out == left_out[0]).all())
    is_most = (~scored).sum(-1).max() > 1
    is_from_first = scored[:, 0].all()
    is_same = (scored == attention_mask.bool()).all() if attention_mask is not None else is_most.new_zeros(())
    is_start = _is_start_of_rows(scored, torch.ones_like(scored) if attention_mask is None else attention_mask)
    flags = is_outside.long(), is_most.long(), is_from_first.long(), is_same.long(), is_start.long()
    num_outside, several, from_first, same, start = torch.stack(flags).tolist()
    if num_outside:
        warn_once(
            f"loss_mask is 1 on {num_outside} tokens that attention_mask leaves out as padding (0), so these are not "
            "scored; are the two swapped? loss_mask is 1 on the tokens to train on, attention_mask on all but padding"
        )
    elif is_policy_loss and start and not is_one_token:  # a single token at the end is padding
        kept = "" if attention_mask is None else " that attention_mask keeps"
        warn_once(
            f"loss_mask is 1 on the first tokens of every row and 0 on the last ones{kept}, so it looks like the mask "
            "of the prompts; it must be 1 on the tokens of the completions"
        )
    elif is_policy_loss and (same or (is_one_token and (several or from_first))):
        what = (
            "equals attention_mask" if same else f"leaves out only token {int(left_out[0])}, which looks like padding"
        )
        warn_once(
            f"loss_mask {what}: if the rows hold prompts, these are scored like the completions; give loss_mask "
            "[B, T], 1 on the tokens of the completions"
        )


def warn_of_left_padding(input_ids: Tensor) -> None:
    """Warn if rows of `input_ids` [B, T] start with equal tokens, which a model reads unless a mask leaves them out."""
    if input_ids.shape[-1] <= REPEATED:
        return
    is_constant = (input_ids == input_ids[:, :1]).all(-1)
    if ((input_ids[:, :REPEATED] == input_ids[:, :1]).all(-1) & ~is_constant).any():
        warn_once(
            f"input_ids without attention_mask: some rows start with {REPEATED} equal tokens, which looks like padding "
            "on the left, and the model reads them; give attention_mask [B, T], 0 on padding"
        )


def _is_start_of_rows(scored: Tensor, attention_mask: Tensor) -> Tensor:
    """Return whether in every row the scored tokens come before others that are not padding, 0-dim bool."""
    is_other = ~scored & attention_mask.bool()
    is_after = scored & (is_other.cumsum(-1) > 0)
    return ~is_after.any() & (scored.any(-1) & is_other.any(-1)).all()


def _warn_of_unmasked(input_ids: Tensor, attention_mask: Tensor | None, *, is_policy_loss: bool) -> None:
    same = input_ids[1:] == input_ids[:-1]
    starts_alike = same[:, :REPEATED].all(-1) & ~same.all(-1)
    if attention_mask is None:
        is_constant = (input_ids == input_ids[:, :1]).all(-1)
        ends = torch.stack([input_ids[:, :REPEATED], input_ids[:, -REPEATED:]])
        has_padding = ((ends == ends[..., :1]).all(-1).any(0) & ~is_constant).any()
    else:  # padding on the left is alike, too
        starts_alike &= attention_mask[1:, 0].bool() & attention_mask[:-1, 0].bool()
        has_padding = torch.zeros_like(starts_alike.any())
    is_padded, is_prompted = torch.stack([has_padding, starts_alike.any()]).tolist()  # waits for the device once
    if is_padded:
        warn_once(
            f"input_ids without loss_mask: some rows start or end with {REPEATED} equal tokens, which looks like "
            "padding, and all of them are scored; give loss_mask [B, T], 1 on the tokens to train on (or "
            "attention_mask, to leave out padding only)"
        )
    elif is_prompted and is_policy_loss:
        warn_once(
            f"input_ids without loss_mask: some rows start with the same {REPEATED} tokens, which looks like a prompt, "
            "and it is scored like the completions; give loss_mask [B, T], 1 on the tokens of the completions"
        )
    elif attention_mask is not None and is_policy_loss:
        warn_once(
            "attention_mask without loss_mask: it leaves out padding only, so a prompt is scored like the completions; "
            "give loss_mask [B, T], 1 on the tokens of the completions (all ones if there are no prompts)"
        )


def warn_of_values(item: LossContextInputItem, cfg: BaseLossConfig) -> None:
    """Warn of advantages [B, T] that look like rewards or indexed by token, and of a reference that nothing reads."""
    if not isinstance(cfg, BaseRLLossConfig):
        return
    ref, advantages = getattr(item, "ref_logprobs", None), getattr(item, "advantages", None)
    if ref is not None and "ref_logprobs" not in cfg.required_fields:
        warn_once(
            "ref_logprobs has no effect: this loss has no KL term; add one with kl=k3 (in Python: use_kl_loss=True, "
            "kl_loss_type='k3'), or leave it out"
        )
    if advantages is None or "advantages" not in cfg.required_fields or isinstance(cfg, OrealLossConfig):
        return
    is_scored = item.shifted_labels != cfg.ignore_idx
    counted = advantages[is_scored]
    is_zero, is_one = counted == 0, counted == 1
    flags = (is_zero | is_one).all(), is_zero.any(), is_one.any(), *_is_off_by_one(advantages, is_scored)
    only, some_zero, some_one, by_token, too_far = torch.stack(flags).tolist()  # waits for the device once
    if by_token or too_far:
        first, last, after, of = (
            ("first", "last", "after", "token t") if by_token else ("last", "first", "before", "token t + 2")
        )
        warn_once(
            f"advantages are 0 at the {first} scored position of each completion and not 0 just {after} the {last} "
            f"one: value t seems to be of {of}. It must be of the token that each position predicts, token t + 1: give "
            "one value for each row, [B], or shift them by RLLossContextInputItem.from_unshifted"
        )
    elif only and some_zero and some_one:
        warn_once(
            "advantages are 0 and 1 only, which looks like rewards: nothing then lowers the probability of a wrong "
            "answer. Give them as rewards=..., with group_ids=... and advantage='grpo', which compares them within the "
            "completions of a prompt"
        )


def _is_off_by_one(advantages: Tensor, is_scored: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether advantages seem to be one position late (indexed by token) or early, 0-dim bool each.

    Only at the edges of each run of scored positions can it be seen: a value of 0 inside, and one that is lost outside.

    Args:
        advantages: [B, T].
        is_scored: [B, T] bool.
    """
    none = torch.zeros_like(is_scored[..., :1])
    scored_before = torch.cat([none, is_scored[..., :-1]], -1)
    scored_after = torch.cat([is_scored[..., 1:], none], -1)
    some = (advantages[is_scored] != 0).any()

    def is_lost(inside: Tensor, outside: Tensor) -> Tensor:
        """Whether values [n] at one edge of the runs are 0, and those [m] behind the other edge are not."""
        return some & (inside == 0).all() & (outside.isfinite() & (outside != 0)).any()

    first, last = is_scored & ~scored_before, is_scored & ~scored_after
    behind, ahead = ~is_scored & scored_before, ~is_scored & scored_after
    return is_lost(advantages[first], advantages[behind]), is_lost(advantages[last], advantages[ahead])


def warn_of_frozen(hidden_states: Tensor, head_weight: Tensor, where: str) -> None:
    """Warn if hidden states have no gradient but the weight requires one.

    Args:
        hidden_states: [B, T, D].
        head_weight: [V, D].
        where: who was called, for the message.
    """
    if torch.is_grad_enabled() and head_weight.requires_grad and not hidden_states.requires_grad:
        warn_once(
            f"{where}: the hidden states have no gradient, so only the head will train; run the model without "
            "torch.no_grad() and .detach()"
        )


def warn_of_log_probabilities(
    metrics: Metrics,
    context: BaseLossContext[Any],
    hidden_states: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
) -> None:
    """Warn if log-probabilities that were passed, or the labels, fit a neighbouring position, or are far off.

    Args:
        metrics: of the step.
        context: of one micro-batch.
        hidden_states: [B, T, D] of this micro-batch.
        head_weight: [V, D].
        head_bias: [V] or None.
    """
    warned, kwargs, head = set(), context.loss_kwargs, (hidden_states, head_weight, head_bias)
    is_plain = context.has_vocabulary and type(head_weight) in (Tensor, torch.nn.Parameter)  # not a shard
    for name in [name for name, *_ in MISMATCH.values() if is_plain and name in type(kwargs).model_fields]:
        values, labels = getattr(kwargs, name), kwargs.shifted_labels
        if values is not None:
            values = values.masked_fill(labels == context.loss_cfg.ignore_idx, math.nan)
            better = better_neighbour(values, labels, context.transform, *head)
            if better is not None:
                warned.add(name)
                neighbour, off, off_there = better
                warn_once(
                    f"{name} differ from the policy's log-probabilities by {off:.2g} nats, but only by {off_there:.2g} "
                    f"nats from those of a neighbour: they {NEIGHBOURS[neighbour]}"
                )
    better_label = (
        better_labels(kwargs.shifted_labels, context.loss_cfg.ignore_idx, context.transform, *head)
        if is_plain and not warned
        else None
    )
    if better_label is not None:
        neighbour, here, there = better_label
        warned.update(name for name, *_ in MISMATCH.values())
        warn_once(
            f"the labels have log-probability {here:.2g} on average, but {there:.2g} with the hidden states of a "
            f"neighbour: {LABELS[neighbour]}"
        )
    numbers = to_floats({metric: metrics[metric] for metric in MISMATCH if metric in metrics})
    warn_of_mismatch({metric: number for metric, number in numbers.items() if MISMATCH[metric][0] not in warned})


def warn_of_mismatch(numbers: Mapping[str, float]) -> None:
    """Warn if log-probabilities that were passed are far from the policy's in the first step.

    Args:
        numbers: metrics of the step, in nats; see `MISMATCH`.
    """
    for metric, (name, largest, holds) in MISMATCH.items():
        if numbers.get(metric, 0.0) > largest:
            warn_once(
                f"{name} differ from the policy's log-probabilities by {numbers[metric]:.2g} nats on average in the "
                f"first step (metric {metric!r}; up to {largest:g} is usual). They must be those {holds}, in nats, of "
                "the token that each position predicts, which is token t + 1 at position t; values by token are "
                "shifted by RLLossContextInputItem.from_unshifted"
            )
