"""The variants to measure: bare products, eager PyTorch, our passes. Legend: n scored tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.bench.config import BenchConfig
from toolkit.bench.overhead import BUILDERS
from toolkit.bench.peers import PEERS
from toolkit.bench.problem import Problem, Step, device_of, make_problem
from toolkit.head import TokenScores, token_logprobs
from toolkit.head.logits import LogitTransform
from toolkit.head.plan import auto_chunk
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import GRPOLossConfig

FLOOR = "bare products"


@dataclass(frozen=True)
class Variant:
    """Something to measure."""

    name: str
    problem: Callable[[], Problem]
    build: Callable[[Problem], Step]
    """Prepares everything that is not measured, and returns the function to measure."""
    has_gradients: bool = True
    is_ours: bool = True
    why_not: str | None = None
    """Why it cannot be measured here; None if it can."""


def variants(config: BenchConfig, loss_cfg: BaseLossConfig) -> list[Variant]:
    """Return everything to measure, the floor first."""
    shared_problem = _once(config, loss_cfg)
    if config.cases == "overhead":
        return [Variant(name, shared_problem, build) for name, build in BUILDERS.items()]
    chosen = [
        Variant(FLOOR, shared_problem, _products, has_gradients=False),
        Variant("toolkit", shared_problem, _toolkit),
        Variant("toolkit, token_logprobs, any loop", shared_problem, _token_logprobs),
        Variant("toolkit, mode=eager", shared_problem, partial(_toolkit, mode="eager")),
        Variant("eager PyTorch, all tokens", shared_problem, _eager),
    ]
    if config.cases == "all":
        chosen[2:2] = _all_cases(config, loss_cfg, shared_problem)
    if config.peers:
        chosen += [
            Variant(peer.name, shared_problem, peer.build, is_ours=False, why_not=peer.why_not(config, loss_cfg))
            for peer in PEERS
        ]
    return chosen


def _all_cases(config: BenchConfig, loss_cfg: BaseLossConfig, shared_problem: Callable[[], Problem]) -> list[Variant]:
    """Return every pass: other losses, other lengths, a frozen head, no gradient."""

    def changed(loss_type: str = "vanilla", **changes: Any) -> Callable[[], Problem]:
        of_loss = [key for key in ("retain_bytes", "use_entropy_metric") if key in changes]
        loss_changes = {str(key): changes.pop(key) for key in of_loss}
        # GSPO's default range clips entire sequences of made-up tokens, whose products would be skipped.
        wide = {"cliprange_low": 0.2, "cliprange_high": 0.2}
        base = loss_cfg.model_dump() if isinstance(loss_cfg, GRPOLossConfig) else GRPOLossConfig().model_dump()
        policy_loss = {"loss_type": loss_type, **wide}
        fixed: dict[str, Any] = {"mode": "chunk", "chunk_size": config.chunk_size, "policy_loss_cfg": policy_loss}
        cfg = GRPOLossConfig(**{**base, **fixed, **loss_changes})  # with the KL term of the configured loss
        return _once(BenchConfig(**{**config.model_dump(), **changes}), cfg)

    length = {"sequence_length": config.shape[0]}
    dtype, chunk = getattr(torch, config.dtype), config.chunk_size
    rows = chunk if isinstance(chunk, int) else auto_chunk(config.shape[2], dtype, device_of(config))
    budget = rows * config.shape[2] * dtype.itemsize
    return [
        Variant("toolkit, cispo", changed("cispo"), _toolkit),
        Variant("toolkit, with entropy metric", changed(use_entropy_metric=True), _toolkit),
        Variant("toolkit, half of the rows at advantage 0", changed(zero_advantage=0.5), _toolkit),
        Variant("toolkit, gspo", changed("gspo"), _toolkit),
        Variant("toolkit, gspo, one long sequence", changed("gspo", **length), _toolkit),
        Variant(
            "toolkit, gspo, one long sequence, one chunk retained",
            changed("gspo", retain_bytes=budget, **length),
            _toolkit,
        ),
        Variant("toolkit, frozen head", changed(frozen_head=True), _toolkit),
        Variant("toolkit, frozen head, gspo, one long sequence", changed("gspo", frozen_head=True, **length), _toolkit),
        Variant("toolkit, log-probs without gradient", shared_problem, _no_grad, has_gradients=False),
    ]


def _once(config: BenchConfig, loss_cfg: BaseLossConfig) -> Callable[[], Problem]:
    """Return a function that makes the problem once, so variants share its tensors."""

    def make() -> Problem:
        key = (config, repr(loss_cfg))
        if key not in _problems:
            _problems[key] = make_problem(config, loss_cfg)
        return _problems[key]

    return make


_problems: dict[Any, Problem] = {}


def _products(problem: Problem) -> Step:
    inputs = problem.hidden.detach()[problem.scored].clone()
    weight = problem.weight.detach()
    logits = inputs.new_empty(len(inputs), weight.shape[0])
    hidden_grad, weight_grad = torch.empty_like(inputs), torch.empty_like(weight)

    def step() -> None:
        torch.mm(inputs, weight.t(), out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), inputs, out=weight_grad)

    return step


def _toolkit(problem: Problem, mode: str = "chunk") -> Step:
    context = problem.context(softcap=problem.config.softcap, mode=mode)

    def step() -> Tensor:
        loss, _ = context.forward(problem.rows, problem.weight)
        loss.backward()
        return loss

    return step


def _token_logprobs(problem: Problem) -> Step:
    context, positions = problem.context(), problem.scored
    kwargs, labels = context.loss_kwargs.take(positions), problem.item.shifted_labels

    def step() -> Tensor:
        logprobs = token_logprobs(
            problem.rows, problem.weight, labels, chunk_size=problem.config.chunk_size, softcap=problem.config.softcap
        )
        loss, _ = context.loss_from_scores(TokenScores(logprobs.reshape(-1)[positions], None), kwargs)
        loss.backward()
        return loss

    return step


def _no_grad(problem: Problem) -> Step:
    labels = problem.item.shifted_labels

    def step() -> None:
        with torch.no_grad():
            token_logprobs(
                problem.rows,
                problem.weight,
                labels,
                chunk_size=problem.config.chunk_size,
                softcap=problem.config.softcap,
            )

    return step


def _eager(problem: Problem) -> Step:
    context, positions = problem.context(), problem.scored
    kwargs, labels = context.loss_kwargs.take(positions), problem.labels.clamp(min=0)
    transform = LogitTransform(softcap=problem.config.softcap)

    def step() -> Tensor:
        logits = F.linear(problem.hidden, problem.weight)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        logprobs = transform(logits).log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        loss, _ = context.loss_from_scores(TokenScores(logprobs[positions], None), kwargs)
        loss.backward()
        return loss

    return step
