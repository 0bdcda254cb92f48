"""Configs remember what follows from their fields: not in a changed copy, nor past a new policy loss."""

from __future__ import annotations

import copy
import pickle

import pytest

from toolkit import ConfigError, GRPOLossConfig, register_policy_loss
from toolkit.losses.grpo import GRPOLossContext


def asked(cfg: GRPOLossConfig) -> GRPOLossConfig:
    """Return the config after its answers were computed."""
    assert [term.name for term in cfg.terms] == [term.name for term in cfg.checked_terms] == ["policy"]
    assert list(cfg.required_fields) == ["advantages"]
    return cfg


def test_a_changed_copy_answers_for_itself() -> None:
    cfg = asked(GRPOLossConfig())
    changed = cfg.model_copy(update={"entropy_coef": 0.1, "policy_loss_cfg": {"loss_type": "gspo"}})
    assert [term.name for term in changed.checked_terms] == ["policy", "entropy"]
    assert changed.policy_options == {}
    assert [term.name for term in cfg.checked_terms] == ["policy"]


def test_remembered_answers_are_no_part_of_a_config() -> None:
    cfg, fresh = asked(GRPOLossConfig()), GRPOLossConfig()
    assert cfg == fresh
    assert hash(cfg) == hash(fresh)
    assert cfg.model_dump() == fresh.model_dump()
    for same in (copy.copy(cfg), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert same == fresh
        assert same.terms == fresh.terms


def test_a_policy_loss_registered_anew_is_asked_anew() -> None:
    register_policy_loss("mine")(lambda t: -t.ratio() * t.advantages)
    cfg = asked(GRPOLossConfig(policy_loss_cfg={"loss_type": "mine"}))
    GRPOLossContext.check_loss(cfg)
    register_policy_loss("mine", needs=("ref_logprobs",), overwrite=True)(
        lambda t: (t.ratio() * t.advantages).cumsum(0)
    )
    assert list(cfg.required_fields) == ["advantages", "ref_logprobs"]
    with pytest.raises(ConfigError, match="scope"):  # it now looks at other tokens
        GRPOLossContext.check_loss(cfg)
