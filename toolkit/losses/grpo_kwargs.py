"""What a policy loss must know before the first forward of an optimizer step: checks, corrections, weights.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import all_gather_objects, rank
from toolkit.errors import ConfigError, DataError
from toolkit.functional.aggregation import Share
from toolkit.functional.conformance import check_scope, is_zero_without_advantage
from toolkit.functional.registry import PolicyLoss, policy_loss
from toolkit.functional.segments import NO_SEQUENCE, turn_ids
from toolkit.losses.base import BaseLossKwargs, check_finite
from toolkit.losses.calibration import aggregated, calibrated, counts_here, prompts_of_batches, sequence_ids_of_batches
from toolkit.losses.candidates import candidates_of
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.fields import PerToken
from toolkit.losses.grpo_correction import comparable_rollout, corrected_batches, early, late
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import Max, Mean, Metric


class GRPOLossKwargs(BaseLossKwargs):
    """Everything the loss of one micro-batch needs; all fields [1, T] or [B, T]."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    policy_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Importance weight of the policy term, 0 where a correction rejected the token; None: 1 everywhere."""
    nll_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of the negative log-likelihood of tokens with A > 0."""
    other_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of the KL and entropy terms under ``per_component``, a mean over all tokens; None: that of the
    policy loss."""
    candidate_ids: Annotated[Tensor | None, PerToken(pad=-1, trailing=1)] = None
    """[.., T, K] tokens whose log-probabilities are compared with another policy's; None: the whole vocabulary."""
    candidate_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None
    """[.., T, K] the reference's or the teacher's."""
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    teacher_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    sequence_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    turn_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    positions: Annotated[Tensor | None, PerToken(pad=0)] = None
    step_metrics: Any = None
    """Metrics that are known before the forward; reported once, by the micro-batch as a whole."""


def build_grpo_kwargs(
    items: list[RLLossContextInputItem],
    cfg: BaseRLLossConfig,
    cu_seq_lens_list: Sequence[Tensor | None] | None,
    sp_mesh: DeviceMesh | None,
) -> list[GRPOLossKwargs]:
    """Check the items, apply the corrections and fix the weight of every token; see `BaseLossContext` for the rest."""
    check_policy_loss_of(cfg, sp_mesh)
    for index, item in enumerate(items):
        _check_item(item, cfg, f"data_batches[{index}]")
    candidates = [candidates_of(item, cfg, f"data_batches[{index}]") for index, item in enumerate(items)]
    labels = [item.shifted_labels for item in items]
    ids = sequence_ids_of_batches(labels, cu_seq_lens_list, sp_mesh, ignore_idx=cfg.ignore_idx)
    turns = [turn_ids(own != cfg.ignore_idx, own_ids) for own, own_ids in zip(labels, ids, strict=True)]
    scope = scope_of(cfg)
    if scope == "group":
        _check_groups_are_whole(items, cfg.ignore_idx)
    corrected = corrected_batches(items, ids, turns, cfg, sp_mesh)
    labels = [batch.labels for batch in corrected]
    terms = [_shares(items, labels, ids, cfg, sp_mesh, cu_seq_lens_list)]
    if cfg.positive_nll_coef:
        terms.append(_positive_shares(items, labels, ids, cfg, sp_mesh))
    has_others = cfg.aggregation.name == "per_component" and (cfg.use_kl_loss or cfg.entropy_coef != 0)
    if has_others:
        terms.append(aggregated(labels, ids, "token_mean", ignore_idx=cfg.ignore_idx, sp_mesh=sp_mesh))
    loss_term, *more_terms = calibrated(
        terms, gradient_reduction=cfg.gradient_reduction, counted_here=counts_here(sp_mesh)
    )
    other_weights = more_terms.pop().weights if has_others else None
    nll_weights = more_terms.pop().weights if more_terms else None
    step_metrics = {**_step_metrics(items, labels, cfg), **_denominators(loss_term.denominators, cfg)}
    return [
        GRPOLossKwargs(
            shifted_labels=own_labels,
            loss_weight=loss_term.weights[index],
            nll_weight=None if nll_weights is None else nll_weights[index],
            other_weight=None if other_weights is None else other_weights[index],
            candidate_ids=candidates[index][0],
            candidate_logprobs=candidates[index][1],
            policy_weight=corrected[index].policy_weight,
            advantages=_given(item.advantages),
            old_logprobs=item.old_logprobs,
            ref_logprobs=item.ref_logprobs,
            rollout_logprobs=comparable_rollout(item, cfg),
            teacher_logprobs=item.teacher_logprobs,
            sequence_ids=ids[index],
            turn_ids=turns[index] if scope != "token" else None,
            group_ids=_renumbered(item.group_ids) if scope in ("group", "batch") else None,
            positions=_positions(own_labels) if scope != "token" else None,
            step_metrics={**corrected[index].metrics, **(step_metrics if index == 0 else {})},
        )
        for index, (item, own_labels) in enumerate(zip(items, labels, strict=True))
    ]


# -------------------------------------------------------------------- the loss and its scope


