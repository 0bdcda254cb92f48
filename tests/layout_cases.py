"""The cases of the layout matrix: every loss under every aggregation, single terms, corrections, and what is besides.

Each case is a config, a layout and the seed of a ragged batch. It runs in processes that `layout_worker` shares.
"""

from __future__ import annotations

import datetime
import itertools
import os
import random
import traceback
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import torch
import torch.distributed as dist

from toolkit import BaseLossConfig, CELossConfig, GRPOLossConfig, LossRunner, OPDLossConfig, OrealLossConfig
from toolkit.errors import ConfigError
from toolkit.functional.names import Aggregation
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.losses.auxiliary import auxiliary_weights
from toolkit.testing import Batch, Layout, Part, differences, random_batch
from toolkit.testing.evaluation import REFERENCE, alone, evaluate, reference, with_current
from toolkit.testing.layout import layouts_of
from toolkit.testing.verdict import compare

WORLDS = (1, 2, 4)
MICRO_BATCHES, SHARDS, PACKED, MODES = (1, 2, 4), (1, 2), (False, True), ("eager", "chunk")
RTOL = {torch.float64: 1e-12, torch.float32: 5e-6}
"""A ratio in float32 is off by the rounding of two log-probabilities of some 4 nats, 4 x 2^-23 each; sums by as much
again."""
REFERENCE_ERRORS = 4
"""In float32 a layout may be off by this many errors of the reference, where that is more: both are rounded, so their
distance is at most the sum of two errors, and the error of another order of sums may be twice that of the one that was
measured."""
FULL = "TOOLKIT_FULL_MATRIX"
"""Environment variable; 1: the slow tests run every layout of every pair in both dtypes, which takes half an hour."""
PART = {1: 4, 2: 4, 4: 1}
"""Layouts of a pair, by number of processes, unless all are asked for."""
SECONDS = 40
"""After so long a process gives up waiting for one that failed alone."""
ALL_REJECTED = {"action": "mask", "upper": 1e-6, "denominator": "original"}
"""Takes the policy term away and leaves every other one."""
KL = {"use_kl_loss": True, "kl_loss_coef": 0.3}
TERMS: dict[str, dict[str, Any]] = {
    "kl_k1": {**KL, "kl_loss_type": "k1", "kl_gradient": "score_corrected"},
    "kl_k2": {**KL, "kl_loss_type": "k2"},
    "kl_k3": {**KL, "kl_loss_type": "k3", "kl_gradient": "is_corrected"},
    "kl_sequence": {**KL, "kl_loss_type": "k3", "kl_gradient": "is_corrected", "kl_ratio_level": "sequence"},
    "kl_abs": {**KL, "kl_loss_type": "abs", "kl_gradient": "straight_through"},
    "kl_top_k": {**KL, "kl_loss_type": "top_k", "kl_tail": "drop"},
    "kl_full": {**KL, "kl_loss_type": "full", "kl_direction": "jensen_shannon"},
    "entropy": {"entropy_coef": 0.2},
    "nll": {"positive_nll_coef": 0.5},
}
PRESETS = ("bypass", "decoupled", "geo_rs", "icepop", "mis", "opsm", "seq_mis", "tis", "veto")
CLAMP = {"action": "clamp_upper", "upper": 1.3}
MASK = {"action": "mask", "lower": 0.8, "upper": 1.3}
WIDE = {"granularity": "sequence", "reduction": "mean"}
TURNS = {"granularity": "segment", "reduction": "sum"}
CORRECTIONS: dict[str, list[dict[str, Any]]] = {
    "normalized": [{**CLAMP, "normalize": True}],
    "normalized_turns": [{**CLAMP, **TURNS, "normalize": True}],
    "normalized_sequences": [{**CLAMP, **WIDE, "normalize": True}],
    "survivors": [{**CLAMP, "normalize": True}, {**MASK, "denominator": "survivors"}],
    "sequence_survivors": [{**MASK, **WIDE, "denominator": "survivors"}],
    "turn_veto": [{**MASK, "granularity": "segment", "reduction": "max", "action": "veto", "denominator": "survivors"}],
    "current": [{**MASK, "between": "current_rollout", "denominator": "original"}],
    "current_sequence": [{**MASK, **WIDE, "between": "current_old", "denominator": "original"}],
    "current_survivors": [{**MASK, "between": "current_old", "denominator": "survivors"}],
    "current_sequence_survivors": [{**MASK, **WIDE, "between": "current_rollout", "denominator": "survivors"}],
    "current_normalized": [{**CLAMP, "between": "current_rollout", "normalize": True}],
}


