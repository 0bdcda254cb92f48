"""Checks of a loss draw nothing from the generator of the run."""

import torch

from toolkit.functional.policy.registry import PolicyLoss, policy_loss, policy_loss_names
from toolkit.functional.purity_check import _passed, check_purity
from toolkit.functional.scope_check import check_policy_loss


def test_the_checks_leave_the_random_state_as_it_was() -> None:
    _passed.clear()
    before = torch.get_rng_state()
    for name in policy_loss_names():
        loss: PolicyLoss = policy_loss(name)
        check_policy_loss(name)
        check_purity(loss, loss.options({}))
    assert torch.equal(torch.get_rng_state(), before)
