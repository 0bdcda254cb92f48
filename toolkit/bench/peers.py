"""Heads of other projects, if installed; each gets only the scored tokens, even if it accepts all.

The loss on top is ours if the peer returns log-probabilities, so only the head differs.

Legend: n scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from toolkit.bench.config import BenchConfig
from toolkit.bench.problem import Problem, Step, device_of
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import GRPOLossConfig

TRL_VOCABULARY_TILE = 32768
"""As in TRL's trainer: tiles of 4096 tokens by this many vocabulary entries."""


@dataclass(frozen=True)
class Peer:
    """A head of another project."""

    name: str
    build: Callable[[Problem], Step]
    why_not: Callable[[BenchConfig, BaseLossConfig], str | None]


def _absent(distribution: str, least: tuple[int, ...]) -> str | None:
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    numbers = tuple(int(part) for part in installed.split(".")[: len(least)] if part.isdigit())
    return None if numbers >= least else f"{distribution} {installed} is older than {'.'.join(map(str, least))}"


def no_trl(config: BenchConfig, loss_cfg: BaseLossConfig) -> str | None:
    """Return why TRL cannot be measured; None if it can."""
    absent = _absent("trl", (1, 16))
    if absent or importlib.util.find_spec("trl.kernels.chunked_logprob") is None:
        return absent or "this trl has no trl.kernels.chunked_logprob"
    return None


def _trl(problem: Problem) -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    softcap, width = problem.config.softcap, min(TRL_VOCABULARY_TILE, problem.weight.shape[0])

    def head(hidden: Tensor, labels: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, problem.weight, None, labels, 1.0, width, softcap, 1.0, ())[0]

    return _with_our_loss(problem, head)


def _no_liger(config: BenchConfig, loss_cfg: BaseLossConfig) -> str | None:
    if absent := _absent("liger-kernel", (0, 8)):
        return absent
    if config.softcap is not None:
        return "its GRPO loss has no soft cap"
    names = ("vanilla", "gspo")
    if not isinstance(loss_cfg, GRPOLossConfig) or loss_cfg.policy.name not in names:
        return "compared for policy_loss=vanilla and gspo only"
    if loss_cfg.use_kl_loss and loss_cfg.kl_loss_type not in ("k3", "low_var_kl"):
        return "its KL term is k3"
    return None


def _liger(problem: Problem) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    cfg, item = problem.loss_cfg, problem.item
    assert isinstance(cfg, GRPOLossConfig)
    options = cfg.policy_loss_cfg
    loss_fn = LigerFusedLinearGRPOLoss(
        beta=cfg.kl_loss_coef if cfg.use_kl_loss else 0.0,
        compiled=True,
        use_ref_model=cfg.use_kl_loss,
        epsilon_low=options["cliprange_low"],
        epsilon_high=options["cliprange_high"],
        loss_type="dapo",
        importance_sampling_level="sequence" if options["loss_type"] == "gspo" else "token",
        delta=options.get("clip_ratio_c"),
    )
    mask = (item.shifted_labels != -100).to(torch.int64)
    labels = item.shifted_labels.clamp(min=0)
    fields = dict(item.tensors())
    advantages = fields["advantages"][:, 0].contiguous()
    ref = fields["ref_logprobs"] if cfg.use_kl_loss else None

    def step() -> Tensor:
        loss, _ = loss_fn(
            problem.rows,
            problem.weight,
            labels,
            mask,
            advantages,
            ref_per_token_logps=ref,
            old_per_token_logps=fields["old_logprobs"],
        )
        loss.backward()
        return loss

    return step


def _cce(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_exact" if device_of(problem.config).type == "cuda" else "torch_compile"
    options = {"softcap": problem.config.softcap, "reduction": "none", "impl": impl}
    return _with_our_loss(
        problem, lambda hidden, labels: -linear_cross_entropy(hidden, problem.weight, labels, **options)
    )


def _no_torch_lce(config: BenchConfig, loss_cfg: BaseLossConfig) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    if config.softcap is not None:
        return "it has no soft cap"
    if config.dtype != "float32" and device_of(config).type == "cpu":
        return "in low precision on a CPU it does not finish in minutes"
    return None


def _torch_lce(problem: Problem) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()

    def head(hidden: Tensor, labels: Tensor) -> Tensor:
        return -torch.nn.functional.linear_cross_entropy(
            hidden, problem.weight, labels, reduction="none", options=options
        )

    return _with_our_loss(problem, head)


def _with_our_loss(problem: Problem, head: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return the step of a head that takes hidden states [n, D] and labels [n] and gives log-probabilities [n]."""
    positions = problem.scored
    labels = problem.labels[positions]
    return problem.with_our_loss(lambda: head(problem.hidden.index_select(0, positions), labels))


PEERS = (
    Peer("TRL, chunked log-prob", _trl, no_trl),
    Peer("Liger, fused linear GRPO", _liger, _no_liger),
    Peer("cut-cross-entropy", _cce, lambda config, loss_cfg: _absent("cut-cross-entropy", (25,))),
    Peer("torch, linear_cross_entropy", _torch_lce, _no_torch_lce),
)
