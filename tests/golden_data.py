"""Numbers that other projects' own code produced, and how to read them; the schema is in ``tests/golden/README.md``.

The directory is that of the environment variable ``TOOLKIT_GOLDEN_DIR`` when it is set: other cases of the same schema
then run through the same tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

SHIPPED = Path(__file__).parent / "golden"
DIRECTORY = Path(os.environ.get("TOOLKIT_GOLDEN_DIR") or SHIPPED)
IS_SHIPPED = DIRECTORY.resolve() == SHIPPED.resolve()
"""Whether the cases are our own: only of these is it known that every exclusion has a case that needs it."""
EXACT = 1e-9
"""Relative tolerance where the peer computed in float64."""
ULP = 2.0**-23
"""Relative spacing of float32 numbers: no operation that rounds to float32 is further off."""
OPERATIONS = 8
"""Roundings between a peer's float32 inputs and its result, at most: two casts, their difference, an exponential, the
products with an advantage, a weight and a coefficient, and the sum. Each is off by an ulp at most."""
Category = Literal["peer's error", "missing here", "not repeatable"]


@dataclass(frozen=True)
class Exclusion:
    """Why a case, or a part of it, is not compared."""

    category: Category
    reason: str


def peers_error(reason: str) -> Exclusion:
    """Return an exclusion of a number that we hold to be wrong."""
    return Exclusion("peer's error", reason)


def missing_here(reason: str) -> Exclusion:
    """Return an exclusion of a right number that nothing here computes."""
    return Exclusion("missing here", reason)


def not_repeatable(reason: str) -> Exclusion:
    """Return an exclusion of a number that depends on more than the file says, such as a random draw."""
    return Exclusion("not repeatable", reason)


class Params:
    """What a case gives the peer's function: read by name alone, remembering which names were read.

    It cannot be looped over or unpacked: that would read every name, also one that the reader does not know. A value
    that is a mapping, or a list of mappings, is read by name in turn.
    """

    def __init__(self, values: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> None:
        self.written = dict(values)
        self._values = {name: _wrapped(value) for name, value in values.items()}
        self._defaults = dict(defaults or {})
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name] if name in self._values else self._defaults[name]

    def __contains__(self, name: str) -> bool:
        self._read.add(name)
        return name in self._values or name in self._defaults

    def __bool__(self) -> bool:
        return bool(self._values or self._defaults)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("ask for parameters by name: a loop would read those that nothing knows")

    keys = items = values = __iter__

    def __repr__(self) -> str:
        return repr({**self._defaults, **self._values})

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default where the case does not give it."""
        return self[name] if name in self else default  # noqa: SIM401 (this is what `get` is)

    def over(self, defaults: Mapping[str, Any]) -> Params:
        """Return the same values, and what is read of them, over what the peer takes where one is not given."""
        result = Params({}, defaults={**self._defaults, **defaults})
        result.written, result._values, result._read = self.written, self._values, self._read
        return result

    def unread(self) -> list[str]:
        """Return the names that nothing read since the last `forget`: "name", or "name.name" inside a value."""
        names = []
        for name, value in self._values.items():
            if name not in self._read:
                names.append(name)
            else:
                names += [f"{name}.{inner}" for part in _parts(value) for inner in part.unread()]
        return names

    def forget(self) -> None:
        """Count every name as not read."""
        self._read.clear()
        for value in self._values.values():
            for part in _parts(value):
                part.forget()


def _wrapped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Params(value)
    return [_wrapped(part) for part in value] if isinstance(value, list) else value


def _parts(value: Any) -> list[Params]:
    return [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, Params)]


@contextlib.contextmanager
def all_params_read(case: Case, ignored: Mapping[str, str]) -> Iterator[None]:
    """Fail by name where the translation in this block leaves a parameter of the case unread.

    Args:
        case: the case that is translated.
        ignored: "name" or "entry/name" of a parameter that the peer's function takes and does not use -> why.
    """
    case.params.forget()
    yield
    unread = [name for name in case.params.unread() if not {name, f"{case.entry}/{name}"} & set(ignored)]
    assert not unread, f"{case.peer}: nothing reads parameter {', '.join(map(repr, unread))} of {case.name}"


@dataclass(frozen=True)
class Case:
    """One run of a peer's function."""

    kind: str
    peer: str
    entry: str
    notes: str
    """The peer's common notes and those of the entry."""
    input_id: str
    params: Params
    """The peer's parameters, with those of its ``_call`` among them."""
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
                params = params_of(case.get("params") or {})
                yield Case(kind, file["peer"], entry["name"], notes, case["input"], params, outputs, number)


def params_of(written: Mapping[str, Any]) -> Params:
    """Return a case's parameters: ``_call`` holds those of the call, beside those of the object that is called."""
    call = written.get("_call") or {}
    twice = sorted(set(call) & set(written))
    assert not twice, f"{twice} both in _call and beside it"
    return Params({**{name: value for name, value in written.items() if name != "_call"}, **call})


def tolerance(case: Case) -> float:
    """The relative tolerance at which a case is compared: 1e-9, or what float32 costs a peer that computed in it.

    Rounding an argument x of exp to float32 moves it by up to an ulp of x: the exponential is then off by |x| ulps,
    relative to itself. A log-probability of -25 alone costs 25 of them.
    """
    if not is_single(case):
        return EXACT
    return ULP * (OPERATIONS if case.kind == "advantage" else OPERATIONS + largest_exponent(case))


def is_single(case: Case) -> bool:
    """Whether the file says that the peer computed in float32 somewhere."""
    return any("float32" in str(value).lower() for value in (*case.outputs.values(), case.notes))


def largest_exponent(case: Case) -> float:
    """Return the largest number behind an exponential: |log-probability|, or a row's sum of |old - rollout|."""
    fields, mask = case.inputs, case.inputs["response_mask"] != 0
    names = ("log_probs", "old_log_probs", "ref_log_probs", "rollout_log_probs")
    mismatch = (fields["old_log_probs"] - fields["rollout_log_probs"]).abs().where(mask, 0.0)
    return max(float(mismatch.sum(-1).max()), *(float(fields[name].abs().where(mask, 0.0).max()) for name in names))


def relative_error(ours: Tensor, theirs: Tensor, *, term: float = 0.0) -> float:
    """|ours - theirs| over the largest |theirs|, over all elements; NaN or inf must be matched by NaN or inf.

    Args:
        ours: any shape.
        theirs: the same shape.
        term: added to the largest |theirs|: the size of terms that cancel in it, whose rounding stays.
    """
    if ours.shape != theirs.shape:
        return math.inf
    strange = ~theirs.isfinite()
    if not torch.equal(ours.isnan(), theirs.isnan()) or not torch.equal(ours.isinf(), theirs.isinf()):
        return math.inf
    difference = (ours - theirs)[~strange].abs()
    if not difference.numel():
        return 0.0
    return float(difference.max() / (theirs[~strange].abs().max() + term).clamp(min=1e-12))
