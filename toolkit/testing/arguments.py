"""What `assert_layout_invariant` is given, looked at before anything is run."""

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
        ConfigError: one is something else; says what is allowed.
    """
    if not isinstance(loss_cfg, BaseLossConfig):
        raise ConfigError(
            f"loss_cfg={_short(loss_cfg)} is no config of a loss; give an object such as "
            "GRPOLossConfig(policy_loss_cfg={'loss_type': 'gspo'}), or CELossConfig()"
        )
    if batch is not None and not isinstance(batch, Batch):
        raise ConfigError(
            f"batch={_short(batch)} is no toolkit.testing.Batch; make one with random_batch(loss_cfg), or leave it out"
        )
    if loop is not None and not callable(loop):
        raise ConfigError(f"loop={_short(loop)} cannot be called; give a function, loop(part) -> (loss, metrics)")


def numbers_of(name: str, given: Any) -> tuple[int, ...]:
    """Return counts of processes, micro-batches or shards as they are; one alone is taken, too.

    Raises:
        ConfigError: one is not a whole number above 0.
    """
    found = _several(given)
    if not found or any(not isinstance(own, int) or isinstance(own, bool) or own < 1 for own in found):
        raise ConfigError(f"{name}={found} must hold whole numbers of at least 1, such as (1, 2)")
    return found


def flags_of(name: str, given: Any) -> tuple[bool, ...]:
    """Return flags as they are; one alone is taken, too.

    Raises:
        ConfigError: there is none, or one is neither True nor False.
    """
    found = _several(given)
    if not found or any(not isinstance(own, bool) for own in found):
        raise ConfigError(f"{name}={found} must be True, False or both: (False, True)")
    return found


def modes_of(given: Any, loss_cfg: BaseLossConfig) -> tuple[str, ...]:
    """Return modes as they are; one alone is taken, too.

    Raises:
        ConfigError: there is none, or the loss cannot be computed in one of them.
    """
    found = _several(given)
    if not found or any(not isinstance(own, str) for own in found):
        raise ConfigError(f"modes={found} must be 'eager', 'chunk' or both: ('eager', 'chunk')")
    for mode in found:
        in_mode(loss_cfg, mode)
    return found


def _several(given: Any) -> tuple[Any, ...]:
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        return tuple(given)
    return (given,)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
