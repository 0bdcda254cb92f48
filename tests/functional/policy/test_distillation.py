"""A teacher's opinion: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, ratios, reports, tokens, values_and_grads
from toolkit.errors import DataError


def test_opd() -> None:
    # The teacher is 1 nat surer of the first token, 2 nats less sure of the second: advantages 1 and -2.
    terms = tokens(ratios(1, 3), [7, 7], teacher_logprobs=[0.0, -3.0])
    check("opd", terms, [-1, 6], [-1, 6])
    assert reports(terms) == {"teacher_kl": 0.5}
    check("opd", terms, [-1, 2], [-1, 2], anchor="self")


def test_opd_mask_and_regulariser() -> None:
    # From 0.9 to 0.3: fell by 0.6, out. From 0.4 to 0.3: in. log pi is log 0.3.
    p = math.log(0.3)
    terms = tokens(ratios(1 / 3, 0.75), [0, 0], logprobs=p, teacher_logprobs=[p + 1, p + 1])
    check("opd", terms, [0, -0.75], [0, -0.75], threshold_low=0.2)
    squares = [0.001 * math.log(r) ** 2 for r in (1 / 3, 0.75)]
    slopes = [0.002 * math.log(r) for r in (1 / 3, 0.75)]
    losses, grads = [squares[0], squares[1] - 0.75], [slopes[0], slopes[1] - 0.75]
    check("opd", terms, losses, grads, threshold_low=0.2, log_ratio_sq_coef=0.001)


def test_sdar() -> None:
    # d = log 3 and gate_beta 1: sigmoid = 3/4; d = -log 3: 1/4. Every token is raised, by its gate.
    d = math.log(3)
    terms = tokens([0, 0], [0, 0], teacher_logprobs=[-1 + d, -1 - d])
    check("sdar", terms, [0.75 * d, -0.25 * d], [-0.75, -0.25], gate_beta=1.0)
    assert reports(terms) == {"gate": pytest.approx(0.5)}


@pytest.mark.parametrize("name", ["opd", "sdar"])
def test_a_teacher_is_needed(name: str) -> None:
    with pytest.raises(DataError, match="needs teacher_logprobs"):
        values_and_grads(name, tokens([0], [1]))
