"""Corrections for rollout/trainer mismatch: hand-worked numbers, a reference in plain loops, and what must never be."""

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from toolkit import ConfigError, DataError
from toolkit.functional.mismatch import (
    Corrected,
    MismatchTerms,
    corrected,
    normalizer_parts,
    unit_statistic,
)
from toolkit.functional.mismatch_metrics import correction_metrics, mismatch_metrics
from toolkit.functional.segments import turn_ids
from toolkit.losses.config.correction import CorrectionConfig, corrections_from
from toolkit.metrics import EffectiveSampleSize, Mean, merge_metrics, metrics_in, to_floats

PRESETS = Path(__file__).parents[2] / "conf" / "correction"
CLAMP = CorrectionConfig(action="clamp_upper")
GEO = CorrectionConfig(action="clamp_upper", granularity="sequence", reduction="mean")
PRODUCT = CorrectionConfig(action="clamp_upper", granularity="sequence", reduction="sum")


def terms_of(log_ratios: Sequence[float], ids: Sequence[int] | None = None, **others: Any) -> MismatchTerms:
    """Tokens of one sequence (or of those that `ids` names) whose old / rollout ratios are as given."""
    rollout = torch.full((len(log_ratios),), -1.0, dtype=torch.float64)
    sequences = torch.tensor(ids if ids is not None else [0] * len(log_ratios))
    return MismatchTerms(
        rollout_logprobs=rollout,
        old_logprobs=rollout + torch.tensor(log_ratios, dtype=torch.float64),
        sequence_ids=sequences,
        num_sequences=int(sequences.max()) + 1 if len(log_ratios) else 0,
        **others,
    )


def mask(**fields: Any) -> CorrectionConfig:
    return CorrectionConfig(**{"action": "mask", "denominator": "original", **fields})


# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(("denominator", "counted"), [("original", 5), ("survivors", 2)])
def test_r8_both_denominators_of_a_token_mask(denominator: str, counted: int) -> None:
    found = corrected([mask(lower=0.5, upper=2.0, denominator=denominator)], terms_of([0.1, -1.5, 0.8, -10, 0.3]))
    assert found.is_kept.nonzero().flatten().tolist() == [0, 4]
    assert int(found.in_denominator.sum()) == counted
    assert found.weights.tolist() == [1, 0, 0, 0, 1]


def test_r9_product_and_geometric_mean_are_far_apart() -> None:
    product = corrected([PRODUCT], terms_of([0.005] * 300)).weights
    geometric = corrected([GEO], terms_of([0.005] * 300)).weights
    assert product[0].item() == pytest.approx(4.4817, abs=1e-4)
    assert geometric[0].item() == pytest.approx(1.0050, abs=1e-4)
    cap = mask(granularity="sequence", reduction="sum", upper=3.0)
    assert not corrected([cap], terms_of([0.005] * 300)).is_kept.any()
    assert corrected([PRODUCT], terms_of([0.012] * 100)).weights[0].item() == pytest.approx(3.3201, abs=1e-4)


@pytest.mark.parametrize(("bound", "smallest"), [(20.0, math.exp(-20)), (None, 0.7**300)])
def test_r10_a_vanishing_product_stays_finite_and_is_not_divided_by(bound: float | None, smallest: float) -> None:
    terms = terms_of([math.log(0.7)] * 300)
    plain = PRODUCT.model_copy(update={"max_log_ratio": bound})
    normalized = PRODUCT.model_copy(update={"max_log_ratio": bound, "normalize": True})
    assert corrected([plain], terms).weights[0].item() == pytest.approx(smallest, rel=1e-9, abs=0)
    found = corrected([normalized], terms, normalizer_parts([normalized], terms))
    assert found.weights.isfinite().all()
    assert found.weights[0].item() == pytest.approx(smallest, rel=1e-9, abs=0)  # a mean of 1e-47 is no divisor


