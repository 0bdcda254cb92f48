"""Completions from a policy by transformers' ``generate``, with the log-probabilities they were sampled at.

Legend: R rows (prompts x group size), P prompt positions, N new positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


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


class _Recorder(LogitsProcessor):
    """Applies the temperature and keeps the log-probability of each sampled token, one step of logits at a time."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.chosen: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids[:, -1])
        scaled = scores.float() / self.temperature
        self._last = scaled.log_softmax(-1)
        return scaled

    def note(self, token: Tensor) -> None:
        """Look up the token that was sampled from the last logits."""
        if self._last is not None:
            self.chosen.append(self._last.gather(-1, token.unsqueeze(-1)))
        self._last = None


@torch.no_grad()
def complete(
    lm: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float | None = None,
) -> Completions:
    """Continue each prompt `group_size` times.

    Args:
        lm: a transformers causal language model, not wrapped.
        tokenizer: pads on the left.
        prompts: texts; the completions of one prompt lie side by side.
        max_new_tokens: where an unfinished continuation is cut.
        group_size: completions of each prompt.
        temperature: of the sampling; None takes the most probable token (greedy).

    Returns:
        `Completions` with R = len(prompts) x group_size rows.
    """
    device = next(lm.parameters()).device
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    input_ids = encoded["input_ids"].repeat_interleave(group_size, 0)
    prompt_mask = encoded["attention_mask"].repeat_interleave(group_size, 0)
    recorder = _Recorder(1.0 if temperature is None else temperature)
    choice = {"do_sample": False} if temperature is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    was_training = lm.training
    lm.eval()
    sequences = lm.generate(
        input_ids=input_ids,
        attention_mask=prompt_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=LogitsProcessorList([recorder]),
        **choice,
    )
    lm.train(was_training)
    recorder.note(sequences[:, -1])
    new = sequences[:, input_ids.shape[1] :]
    is_end = (new == tokenizer.eos_token_id).int()
    written = (is_end.cumsum(-1) - is_end) == 0  # up to and including the first end
    is_new = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), written], -1)
    logprobs = torch.cat([torch.full_like(prompt_mask, torch.nan, dtype=torch.float32), *recorder.chosen], -1)
    return Completions(
        input_ids=sequences,
        attention_mask=torch.cat([prompt_mask, written.to(prompt_mask.dtype)], -1),
        is_new=is_new,
        logprobs=logprobs.where(is_new, torch.nan),
        texts=tokenizer.batch_decode(new.where(written, tokenizer.pad_token_id), skip_special_tokens=True),
        finished=(is_end.sum(-1) > 0).tolist(),
    )
