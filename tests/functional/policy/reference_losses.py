"""Every policy loss as a loop over tokens, from the formula of its paper; see `reference` for what a sample is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.functional.policy.reference import (
    LogProbs,
    Losses,
    Sample,
    clipped,
    level_ratios,
    log_ratios,
    over,
    ppo,
    ratios,
)


def vanilla(
    x: Sample,
    live: LogProbs,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None,
    delta: float | None,
    anchor: str,
) -> Losses:
    return [
        ppo(r, a, cliprange_low, cliprange_high, clip_ratio_c, delta)
        for r, a in zip(ratios(x, live, anchor), x.advantages, strict=True)
    ]


def _level(x: Sample, live: LogProbs, labels: Sequence[int], how: str, **o: Any) -> Losses:
    advantages = over(x.sequences, x.advantages, "mean") if o.get("average_advantages") else x.advantages
    found = level_ratios(x, live, o["anchor"], labels, how)
    return [
        ppo(r, a, o["cliprange_low"], o["cliprange_high"], o.get("clip_ratio_c"), o.get("delta"))
        for r, a in zip(found, advantages, strict=True)
    ]


def gspo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _level(x, live, x.sequences, "mean", **o)


def segment_ratio(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _level(x, live, x.turns, "mean", **o)


def rloo_sequence(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _level(x, live, x.sequences, "sum", **o)


def luspo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return [len(x.members(t)) * loss for t, loss in enumerate(gspo(x, live, **o))]


def gspo_token(x: Sample, live: LogProbs, **o: Any) -> Losses:
    raw = [new - old for new, old in zip(x.logprobs, x.anchor(o["anchor"]), strict=True)]
    found = []
    for t, mean in enumerate(over(x.sequences, raw, "mean")):
        s = math.exp(x.bound(mean + live[t] - x.logprobs[t]))
        found.append(ppo(s, x.advantages[t], o["cliprange_low"], o["cliprange_high"], o["clip_ratio_c"], o["delta"]))
    return found


def cispo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    low, high = o["weight_min"], o["weight_max"]
    if low is None and o["cliprange_low"] is not None:
        low = 1 - o["cliprange_low"]
    if high is None and o["cliprange_high"] is not None:
        high = 1 + o["cliprange_high"]
    found = []
    for t, r in enumerate(ratios(x, x.logprobs, o["anchor"])):
        a = x.advantages[t]
        is_out = (a > 0 and high is not None and r > high) or (a < 0 and low is not None and r < low)
        found.append(0.0 if is_out and o["use_unified_mask"] else -clipped(r, low, high) * a * live[t])
    return found


def tis(x: Sample, live: LogProbs, **o: Any) -> Losses:
    frozen = ratios(x, x.logprobs, o["anchor"])
    return [-clipped(r, o["weight_min"], o["weight_max"]) * x.advantages[t] * live[t] for t, r in enumerate(frozen)]


def rollout_is(x: Sample, live: LogProbs, **o: Any) -> Losses:
    low, high = 1 - o["cliprange_low"], 1 + o["cliprange_high"]
    frozen = ratios(x, x.logprobs, o["anchor"])
    return [-r * x.advantages[t] * live[t] if low < r < high else 0.0 for t, r in enumerate(frozen)]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _sapo(found: list[float], advantages: Sequence[float], o: dict[str, Any]) -> Losses:
    losses = []
    for r, a in zip(found, advantages, strict=True):
        tau = o["tau_pos"] if a > 0 else o["tau_neg"]
        losses.append(-4 / tau * _sigmoid(tau * (r - 1)) * a)
    return losses


def sapo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _sapo(ratios(x, live, o["anchor"]), x.advantages, o)


def sapo_sequence(x: Sample, live: LogProbs, **o: Any) -> Losses:
    advantages = over(x.sequences, x.advantages, "mean") if o["average_advantages"] else x.advantages
    return _sapo(level_ratios(x, live, o["anchor"], x.sequences, "mean"), advantages, o)


def gmpo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    kept = []
    for value, a in zip(log_ratios(x, live, o["anchor"]), x.advantages, strict=True):
        up = min(value, o["cliprange_high"])
        kept.append(up if a > 0 else max(value, -o["cliprange_low"]) if a < 0 else 0.0)
    means = over(x.sequences, x.advantages, "mean")
    return [-a * math.exp(value) for a, value in zip(means, over(x.sequences, kept, "mean"), strict=True)]


def vespo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    smallest = math.log(1e-8)
    logs = [clipped(value, -20, 20) for value in log_ratios(x, x.logprobs, o["anchor"])]
    if o["use_rollout_weight"]:
        cap = 20.0 if o["rollout_weight_max"] is None else min(20.0, math.log(o["rollout_weight_max"]))
        logs = [
            value + clipped(old - rollout, smallest, cap)
            for value, old, rollout in zip(logs, x.old, x.rollout, strict=True)
        ]
    found = []
    for t, total in enumerate(over(x.sequences, logs, "sum")):
        log_w, a = clipped(total, smallest, 20.0), x.advantages[t]
        k, rate = (o["k_pos"], o["lambda_pos"]) if a >= 0 else (o["k_neg"], o["lambda_neg"])
        found.append(-math.exp(k * log_w + rate * (1 - math.exp(log_w))) * a * live[t])
    return found


def _dppo(x: Sample, live: LogProbs, distance: Callable[[float, float], float], o: dict[str, Any]) -> Losses:
    found = []
    anchors, cap = x.anchor(o["anchor"]), o["clip_ratio_c"] or math.inf
    frozen, moving = ratios(x, x.logprobs, o["anchor"]), ratios(x, live, o["anchor"])
    for t, a in enumerate(x.advantages):
        p, p_old = math.exp(x.logprobs[t]), math.exp(anchors[t])
        far = distance(p, p_old)
        is_out = (p > p_old and far > o["threshold_high"]) if a > 0 else (p < p_old and far > o["threshold_low"])
        loss = -min(moving[t], cap) * a if o["form"] == "ratio" else -min(frozen[t], cap) * live[t] * a
        square = log_ratios(x, live, o["anchor"])[t] ** 2
        found.append((0.0 if is_out else loss) + o["log_ratio_sq_coef"] * square)
    return found


def dppo_tv(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _dppo(x, live, lambda p, p_old: abs(p - p_old), o)


def dppo_kl(x: Sample, live: LogProbs, **o: Any) -> Losses:
    def divergence(p: float, p_old: float) -> float:
        rest, rest_old = max(1 - p, 1e-8), max(1 - p_old, 1e-8)
        return p_old * math.log(p_old / p) + (1 - p_old) * math.log(rest_old / rest)

    return _dppo(x, live, divergence, o)


def ipo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    anchors, found = x.anchor(o["anchor"]), []
    for t, value in enumerate(log_ratios(x, live, o["anchor"])):
        is_out = abs(math.exp(x.logprobs[t]) - math.exp(anchors[t])) > o["threshold"]
        loss = 0.0 if is_out else -math.exp(value) * x.advantages[t]
        found.append(loss + o["log_ratio_sq_coef"] * value**2)
    return found


def reinforce(x: Sample, live: LogProbs) -> Losses:
    return [-a * new for a, new in zip(x.advantages, live, strict=True)]


def is_reinforce(x: Sample, live: LogProbs, *, anchor: str) -> Losses:
    return [-a * r for a, r in zip(x.advantages, ratios(x, live, anchor), strict=True)]


def nll(x: Sample, live: LogProbs, *, only_positive: bool) -> Losses:
    return [-new if a > 0 or not only_positive else 0.0 for a, new in zip(x.advantages, live, strict=True)]


def _topr(x: Sample, live: LogProbs, found: list[float], scores: Sequence[float], o: dict[str, Any]) -> Losses:
    losses = []
    for t, (r, score) in enumerate(zip(found, scores, strict=True)):
        negative = o["negative_weight"] * clipped(r, o["weight_min"], o["weight_max"])
        losses.append(-(o["positive_weight"] if score > 0 else negative) * x.advantages[t] * live[t])
    return losses


def topr(x: Sample, live: LogProbs, **o: Any) -> Losses:
    return _topr(x, live, ratios(x, x.logprobs, o["anchor"]), x.advantages, o)


def topr_sequence(x: Sample, live: LogProbs, **o: Any) -> Losses:
    scores = over(x.sequences, x.advantages, "mean")
    if o["token_ratio"]:
        return _topr(x, live, ratios(x, x.logprobs, o["anchor"]), scores, o)
    return _topr(x, live, level_ratios(x, x.logprobs, o["anchor"], x.sequences, "sum"), scores, o)


def kimi(x: Sample, live: LogProbs, *, tau: float, anchor: str) -> Losses:
    squares = [value**2 for value in log_ratios(x, live, anchor)]
    return [-a * new + tau / 2 * square for a, new, square in zip(x.advantages, live, squares, strict=True)]


def fipo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    logs, found = log_ratios(x, x.logprobs, o["anchor"]), []
    limit = math.inf if o["delta"] is None else o["delta"]
    for t, value in enumerate(log_ratios(x, live, o["anchor"])):
        future = sum(
            0.5 ** ((x.positions[k] - x.positions[t]) / o["half_life"]) * logs[k]
            for k in x.members(t)
            if k >= t and math.exp(logs[k]) <= limit
        )
        weight, span = math.exp(x.bound(future)), o["weight_range"]
        if span is not None:
            weight = clipped(weight, 1.0 if o["only_raise"] else 1 - span, 1 + span)
        a, safe = x.advantages[t], o["safety_threshold"]
        if safe is not None and a < 0 and math.exp(logs[t]) > safe:
            weight = clipped(weight, 0.8, 1.0)
        loss = ppo(math.exp(value), a, o["cliprange_low"], o["cliprange_high"], o["clip_ratio_c"], o["delta"])
        found.append(weight * loss)
    return found


def real(x: Sample, live: LogProbs, *, tau: float, only_mixed: bool, anchor: str) -> Losses:
    raw = [new - old for new, old in zip(live, x.anchor(anchor), strict=True)]
    scores = [x.bound(value) / tau for value in over(x.sequences, raw, "mean")]
    labels = over(x.sequences, x.advantages, "mean")
    found = []
    for group in x.groups:
        own = {x.sequences[t]: t for t, other in enumerate(x.groups) if other == group}
        bad = sum(math.exp(scores[t]) for t in own.values() if labels[t] <= 0)
        good = sum(math.exp(-scores[t]) for t in own.values() if labels[t] > 0)
        is_left_out = only_mixed and (bad == 0 or good == 0)
        found.append(0.0 if is_left_out else math.log(1 + bad) + math.log(1 + good))
    return found


def _covariances(x: Sample) -> list[float]:
    a, new = sum(x.advantages) / len(x.advantages), sum(x.logprobs) / len(x.logprobs)
    return [(x.advantages[t] - a) * (x.logprobs[t] - new) for t in range(len(x.logprobs))]


def clip_cov(x: Sample, live: LogProbs, **o: Any) -> Losses:
    assert o["clip_cov_ratio"] == 1.0  # no draw: everything eligible is left out
    found = []
    frozen, low, high = ratios(x, x.logprobs, o["anchor"]), o["cliprange_low"], o["cliprange_high"]
    covariances = _covariances(x)
    for t, r in enumerate(ratios(x, live, o["anchor"])):
        a = x.advantages[t]
        is_clipped = (a < 0 and frozen[t] < 1 - low) or (a > 0 and frozen[t] > 1 + high)
        is_out = o["cov_low"] < covariances[t] < o["cov_high"] and not is_clipped
        found.append(0.0 if is_out else ppo(r, a, low, high, o["clip_ratio_c"]))
    return found


def kl_cov(x: Sample, live: LogProbs, **o: Any) -> Losses:
    covariances = _covariances(x)
    count = max(1, int(o["kl_cov_ratio"] * len(live))) if o["kl_cov_ratio"] else 0
    largest = sorted(range(len(live)), key=lambda t: -covariances[t])[:count]
    logs = log_ratios(x, live, o["anchor"])
    return [
        -x.advantages[t] * math.exp(value) + (o["kl_coef"] * abs(value) if t in largest else 0.0)
        for t, value in enumerate(logs)
    ]


def aspo(x: Sample, live: LogProbs, **o: Any) -> Losses:
    found = []
    frozen = ratios(x, x.logprobs, o["anchor"])
    for t, r in enumerate(ratios(x, live, o["anchor"])):
        a = x.advantages[t]
        if a <= 0:
            found.append(ppo(r, a, o["cliprange_low"], o["cliprange_high"], o["clip_ratio_c"]))
        elif frozen[t] > 1 + o["cliprange_high"]:
            found.append(0.0)
        else:
            weight = clipped(1 / frozen[t], None, o["weight_max"])
            found.append(-a * weight * math.exp(live[t]) / math.exp(x.logprobs[t]))
    return found


def opd(x: Sample, live: LogProbs, **o: Any) -> Losses:
    anchors, found = x.anchor(o["anchor"]), []
    for t, value in enumerate(log_ratios(x, live, o["anchor"])):
        fall = math.exp(anchors[t]) - math.exp(x.logprobs[t])
        is_out = o["threshold_low"] is not None and fall > o["threshold_low"]
        loss = 0.0 if is_out else -(x.teacher[t] - x.logprobs[t]) * math.exp(value)
        found.append(loss + o["log_ratio_sq_coef"] * value**2)
    return found


def sdar(x: Sample, live: LogProbs, *, gate_beta: float) -> Losses:
    gates = [_sigmoid(gate_beta * (f - new)) for f, new in zip(x.teacher, x.logprobs, strict=True)]
    return [gate * (f - new) for gate, f, new in zip(gates, x.teacher, live, strict=True)]


REFERENCES: dict[str, Callable[..., Losses]] = {
    **{
        function.__name__: function
        for function in (
            *(vanilla, gspo, gspo_token, segment_ratio, luspo, rloo_sequence, cispo, tis, rollout_is, sapo),
            *(sapo_sequence, gmpo, vespo, dppo_tv, dppo_kl, ipo, reinforce, is_reinforce, nll, topr, topr_sequence),
            *(kimi, fipo, real, clip_cov, kl_cov, aspo, opd, sdar),
        )
    },
    "gpg": reinforce,
    "dro": kimi,
}
"""Every built-in loss."""
