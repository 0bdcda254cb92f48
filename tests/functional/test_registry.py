"""Registering a policy loss: options from the signature, and clear refusals."""

from typing import Annotated

import pytest
from annotated_types import Ge

from toolkit import ConfigError, GRPOLossConfig, register_policy_loss
from toolkit.functional.policy import registry


def test_options_are_typed_by_the_signature() -> None:
    @register_policy_loss("mine")
    def mine(t, *, eps: Annotated[float, Ge(0)] = 0.2, n: int = 3):
        return t.logprobs

    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "mine", "eps": 0.5})
    assert dict(cfg.policy_loss_cfg) == {"loss_type": "mine", "eps": 0.5, "n": 3}
    for wrong in ({"eps": -1}, {"n": "x"}, {"epss": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GRPOLossConfig(policy_loss_cfg={"loss_type": "mine", **wrong})


def test_a_name_is_not_taken_twice_by_accident() -> None:
    def other(t):
        return t.logprobs

    with pytest.raises(ConfigError, match="already registered"):
        register_policy_loss("vanilla")(other)
    register_policy_loss("vanilla", overwrite=True)(other)
    assert registry.policy_loss("vanilla").function is other


def test_running_the_same_cell_again_is_fine() -> None:
    for _ in range(2):

        @register_policy_loss("cell")
        def cell(t, *, eps: float = 0.1):
            return t.logprobs

    assert "cell" in registry.policy_loss_names()


def test_unusable_signatures_are_refused() -> None:
    with pytest.raises(ConfigError, match="keyword-only"):

        @register_policy_loss("positional")
        def positional(t, eps=0.1):
            return t.logprobs

    with pytest.raises(ConfigError, match="selects the loss itself"):

        @register_policy_loss("typed")
        def typed(t, *, loss_type: str = "a"):
            return t.logprobs

    with pytest.raises(ConfigError, match="scope"):
        register_policy_loss("scoped", scope="tokn")  # type: ignore[arg-type]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vanilla'"):
        GRPOLossConfig(policy_loss_cfg={"loss_type": "vanila"})


def test_missing_loss_type() -> None:
    with pytest.raises(ConfigError, match="no loss_type"):
        GRPOLossConfig(policy_loss_cfg={"cliprange_low": 0.1})


def test_an_unknown_name_says_how_to_load_a_file_of_your_own() -> None:
    with pytest.raises(ConfigError, match=r"register your own with @\S+ in a file that plugins=\[file.py\] loads"):
        registry.policy_loss("mine")