def options_of(cfg: BaseRLLossConfig) -> dict[str, Any]:
    """Return the options of the chosen policy loss."""
    return {key: value for key, value in cfg.policy_loss_cfg.items() if key != "loss_type"}


def policy_loss_of(cfg: BaseRLLossConfig) -> PolicyLoss:
    """Return the chosen policy loss."""
    return policy_loss(cfg.policy_loss_cfg["loss_type"])


def scope_of(cfg: BaseRLLossConfig) -> str:
    """Return what one token's loss depends on: the wider of the policy loss and of corrections in the forward."""
    scope = policy_loss_of(cfg).scope
    needs_sequences = any(correction.needs_sequences for correction in late(cfg))
    return "sequence" if scope == "token" and needs_sequences else scope


def check_policy_loss_of(cfg: BaseRLLossConfig, sp_mesh: DeviceMesh | None = None) -> None:
    """Check once for each loss and its options that it keeps what it declares.

    Raises:
        ConfigError: it looks at more tokens than its scope says, or at more than the setting allows.
    """
    loss, options = policy_loss_of(cfg), options_of(cfg)
    if sp_mesh is not None and scope_of(cfg) != "token":
        raise ConfigError(
            f"policy loss {loss.name!r} with its corrections uses statistics beyond one token "
            f"(scope={scope_of(cfg)!r}), which sequence parallelism would cut apart; use it without sp_mesh"
        )
    check_scope(loss, options)
    is_local = loss.scope in ("token", "sequence")
    if cfg.drop_zero_advantage and not (is_local and is_zero_without_advantage(loss, options)):
        raise ConfigError(
            f"drop_zero_advantage=True would change policy loss {loss.name!r}: its tokens count even with advantage 0; "
            "set drop_zero_advantage=False (their products in backward are skipped anyway where their gradient is 0)"
        )


# -------------------------------------------------------------------- the items


@dataclass(frozen=True)
class _Reader:
    """Who reads a field of the items, and what to do without it."""

    is_read: bool
    why: str
    instead: str


def _readers(cfg: BaseRLLossConfig) -> dict[str, _Reader]:
    loss, options = policy_loss_of(cfg), options_of(cfg)
    name = f"policy loss {loss.name!r}"
    uses_rollout = any("rollout" in own.between for own in cfg.correction)
    anchored = options.get("anchor") == "rollout" or "rollout_logprobs" in loss.needs
    anchored |= bool(options.get("use_rollout_weight"))
    kl_anchored = cfg.use_kl_loss and cfg.kl_gradient == "is_corrected" and cfg.kl_anchor == "rollout"
    return {
        "ref_logprobs": _Reader(
            cfg.needs_reference or "ref_logprobs" in loss.needs,
            "use_kl_loss=True compares the policy with a reference"
            if cfg.use_kl_loss
            else "teacher='reference' distils it"
            if cfg.needs_reference
            else f"{name} needs them",
            "give the reference's log-probabilities"
            + (" or set use_kl_loss=False (on the command line: kl=none)" if cfg.use_kl_loss else ""),
        ),
        "rollout_logprobs": _Reader(
            uses_rollout or anchored or kl_anchored,
            f"{name} divides by the sampler's probability"
            if anchored
            else "a correction or KL anchor compares with it",
            "give the log-probabilities that the sampler reported, or choose anchor='old' and no correction",
        ),
        "old_logprobs": _Reader(
            bool(early(cfg)),
            "a correction compares them with the sampler's before the forward",
            "score the batch once before the step, or use anchor='rollout' instead of a correction",
        ),
        "teacher_logprobs": _Reader(
            "teacher_logprobs" in loss.needs and cfg.candidates != "teacher",
            f"{name} needs them",
            "give the teacher's log-probabilities",
        ),
    }


def _check_item(item: RLLossContextInputItem, cfg: BaseRLLossConfig, where: str) -> None:
    if item.advantages is None:
        raise DataError(f"{where}.advantages is missing; a policy loss needs one advantage for each scored token")
    check_finite(f"{where}.advantages", item.advantages, item.shifted_labels, cfg.ignore_idx)
    for name, reader in _readers(cfg).items():
        values = getattr(item, name)
        if reader.is_read and values is None:
            raise DataError(f"{where}.{name} is missing, but {reader.why}; {reader.instead}")
        if reader.is_read or name == "old_logprobs":
            check_finite(f"{where}.{name}", values, item.shifted_labels, cfg.ignore_idx)
    if item.rollout_spec is not None and not cfg.accept_mismatch and _readers(cfg)["rollout_logprobs"].is_read:
        reason = item.rollout_spec.mismatch(cfg.temperature)
        if reason is not None:
            raise DataError(
                f"{where}.rollout_logprobs cannot be compared with the policy's: {reason}. accept_mismatch=True goes on"
            )
    if item.group_ids is None and (cfg.aggregation.name == "prompt_mean" or policy_loss_of(cfg).scope == "group"):
        who = (
            f"policy loss {cfg.policy_loss_cfg['loss_type']!r}"
            if policy_loss_of(cfg).scope == "group"
            else "prompt_mean"
        )
        raise DataError(
            f"{where}.group_ids is missing, but {who} looks at all completions of a prompt together; give one integer "
            "for each sequence ([B, 1]), the same for completions of the same prompt"
        )


