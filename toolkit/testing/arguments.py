"""Check the arguments of `assert_layout_invariant` before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.errors import ConfigError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.samples import Batch
from toolkit.testing.evaluation import in_mode


def check_objects(loss_cfg: Any, batch: Any, loop: Any) -> None:
    """Raise unless they are a config, a batch or None, and a function or None.

    Raises:
        ConfigError: one of them is something else.
    """
    if not isinstance(loss_cfg, BaseLossConfig):
        raise ConfigError(
            f"loss_cfg={_short(loss_cfg)} is not a loss config; pass e.g. "
            "GRPOLossConfig(policy_loss_cfg={'loss_type': 'gspo'}) or CELossConfig()"
        )
    if batch is not None and not isinstance(batch, Batch):
        raise ConfigError(
            f"batch={_short(batch)} is not a toolkit.testing.Batch; make one with random_batch(loss_cfg) or omit it"
        )
    if loop is not None and not callable(loop):
        raise ConfigError(f"loop={_short(loop)} is not callable; pass a function, loop(part) -> (loss, metrics)")


def numbers_of(name: str, value: Any) -> tuple[int, ...]:
    """Return counts of processes, micro-batches or shards as a tuple; `value` is one count or several.

    Raises:
        ConfigError: there is none, or one is not an integer of at least 1.
    """
    numbers = _as_tuple(value)
    if not numbers or any(not isinstance(number, int) or isinstance(number, bool) or number < 1 for number in numbers):
        raise ConfigError(f"{name}={numbers} must be integers of at least 1, such as (1, 2)")
    return numbers


def flags_of(name: str, value: Any) -> tuple[bool, ...]:
    """Return flags as a tuple; `value` is one flag or several.

    Raises:
        ConfigError: there is none, or one is neither True nor False.
    """
    flags = _as_tuple(value)
    if not flags or any(not isinstance(flag, bool) for flag in flags):
        raise ConfigError(f"{name}={flags} must be True, False or both: (False, True)")
    return flags


def modes_of(value: Any, loss_cfg: BaseLossConfig) -> tuple[str, ...]:
    """Return modes as a tuple; `value` is one mode or several.

    Raises:
        ConfigError: there is none, or the loss cannot be computed in one of them.
    """
    modes = _as_tuple(value)
    if not modes or any(not isinstance(mode, str) for mode in modes):
        raise ConfigError(f"modes={modes} must be 'eager', 'chunk' or both: ('eager', 'chunk')")
    for mode in modes:
        in_mode(loss_cfg, mode)
    return modes


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(value)
    return (value,)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