def test_r18_a_rejected_token_counts_nothing_however_large_its_ratio() -> None:
    far = terms_of([0.0, 800.0, -800.0])
    icepop = [
        CorrectionConfig(action="clamp_upper", max_log_ratio=None),
        mask(lower=0.5, upper=5.0, max_log_ratio=None),
    ]
    assert corrected(icepop, far).weights.tolist() == [1.0, 0.0, 0.0]
    unbounded = corrected([icepop[0]] * 3, far).weights
    assert unbounded.float().isfinite().all()


def test_statistics_by_hand_at_half_and_a_quarter() -> None:
    p, q, d = torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), math.log(2)
    expected = {"ratio": 2.0, "k1": -d, "k2": d * d / 2, "k3": 1 - d, "tv": 0.25, "prob_diff": 0.25}
    expected["ratio_tv"] = 1.0
    for statistic, value in expected.items():
        found = unit_statistic(p, q, None, 0, statistic=statistic, reduction=None)
        assert found.item() == pytest.approx(value, rel=1e-6), statistic
    assert unit_statistic(q, p, None, 0, statistic="prob_diff", reduction=None).item() == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("action", "lower", "upper", "weights"),
    [
        ("clamp_upper", None, None, [0.25, 1.0, 4.0]),
        ("clamp_upper", None, 2.0, [0.25, 1.0, 2.0]),
        ("clamp", 0.5, 2.0, [0.5, 1.0, 2.0]),
        ("clamp", 0.5, None, [0.5, 1.0, 4.0]),
    ],
)
def test_clamps(action: str, lower: float | None, upper: float | None, weights: list[float]) -> None:
    cfg = CorrectionConfig(action=action, lower=lower, upper=upper)  # type: ignore[arg-type]
    found = corrected([cfg], terms_of([-math.log(4), 0.0, math.log(4)]))
    assert found.weights.tolist() == pytest.approx(weights)
    assert found.is_kept.all()
    assert found.in_denominator.all()


def test_bounds_are_inclusive() -> None:
    bounds = mask(statistic="k1", lower=-1.0, upper=0.5)
    assert corrected([bounds], terms_of([1.0, 1.25, -0.5, -0.75])).is_kept.tolist() == [True, False, True, False]
    clamp = CorrectionConfig(action="clamp_upper", upper=1.0)
    assert corrected([clamp], terms_of([0.0, 1.0])).is_hit[0].tolist() == [False, True]


def test_one_wild_token_can_be_kept_from_deciding_alone() -> None:
    terms = terms_of([0.0, 0.0, 0.0, -40.0])
    assert corrected([GEO], terms).weights[0].item() == pytest.approx(math.exp(-10))
    held = GEO.model_copy(update={"max_token_log_ratio": 1.0})
    assert corrected([held], terms).weights[0].item() == pytest.approx(math.exp(-0.25))


def test_a_veto_drops_the_whole_sequence_and_only_it() -> None:
    veto = CorrectionConfig(action="veto", upper=2.0, denominator="survivors")
    found = corrected([veto], terms_of([0.0, 1.0, 0.0, 0.1], ids=[0, 0, 1, 1]))
    assert found.is_kept.tolist() == [False, False, True, True]
    assert found.in_denominator.tolist() == [False, False, True, True]


def test_a_correction_of_negative_advantages_leaves_the_others() -> None:
    opsm = mask(granularity="sequence", statistic="k1", reduction="mean", upper=0.1, advantages="negative")
    terms = terms_of([-1.0, -1.0, 0.0], ids=[0, 1, 2], advantages=torch.tensor([1.0, -1.0, -1.0]))
    assert corrected([opsm], terms).is_kept.tolist() == [True, False, True]


