"""Every policy loss of every peer, through its preset: loss and gradient as the peer's own code computed them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch

from tests.dialects import Run
from tests.dialects.parts import shrunk
from tests.golden_data import IS_SHIPPED, Case, Exclusion, all_params_read, cases, relative_error, tolerance
from toolkit import GRPOLossConfig, RLLossContextInputItem
from toolkit.compose.tree import load_loss
from toolkit.head import TokenScores

CASES = list(cases("policy_loss"))
FIELDS = {
    "advantages": "advantages",
    "old_logprobs": "old_log_probs",
    "ref_logprobs": "ref_log_probs",
    "rollout_logprobs": "rollout_log_probs",
}
MOST_EXCLUDED = 0.10


def dialect(peer: str) -> Any:
    return importlib.import_module(f"tests.dialects.{peer}")


def reason_to_exclude(case: Case) -> Exclusion | None:
    """Why a case is left out: by its entry, "entry/input" or whole name, or by its parameters."""
    excluded, of_params = dialect(case.peer).EXCLUDED, getattr(dialect(case.peer), "reason_to_exclude", None)
    keys = (case.entry, f"{case.entry}/{case.input_id}", case.name)
    reason = next((excluded[key] for key in keys if key in excluded), None)
    return reason or (of_params(case) if of_params else None)


def translated(case: Case) -> Run:
    """Return our run of a case, every parameter of which the dialect must read."""
    with all_params_read(case, getattr(dialect(case.peer), "IGNORED", {})):
        return dialect(case.peer).translate(case)


def outcome(case: Case) -> str:
    """Return how a case is compared: a category of exclusion, "adjusted" or "matched"."""
    if exclusion := reason_to_exclude(case):
        return exclusion.category
    return "adjusted" if translated(case).is_adjusted else "matched"


@functools.cache
def preset_config(preset: str) -> GRPOLossConfig:
    return load_loss([f"loss=preset/{preset}"])  # type: ignore[return-value]


def config_of(run: Run) -> GRPOLossConfig:
    base = preset_config(run.preset)
    changes = {"policy_loss_cfg": {**base.policy_loss_cfg, **run.policy_loss}, **run.loss}
    return type(base)(**{**{name: getattr(base, name) for name in type(base).model_fields}, **changes})


def ours(case: Case, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Our loss and its gradient at the scored tokens, row by row."""
    cfg, given = config_of(run), case.inputs
    mask = given["response_mask"] != 0
    labels = torch.zeros(mask.shape, dtype=torch.int64).masked_fill(~mask, cfg.ignore_idx)
    names = {**FIELDS, **run.fields}
    item = RLLossContextInputItem(
        shifted_labels=labels,
        group_ids=(given["group_index"] if run.groups is None else torch.tensor(run.groups)).long().unsqueeze(-1),
        **{name: given[source] for name, source in names.items() if source and name != "advantages"},
        advantages=given[names["advantages"]] * run.advantage_scale,
    )
    context_class = cfg.loss_ctx_cls
    (kwargs,) = context_class.build_batches_loss_kwargs([item], cfg)
    kwargs = kwargs.replace(loss_weight=shrunk(kwargs.loss_weight, mask, run.row_epsilon))
    context = context_class(cfg, kwargs)
    scored = (context.scored_labels() != cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1)
    logprobs = given["log_probs"].clone().requires_grad_()
    seen = logprobs
    if run.ratio_epsilon:
        anchor = given[FIELDS[f"{cfg.policy_loss_cfg['anchor']}_logprobs"]]
        seen = anchor + shrunk(logprobs - anchor, mask, run.ratio_epsilon)
    entropies = given["entropies"].reshape(-1)[scored]
    loss, _ = context.loss_from_scores(TokenScores(seen.reshape(-1)[scored], entropies), kwargs.take(scored))
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach() * run.scale, grad[mask] * run.scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_peer_computed_it(case: Case) -> None:
    reason = reason_to_exclude(case)
    if reason is not None:
        pytest.skip(f"{reason.category}: {reason.reason}")
    run = translated(case)
    loss, grad = ours(case, run)
    assert relative_error(grad, case.tensor("grad")) < tolerance(case), (grad, case.outputs["grad"], config_of(run))
    expected = torch.tensor(float(case.outputs["loss"]), dtype=torch.float64)
    # A loss that cancels to nearly 0 is compared on the scale of its parts: gradient times one nat.
    scale = max(abs(float(expected)), float(case.tensor("grad").abs().max()))
    assert abs(float(loss - expected)) < tolerance(case) * max(scale, 1e-12), (loss, expected)


@pytest.mark.skipif(not IS_SHIPPED, reason="other cases may be any")
def test_few_are_excluded_and_each_for_a_reason() -> None:
    exclusions = {case.name: exclusion for case in CASES if (exclusion := reason_to_exclude(case))}
    assert len(exclusions) <= MOST_EXCLUDED * len(CASES), list(exclusions)
    assert all(len(exclusion.reason) > 20 for exclusion in exclusions.values())


def test_each_ignored_parameter_has_a_reason() -> None:
    for peer in {case.peer for case in CASES}:
        assert all(len(reason) > 20 for reason in getattr(dialect(peer), "IGNORED", {}).values()), peer


@pytest.mark.slow
def test_every_preset_uses_a_registered_loss() -> None:
    from pathlib import Path

    from toolkit.compose.schemas import conf_dir

    found = sorted(Path(conf_dir(), "loss", "preset").glob("*/*.yaml"))
    assert found
    for path in found:
        cfg = preset_config(f"{path.parent.name}/{path.stem}")
        if isinstance(cfg, GRPOLossConfig):
            assert cfg.policy.name in path.read_text()