@dataclass(frozen=True)
class Case:
    """One step in one or several layouts."""

    name: str
    cfg: BaseLossConfig
    layouts: tuple[Layout, ...]
    seed: int
    dtype: torch.dtype = torch.float64
    is_two_pass: bool = False
    """Whether the items have current_logprobs though the loss could do without."""
    is_on_policy: bool = False
    """Whether the items have no old_logprobs."""
    empty: tuple[int, ...] = ()
    """Rows that are not scored at all, besides the last."""
    is_auxiliary: bool = False
    """Whether a term of the model's own is looked at instead of the loss."""


def aggregation(name: str) -> Any:
    if name == "constant":
        return {"name": name, "length": 4}
    return {"name": name, "positive_weight": 2.0, "negative_weight": 0.5} if name == "per_component" else name


def grpo(loss: str, how: str, **settings: Any) -> GRPOLossConfig:
    return GRPOLossConfig(policy_loss_cfg={"loss_type": loss}, aggregation=aggregation(how), **settings)


def pairs() -> list[tuple[str, str]]:
    """Every registered loss under every aggregation."""
    return list(itertools.product(policy_loss_names(), get_args(Aggregation)))


@cache
def others() -> dict[str, BaseLossConfig]:
    """Everything that is not a policy loss under an aggregation."""
    found: dict[str, BaseLossConfig] = {}
    for how in get_args(Aggregation):
        for term, settings in TERMS.items():
            found[f"{term}/{how}"] = grpo("vanilla", how, correction=[ALL_REJECTED], **settings)
        for name in ("survivors", "sequence_survivors", "current_sequence_survivors"):
            found[f"{name}/{how}"] = grpo("gspo", how, correction=CORRECTIONS[name], entropy_coef=0.1)
    for preset in PRESETS:
        found[f"correction={preset}"] = LossRunner.from_overrides([f"correction={preset}", "kl=k3"]).loss_cfg
    for name, corrections in CORRECTIONS.items():
        found[name] = grpo("vanilla", "token_mean", correction=corrections, correction_on_kl=True, **TERMS["kl_k3"])
        found[f"gspo_{name}"] = grpo("gspo", "seq_mean_token_mean", correction=corrections, positive_nll_coef=0.3)
        found[f"oreal_{name}"] = OrealLossConfig(correction=corrections, negative_loss_factor=0.4)
    for loss in ("vanilla", "gspo", "fipo", "real", "clip_cov"):
        found[f"oreal_{loss}"] = OrealLossConfig(policy_loss_cfg={"loss_type": loss}, **TERMS["kl_k2"])
    return {**found, **more()}


def more() -> dict[str, BaseLossConfig]:
    """Cross-entropy, distillation and settings of all losses."""
    empty = {"count_empty": True}
    drop = {"drop_zero_advantage": True}
    return {
        "ce_token": CELossConfig(),
        "ce_sample": CELossConfig(loss_reduction="sample", gradient_reduction="sum"),
        "ce_square": CELossConfig(loss_reduction="square", softcap=3.0, logit_scale=0.5, temperature=0.7),
        "ce_ignore": CELossConfig(ignore_idx=-7, loss_reduction="sample"),
        "opd": OPDLossConfig(threshold_low=0.2, log_ratio_sq_coef=0.01),
        "opd_reference": OPDLossConfig(teacher="reference", anchor="rollout", aggregation="seq_mean_token_mean"),
        "opd_top_k": OPDLossConfig(variant="top_k", aggregation="prompt_mean", correction=CORRECTIONS["normalized"]),
        "opd_forward": OPDLossConfig(variant="top_k", direction="forward", tail="drop", **TERMS["kl_k2"]),
        "sum_back_end": grpo("gspo", "prompt_mean", gradient_reduction="sum", **TERMS["kl_k3"]),
        "transformed": grpo("gspo", "token_mean", softcap=3.0, logit_scale=0.5, temperature=0.7, ignore_idx=-7),
        "drop_zero": grpo("vanilla", "seq_mean_token_mean", **drop),
        "drop_zero_gspo": grpo("gspo", "token_mean", **drop),
        "entropy_metric": grpo("vanilla", "token_mean", use_entropy_metric=True),
        "empty_sequences": grpo("vanilla", {"name": "seq_mean_token_mean", **empty}),  # type: ignore[arg-type]
        "empty_prompts": grpo("gspo", {"name": "prompt_mean", **empty}),  # type: ignore[arg-type]
        "empty_constant": grpo("vanilla", {"name": "constant", "length": 4, **empty}),  # type: ignore[arg-type]
    }


def layouts(world: int) -> list[Layout]:
    return layouts_of(world, MICRO_BATCHES, SHARDS, PACKED, MODES)


