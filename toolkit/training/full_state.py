"""Unsharded weights and optimizer state, for checkpoints that every layout can read.

Under ``fully_shard`` they are gathered on rank 0 and distributed from there; otherwise every rank has them.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from toolkit.distributed import rank
from toolkit.errors import ConfigError
from toolkit.training.sharding import is_sharded, local_parameters, unwrapped

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_DISTRIBUTED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def full_optimizer_state(policy: Any, optimizer: Any) -> dict[str, Any]:
    """Return the full state as ``optimizer.state_dict()`` of an unsharded policy; all ranks must call it.

    Under FSDP 2 it is on rank 0 alone; the others get an empty dict.

    Raises:
        ConfigError: under FSDP 2, see `check_optimizer`.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not is_sharded(policy):
        return inner.state_dict()
    names = _names(policy, inner)
    state = get_optimizer_state_dict(policy, inner, options=_GATHERED)
    return _keyed(state, {name: index for index, name in enumerate(names)}) if rank() == 0 else {}


def load_full_optimizer_state(policy: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Load the moments that `full_optimizer_state` returned, sharded or not.

    The learning rate, decays and other settings stay those that the optimizer has. Under FSDP 2 only rank 0's `state`
    is read.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in inner.param_groups]
    if is_sharded(policy):
        names = _names(policy, inner)
        named = _keyed(state, dict(enumerate(names))) if rank() == 0 else {}
        set_optimizer_state_dict(policy, inner, optim_state_dict=named, options=_DISTRIBUTED)
    else:
        inner.load_state_dict(state)
    for group, kept in zip(inner.param_groups, settings, strict=True):
        group.update(kept)


def save_optimizer_state(state: dict[str, Any], path: str) -> None:
    """Write what `full_optimizer_state` returned as safetensors, which, unlike a pickle, cannot run code.

    A tensor is named ``<index of the parameter>.<name>``; the settings of the groups are JSON in the metadata.
    """
    tensors = {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, metadata={"param_groups": json.dumps(state["param_groups"])})


def read_optimizer_state(path: str) -> dict[str, Any]:
    """Return what `save_optimizer_state` wrote.

    Raises:
        SafetensorError: the file is damaged.
        KeyError, ValueError: it holds something else.
    """
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        groups = json.loads((file.metadata() or {})["param_groups"])
        for key in file.keys():  # noqa: SIM118 - no mapping
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
    return {"state": state, "param_groups": groups}


def _names(policy: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in its order; all must belong to the policy."""
    check_optimizer(policy, optimizer)
    name_of = {id(parameter): name for name, parameter in policy.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _keyed(state: dict[str, Any], key_of: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [key_of[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {key_of[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def full_weights(policy: Any, *, trained_only: bool = False) -> dict[str, Any]:
    """Return the state dict of an unsharded policy; all ranks must call it.

    Under FSDP 2 it is on the CPU of rank 0 alone; the others get an empty dict. `trained_only`: without the weights
    that are not trained, and without buffers.
    """
    if not is_sharded(policy):
        state: dict[str, Any] = unwrapped(policy).state_dict()
    else:
        policy.reshard()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        state = get_model_state_dict(policy, options=options)
    if rank() != 0 and is_sharded(policy):
        return {}
    trained = _trained_names(policy)
    return {name: tensor for name, tensor in state.items() if name in trained or not trained_only}


def _trained_names(policy: Any) -> set[str]:
    parameters = unwrapped(policy).named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.requires_grad}


def save_weights(policy: Any, path: str, *, trained_only: bool = False) -> None:
    """Write the weights as safetensors, from rank 0; all ranks must call it.

    The file is that of an unsharded policy (``safetensors.torch.save_model``): either can load what the other wrote.
    `trained_only`: without the weights that are not trained, as for adapters, whose model is in files already.
    """
    state = full_weights(policy, trained_only=trained_only)
    if rank() != 0:
        return
    first_of: dict[int, str] = {}
    aliases = {}
    for name, parameter in unwrapped(policy).named_parameters(remove_duplicate=False):
        if first_of.setdefault(id(parameter), name) != name:  # tied: the file names the one that holds it
            aliases[name] = first_of[id(parameter)]
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in aliases}
    save_file(kept, path, metadata={"format": "pt", **aliases})


def load_weights(policy: Any, path: str, *, trained_only: bool = False) -> None:
    """Load the weights from a file of `save_weights`, written with the same `trained_only`; all ranks must call it.

    Under FSDP 2 the weights of rank 0's file count.

    Raises:
        RuntimeError: names or shapes are not those of the policy.
    """
    if trained_only:
        _check_names(policy, path)
    if not is_sharded(policy):
        load_model(unwrapped(policy), path, strict=not trained_only)
        return
    state: dict[str, Any] = {}
    if rank() == 0:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            aliases = {name: kept for name, kept in (file.metadata() or {}).items() if kept in state}
        state |= {name: state[kept] for name, kept in aliases.items()}
    policy.reshard()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not trained_only)
    set_model_state_dict(policy, state, options=options)


def _check_names(policy: Any, path: str) -> None:
    """Raise unless the file holds just what is trained; names tied to another one are in its metadata."""
    with safe_open(path, framework="pt") as file:
        names = {*file.keys(), *(name for name, kept in (file.metadata() or {}).items() if kept in file.keys())}  # noqa: SIM118
    different = sorted(names ^ _trained_names(policy))
    if different:
        raise RuntimeError(f"{len(different)} weights are not those that this policy trains, the first: {different[0]}")


def check_optimizer(policy: Any, optimizer: Any) -> None:
    """Raise if the optimizer updates tensors that are not the policy's parameters; call it between steps.

    Raises:
        ConfigError: it was created before `prepare_policy`, or from weights that a forward had gathered.
    """
    parameter_ids = {id(parameter) for parameter in local_parameters(policy)}
    groups = getattr(optimizer, "optimizer", optimizer).param_groups  # accelerate's wrapper
    foreign = [parameter for group in groups for parameter in group["params"] if id(parameter) not in parameter_ids]
    if foreign:
        raise ConfigError(
            f"{len(foreign)} tensors of the optimizer are not parameters of the policy (the first: "
            f"{list(foreign[0].shape)}), so their updates would be lost; create it after prepare_policy and outside of "
            "a step, from toolkit.training.sharding.local_parameters(policy)"
        )
