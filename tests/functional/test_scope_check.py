"""A loss that uses more than it declares is found out on made-up tokens, before it gives a wrong gradient."""

from __future__ import annotations

import pytest
import torch

from toolkit import ConfigError, DataError, register_policy_loss
from toolkit.functional import scope_check
from toolkit.functional.policy.registry import policy_loss
from toolkit.functional.scope_check import check_policy_loss, is_zero_without_advantage

pytestmark = pytest.mark.usefixtures("_own_registry")


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope_check, "_passed", set())


def is_zero(name: str) -> bool:
    loss = policy_loss(name)
    return is_zero_without_advantage(loss, loss.options({}))


def centred_in_sequence(t):
    return -t.logprobs * (t.advantages - t.segment_mean(t.advantages))


def centred_in_batch(t):
    return -t.logprobs * (t.advantages - t.advantages.mean())


def local_value_sequence_gradient(t):
    # Exactly a REINFORCE loss in value; its gradient also has that of the sequence's mean.
    mean = t.segment_mean(t.logprobs)
    return -t.logprobs * t.advantages + mean - mean.detach()


def local_value_batch_gradient(t):
    mean = t.logprobs.mean()
    return -t.logprobs * t.advantages + mean - mean.detach()


def local_gradient_batch_value(t):
    return -t.logprobs * t.advantages + t.logprobs.detach().max()


def depends_on_its_place(t):
    return -t.logprobs * t.advantages * torch.arange(len(t.logprobs))


@pytest.mark.parametrize(
    ("function", "declared", "needed"),
    [
        (centred_in_sequence, "token", "sequence"),
        (local_value_sequence_gradient, "token", "sequence"),
        (centred_in_batch, "token", "batch"),
        (centred_in_batch, "sequence", "batch"),
        (local_value_batch_gradient, "token", "batch"),
        (local_value_batch_gradient, "sequence", "batch"),
        (local_gradient_batch_value, "token", "batch"),
        (local_gradient_batch_value, "sequence", "batch"),
        (depends_on_its_place, "token", "batch"),
        (depends_on_its_place, "sequence", "batch"),
    ],
)
def test_a_loss_that_uses_more_is_told_its_scope(function, declared: str, needed: str) -> None:
    register_policy_loss("mine", scope=declared)(function)
    for _ in range(2):  # a failure is not remembered as a pass
        with pytest.raises(ConfigError, match=rf"'mine' is registered with scope='{declared}'.*scope='{needed}'\)"):
            check_policy_loss("mine")
    # What the message says is right.
    register_policy_loss("mine", scope=needed, overwrite=True)(function)
    check_policy_loss("mine")


def test_an_option_decides() -> None:
    @register_policy_loss("mine")
    def mine(t, *, centre: bool = False):
        return -t.logprobs * (t.advantages - t.advantages.mean() if centre else t.advantages)

    check_policy_loss("mine")
    with pytest.raises(ConfigError, match="scope='batch'"):
        check_policy_loss("mine", centre=True)
    with pytest.raises(ConfigError, match="center"):
        check_policy_loss("mine", center=True)


def test_a_loss_registered_anew_is_checked_anew() -> None:
    register_policy_loss("mine")(lambda t: -t.logprobs * t.advantages)
    check_policy_loss("mine")
    register_policy_loss("mine", overwrite=True)(centred_in_sequence)
    with pytest.raises(ConfigError, match="scope='sequence'"):
        check_policy_loss("mine")


def test_a_check_is_made_once() -> None:
    calls = []

    @register_policy_loss("mine")
    def mine(t):
        calls.append(len(t.logprobs))
        return -t.logprobs * t.advantages

    check_policy_loss("mine")
    once = len(calls)
    check_policy_loss("mine")
    assert len(calls) == once > 0


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda values: values.unsqueeze(0), lambda values: 1.0])
def test_a_mean_is_refused(reduce) -> None:
    register_policy_loss("mine")(lambda t: reduce(t.logprobs * t.advantages))
    with pytest.raises(DataError, match=r"'mine' returned .*one loss for each of the 13"):
        check_policy_loss("mine")


def test_a_constant_loss_is_local() -> None:
    register_policy_loss("mine")(lambda t: t.advantages * 2)
    check_policy_loss("mine")


def test_it_works_without_grad_mode() -> None:
    register_policy_loss("mine")(local_value_sequence_gradient)
    with torch.no_grad(), pytest.raises(ConfigError, match="scope='sequence'"):
        check_policy_loss("mine")


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo"])
def test_builtin_losses_are_zero_without_advantage(name: str) -> None:
    assert is_zero(name)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: -t.logprobs * t.advantages + 1,
        lambda t: -t.logprobs * t.advantages - 0.01 * t.logprobs,
        lambda t: -t.logprobs * (t.advantages - 0.1),
        # The value is 0, the gradient is not.
        lambda t: -t.logprobs * t.advantages + t.logprobs - t.logprobs.detach(),
        # The gradient is 0, the value is not.
        lambda t: -t.logprobs * t.advantages + t.old_logprobs,
    ],
    ids=["constant", "penalty", "baseline", "gradient only", "value only"],
)
def test_losses_with_more_than_the_advantage_are_not(function) -> None:
    register_policy_loss("mine")(function)
    assert not is_zero("mine")


@pytest.mark.usefixtures("_own_registry")
def test_statistics_of_the_batch_that_hide() -> None:
    # Through the number of sequences, and through a threshold that only large ratios cross.
    @register_policy_loss("per_sequence", scope="sequence")
    def per_sequence(t):
        return -t.advantages * t.sequence_ratio() / t.num_sequences

    @register_policy_loss("guarded")
    def guarded(t):
        is_near = (t.logprobs - t.old_logprobs).abs().mean() < 1
        return -t.advantages * t.logprobs * is_near

    for name in ("per_sequence", "guarded"):
        with pytest.raises(ConfigError, match="scope='batch'"):
            check_policy_loss(name)
