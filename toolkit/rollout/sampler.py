"""Completions from a policy by transformers' ``generate``, with the log-probabilities they were sampled at.

Tokens are chosen here, by one uniform number for each row and position: a row's text depends on its prompt and its
numbers, not on the rows beside it, nor on the process that samples it.

Legend: R rows (prompts x group size), P prompt positions, N new positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from toolkit.metrics import wide_dtype

if TYPE_CHECKING:
    from toolkit.tasks.episodes import Episode


@dataclass(frozen=True)
class Completions:
    """Prompts and their continuations, the prompts padded on the left, the continuations on the right."""

    input_ids: Tensor
    """[R, P + N] int64."""
    attention_mask: Tensor
    """[R, P + N]; 1 at prompt tokens and at new tokens up to and including the end of the text."""
    is_new: Tensor
    """[R, P + N] bool; True at new tokens up to and including the end of the text."""
    logprobs: Tensor
    """[R, P + N] log-probability that each new token was sampled with, in nats; NaN elsewhere."""
    texts: list[str]
    """The R continuations, special tokens removed."""
    finished: list[bool]
    """Whether each continuation ended by itself."""
    episodes: list[Episode] | None = None
    """With an environment: the R episodes. A row is then prompt, turn, observation, turn ..., `texts` are the last
    turns, and `finished` is about these. Every turn has a token, and so has every observation."""

    def first(self, number: int) -> Completions:
        """Return the first rows."""
        parts = {name: value[:number] for name, value in vars(self).items() if value is not None}
        return Completions(**parts)

    @property
    def transcripts(self) -> list[str]:
        """The R continuations with the observations between their turns, special tokens removed."""
        return self.texts if self.episodes is None else [episode.transcript for episode in self.episodes]


class _Chooser(LogitsProcessor):
    """Chooses the tokens and keeps their log-probabilities; ``generate`` then takes the only one left."""

    def __init__(self, temperature: float, uniforms: Tensor | None) -> None:
        self.temperature = temperature
        self.uniforms = uniforms
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature).log_softmax(-1)
        if self.uniforms is None:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            token = inverse_cdf(logprobs, self.uniforms[:, len(self.chosen)])
        self.chosen.append(logprobs.gather(-1, token))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token at which the cumulated probability exceeds the uniform number, [R, 1].

    The sums are float64, so another layout, whose logits differ in their last bits, chooses the same token unless the
    number lies within these bits of an edge. A token of probability 0 is never chosen.

    Args:
        logprobs: [R, V] in nats.
        uniforms: [R] in [0, 1).
    """
    wide = wide_dtype(logprobs)
    edges = logprobs.to(wide).exp().cumsum(-1)
    total = edges[:, -1:]
    # The product of a number just below 1 may round to the total itself, which no edge exceeds.
    target = torch.minimum(uniforms.to(wide).unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(edges, target, right=True)


def row_uniforms(seeds: Sequence[str], number: int) -> Tensor:
    """Return `number` uniform numbers in [0, 1) for each row, [R, number] float64, from its seed alone."""
    generators = [Random(seed) for seed in seeds]
    numbers = [generator.random() for generator in generators for _ in range(number)]
    return torch.tensor(numbers, dtype=torch.float64).view(len(seeds), number)


def end_ids(lm: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's generation config (chat models)."""
    stops = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    return list(dict.fromkeys([tokenizer.eos_token_id, *stops]))


def complete(
    lm: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, group_size: int = 1, **options: Any
) -> Completions:
    """Continue each prompt `group_size` times: R = len(prompts) x group_size rows.

    Args:
        lm: a transformers causal language model, not wrapped.
        tokenizer: pads on the left.
        prompts: texts; the completions of one prompt are consecutive.
        max_new_tokens: where an unfinished continuation is cut.
        group_size: completions of each prompt.
        options: of `continued`.
    """
    device = next(lm.parameters()).device
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    ids, mask = (encoded[name].repeat_interleave(group_size, 0) for name in ("input_ids", "attention_mask"))
    return continued(lm, tokenizer, ids, mask, max_new_tokens=max_new_tokens, **options)


@torch.no_grad()
def continued(
    lm: Any,
    tokenizer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    uniforms: Tensor | None = None,
    synced_gpus: bool = False,
) -> Completions:
    """Continue rows of tokens.

    Args:
        lm: a transformers causal language model, not wrapped.
        tokenizer: of the model.
        input_ids: [R, P] padded on the left.
        attention_mask: [R, P] 1 at tokens.
        max_new_tokens: where an unfinished continuation is cut.
        temperature: sampling temperature; None takes the most probable token (greedy).
        uniforms: [R, max_new_tokens] numbers in [0, 1) that choose the tokens; None: from torch's global generator.
        synced_gpus: continue until all processes have finished; needed if each forward gathers weights over processes.
    """
    device = input_ids.device
    if temperature is None:
        chooser = _Chooser(1.0, None)
    else:
        if uniforms is None:
            uniforms = torch.rand(len(input_ids), max_new_tokens, dtype=torch.float64)
        chooser = _Chooser(temperature, uniforms.to(device, wide_dtype(input_ids)))
    ends = end_ids(lm, tokenizer)
    was_training = lm.training
    lm.eval()
    sequences = lm.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        logits_processor=LogitsProcessorList([chooser]),
        do_sample=False,  # of the one token that the chooser leaves
        synced_gpus=synced_gpus,
    )
    lm.train(was_training)
    new = sequences[:, input_ids.shape[1] :]
    is_end = torch.isin(new, torch.tensor(ends, device=device)).int()
    written = (is_end.cumsum(-1) - is_end) == 0  # up to and including the first end
    is_new = torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), written], -1)
    not_sampled = torch.full_like(attention_mask, torch.nan, dtype=chooser.chosen[0].dtype)
    logprobs = torch.cat([not_sampled, *chooser.chosen[: new.shape[1]]], -1)
    return Completions(
        input_ids=sequences,
        attention_mask=torch.cat([attention_mask, written.to(attention_mask.dtype)], -1),
        is_new=is_new,
        logprobs=logprobs.where(is_new, torch.nan),
        texts=tokenizer.batch_decode(new.where(written, tokenizer.pad_token_id), skip_special_tokens=True),
        finished=(is_end.sum(-1) > 0).tolist(),
    )
