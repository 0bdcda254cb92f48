"""The random state of every process, as JSON values: Python's, NumPy's if it is loaded, torch's on CPU and GPU.

What a run draws itself depends on the step alone (`toolkit.training.draws`); this is for dropout and for your rewards.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import all_gather_objects, rank
from toolkit.training.draws import Draws


def random_states() -> list[dict[str, Any]]:
    """Return the random state of each process; all call it together."""
    numpy = sys.modules.get("numpy")
    has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return all_gather_objects(
        {
            "python": random.getstate(),
            "numpy": None if numpy is None else _listed(numpy.random.get_state(legacy=False)),
            "torch": _text(torch.get_rng_state()),
            "cuda": _text(torch.cuda.get_rng_state()) if has_gpu else None,
        }
    )


def restore_random_state(states: list[dict[str, Any]], draws: Draws) -> None:
    """Restore the state of this process; one that was not there gets another state, from the run's seed."""
    numpy = sys.modules.get("numpy")
    if rank() >= len(states):
        draw = draws.rng("random_state", rank())
        random.setstate(draw.getstate())
        torch.manual_seed(draw.getrandbits(63))
        if numpy is not None:
            numpy.random.seed(draw.getrandbits(32))
        return
    state = states[rank()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    if state["numpy"] is not None and numpy is not None:
        key = numpy.array(state["numpy"]["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})


def _listed(state: Any) -> dict[str, Any]:
    inner = {**state["state"], "key": state["state"]["key"].tolist(), "pos": int(state["state"]["pos"])}
    return {**state, "state": inner, "has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"])}


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
