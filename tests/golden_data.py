"""Numbers that other projects' own code produced, and how to read them; the schema is in ``tests/golden/README.md``.

The directory is that of the environment variable ``TOOLKIT_GOLDEN_DIR`` when it is set: other cases of the same schema
then run through the same tests.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHIPPED = Path(__file__).parent / "golden"
DIRECTORY = Path(os.environ.get("TOOLKIT_GOLDEN_DIR") or SHIPPED)
IS_SHIPPED = DIRECTORY.resolve() == SHIPPED.resolve()
"""Whether the cases are our own: only of these is it known that every exclusion has a case that needs it."""
EXACT, SINGLE = 1e-9, 1e-6
"""Relative tolerances: the peer computed in float64, or in float32 somewhere."""


@dataclass(frozen=True)
class Case:
    """One run of a peer's function."""

    kind: str
    peer: str
    entry: str
    notes: str
    """The peer's common notes and those of the entry."""
    input_id: str
    params: dict[str, Any]
    outputs: dict[str, Any]
    """Everything else that the file says of the case: loss, grad, values, weights ..."""
    number: int

    @property
    def name(self) -> str:
        """What the case is called in test ids and exclusions."""
        return f"{self.peer}/{self.entry}/{self.input_id}/{self.number}"

    @property
    def inputs(self) -> dict[str, Any]:
        """The named input: tensors where the file has numbers, float64."""
        return _inputs("inputs_advantage.json" if self.kind == "advantage" else "inputs.json")[self.input_id]

    def tensor(self, key: str) -> Tensor:
        """An output as a float64 tensor; "nan" and "inf" are numbers."""
        return torch.tensor([float(value) for value in self.outputs[key]], dtype=torch.float64)


@functools.cache
def _inputs(file: str) -> dict[str, dict[str, Any]]:
    found = json.loads((DIRECTORY / file).read_text())
    return {name: {key: _tensor(value) for key, value in fields.items()} for name, fields in found.items()}


def _tensor(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return torch.tensor(value) if _integers(value) else torch.tensor(value, dtype=torch.float64)


def _integers(value: Any) -> bool:
    return all(map(_integers, value)) if isinstance(value, list) else isinstance(value, int)


def cases(kind: str) -> Iterator[Case]:
    """Yield every case of ``policy_loss``, ``kl``, ``aggregation``, ``is_correction`` or ``advantage``."""
    for path in sorted(DIRECTORY.glob(f"{kind}__*.json")):
        file = json.loads(path.read_text())
        for entry in file["entries"]:
            for number, case in enumerate(entry["cases"]):
                outputs = {key: value for key, value in case.items() if key not in ("input", "params")}
                notes = f"{file.get('common_notes') or ''} {entry.get('notes') or ''}"
                yield Case(
                    kind, file["peer"], entry["name"], notes, case["input"], case.get("params") or {}, outputs, number
                )


def tolerance(case: Case) -> float:
    """The relative tolerance at which a case is compared: tighter where the peer computed in float64 throughout."""
    says_single = any("float32" in str(value).lower() for value in (*case.outputs.values(), case.notes))
    return SINGLE if says_single else EXACT


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| over the largest |theirs|, over all elements; NaN or inf must be matched by NaN or inf."""
    if ours.shape != theirs.shape:
        return math.inf
    strange = ~theirs.isfinite()
    if not torch.equal(ours.isnan(), theirs.isnan()) or not torch.equal(ours.isinf(), theirs.isinf()):
        return math.inf
    difference = (ours - theirs)[~strange].abs()
    scale = theirs[~strange].abs().max() if difference.numel() else torch.tensor(1.0)
    return float(difference.max() / scale.clamp(min=1e-12)) if difference.numel() else 0.0
