"""The variants to measure: bare products, eager PyTorch, our passes. Legend: n scored tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.bench import model, overhead
from toolkit.bench.config import BenchConfig
from toolkit.bench.peers import PEERS, no_trl
from toolkit.bench.problem import Problem, Step, changed, device_of, make_problem
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
    problem: Callable[[], Any]
    build: Callable[[Any], Step]
    """Prepares everything that is not measured, and returns the function to measure."""
    has_gradients: bool = True
    is_ours: bool = True
    why_not: str | None = None
    """Why it cannot be measured here; None if it can."""


def variants(config: BenchConfig, loss_cfg: BaseLossConfig) -> list[Variant]:
    """Return everything to measure, the floor first."""
    shared_problem = partial(_problem, config, loss_cfg)
    if config.cases == "overhead":
        return [Variant(name, shared_problem, build) for name, build in overhead.BUILDERS.items()]
    if config.cases == "model":
        shared_model = partial(_model_problem, config, loss_cfg)
        ours = [Variant(name, shared_model, build) for name, build in model.BUILDERS.items()]
        why_not = no_trl(config, loss_cfg) if config.peers else "bench.peers=false"
        return [*ours, Variant(model.TRL, shared_model, model.by_trl, is_ours=False, why_not=why_not)]
    chosen = [
        Variant(FLOOR, shared_problem, _products, has_gradients=False),
        Variant("toolkit", shared_problem, toolkit_step),
        Variant("toolkit, token_logprobs, any loop", shared_problem, _token_logprobs),
        Variant("toolkit, mode=eager", shared_problem, partial(toolkit_step, mode="eager")),
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
    base = loss_cfg if isinstance(loss_cfg, GRPOLossConfig) else GRPOLossConfig()

    def with_changes(loss_type: str = "vanilla", *, of_loss: dict[str, Any] | None = None, **changes: Any) -> Any:
        # GSPO's default range clips entire sequences of made-up tokens, whose products would be skipped.
        policy_loss = {"loss_type": loss_type, "cliprange_low": 0.2, "cliprange_high": 0.2}
        cfg = changed(base, mode="chunk", chunk_size=config.chunk_size, policy_loss_cfg=policy_loss, **(of_loss or {}))
        return partial(_problem, changed(config, **changes), cfg)

    length: dict[str, Any] = {"sequence_length": config.shape[0]}
    dtype, chunk = getattr(torch, config.dtype), config.chunk_size
    rows = chunk if isinstance(chunk, int) else auto_chunk(config.shape[2], dtype, device_of(config))
    budget = {"retain_bytes": rows * config.shape[2] * dtype.itemsize}
    problems = {
        "cispo": with_changes("cispo"),
        "with entropy metric": with_changes(of_loss={"use_entropy_metric": True}),
        "half of the rows at advantage 0": with_changes(zero_advantage=0.5),
        "gspo": with_changes("gspo"),
        "gspo, one long sequence": with_changes("gspo", **length),
        "gspo, one long sequence, one chunk retained": with_changes("gspo", of_loss=budget, **length),
        "frozen head": with_changes(frozen_head=True),
        "frozen head, gspo, one long sequence": with_changes("gspo", frozen_head=True, **length),
    }
    return [
        *(Variant(f"toolkit, {name}", problem, toolkit_step) for name, problem in problems.items()),
        Variant("toolkit, log-probs without gradient", shared_problem, _no_grad, has_gradients=False),
    ]


_problem, _model_problem = cache(make_problem), cache(model.make_model_problem)
"""Made once, so variants share their tensors."""


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


def toolkit_step(problem: Problem, mode: str = "chunk") -> Step:
    """Return forward and backward of the loss through its context."""
    context = problem.context(softcap=problem.config.softcap, mode=mode)

    def step() -> Tensor:
        loss, _ = context.forward(problem.rows, problem.weight)
        loss.backward()
        return loss

    return step


def _token_logprobs(problem: Problem) -> Step:
    logprobs, positions = _head_alone(problem), problem.scored
    return problem.with_our_loss(lambda: logprobs().reshape(-1)[positions])


def _no_grad(problem: Problem) -> Step:
    return torch.no_grad()(_head_alone(problem))


def _head_alone(problem: Problem) -> Callable[[], Tensor]:
    config, labels = problem.config, problem.item.shifted_labels
    options = {"chunk_size": config.chunk_size, "softcap": config.softcap}
    return partial(token_logprobs, problem.rows, problem.weight, labels, **options)


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