def _check_groups_are_whole(items: list[RLLossContextInputItem], ignore_idx: int) -> None:
    """A group that is split over micro-batches would be seen as several smaller ones, without any error."""
    own = [
        set(item.group_ids[item.shifted_labels != ignore_idx].unique().tolist())
        for item in items
        if item.group_ids is not None
    ]
    mine: set[int] = set().union(*own) if own else set()
    others = [groups for number, groups in enumerate(all_gather_objects(mine)) if number != rank()]
    for index, groups in enumerate(own):
        elsewhere = set().union(*own[:index], *others) & groups
        if elsewhere:
            raise DataError(
                f"data_batches[{index}].group_ids: group {min(elsewhere)} lies in several micro-batches, but this loss "
                "needs all sequences of a group in one; split the batch between groups"
            )


# -------------------------------------------------------------------- weights and metrics


def _shares(
    items: list[RLLossContextInputItem],
    labels: list[Tensor],
    ids: list[Tensor],
    cfg: BaseRLLossConfig,
    sp_mesh: DeviceMesh | None,
    cu_seq_lens_list: Sequence[Tensor | None] | None,
) -> list[Share]:
    chosen = cfg.aggregation
    options: dict[str, Any] = {"count_empty": chosen.count_empty, "length": chosen.length}
    if cu_seq_lens_list is not None:  # empty sequences leave no trace in the ids
        options["num_sequences"] = [
            len(own_ids) if bounds is None else len(bounds) - 1
            for own_ids, bounds in zip(ids, cu_seq_lens_list, strict=True)
        ]
    if chosen.name == "per_component":
        options["is_positive"] = [_given(item.advantages) > 0 for item in items]
        options["component_weights"] = (chosen.positive_weight, chosen.negative_weight)
    if chosen.name == "prompt_mean":
        if sp_mesh is not None:
            raise ConfigError(
                "aggregation 'prompt_mean' does not work under sequence parallelism; use it without sp_mesh"
            )
        groups = [item.group_ids for item in items if item.group_ids is not None]
        options["prompt_tokens"], options["num_prompts"] = prompts_of_batches(
            labels, groups, ignore_idx=cfg.ignore_idx, count_empty=chosen.count_empty
        )
    return aggregated(labels, ids, chosen.name, ignore_idx=cfg.ignore_idx, sp_mesh=sp_mesh, **options)


def _positive_shares(
    items: list[RLLossContextInputItem],
    labels: list[Tensor],
    ids: list[Tensor],
    cfg: BaseRLLossConfig,
    sp_mesh: DeviceMesh | None,
) -> list[Share]:
    """Return the shares of a mean over the tokens with A > 0."""
    positive = [
        own.masked_fill(~(_given(item.advantages) > 0), cfg.ignore_idx) for item, own in zip(items, labels, strict=True)
    ]
    return aggregated(positive, ids, "token_mean", ignore_idx=cfg.ignore_idx, sp_mesh=sp_mesh)


def _denominators(denominators: Tensor, cfg: BaseRLLossConfig) -> dict[str, Metric]:
    if cfg.aggregation.name == "per_component":
        return {"denominator_positive": Max(denominators[0]), "denominator_negative": Max(denominators[1])}
    return {"denominator": Max(denominators[0])}


def _step_metrics(
    items: list[RLLossContextInputItem], labels: list[Tensor], cfg: BaseRLLossConfig
) -> dict[str, Metric]:
    """Return what the items themselves tell: tokens without an advantage, groups that teach nothing.

    Rewards that are all equal give a group the advantage 0 throughout; so does every part of such a group that a
    micro-batch or a rank holds. (A part of another group whose advantages happen to be equal does not count.)
    """
    is_scored = [own != cfg.ignore_idx for own in labels]
    advantages = torch.cat(
        [_given(item.advantages)[own] for item, own in zip(items, is_scored, strict=True)] or [torch.zeros(0)]
    )
    metrics: dict[str, Metric] = {"zero_advantage_tokens": Mean.of(advantages == 0)}
    if items and all(item.group_ids is not None for item in items):
        groups = torch.cat([i.group_ids[m] for i, m in zip(items, is_scored, strict=True) if i.group_ids is not None])
        _, place = groups.unique(return_inverse=True)
        size = int(place.max()) + 1 if len(place) else 0
        largest = advantages.new_zeros(size).scatter_reduce(0, place, advantages.abs(), "amax")
        metrics["zero_variance_groups"] = Mean.of(largest == 0)
    return metrics


def _given(advantages: Tensor | None) -> Tensor:
    assert advantages is not None  # checked with the items
    return advantages


def _renumbered(group_ids: Tensor | None) -> Tensor | None:
    """Number the groups of a micro-batch from 0, so that sums over them need no more room than there are groups."""
    return None if group_ids is None else group_ids.unique(return_inverse=True)[1].reshape(group_ids.shape)


def _positions(labels: Tensor) -> Tensor:
    return torch.arange(labels.shape[-1], device=labels.device).expand(labels.shape)
