"""What holds for every policy loss, or for every one but those named here with the reason."""

from __future__ import annotations

import inspect
import itertools
import string
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.policy.made import BOUNDED, OTHER_OPTIONS, UNBOUNDED, from_sample, values_and_grads
from tests.functional.policy.reference import made_up
from tests.functional.policy.reference_losses import REFERENCES
from toolkit.compose.schemas import conf_dir
from toolkit.functional.names import Aggregation
from toolkit.functional.policy.registry import policy_loss
from toolkit.functional.scope_check import check_policy_loss, is_zero_without_advantage
from toolkit.functional.terms import PolicyTerms

NAMES = sorted(REFERENCES)
CASES = [(name, options) for name in NAMES for options in [{}, *OTHER_OPTIONS.get(name, [])]]
IGNORE_ADVANTAGES = {
    "nll": "every good token counts the same",
    "opd": "the teacher gives the advantage",
    "sdar": "the teacher gives the gate",
    "real": "the advantage is a label",
}
NOT_HOMOGENEOUS = {
    **IGNORE_ADVANTAGES,
    "kimi": "a penalty beside the advantage",
    "dro": "a penalty beside the advantage",
    "ipo": "a regulariser beside the advantage",
    "kl_cov": "a penalty beside the advantage",
    "clip_cov": "the covariance grows with the advantage and is compared with fixed bounds",
}
NOT_THE_POLICY_GRADIENT = {
    **IGNORE_ADVANTAGES,
    "luspo": "times the length of the sequence",
    "rloo_sequence": "the loss of a sequence stands at each of its tokens, and has the gradient of the whole product",
    "clip_cov": "what is drawn has none",
}
samples = st.builds(
    made_up,
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    spread=st.sampled_from([0.0, 0.01, 0.3, 3.0, 25.0]),
    log_ratio_range=st.sampled_from([BOUNDED, UNBOUNDED, (None, 10.0)]),
)
quickly = settings(max_examples=5, deadline=None, derandomize=True)


def take(terms: PolicyTerms, rows: Tensor) -> PolicyTerms:
    """The tokens at `rows`, in that order."""
    return replace(terms, **{f.name: v[rows] for f in fields(terms) if isinstance(v := getattr(terms, f.name), Tensor)})


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@quickly
@given(sample=samples, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_finite_and_inputs_stay(name: str, options: dict[str, Any], sample: Any, dtype: torch.dtype) -> None:
    terms = from_sample(sample, dtype)
    before = [v.clone() for f in fields(terms) if isinstance(v := getattr(terms, f.name), Tensor)]
    losses, grads = values_and_grads(name, terms, **options)
    assert losses.dtype == grads.dtype == dtype
    assert losses.isfinite().all()
    assert grads.isfinite().all()
    after = [v for f in fields(terms) if isinstance(v := getattr(terms, f.name), Tensor)]
    assert all(map(torch.equal, before, after))
    assert all(0 <= m.value() <= 1 for key, m in terms.reports().items() if "fraction" in key)


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c != ("clip_cov", {})], ids=str)
@quickly
@given(sample=samples, order=st.randoms(use_true_random=False))
def test_the_order_of_sequences_does_not_matter(name: str, options: dict[str, Any], sample: Any, order: Any) -> None:
    terms = from_sample(sample)
    assert terms.sequence_ids is not None
    sequences = list(range(terms.num_sequences))
    order.shuffle(sequences)
    rows = torch.cat([(terms.sequence_ids == s).nonzero()[:, 0] for s in sequences])
    for whole, moved in zip(
        values_and_grads(name, terms, **options), values_and_grads(name, take(terms, rows), **options), strict=True
    ):
        torch.testing.assert_close(whole[rows], moved, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_HOMOGENEOUS])