def test_a_correction_of_widening_updates_leaves_those_that_lead_back() -> None:
    # Means of |ratio - 1| are 1 and 0; in the first sequence A > 0 widens a ratio of 2, and A < 0 narrows it.
    vaco = mask(granularity="sequence", statistic="ratio_tv", reduction="mean", upper=0.9, advantages="widening")
    signs = torch.tensor([1.0, -1.0, 0.0, 1.0])
    terms = terms_of([math.log(2)] * 3 + [0.0], ids=[0, 0, 0, 1], advantages=signs)
    assert corrected([vaco], terms).is_kept.tolist() == [False, True, True, True]
    shrunk = terms_of([-math.log(2), -math.log(2)], ids=[0, 0], advantages=torch.tensor([1.0, -1.0]))
    half = vaco.model_copy(update={"upper": 0.4})
    assert corrected([half], shrunk).is_kept.tolist() == [True, False]


def test_turns_are_treated_apart() -> None:
    turns = {"turn_ids": torch.tensor([0, 0, 1]), "num_turns": 2}
    cfg = CorrectionConfig(action="clamp_upper", granularity="segment", reduction="sum")
    found = corrected([cfg], terms_of([0.1, 0.2, 0.4], **turns))
    assert found.weights.log().tolist() == pytest.approx([0.3, 0.3, 0.4])


def test_the_current_policy_gets_no_gradient_through_a_weight() -> None:
    current = torch.tensor([-1.0, -2.0], requires_grad=True)
    terms = MismatchTerms(rollout_logprobs=torch.tensor([-1.0, -1.0]), current_logprobs=current)
    found = corrected([CorrectionConfig(action="clamp_upper", between="current_rollout")], terms)
    assert not found.weights.requires_grad
    assert found.weights.tolist() == pytest.approx([1.0, math.exp(-1)])


def test_normalizing_over_tokens_and_over_sequences() -> None:
    terms = terms_of([math.log(4), math.log(2), math.log(2)], ids=[0, 1, 1])
    token = CorrectionConfig(action="clamp_upper", upper=3.0, normalize=True)
    assert normalizer_parts([token], terms).tolist() == [[pytest.approx(7.0), pytest.approx(3.0)]]
    sequence = GEO.model_copy(update={"normalize": True})
    sums = normalizer_parts([CLAMP, sequence], terms)
    assert sums.tolist() == [[0.0, 0.0], [pytest.approx(6.0), pytest.approx(2.0)]]
    found = corrected([CLAMP, sequence], terms, sums).weights
    assert found.tolist() == pytest.approx([4 * 4 / 3, 2 * 2 / 3, 2 * 2 / 3])


def test_normalizing_without_the_sums_is_refused() -> None:
    with pytest.raises(DataError, match="normalizer_parts"):
        corrected([CorrectionConfig(action="clamp_upper", normalize=True)], terms_of([0.0]))


@pytest.mark.parametrize(
    "cfg", [CLAMP.model_copy(update={"between": "current_old"}), mask(upper=2.0, advantages="negative")]
)
def test_what_a_batch_lacks_is_named(cfg: CorrectionConfig) -> None:
    with pytest.raises(DataError, match=r"needs (current_logprobs|advantages)"):
        corrected([cfg], terms_of([0.0]))


def test_turn_ids_by_hand() -> None:
    scored = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0, 1]]).bool()
    sequences = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2, 2]])
    assert turn_ids(scored, sequences).tolist() == [[0, 0, -1, 1, 2, 2, -1], [3, -1, 4, -1, -1, -1, 5]]
    assert turn_ids(scored[0], sequences[0]).tolist() == [0, 0, -1, 1, 2, 2, -1]


# ------------------------------------------------------------------------------------------------ plain loops