def fitting(cfg: BaseLossConfig, world: int) -> tuple[Layout, ...]:
    """Return the layouts in which the loss can be computed."""
    in_chunks = fits(cfg, Layout(mode="chunk"))
    return tuple(own for own in layouts(world) if (own.mode == "eager" or in_chunks) and _is_counted_once(cfg, own))


def _is_counted_once(cfg: BaseLossConfig, layout: Layout) -> bool:
    """Whether no idle micro-batch would be counted as an empty sequence."""
    counts_empty = getattr(getattr(cfg, "aggregation", None), "count_empty", False)
    return not counts_empty or layout.slots <= 4


def fits(cfg: BaseLossConfig, layout: Layout) -> bool:
    """Whether the loss can be computed so, and no idle micro-batch would be counted as an empty sequence."""
    if not _is_counted_once(cfg, layout):
        return False
    if layout.mode == "eager":
        return True
    try:
        type(cfg)(**{name: getattr(cfg, name) for name in cfg.model_fields_set} | {"mode": "chunk"})
    except ConfigError:
        return False
    return True


def full_cases(world: int) -> list[Case]:
    """Every loss under every aggregation in some layouts in float64, in fewer of them in float32, and so the others.

    Under its aggregations together a loss meets every layout of one and of two processes; all losses together meet
    those of four, which are slow on a machine of two cores. With `FULL` every pair meets every layout in both dtypes.
    """
    is_full = os.environ.get(FULL) == "1"
    draw = random.Random(world)
    configs = {f"{loss}/{how}": grpo(loss, how) for loss, how in pairs()}
    rest = others()
    found = []
    for number, (name, cfg) in enumerate({**configs, **rest}.items()):
        own = fitting(cfg, world)
        seed = 1000 * world + number
        most = min(PART[world] if not is_full else 6 if name in rest else len(own), len(own))
        wide = tuple(own[(number * most + step) % len(own)] for step in range(most))
        narrow = wide if is_full else tuple(draw.sample(own, 2 if world < 4 else 1))
        found += [Case(name, cfg, wide, seed), Case(name, cfg, narrow, seed, torch.float32)]
    return found


# -------------------------------------------------------------------- a sample that covers all pairs of values


def pairs_of(name: str, layout: Layout, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """Return all pairs of values that a case has."""
    loss, _, how = name.partition("/")
    values = [
        ("loss", loss),
        ("aggregation", how),
        ("processes", layout.processes),
        ("micro_batches", layout.micro_batches),
        ("sequence_parallel", layout.sequence_parallel),
        ("packed", layout.is_packed),
        ("mode", layout.mode),
        ("dtype", dtype),
    ]
    return list(itertools.combinations(values, 2))


@cache
def sampled_cases() -> list[Case]:
    """Every loss under every aggregation, in layouts chosen so that all pairs of values occur; the others in two."""
    draw = random.Random(5)
    choices = [(own, dtype) for world in WORLDS for own in layouts(world) for dtype in RTOL]
    seen: set[Any] = set()
    found: list[Case] = []
    for number, (loss, how) in enumerate(draw.sample(pairs(), len(pairs()))):
        name = f"{loss}/{how}"
        # The one of some layouts that has most that is new.
        tried = [
            (len(set(pairs_of(name, *choice)) - seen), index, choice)
            for index, choice in enumerate(draw.sample(choices, 40))
        ]
        _, _, (layout, dtype) = max(tried, key=lambda own: own[:2])
        seen.update(pairs_of(name, layout, dtype))
        found.append(Case(name, grpo(loss, how), (layout,), number, dtype))
    for number, (name, cfg) in enumerate(others().items()):
        allowed = [choice for choice in choices if choice[0].processes > 1 and fits(cfg, choice[0])]
        world = 2 if number % 10 else 4
        layout, dtype = draw.choice([choice for choice in allowed if choice[0].processes == world])
        found.append(Case(name, cfg, (layout,), 500 + number, dtype))
    return [*found, *variants(found)]


def variants(cases: list[Case]) -> list[Case]:
    """Return some cases again with items that have more, or less."""
    by_name = {case.name: case for case in cases}
    ours = [
        Case("auxiliary", GRPOLossConfig(gradient_reduction=how), tuple(layouts(world)), world, is_auxiliary=True)
        for world, how in itertools.product(WORLDS, ("mean", "sum"))
    ]
    return [
        *ours,
        *(
            replace(by_name[name], name=f"{name} in two passes", is_two_pass=True)
            for name in (
                "vanilla/token_mean",
                "gspo/prompt_mean",
                "correction=opsm",
                "current_sequence",
                "oreal_vanilla",
            )
        ),
        *(
            replace(by_name[name], name=f"{name} on-policy", is_on_policy=True)
            for name in ("vanilla/token_mean", "gspo/square", "real/prompt_mean", "oreal_gspo", "kl_k3/token_mean")
            if not getattr(by_name[name].cfg, "correction", ())
        ),
    ]


# -------------------------------------------------------------------- in the processes


def layout_worker(cases: list[Case]) -> list[str]:
    """Run the cases in all processes and return what failed, in words.

    After every case the processes tell each other how it went, in a group of their own: an error that one process has
    alone cannot be taken for an answer of the loss, and whoever waits for it in vain gives up.
    """
    status = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS)) if dist.is_initialized() else None
    failed = []
    for case in cases:
        try:
            words = run_case(case)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            words = f"{type(error).__name__}: {error} {notes}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
        everyone = [words]
        if status is not None:
            everyone = [None] * dist.get_world_size()
            try:
                dist.all_gather_object(everyone, words, group=status)
            except RuntimeError as error:
                what = words or "this process has an answer, but waits for another one"
                raise RuntimeError(f"{case.name} (seed {case.seed}): {what}; failed before: {failed}") from error
        failed += [f"{case.name} (seed {case.seed}, {case.dtype}): {own}" for own in dict.fromkeys(everyone) if own]
    return failed


