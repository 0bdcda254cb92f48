"""Random draws of a run, each from what it is for: a step, a prompt, a sample; never from the process that draws."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Draws:
    """The source of all random draws of a run, which neither processes nor a restart change."""

    seed: int

    def key(self, *parts: object) -> str:
        """Return the text that seeds a draw, e.g. ``0/main/3/sample/7/1``."""
        return "/".join(map(str, (self.seed, *parts)))

    def rng(self, *parts: object) -> Random:
        """Return a generator that depends on the run's seed and on `parts` alone."""
        return Random(self.key(*parts))
