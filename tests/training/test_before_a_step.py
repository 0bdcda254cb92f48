"""What a step asks for beforehand: current log-probabilities for losses of the whole step, router weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit import GRPOLossConfig
from toolkit.training.experience import Rows
from toolkit.training.rehearsal import rehearse
from toolkit.training.step import router_weights

SURVIVORS = {"between": "current_old", "action": "mask", "lower": 0.9, "upper": 1.1, "denominator": "survivors"}


def rows(number: int) -> Rows:
    ids = torch.ones(number, 5, dtype=torch.int64)
    return Rows(ids, torch.ones_like(ids), torch.ones(number, 4, dtype=torch.int64), torch.ones(number, 4))


@pytest.mark.parametrize(
    ("options", "in_one", "in_two"),
    [
        ({}, False, False),
        ({"correction": [SURVIVORS]}, True, True),
        ({"policy_loss_cfg": {"loss_type": "kl_cov"}}, False, True),
        ({"policy_loss_cfg": {"loss_type": "real"}}, False, True),
    ],
)
def test_who_needs_a_first_pass_and_gets_through_the_rehearsal(
    options: dict[str, Any], in_one: bool, in_two: bool
) -> None:
    cfg = GRPOLossConfig(**options)
    assert cfg.needs_current(1) == in_one
    assert cfg.needs_current(2) == in_two
    rehearse(cfg)


def test_a_silent_micro_batch_has_no_part_in_the_router_loss() -> None:
    config = SimpleNamespace(output_router_logits=True, router_aux_loss_coef=0.1)
    policy: Any = SimpleNamespace(head=SimpleNamespace(lm=SimpleNamespace(config=config)))
    found = router_weights(policy, [rows(3), rows(1), rows(2).unscored_row()], "mean")
    assert [float(own) for own in found] == pytest.approx([0.75, 0.25, 0.0])
    config.output_router_logits = False
    assert router_weights(policy, [rows(3)], "mean") == [None]