def run_case(case: Case) -> str:
    """Return what differs in words, empty when nothing does."""
    draw = random.Random(case.seed)
    batch = random_batch(
        case.cfg,
        seed=case.seed,
        num_sequences=draw.choice((4, 5, 6)),
        longest=draw.choice((3, 4, 5)),
        garbage=float("nan"),
    )
    if case.empty:
        labels = batch.item.shifted_labels.clone()
        labels[[row for row in case.empty if row < len(labels)]] = case.cfg.ignore_idx
        batch = replace(batch, item=batch.item.replace(shifted_labels=labels))
    if case.is_on_policy:
        batch = replace(batch, item=batch.item.replace(old_logprobs=None))
    if case.is_two_pass:
        batch = batch.with_current_logprobs(case.cfg)
    batch = batch.with_dtype(case.dtype)
    rtol = RTOL[case.dtype]
    if case.is_auxiliary:
        with alone():
            known = evaluate(batch, case.cfg, REFERENCE, auxiliary_loop)
        results = [(own, evaluate(batch, case.cfg, own, auxiliary_loop)) for own in case.layouts]
        found = [finding for own, result in results for finding in compare(result, known, own, rtol)]
    else:
        found = []
        for mode in sorted({own.mode for own in case.layouts}):
            own_layouts = [own for own in case.layouts if own.mode == mode]
            # float32 is compared within a mode: where a loss is a difference of log-probabilities (opd, KL), or its
            # terms cancel, it magnifies the rounding in which eager and chunk differ; that has tests of its own.
            known_by = replace(REFERENCE, mode=mode) if case.dtype == torch.float32 else REFERENCE
            if case.dtype == torch.float32:
                rtol = max(RTOL[case.dtype], REFERENCE_ERRORS * rounding_of_reference(case.cfg, batch, known_by))
            found += differences(case.cfg, batch, own_layouts, rtol=rtol, compared_with=known_by)
    by_layout = itertools.groupby(found, key=lambda own: (str(own.layout), own.rank))
    return "\n".join(f"{where}: {'; '.join(map(str, own))}" for where, own in by_layout)


def rounding_of_reference(cfg: BaseLossConfig, batch: Batch, layout: Layout) -> float:
    """Return how far float32 takes the reference's gradients from those of float64, over their largest element.

    A loss whose coefficient is a difference of log-probabilities (opd) magnifies the rounding of both, on each CPU
    otherwise.
    """
    batch = with_current(batch, cfg)
    rounded, exact = (reference(one, cfg, layout).gradients for one in (batch, batch.with_dtype(torch.float64)))
    errors = [
        float((rounded[name].double() - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30))
        for name, gradient in exact.items()
    ]
    return max(errors, default=0.0)


def auxiliary_loop(part: Part) -> tuple[None, None]:
    """A z-loss as a model would give it: the mean, over the tokens of a micro-batch, of something of its own."""
    is_scored = [item.shifted_labels != part.loss_cfg.ignore_idx for item in part.items]
    weights = auxiliary_weights([own.sum() for own in is_scored], gradient_reduction=part.loss_cfg.gradient_reduction)
    for weight, hidden, own in zip(weights, part.hidden_states, is_scored, strict=True):
        logits = hidden[own] @ part.head_weight.T
        term = logits.logsumexp(-1).square().mean() if len(logits) else part.head_weight.sum() * 0
        (weight * term).backward()
    part.reduce_gradients()
    return None, None
