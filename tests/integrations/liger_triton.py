"""Liger's Triton kernel on a CPU: ``TRITON_INTERPRET=1 python -m tests.integrations.liger_triton results.pt``."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from liger_kernel.transformers.grpo_loss import triton_grpo_loss
from torch import Tensor

from tests.integrations.liger_cases import TRITON, Arguments, batch, leaves, with_gradients


def of_kernel(arguments: Arguments) -> list[Tensor]:
    """Return loss, gradient of the hidden states and of the head; the kernel drops the logits of the last position."""
    given = batch(torch.float32)
    hidden, weight = leaves(given)
    options = arguments.theirs()
    loss, _ = triton_grpo_loss(
        F.pad(hidden @ weight.T, (0, 0, 0, 1)),
        given["old_logprobs"],
        given["ref_logprobs"] if arguments.beta else None,
        given["labels"],
        given["advantages"],
        given["mask"].int(),
        temperature=arguments.temperature,
        eps_low=options.pop("epsilon_low", 0.0),
        eps_high=options.pop("epsilon_high"),
        inplace=False,
        reduce=True,
        **options,
    )
    return with_gradients(loss, hidden, weight)


if __name__ == "__main__":
    torch.save({name: of_kernel(arguments) for name, arguments in TRITON.items()}, sys.argv[1])