def slow(corrections: Sequence[CorrectionConfig], tokens: list[dict[str, float]]) -> list[tuple[float, bool, bool]]:
    """The definitions, token by token: weight, kept, counted."""
    found = []
    for token in tokens:
        weight, is_kept, is_counted = 1.0, True, True
        for cfg in corrections:
            value = slow_statistic(cfg, tokens, token)
            if cfg.action in ("clamp", "clamp_upper"):
                weight *= min(max(value, cfg.lower or 0.0), math.inf if cfg.upper is None else cfg.upper)
                continue
            judged = [t for t in tokens if t["sequence"] == token["sequence"]] if cfg.action == "veto" else [token]
            is_out = any(
                not (
                    (-math.inf if cfg.lower is None else cfg.lower)
                    <= v
                    <= (math.inf if cfg.upper is None else cfg.upper)
                )
                for v in (slow_statistic(cfg, tokens, t) for t in judged)
            )
            first, second = cfg.between.split("_")
            sign = {"any": True, "negative": token["advantage"] < 0, "positive": token["advantage"] > 0}
            sign["widening"] = token["advantage"] * (token[first] - token[second]) > 0
            if is_out and sign[cfg.advantages]:
                is_kept = False
                is_counted = is_counted and cfg.denominator == "original"
        found.append((weight if is_kept else 0.0, is_kept, is_counted))
    return found


def slow_statistic(cfg: CorrectionConfig, tokens: list[dict[str, float]], token: dict[str, float]) -> float:
    unit = {"segment": "turn", "sequence": "sequence"}.get(cfg.granularity)
    members = [token] if unit is None else [t for t in tokens if t[unit] == token[unit]]
    first, second = cfg.between.split("_")
    values = []
    for t in members:
        p, q = math.exp(t[first]), math.exp(t[second])
        d = t[first] - t[second]
        each = {"ratio": d, "k1": -d, "k2": d * d / 2, "k3": p / q - 1 - d, "tv": abs(p - q), "prob_diff": p - q}
        each["ratio_tv"] = abs(p / q - 1)
        values.append(each[cfg.statistic])
    whole = {"sum": sum(values), "mean": sum(values) / len(values), "max": max(values), None: values[0]}[cfg.reduction]
    return math.exp(whole) if cfg.statistic == "ratio" else whole


def random_tokens(seed: int) -> list[dict[str, float]]:
    dice = random.Random(seed)
    tokens: list[dict[str, float]] = []
    turn = 0
    for sequence in range(4):
        for _ in range(dice.randint(1, 3)):
            for _ in range(dice.randint(1, 4)):
                policies = {name: -1.5 + 0.5 * dice.uniform(-1, 1) for name in ("rollout", "old", "current")}
                tokens.append(
                    {**policies, "sequence": sequence, "turn": turn, "advantage": dice.choice((-1.0, 0.0, 1.0))}
                )
            turn += 1
    return tokens


def tensors(tokens: list[dict[str, float]]) -> MismatchTerms:
    def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([token[name] for token in tokens], dtype=dtype)

    return MismatchTerms(
        rollout_logprobs=column("rollout"),
        old_logprobs=column("old"),
        current_logprobs=column("current"),
        advantages=column("advantage"),
        sequence_ids=column("sequence", torch.int64),
        num_sequences=4,
        turn_ids=column("turn", torch.int64),
        num_turns=int(max(token["turn"] for token in tokens)) + 1,
    )


def every_correction() -> list[CorrectionConfig]:
    units = [("token", None), *itertools.product(("segment", "sequence"), ("sum", "mean", "max"))]
    found = []
    for (granularity, reduction), between in itertools.product(
        units, ("old_rollout", "current_rollout", "current_old")
    ):
        common: dict[str, Any] = {"granularity": granularity, "reduction": reduction, "between": between}
        found += [CorrectionConfig(action="clamp", lower=0.8, upper=1.2, **common)]
        bounds = {"ratio": (0.9, 1.1), "k1": (-0.1, 0.1), "k2": (None, 0.05), "k3": (None, 0.05)}
        bounds |= {"tv": (None, 0.05), "prob_diff": (-0.05, 0.05), "ratio_tv": (0.02, 0.3)}
        for statistic, (lower, upper) in bounds.items():
            fields = {**common, "statistic": statistic, "lower": lower, "upper": upper}
            found += [mask(**fields), mask(**fields, advantages="negative"), mask(**fields, advantages="widening")]
            if granularity != "sequence":
                found += [mask(**{**fields, "action": "veto"})]
            if between == "old_rollout":
                found += [mask(**{**fields, "denominator": "survivors"}, advantages="positive")]
    return found


