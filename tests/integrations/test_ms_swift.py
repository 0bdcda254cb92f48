"""Our losses against those of ms-swift's GRPO trainer as installed; skipped where ms-swift is not.

.ci/peers installs it in a folder of its own: it imports what TRL 1.0 took out.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

pytest.importorskip("swift.rlhf_trainers.grpo_trainer", exc_type=ImportError)

from swift.rlhf_trainers.grpo_trainer import WINDOW_NORMALIZED_LOSS_TYPES, GRPOTrainer

from tests.integrations.loops import DTYPES, batch, check_equal, namespace, of_our_loop
from tests.integrations.swift_trainer import Arguments, grpo_batch, of_ms_swift
from toolkit.integrations.ms_swift import ToolkitGRPOTrainer

LEVELS = ("token", "sequence", "sequence_token")
BETAS = (0.0, 0.04)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
PLAIN = [
    Arguments(name, level, beta, delta)
    for name in CLIPPED
    for level in LEVELS
    for beta in BETAS
    for delta in (None, 1.2)
]
OTHERS = [Arguments(name, beta=beta) for name in ("cispo", "sapo", "fipo") for beta in BETAS]
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CORRECTED = [
    *(Arguments(name, beta=beta, rollout=mode) for name in ("grpo", "cispo") for mode in MODES for beta in BETAS),
    *(Arguments("grpo", beta=beta, off_policy=0.1) for beta in BETAS),
]


def given_of(dtype: torch.dtype) -> dict[str, Tensor]:
    given = batch(dtype)
    noise = torch.randn(given["mask"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return given | {"rollout_logprobs": given["old_logprobs"] + (0.2 * noise).to(dtype)}


def of_ours(arguments: Arguments, given: dict[str, Tensor], **changes: Tensor) -> list[Tensor]:
    fields = [*(["ref_logprobs"] if arguments.beta else [])]
    fields += ["rollout_logprobs"] if arguments.rollout or arguments.off_policy else []
    return of_our_loop(given, " ".join(f"'{each}'" for each in arguments.ours()), fields=fields, **changes)


def test_the_cases_are_all_loss_types_and_levels_of_the_installed_version() -> None:
    assert version("ms-swift") == "4.6.0"
    known = inspect.getsource(GRPOTrainer._compute_loss_and_metrics)
    named = set(re.findall(r"'(\w+)'", " ".join(re.findall(r"self\.loss_type (?:==|in) (\[.*?\]|'\w+')", known))))
    assert {*named, *WINDOW_NORMALIZED_LOSS_TYPES} == {each.loss_type for each in [*PLAIN, *OTHERS]} | {"real"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [*PLAIN, *OTHERS, *CORRECTED], ids=str)
def test_loss_and_gradient_equal_those_of_ms_swift(arguments: Arguments, dtype: torch.dtype) -> None:
    given = given_of(dtype)
    check_equal(of_ours(arguments, given), of_ms_swift(arguments, given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_of_whole_groups(dtype: torch.dtype) -> None:
    """Without a KL term, which ms-swift averages over tokens and REAL over groups."""
    given = given_of(dtype)
    given["mask"][2, 1:4] = True
    ours = of_ours(Arguments("real"), given, group_ids=torch.tensor([0, 0, 1, 1]))
    check_equal(ours, of_ms_swift(Arguments("real"), given))


@pytest.mark.parametrize("name", WINDOW_NORMALIZED_LOSS_TYPES)
def test_micro_batches_of_ms_swift_add_up_to_our_step(name: str) -> None:
    """These divide by the tokens of the step; transformers' Trainer divides by the number of micro-batches, too."""
    arguments = Arguments(name, beta=0.04)
    given = given_of(torch.float64)
    parts = [{key: values[rows] for key, values in given.items()} for rows in (slice(0, 1), slice(1, 4))]
    told = {"num_items_in_batch": given["mask"].sum()}
    (loss, gradient), (more, others) = (
        of_ms_swift(arguments, part, of_batch=told, current_gradient_accumulation_steps=2) for part in parts
    )
    check_equal(of_ours(arguments, given), [(loss + more) / 2, torch.cat([gradient, others]) / 2])


def test_sdar_is_a_term_beside_the_policy_loss() -> None:
    given = given_of(torch.float64)
    teacher = {"teacher_per_token_logps": given["ref_logprobs"]}
    whole = of_ms_swift(Arguments("dapo"), given, of_batch=teacher, sdar_loss_coef=0.5)
    policy = of_ours(Arguments("dapo"), given)
    sdar = of_our_loop(given, "loss=preset/ms_swift/sdar", teacher_logprobs=given["ref_logprobs"])
    check_equal([ours + 0.5 * term for ours, term in zip(policy, sdar, strict=True)], whole)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_overlong_filter_is_a_mask_of_rows(name: str) -> None:
    """Under dapo the tokens of what it drops still count, as ms-swift counts them before."""
    given, arguments = given_of(torch.float64), Arguments(name)
    dropped = torch.tensor([False, True, False, False])
    theirs = of_ms_swift(arguments, given, of_batch={"truncated_mask": dropped}, overlong_filter=True)
    kept = given | {"mask": given["mask"] & ~dropped[:, None]}
    scale = float(kept["mask"].sum() / given["mask"].sum()) if name == "dapo" else 1.0
    check_equal([scale * ours for ours in of_ours(arguments, kept)], theirs)


def test_micro_batches_of_ms_swift_as_items() -> None:
    """Its values belong to tokens; position t of an item has those of token t + 1."""
    given = given_of(torch.float32)
    prompt, ids = 2, torch.arange(4 * 11).view(4, 11)
    dropped = torch.tensor([False, True, False, False])
    theirs = grpo_batch(Arguments("grpo", beta=0.04), given, truncated_mask=dropped)
    trainer = namespace(overlong_filter=True, loss_cfg=namespace(ignore_idx=-100))
    item = ToolkitGRPOTrainer._item_of(trainer, ids, theirs, given["old_logprobs"])
    scored = torch.nn.functional.pad(given["mask"] & ~dropped[:, None], (prompt - 1, 1))
    assert torch.equal(item.shifted_labels != -100, scored)
    assert torch.equal(item.shifted_labels[scored], ids.roll(-1, 1)[scored])
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages"):
        expected = torch.nn.functional.pad(given[name], (prompt - 1, 1))
        torch.testing.assert_close(getattr(item, name)[scored], expected[scored], rtol=0, atol=0)
    assert torch.equal(item.current_logprobs[scored], item.old_logprobs[scored])
