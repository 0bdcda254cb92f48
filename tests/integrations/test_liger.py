"""Our losses against Liger's GRPO losses as installed; skipped where liger-kernel is not (.ci/peers installs it).

Its fused loss computes log-probabilities in fp32 whatever it is given, so float64 goes through its loss of
log-probabilities (``ppo_loss_fn``), which the fused one calls.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss

from tests.integrations.liger_cases import (
    CLIPPED,
    TRITON,
    UNCLIPPED,
    Arguments,
    batch,
    leaves,
    of_ours,
    rollout_weights,
    scored,
    with_gradients,
)
from tests.integrations.loops import check_equal

BETAS = (0.0, 0.04)
TYPES = [
    *((name, level) for name in CLIPPED for level in ("token", "sequence")),
    *((name, "token") for name in UNCLIPPED),
]
PLAIN = [Arguments(name, level, beta) for name, level in TYPES for beta in BETAS]
CLAMPED = [
    Arguments(name, level, beta, delta=1.2) for name in CLIPPED for level in ("token", "sequence") for beta in BETAS
]
WEIGHTED = [Arguments(name, level, 0.04, weights=unit) for name, level in TYPES for unit in ("token", "sequence")]
CORRECTED = [Arguments(name, level, 0.04, corrects_kl=True) for name, level in TYPES]
COOLED = [Arguments("dapo", beta=0.04, temperature=0.7), Arguments("grpo", "sequence", 0.04, temperature=0.7)]
CASES = [*PLAIN, *CLAMPED, *WEIGHTED, *CORRECTED, *COOLED]


def fields_of(arguments: Arguments, given: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "ref_per_token_logps": given["ref_logprobs"] if arguments.beta else None,
        "old_per_token_logps": given["old_logprobs"],
        "vllm_is_ratio": rollout_weights(arguments, given),
    }


def fused(arguments: Arguments, given: dict[str, Tensor], *, chunk_size: int = 1, **more: Any) -> list[Tensor]:
    """Return loss and gradients of Liger's fused loss."""
    hidden, weight = leaves(given)
    use = {"use_ref_model": arguments.beta != 0, "temperature": arguments.temperature}
    function = LigerFusedLinearGRPOLoss(compiled=False, chunk_size=chunk_size, **arguments.theirs(), **use)
    fields = fields_of(arguments, given) | more
    loss, _ = function(hidden, weight, given["labels"], given["mask"].long(), given["advantages"], **fields)
    return with_gradients(loss, hidden, weight)


def of_logprobs(arguments: Arguments, given: dict[str, Tensor]) -> list[Tensor]:
    """Return loss and gradients of Liger's loss of log-probabilities, behind a plain head."""
    hidden, weight = leaves(given)
    mask = given["mask"].long()
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        scored(hidden, weight, given["labels"], arguments.temperature),
        mask,
        given["advantages"],
        mask,
        **fields_of(arguments, given),
        **arguments.theirs(),
    )
    return with_gradients(loss, hidden, weight)


def test_the_cases_are_all_loss_types_and_levels_of_the_installed_version() -> None:
    assert version("liger-kernel") == "0.8.5"
    known = inspect.getsource(LigerFusedLinearGRPOFunction.ppo_loss_fn)
    assert '["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]' in known
    for name in UNCLIPPED:
        with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
            of_logprobs(Arguments(name, "sequence"), batch(torch.float64))


def given_for(arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch; where Liger's LUSPO averages over the padded width, one without padding."""
    return batch(dtype, is_full=arguments.pads_wrongly, temperature=arguments.temperature)


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_loss_and_gradients_in_float64(arguments: Arguments) -> None:
    given = given_for(arguments, torch.float64)
    check_equal(of_ours(arguments, given), of_logprobs(arguments, given), 1e-9)


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_fused_loss_and_gradients_of_hidden_states_and_head_in_fp32(arguments: Arguments) -> None:
    given = given_for(arguments, torch.float32)
    check_equal(of_ours(arguments, given), fused(arguments, given), 1e-6)


@pytest.mark.parametrize("chunk_size", [2, 4])
def test_every_chunk_size_of_liger(chunk_size: int) -> None:
    arguments = Arguments("grpo", "sequence", 0.04)
    given = given_for(arguments, torch.float32)
    check_equal(of_ours(arguments, given), fused(arguments, given, chunk_size=chunk_size), 1e-6)


@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo"])
def test_micro_batches_of_liger_add_up_to_our_step_if_it_is_told_the_tokens_of_the_step(name: str) -> None:
    """Without ``num_items_in_batch`` it divides by the tokens of each."""
    arguments = Arguments(name, beta=0.04)
    given = batch(torch.float32)
    parts = [{key: value if key == "weight" else value[rows] for key, value in given.items()} for rows in HALVES]
    told = [fused(arguments, part, num_items_in_batch=given["mask"].sum()) for part in parts]
    check_equal(of_ours(arguments, given), joined(told), 1e-6)
    alone = joined([fused(arguments, part) for part in parts])
    assert (alone[0] - told[0][0] - told[1][0]).abs() > 0.01


HALVES = (slice(0, 1), slice(1, 4))


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Return loss and gradients of two micro-batches together."""
    (loss, hidden, weight), (more, others, another) = parts
    return [loss + more, torch.cat([hidden, others]), weight + another]


@pytest.mark.parametrize("arguments", [Arguments("luspo"), Arguments("luspo", "sequence", 0.04)], ids=str)
def test_luspo_of_liger_counts_padding_where_its_tokens_differ_and_ours_does_not(arguments: Arguments) -> None:
    """It takes the mean over the padded width without a mask; the two are equal where nothing is padded."""
    given = batch(torch.float64, is_full=True)
    padded = {name: torch.cat([values, values[:, :3]], 1) for name, values in given.items() if values.dim() > 1}
    padded |= {"weight": given["weight"], "advantages": given["advantages"]}
    padded["mask"][:, -3:] = False
    ours, theirs = of_ours(arguments, padded), of_logprobs(arguments, padded)
    check_equal([ours[0], ours[2]], [of_ours(arguments, given)[0], of_ours(arguments, given)[2]], 1e-9)
    assert (ours[0] - theirs[0]).abs() > 1e-4
    assert theirs[1][:, -3:].any()
    assert not ours[1][:, -3:].any()


def test_the_triton_kernel_of_liger_in_the_interpreter_of_triton(tmp_path: Path) -> None:
    """It runs in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    path = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.liger_triton", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = torch.load(path)
    assert results.keys() == TRITON.keys()
    for name, arguments in TRITON.items():
        check_equal(of_ours(arguments, given_for(arguments, torch.float32)), results[name], 1e-6)
