"""Every policy loss against a loop over tokens written from its paper: values and gradients, on ragged sequences."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.functional.policy.made import BOUNDED, OTHER_OPTIONS, UNBOUNDED, from_sample, values_and_grads
from tests.functional.policy.reference import gradient, made_up
from tests.functional.policy.reference_losses import REFERENCES
from toolkit.functional.policy.registry import policy_loss

SAMPLES = [
    ((3, 1, 4, 2), 0.01, BOUNDED),
    ((1, 5, 2, 3), 0.5, (None, 1.0)),
    ((4, 2, 1, 3, 2), 1.5, BOUNDED),
    ((2, 3, 1), 12.0, BOUNDED),
    ((2, 3, 4), 4.0, UNBOUNDED),
]
CASES = [
    (name, options)
    for name in sorted(REFERENCES)
    for options in [{}, *OTHER_OPTIONS.get(name, [])]
    if name != "clip_cov" or options
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_values_and_gradients(name: str, options: dict[str, Any]) -> None:
    complete = policy_loss(name).options(options)
    is_zero = True
    for seed, (lengths, spread, log_ratio_range) in enumerate(SAMPLES):
        sample = made_up(seed, lengths, spread, log_ratio_range)
        weights = [random.Random(t).uniform(0.5, 2) for t in range(len(sample.logprobs))]
        losses, grads = values_and_grads(name, from_sample(sample), torch.tensor(weights).double(), **options)
        expected = torch.tensor(REFERENCES[name](sample, sample.logprobs, **complete), dtype=torch.float64)
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
        slopes = torch.tensor(gradient(REFERENCES[name], sample, weights, **complete), dtype=torch.float64)
        # Differences of step 1e-6 lose about 1e-10 of the largest term; the rest is for curvature.
        torch.testing.assert_close(grads, slopes, rtol=1e-5, atol=1e-8 * max(1.0, float(slopes.abs().max())))
        is_zero = is_zero and not bool(grads.any())
    assert not is_zero