@pytest.mark.parametrize("seed", [0])
def test_every_combination_equals_plain_loops(seed: int) -> None:
    tokens = random_tokens(seed)
    terms, dice = tensors(tokens), random.Random(seed)
    everything = every_correction()
    for cfg in everything:
        chosen = [cfg, dice.choice(everything)]
        found, expected = corrected(chosen, terms), slow(chosen, tokens)
        assert found.weights.tolist() == pytest.approx([w for w, _, _ in expected], rel=1e-12), cfg
        assert found.is_kept.tolist() == [kept for _, kept, _ in expected], cfg
        assert found.in_denominator.tolist() == [counted for _, _, counted in expected], cfg


# ------------------------------------------------------------------------------------------------ properties


def select(terms: MismatchTerms, is_in: Tensor) -> MismatchTerms:
    fields = {name: value[is_in] if isinstance(value, Tensor) else value for name, value in vars(terms).items()}
    return MismatchTerms(**fields)


def joined(parts: list[Corrected], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])


def test_micro_batches_equal_the_whole() -> None:
    terms = tensors(random_tokens(3))
    assert terms.sequence_ids is not None
    corrections = [
        CorrectionConfig(action="clamp_upper", upper=1.3, normalize=True),
        GEO.model_copy(update={"normalize": True}),
        mask(granularity="segment", reduction="sum", upper=1.2, denominator="survivors"),
    ]
    parts = [select(terms, terms.sequence_ids % 2 == half) for half in (0, 1)]
    order = torch.cat([(terms.sequence_ids % 2 == half).nonzero().flatten() for half in (0, 1)])
    sums = normalizer_parts(corrections, terms)
    part_sums = normalizer_parts(corrections, parts[0]) + normalizer_parts(corrections, parts[1])
    torch.testing.assert_close(part_sums, sums, rtol=1e-12, atol=0)
    whole, found = corrected(corrections, terms, sums), [corrected(corrections, part, part_sums) for part in parts]
    for name in ("weights", "is_kept", "in_denominator"):
        torch.testing.assert_close(joined(found, name), getattr(whole, name)[order], rtol=1e-12, atol=0)

    def metrics(t: MismatchTerms, r: Corrected) -> dict[str, Any]:
        assert t.old_logprobs is not None
        own = mismatch_metrics(t.old_logprobs, t.rollout_logprobs, r.weights, r.is_kept, t.sequence_ids, 4)
        return {**own, **correction_metrics(corrections, r)}

    merged = merge_metrics([metrics(part, result) for part, result in zip(parts, found, strict=True)])
    assert to_floats(merged) == pytest.approx(to_floats(metrics(terms, whole)), rel=1e-12)


def test_the_order_of_corrections_makes_no_difference() -> None:
    terms = tensors(random_tokens(4))
    corrections = [CLAMP, mask(upper=1.2), mask(granularity="sequence", reduction="mean", lower=0.99), GEO]
    first = corrected(corrections, terms)
    second = corrected(corrections[::-1], terms)
    torch.testing.assert_close(first.weights, second.weights, rtol=1e-12, atol=0)
    assert torch.equal(first.is_kept, second.is_kept)