@quickly
@given(sample=samples, factor=st.floats(0.1, 10))
def test_advantages_scale_the_loss(name: str, sample: Any, factor: float) -> None:
    terms = from_sample(sample)
    larger = replace(terms, advantages=factor * terms.advantages)
    for one, scaled in zip(values_and_grads(name, terms), values_and_grads(name, larger), strict=True):
        torch.testing.assert_close(factor * one, scaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("anchor", ["old", "self"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_THE_POLICY_GRADIENT])
@quickly
@given(seed=st.integers(0, 1000))
def test_on_policy_it_is_the_policy_gradient(name: str, anchor: str, seed: int) -> None:
    """R20, R21: old == current gives -A at every token, whatever the value of the loss."""
    sample = made_up(seed, (3, 1, 4), 0.0 if anchor == "old" else 1.0)
    advantages = [sample.advantages[sample.members(t)[0]] for t in range(len(sample.logprobs))]
    options = {"anchor": "self"} if anchor == "self" and "anchor" in policy_loss(name).options({}) else {}
    if anchor == "self" and not options:
        return  # without a ratio
    terms = from_sample(replace(sample, advantages=advantages))
    _, grads = values_and_grads(name, terms, **options)
    torch.testing.assert_close(grads, -terms.advantages, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NOT_THE_POLICY_GRADIENT))
def test_what_is_not_the_policy_gradient_is_not(name: str) -> None:
    terms = from_sample(made_up(3, (3, 1, 4), 0.0))
    _, grads = values_and_grads(name, terms, **({"clip_cov_ratio": 1.0, "cov_low": 0.0} if name == "clip_cov" else {}))
    assert not torch.allclose(grads, -terms.advantages)


@pytest.mark.parametrize("name", NAMES)
def test_zero_advantage_is_idle_unless_something_else_counts(name: str) -> None:
    loss = policy_loss(name)
    counts_more = {"kimi", "dro", "ipo", "kl_cov", "opd", "sdar", "real"}
    assert is_zero_without_advantage(loss, loss.options({})) == (name not in counts_more)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_exploded_ratios_are_finite(name: str, options: dict[str, Any]) -> None:
    """R14 and 0 * inf: no NaN even with A = 0 and without bounds, and with bounds everything is finite."""
    sample = made_up(0, (2, 3), 0.0, UNBOUNDED)
    for log_ratio, advantage in itertools.product((1000.0, 100.0, -1000.0), (0.0, 0.5, -0.5)):
        far = [value - log_ratio for value in sample.logprobs]
        sample = replace(sample, old=far, rollout=far, advantages=[advantage] * 5)
        for dtype in (torch.float32, torch.float64):
            assert not any(x.isnan().any() for x in values_and_grads(name, from_sample(sample, dtype), **options))
            bounded = from_sample(replace(sample, log_ratio_range=BOUNDED), dtype)
            assert all(x.isfinite().all() for x in values_and_grads(name, bounded, **options))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_declared_scope_holds(name: str, options: dict[str, Any]) -> None:
    check_policy_loss(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_micro_batch(name: str) -> None:
    terms = take(from_sample(made_up(0, (2,), 0.1)), torch.zeros(0, dtype=torch.int64))
    losses, _ = values_and_grads(name, terms)
    assert losses.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_described(name: str) -> None:
    loss = policy_loss(name)
    options = loss.options({})
    keys = {key for _, key, _, _ in string.Formatter().parse(loss.formula) if key}
    assert loss.formula
    assert keys <= set(options), keys - set(options)
    doc = inspect.getdoc(loss.function) or ""
    assert "Source: " in doc
    assert "\nLoss: " in doc
    assert "\nRatio: " in doc
    assert "\nGradient: " in doc
    for option, field in loss.options_model.model_fields.items():
        assert field.description, option
        assert f"    {option}: {field.description[:9]}" in doc
    assert loss.aggregation in (None, *get_args(Aggregation))
    title, source, *_ = Path(conf_dir(), "policy_loss", f"{name}.yaml").read_text().splitlines()
    assert title.startswith("# ")
    assert source.startswith("# Source: ")
