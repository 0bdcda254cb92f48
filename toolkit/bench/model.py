"""A step of a small model: trunk, head and loss, by our modes and by what others do. Legend: B rows, T positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.bench.config import BenchConfig
from toolkit.bench.problem import Step, changed, context_of, device_of
from toolkit.head import TokenScores
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.models.policy import Policy

TRUNK = "trunk alone"
"""The variant that the others are compared with."""
LAYERS, HEAD_WIDTH = 2, 64


@dataclass(frozen=True)
class ModelProblem:
    """A model with a tied head, texts and a loss over the second half of each."""

    config: BenchConfig
    loss_cfg: BaseLossConfig
    policy: Policy
    input_ids: Tensor
    """[B, T] int64."""
    item: RLLossContextInputItem
    """[B, T - 1]."""

    @property
    def hidden(self) -> Tensor:
        """A tensor on the device that is measured: the embedding, [V, D]."""
        weight: Tensor = self.policy.lm.get_input_embeddings().weight
        return weight

    def clear(self) -> None:
        """Delete the gradients."""
        self.policy.zero_grad(set_to_none=True)

    def context(self, **changes: Any) -> Any:
        """Return a fresh context of the loss, with some fields of its config changed."""
        return context_of(changed(self.loss_cfg, **changes), self.item)

    def with_our_loss(self, logprobs: Callable[[], Tensor]) -> Step:
        """Return forward and backward of the loss, given a function for the log-probabilities of the second halves."""
        context = self.context()
        kwargs = context.loss_kwargs.take((self.item.shifted_labels.reshape(-1) != -100).nonzero().squeeze(1))

        def step() -> Tensor:
            loss: Tensor
            loss, _ = context.loss_from_scores(TokenScores(logprobs().reshape(-1), None), kwargs)
            loss.backward()
            return loss

        return step


def make_model_problem(config: BenchConfig, loss_cfg: BaseLossConfig) -> ModelProblem:
    """Return a Llama of two layers over `config.shape`'s width and vocabulary, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, width, vocabulary = config.shape
    device, dtype = device_of(config), getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    heads = max(1, width // HEAD_WIDTH)
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=True,
    )
    policy = Policy(LlamaForCausalLM(llama).to(device, dtype))
    input_ids = torch.randint(0, vocabulary, (tokens // config.sequence_length, config.sequence_length), device=device)
    with torch.no_grad():
        logprobs = policy(input_ids, torch.ones_like(input_ids))
    labels = input_ids[:, 1:].clone()
    labels[:, : config.sequence_length // 2 - 1] = -100
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.randn(len(labels), 1, device=device),
        old_logprobs=(logprobs + 0.1 * torch.randn_like(logprobs)).clamp(max=0),
    )
    return ModelProblem(config, loss_cfg, policy, input_ids, item)


def by_trunk(problem: ModelProblem) -> Step:
    """Return forward and backward of the trunk, with a made-up gradient [B, T - 1, D] of its hidden states."""
    trunk, ids = problem.policy.lm.model, problem.input_ids[:, :-1]
    gradient = torch.randn(*ids.shape, problem.config.shape[1], device=ids.device, dtype=problem.hidden.dtype)

    def step() -> None:
        trunk(ids).last_hidden_state.backward(gradient)

    return step


def by_policy(problem: ModelProblem, changes: Mapping[str, Any]) -> Step:
    """Return forward and backward of the loss inside the model's forward; `changes` are settings of the loss."""
    context, mask = problem.context(**changes), torch.ones_like(problem.input_ids)

    def step() -> Tensor:
        loss: Tensor
        loss, _ = problem.policy(problem.input_ids, mask, context)
        loss.backward()
        return loss

    return step


def by_logits(problem: ModelProblem, *, keep: bool, log_softmax: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return the same from transformers' logits, of all positions or (`keep`) of the second halves alone."""
    half = problem.config.sequence_length // 2
    labels = problem.input_ids[:, half:]

    def logprobs() -> Tensor:
        ids, kept = problem.input_ids[:, :-1], {"logits_to_keep": half} if keep else {}
        logits = problem.policy.lm(ids, **kept).logits[:, -half:]
        return log_softmax(logits, labels)

    return problem.with_our_loss(logprobs)


def plain_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities [B, n] of `labels` [B, n] from `logits` [B, n, V]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def by_trl(problem: ModelProblem) -> Step:
    """Return the same with TRL's selective log-softmax."""
    from trl.trainer.utils import selective_log_softmax

    return by_logits(problem, keep=True, log_softmax=selective_log_softmax)


BUILDERS: dict[str, Callable[[Any], Step]] = {
    TRUNK: by_trunk,
    "toolkit, the default": partial(by_policy, changes={"use_entropy_metric": True}),
    "toolkit, without entropy metric": partial(by_policy, changes={"use_entropy_metric": False}),
    "toolkit, mode=eager": partial(by_policy, changes={"mode": "eager", "use_entropy_metric": False}),
    "toolkit, mode=eager, entropy metric": partial(by_policy, changes={"mode": "eager", "use_entropy_metric": True}),
    "transformers, all logits": partial(by_logits, keep=False, log_softmax=plain_log_softmax),
    "transformers, logits_to_keep": partial(by_logits, keep=True, log_softmax=plain_log_softmax),
}
"""By name; the others are compared with the first."""
TRL = "TRL, selective log-softmax"