@pytest.mark.parametrize(
    ("statistic", "bound", "d"),
    [
        ("ratio", 2.0, math.log(2)),
        ("ratio", 0.5, math.log(0.5)),
        ("k1", 0.7, -0.7),
        ("k2", 0.02, 0.2),
        ("k3", math.e - 2, 1.0),
        ("ratio_tv", 1.0, math.log(2)),
    ],
)
@pytest.mark.parametrize("logprob", [-0.3, -1.7, -9.1])
def test_rounding_breaks_no_inclusive_bound(statistic: str, bound: float, d: float, logprob: float) -> None:
    p = torch.tensor([logprob] * 64) - torch.arange(64) / 64
    fields = {"upper": bound} if bound >= 0.5 or statistic == "k2" else {"lower": bound}
    fields = {"lower": bound} if (statistic, bound) == ("ratio", 0.5) else fields
    mask = CorrectionConfig(statistic=statistic, action="mask", denominator="original", **fields)
    for shift, is_kept in ((0.0, True), (1e-4 * (1 if d > 0 else -1), False)):
        terms = MismatchTerms(rollout_logprobs=p - d - shift, old_logprobs=p)
        assert corrected([mask], terms).is_kept.tolist() == [is_kept] * 64, shift
        if is_kept:  # with all digits there is no room for more than them
            off = 1e-12 * (1 if d > 0 else -1)
            exact = MismatchTerms(rollout_logprobs=p.double() - d - off, old_logprobs=p.double())
            assert not corrected([mask], exact).is_kept.any()


def test_arguments_do_not_change_and_an_empty_batch_works() -> None:
    terms = tensors(random_tokens(5))
    copies = {name: value.clone() for name, value in vars(terms).items() if isinstance(value, Tensor)}
    corrected(every_correction()[:60], terms)
    assert all(torch.equal(getattr(terms, name), value) for name, value in copies.items())
    empty = select(terms, torch.zeros(len(terms.rollout_logprobs), dtype=torch.bool))
    for cfg in every_correction():
        assert corrected([cfg], empty).weights.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_inputs_give_finite_weights(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1e-30, -25.0, -1e4, -3e38], dtype=dtype)
    old, rollout = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    ids = torch.arange(25) // 7
    terms = MismatchTerms(
        rollout_logprobs=rollout, old_logprobs=old, current_logprobs=old, advantages=old, sequence_ids=ids,
        num_sequences=4, turn_ids=ids, num_turns=4,
    )  # fmt: skip
    for cfg in every_correction():
        for bound in (20.0, None):
            found = corrected([cfg.model_copy(update={"max_log_ratio": bound})] * 3, terms)
            assert found.weights.to(torch.float32).isfinite().all(), cfg
    for name, value in to_floats(mismatch_metrics(old, rollout, torch.ones(25), torch.ones(25).bool())).items():
        assert math.isfinite(value), name


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_by_hand() -> None:
    old, rollout = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log()
    found = to_floats(
        mismatch_metrics(old, rollout, torch.tensor([1.0, 3.0]), torch.tensor([True, False]), torch.tensor([0, 2]), 3)
    )
    d = math.log(2)
    assert found == pytest.approx(
        {
            "rollout_mismatch": d / 2,
            "rollout_mismatch_max": d,
            "rollout_k1": -d / 2,
            "rollout_k3": (1 - d) / 2,
            "rollout_chi2": 1.5,
            "rollout_prob_diff": 0.125,
            "rollout_weight": 2.0,
            "rollout_weight_min": 1.0,
            "rollout_weight_max": 3.0,
            "rollout_ess": 16 / 20,
            "rollout_kept": 0.5,
            "rollout_kept_sequences": 0.5,  # sequence 1 has no token here
        },
        rel=1e-6,
    )


def test_effective_sample_size_is_a_metric_that_merges() -> None:
    whole = EffectiveSampleSize.of(torch.tensor([1.0, 1.0, 0.0, 4.0]))
    parts = EffectiveSampleSize.of(torch.tensor([1.0])).merge(EffectiveSampleSize.of(torch.tensor([1.0, 0.0, 4.0])))
    assert whole.value() == parts.value() == pytest.approx(36 / (4 * 18))
    assert math.isnan(EffectiveSampleSize.of(torch.tensor([])).value())
    assert list(metrics_in({"ess": whole, "logits": torch.ones(1)})) == ["ess"]
    with pytest.raises(TypeError, match="cannot merge"):
        whole.merge(Mean.of(torch.ones(1)))


