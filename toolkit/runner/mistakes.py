"""What to say of wrong arguments of `LossRunner` and `LossRunner.from_overrides`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from toolkit.errors import DataError, a_type, did_you_mean
from toolkit.losses.config.base import BaseLossConfig

OF_TOKENIZER = frozenset({"token_type_ids", "special_tokens_mask", "offset_mapping", "length"})
"""What a tokenizer may return beside ids and mask, which a causal language model does not read."""
BY_NAME = (
    "the runner takes hidden_states, head_weight and head_bias by position, not a fourth one ({}); the fields of the "
    "batch are given by name: input_ids=..., advantages=..."
)
"""The error message for a field that is given by position."""
BATCH = "{'input_ids': ids, 'loss_mask': mask, 'advantages': advantages}"
"""A batch, for messages."""
OF_OUTPUT = ("last_hidden_state", "hidden_states", "logits")
"""What the output of a model of transformers has."""


def not_a_config(loss_cfg: Any, settings: Mapping[str, Any]) -> str:
    """Return the error message for what is not a loss config, or for settings beside it."""
    for name, value in settings.items():
        from toolkit.compose.overrides import LOSS_GROUPS
        from toolkit.losses.config.policy import GRPOLossConfig
        from toolkit.peers import counterpart_keyword

        if (
            loss_cfg is None and name in LOSS_GROUPS and name != "mode" and isinstance(value, str)
        ):  # of the command line
            pairs = [f"{key}={choice}" for key, choice in settings.items() if key in LOSS_GROUPS]
            return f"{name}={value!r} is a choice of the command line; write LossRunner.from_overrides({pairs})"
        where = f"{name} is a setting of the loss config, not of LossRunner"
        if name in GRPOLossConfig.model_fields:
            return f"{where}; write LossRunner(GRPOLossConfig({name}={value!r}))"
        elsewhere = counterpart_keyword(name, value, GRPOLossConfig.model_fields)
        if elsewhere is not None:
            return f"{where}; {elsewhere}"
        return f"LossRunner takes a loss config and nothing else, not {name}; write LossRunner(GRPOLossConfig(...))"
    if isinstance(loss_cfg, type) and issubclass(loss_cfg, BaseLossConfig):
        return f"LossRunner needs a config, not its class; write LossRunner({loss_cfg.__name__}())"
    return (
        f"LossRunner needs a loss config such as GRPOLossConfig(), not {type(loss_cfg).__name__}; "
        "for overrides use LossRunner.from_overrides([...])"
    )


def check_first(first: Any, second: Any, call: str = "runner({})") -> None:
    """Check the first two arguments of a call: a model and its batch, or hidden states and a head.

    Args:
        first: a model or hidden states.
        second: a batch or a head.
        call: how the call is written, with a place for both.

    Raises:
        DataError: they are swapped, or a model has no mapping beside it, or a batch no model.
    """
    write = f"write {call.format('model, batch')}"
    if isinstance(first, nn.Module):
        if second is None or isinstance(second, Mapping):
            return
        if isinstance(second, (list, tuple)):
            raise DataError(f"the batch of a model is {a_type(second)}; {write}, or runner.step(batches, model=model)")
        raise DataError(f"the batch of a model is {a_type(second)}; {write} with a mapping such as {BATCH}")
    has_states = isinstance(first, Mapping) and any(first.get(name) is not None for name in OF_OUTPUT)
    if isinstance(first, Mapping) and not has_states:
        raise DataError(f"the first argument is {a_type(first)} without hidden states; {write}")
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], Mapping):
        raise DataError(f"the first argument is a list of batches; write runner.step(batches, model=model), or {write}")
    if isinstance(second, Mapping) and not isinstance(first, Tensor) and not has_states:
        loaded = " with the loaded model" if isinstance(first, str) else ""
        raise DataError(f"the first argument is {a_type(first)}; {write}{loaded}")


@contextlib.contextmanager
def naming_batches(name: str) -> Iterator[None]:
    """Call the items of a step what the caller of the runner knows: ``batches[1]``, or a field by its name alone.

    Args:
        name: of the list of batches; empty: there is only one.
    """
    try:
        yield
    except DataError as error:
        message = str(error)
        message = message.replace("data_batches[", f"{name}[") if name else message.replace("data_batches[0].", "")
        error.args = (message.replace("data_batches[0]", "the batch"),)
        raise


def not_a_field(
    name: str, fields: Mapping[str, Any], known: Sequence[str], loss_cfg: BaseLossConfig, may_have_others: bool
) -> str | None:
    """Return the error message for a field that a batch does not have; None if it may be for the caller's forward.

    Args:
        name: the field.
        fields: all fields of the batch.
        known: the fields that exist.
        loss_cfg: the loss.
        may_have_others: whether only what looks like a field of the loss is wrong.
    """
    from toolkit.peers import counterpart_keyword  # only a mistake needs it
    from toolkit.peers.batch_fields import counterpart_field, replaces

    if name in OF_TOKENIZER and may_have_others:
        return None
    where, settings = f"{name!r} is not a field of a batch", type(loss_cfg).model_fields
    if name == "labels" and fields.get("shifted_labels") is None and fields.get("input_ids") is None:
        may_have_others = False  # the loss needs them
    if not may_have_others:
        if name in settings:
            write = f"write LossRunner({type(loss_cfg).__name__}({name}={fields[name]!r}))"
            return f"{where} but a setting of the loss config; {write}"
        elsewhere = counterpart_keyword(name, fields[name], settings)
        if elsewhere is not None:
            return f"{where} but a setting of the loss config; {elsewhere}"
    if name in ("advantage", "advantage_options") and fields.get("rewards") is not None:
        call = f"runner(model, batch, {name}=...)"
        return f"{where} but an argument of the call; write {call} or runner.step(batches, model=model, {name}=...)"
    if name == "reward" and "rewards" in known and fields.get("rewards") is None:
        has_it = may_have_others and fields.get("advantages") is not None
        return None if has_it else f"{where} (did you mean 'rewards'?); it has: {', '.join(known)}"
    counterpart, ours = counterpart_field(name, known), replaces(name, known)
    if counterpart is not None and not may_have_others:
        has_it = ours is not None and fields.get(ours) is not None
        return f"{where}; the batch has {ours} already: leave {name} out" if has_it else f"{where}; {counterpart}"
    is_marked = ours == "loss_mask" and fields.get("shifted_labels") is not None
    if ours is not None and fields.get(ours) is None and not is_marked:
        return f"{name!r} is not read by the loss, and the batch has no {ours}; {counterpart}"
    if ours is not None and may_have_others:
        return None  # for the forward: the loss has its field
    hint = did_you_mean(name, known)
    return None if may_have_others and not hint else f"{where}{hint}; it has: {', '.join(known)}"


def not_a_list(overrides: Any, choices: Mapping[str, Any]) -> str:
    """Return the error message for overrides that are not a list of strings, such as keywords or a mapping."""
    pairs = {**(overrides if isinstance(overrides, Mapping) else {}), **choices}
    words = overrides.split() if isinstance(overrides, str) else []
    wanted = [*words, *(f"{name}={value}" for name, value in pairs.items())] or ["loss=grpo", "kl=k3"]
    return f"from_overrides takes a list of strings, as on the command line; write from_overrides({wanted})"


def not_of_loss(override: str, key: str, loss_cfg: BaseLossConfig | None = None) -> str:
    """Return the error message for an override that does not concern the loss.

    Args:
        override: as it was written.
        key: of it.
        loss_cfg: the loss that it was to change, whose settings may be meant; None: not known.
    """
    from toolkit.compose.overrides import LOSS_GROUPS

    setting = key.rpartition(".")[2]
    if setting == "temperature" or setting in getattr(loss_cfg, "policy_loss_cfg", {}):
        path = "rollout.temperature" if setting == "temperature" else f"policy_loss.{setting}"
        return f"{override}: there is no {key}; did you mean {path!r}?"
    if loss_cfg is not None and setting in type(loss_cfg).model_fields:
        return f"{override}: there is no {key}; did you mean 'loss.{setting}'?"
    if key == "kl":
        return f"{override}: LossRunner has no rewards; leave it out, or choose a KL in the loss, such as kl=k3"
    return (
        f"{override}: LossRunner has no {key.partition('.')[0]}; leave it out (it reads "
        f"{', '.join(LOSS_GROUPS[:-2])} and rollout.temperature), or train with python -m toolkit.train"
    )
