"""What to say of wrong arguments of `LossRunner` and `LossRunner.from_overrides`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from toolkit.errors import DataError, did_you_mean
from toolkit.losses.config.base import BaseLossConfig


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


class NotATensor(DataError, AttributeError, TypeError):
    """A result is used as if it were the loss, a tuple or a dict; also the errors that Python raises for that."""


class NotATuple:
    """Base of a result: what it is not answers with what to write."""

    if not TYPE_CHECKING:  # type checkers report these themselves

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # a protocol of Python or IPython
                raise AttributeError(name)
            raise NotATensor(
                f"a LossResult has no {name}; its loss is result.loss, so write result.loss.{name}"
                if hasattr(Tensor, name)
                else f"a LossResult has no {name}; it has loss, metrics, raw_metrics and backward()"
            )

        def __getitem__(self, key: Any) -> Any:
            how = f"result.metrics[{key!r}] is a number of it" if isinstance(key, str) and key != "loss" else ""
            raise NotATensor(
                "a LossResult is not a tuple or a dict; write loss, metrics = result.loss, result.metrics"
                f"{'; ' if how else ''}{how}"
            )

        def _computed(self, other: Any) -> Any:
            raise NotATensor(
                "a LossResult is not a number; its loss is result.loss. It is averaged already: do not divide it by a "
                "number of micro-batches or ranks, give all micro-batches to runner.step([...], forward)"
            )

        __truediv__ = __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = _computed


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
    counterpart, ours = counterpart_field(name, known), replaces(name, known)
    if counterpart is not None and not may_have_others:
        return f"{where}; {counterpart}"
    is_marked = ours == "loss_mask" and fields.get("shifted_labels") is not None
    if ours is not None and fields.get(ours) is None and not is_marked:
        return f"{name!r} is not read by the loss, and the batch has no {ours}; {counterpart}"
    hint = did_you_mean(name, known)
    return None if may_have_others and not hint else f"{where}{hint}; it has: {', '.join(known)}"


def not_a_list(overrides: Any, choices: Mapping[str, Any]) -> str:
    """Return the error message for overrides that are not a list of strings, such as keywords or a mapping."""
    pairs = {**(overrides if isinstance(overrides, Mapping) else {}), **choices}
    words = overrides.split() if isinstance(overrides, str) else []
    wanted = [*words, *(f"{name}={value}" for name, value in pairs.items())] or ["loss=grpo", "kl=k3"]
    return f"from_overrides takes a list of strings, as on the command line; write from_overrides({wanted})"


def not_of_loss(override: str, key: str) -> str:
    """Return the error message for an override that does not concern the loss."""
    from toolkit.compose.overrides import LOSS_GROUPS

    if key == "kl":
        return f"{override}: LossRunner has no rewards; leave it out, or choose a KL in the loss, such as kl=k3"
    return (
        f"{override}: LossRunner has no {key.partition('.')[0]}; leave it out (it reads "
        f"{', '.join(LOSS_GROUPS[:-2])} and rollout.temperature), or train with python -m toolkit.train"
    )
