"""The reference policy, never trained: the policy as the main phase began or at its last refresh, or another model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.models.lora import has_adapters
from toolkit.models.policy import Policy
from toolkit.training.full_state import load_weights, save_weights
from toolkit.training.reference_path import reference_config
from toolkit.training.sharding import copy_weights, frozen_copy, is_sharded, mix_weight, unwrapped


class SharedReference:
    """The policy as it was, for a policy with adapters: it shares the model, and keeps the adapters alone.

    With fresh adapters it computes what the model does with its adapters switched off. After a warm-up, or with
    adapters that an earlier run trained, it still is the policy as it was, which the model without adapters is not.
    """

    def __init__(self, policy: Any) -> None:
        """Remember the trained weights of `policy` (from `prepare_policy`) as they are now."""
        self.policy = unwrapped(policy)
        self._kept = [parameter.detach().clone() for parameter in self._trained()]

    def eval(self) -> Self:
        """Put the policy into evaluation mode."""
        self.policy.eval()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the policy returned for these arguments then; without gradients, between optimizer steps."""
        with torch.no_grad(), self._in_force():
            return self.policy(*args, **kwargs)

    def refresh(self, mixup: float) -> None:
        """Replace this part of its weights by those of the policy now."""
        for kept, current in zip(self._kept, self._trained(), strict=True):
            mix_weight(kept, current.detach(), mixup)

    def save(self, path: str) -> None:
        """Write its weights as `save_weights` does."""
        with self._in_force():
            save_weights(self.policy, path, trained_only=True)

    def load(self, path: str) -> None:
        """Read what `save` wrote."""
        with self._in_force():
            load_weights(self.policy, path, trained_only=True)
            self._kept = [parameter.detach().clone() for parameter in self._trained()]

    def _trained(self) -> list[Tensor]:
        if is_sharded(self.policy):
            self.policy.reshard()  # type: ignore[operator]
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[None]:
        """Exchange the weights that have been trained since; both are small."""
        current = [parameter.detach().clone() for parameter in self._trained()]
        self._assign(self._kept)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._trained(), values, strict=True):
            parameter.copy_(value)


Reference = Policy | SharedReference


def reference_of(policy: Any) -> Reference:
    """Return the policy as it is now; all ranks call it. A policy with adapters is not copied."""
    return SharedReference(policy) if has_adapters(unwrapped(policy).lm) else frozen_copy(policy)


def loaded_reference(path: str, policy: Any, tokenizer: Any) -> Policy:
    """Return the model in `path` as a reference on the policy's device, in its dtype; all ranks call it.

    Args:
        path: folder or hub id.
        policy: from `prepare_policy`.
        tokenizer: of the policy.

    Raises:
        ConfigError: there is no such model, or its tokenizer has another vocabulary.
    """
    weight = next(unwrapped(policy).parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    reference, theirs = reference_config(path, dtype).build("")
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"training.reference_path={path} has another tokenizer ({len(theirs.get_vocab())} tokens) than the policy "
            f"({len(tokenizer.get_vocab())}); a reference scores the policy's own tokens, so give a model with the same"
        )
    return reference.to(weight.device).requires_grad_(False).eval()


def refresh_reference(reference: Reference, policy: Any, mixup: float = 1.0) -> None:
    """Replace a part of the reference's weights by those of the policy as it is now, 1 for all; all ranks call it."""
    if isinstance(reference, SharedReference):
        reference.refresh(mixup)
    else:
        copy_weights(policy, reference, mixup)


def save_reference(reference: Reference, path: str) -> None:
    """Write the reference's weights; all ranks call it."""
    if isinstance(reference, SharedReference):
        reference.save(path)
    else:
        save_weights(reference, path)


def load_reference(reference: Reference, path: str) -> None:
    """Read what `save_reference` wrote; all ranks call it."""
    if isinstance(reference, SharedReference):
        reference.load(path)
    else:
        load_weights(reference, path)
