"""What every config refuses: a boolean where a number is expected, also inside lists."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from toolkit import ConfigError, GRPOLossConfig
from toolkit.compose.schemas import SCHEMAS
from toolkit.compose.tree import check_command_line
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.schema import Config
from toolkit.training.config import OptimizerConfig

CLASSES: list[type[Config]] = [
    *(schema for schema in SCHEMAS if not inspect.isabstract(schema)),
    *(policy_loss(name).options_model for name in policy_loss_names()),
]


def test_a_boolean_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match="softcap=True is not allowed: a boolean is not a number"):
        GRPOLossConfig(softcap=True)
    with pytest.raises(ConfigError, match=r"betas=\[0\.9, False\] is not allowed: a boolean is not a number"):
        OptimizerConfig(betas=[0.9, False])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cliprange_low=True is not allowed: a boolean"):
        GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", "cliprange_low": True})
    assert GRPOLossConfig(use_entropy_metric=True).use_entropy_metric is True
    assert OptimizerConfig(lr=1).lr == 1.0


@pytest.mark.parametrize("override", ["optimizer.lr=true", "training.steps=true", "optimizer.betas=[0.9,false]"])
def test_nor_is_it_on_the_command_line(override: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed: a boolean is not a number"):
        check_command_line([override])


@pytest.mark.every_case
@pytest.mark.parametrize("model", CLASSES, ids=lambda model: model.__name__)
def test_no_field_of_any_config_takes_one(model: type[Config]) -> None:
    """A field that takes 0.5, 1 or 3 refuses True, unless it takes booleans as well."""
    for name, field in model.model_fields.items():
        adapter: TypeAdapter[Any] = TypeAdapter(field.annotation)
        if not any(_accepts(adapter, number) for number in (0.5, 3)) or _accepts(adapter, True, strict=True):
            continue
        words = rf"(?s){name}=True is not allowed: (a boolean is not|it must be) a number"
        with pytest.raises(ValueError, match=words):
            model(**{name: True})


def _accepts(adapter: TypeAdapter[Any], value: Any, strict: bool = False) -> bool:
    try:
        adapter.validate_python(value, strict=strict)
    except ValidationError:
        return False
    return True
