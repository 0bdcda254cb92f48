"""How each peer's parameters read in ours: one module for each peer, each with ``translate(case)``.

A module also has ``EXCLUDED``, whole entries that are not compared, and where it needs them ``reason_to_exclude(case)``
and ``IGNORED``: "name" or "entry/name" of a parameter that the peer's function takes and does not use, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """A peer's case as a preset of ours and what the case changes of it."""

    preset: str
    """``<peer>/<name>``, chosen by ``loss=preset/<peer>/<name>``."""
    policy_loss: dict[str, Any] = field(default_factory=dict)
    """Options of the policy loss that differ from the preset."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Other fields of the loss config that differ from the preset."""
    fields: dict[str, str] = field(default_factory=dict)
    """Fields of the item that come from another named input, e.g. ``{"teacher_logprobs": "ref_log_probs"}``."""
    groups: list[int] | None = None
    """The group of each row, where it is not that of the input."""
    row_epsilon: float = 0.0
    """What the peer adds to the number of a row's tokens before it divides their sum by it."""
    ratio_epsilon: float = 0.0
    """The same in the mean log ratio of a row; for losses that see the policy through that alone."""
    scale: float = 1.0
    """The peer's number is this times ours, e.g. where it leaves a division to its back-end; the reason beside it."""
    advantage_scale: float = 1.0
    """What the peer multiplies advantages by first."""
    is_rescaled: bool = False
    """Whether an option is not the peer's number but what comes to the same on this input; the reason beside it."""

    @property
    def is_adjusted(self) -> bool:
        """Whether our number is the peer's only after what the fields above add to the config."""
        epsilons = self.row_epsilon != 0 or self.ratio_epsilon != 0
        return epsilons or self.scale != 1 or self.advantage_scale != 1 or self.is_rescaled