def test_unreported_logprobs_are_left_out_of_the_comparison() -> None:
    old, ones = torch.tensor([-1.0, -1.0]), torch.ones(2)
    found = to_floats(mismatch_metrics(old, torch.tensor([-2.0, math.nan]), ones, ones.bool()))
    assert found["rollout_mismatch"] == pytest.approx(1.0)


def test_each_correction_reports_what_it_hit() -> None:
    corrections = [CorrectionConfig(action="clamp_upper", upper=2.0), mask(upper=3.0), mask(upper=5.0)]
    result = corrected(corrections, terms_of([0.0, math.log(2.5), math.log(4), math.log(8)]))
    assert to_floats(correction_metrics(corrections, result)) == {
        "rollout_clamp_upper_token_ratio": 0.75,
        "rollout_mask_token_ratio": 0.5,
        "rollout_mask_token_ratio_2": 0.25,
    }


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": "mask", "upper": 2.0}, "needs denominator: 'original'.*'survivors'"),
        ({"action": "veto", "upper": 2.0}, "needs denominator"),
        ({"action": "mask", "denominator": "original"}, "rejects nothing"),
        ({"action": "clamp", "denominator": "original"}, "nothing is rejected"),
        ({"action": "clamp", "statistic": "k3"}, "use statistic='ratio'"),
        ({"action": "clamp", "advantages": "negative"}, "rejects nothing"),
        ({"action": "clamp_upper", "lower": 0.5}, "use action='clamp'"),
        ({"action": "clamp", "granularity": "sequence"}, "needs reduction"),
        ({"action": "clamp", "reduction": "mean"}, "no effect on single tokens"),
        ({"action": "clamp", "lower": 2.0, "upper": 0.5}, "must be less than"),
        ({"action": "clamp", "lower": -0.7}, "not logs"),
        ({"action": "clamp_upper", "upper": 0.0}, "leaves nothing"),
        ({"action": "mask", "denominator": "original", "statistic": "tv", "upper": 1.5}, "never binds"),
        ({"action": "mask", "denominator": "original", "upper": 2.0, "normalize": True}, "has no weights"),
        (
            {"action": "veto", "denominator": "original", "upper": 2.0, "granularity": "sequence", "reduction": "sum"},
            "write mask",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorrectionConfig(**fields)


def test_corrections_from_every_form() -> None:
    tis = {"action": "clamp_upper", "upper": 2.0}
    pop = {"action": "mask", "upper": 5.0, "denominator": "original"}
    expected = (CorrectionConfig(action="clamp_upper", upper=2.0), mask(upper=5.0))
    assert corrections_from({"tis": tis, "pop": pop}) == expected
    assert corrections_from({"both": [tis, pop], "off": None}) == expected
    assert corrections_from([tis, expected[1]]) == expected
    assert corrections_from(expected) == expected
    assert corrections_from(None) == corrections_from({}) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tis": {"action": "clamp_upper", "uper": 2.0}}, r"loss.correction.tis.uper .*did you mean 'upper'"),
        ({"tis": {"action": "clamp_upper", "upper": "x"}}, r"loss.correction.tis.upper='x'"),
        (
            {"pop": [{"action": "clamp_upper"}, {"action": "mask", "upper": 2.0}]},
            r"loss.correction.pop.1: .*denominator",
        ),
        ({"action": "mask"}, r"loss.correction.action='mask' is not a correction.*below a name"),
        ("tis", r"loss.correction='tis' is not a correction"),
    ],
)
def test_a_mistake_is_placed(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corrections_from(given)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(path: Path) -> None:
    text = path.read_text()
    preset = yaml.safe_load(text)
    if path.stem == "bypass":
        assert preset == {"policy_loss": {"anchor": "rollout"}}
        return
    if path.stem == "none":
        assert preset == {"correction": None}
        return
    assert text.startswith("# @package loss.correction\n# ")
    assert "# Source: " in text
    assert list(preset) == [path.stem]
    assert corrections_from(preset)
