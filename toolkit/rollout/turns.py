"""Episodes of several turns: the environment's answer is read between them, and what was sampled never changes.

A row grows at its end only. Token ids that were sampled stay as they are, because the same text tokenised again may
have others; only what the environment says is tokenised, by itself.

Legend: R rows, P prompt positions, N later positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.distributed import all_gather_objects
from toolkit.rollout.sampler import Completions
from toolkit.tasks import chat
from toolkit.tasks.base import Example
from toolkit.tasks.calls import Failure
from toolkit.tasks.environment import Reply
from toolkit.tasks.episodes import Environment, Episode, Turn

Continue = Callable[[Tensor, Tensor, list[int], int], Completions]
"""(input_ids [n, T], attention_mask [n, T], numbers of the rows, turn from 1) -> the next turn of each."""


@dataclass
class _Row:
    """One episode as tokens, on the host."""

    number: int
    episode: Episode
    input_ids: Tensor
    """[n] int64, without padding."""
    is_new: Tensor
    """[n] bool."""
    logprobs: Tensor
    """[n] NaN where nothing was sampled."""
    num_prompt: int
    num_tokens: int = 0
    """Of the newest turn."""
    finished: bool = False

    def take(self, turn: Completions, index: int) -> None:
        """Append row `index` of sampled turns."""
        is_new = turn.is_new[index].cpu()
        self._append(turn.input_ids[index].cpu()[is_new], turn.logprobs[index].cpu()[is_new], is_new=True)
        self.num_tokens, self.finished = int(is_new.sum()), turn.finished[index]
        self.episode.texts.append(turn.texts[index])

    def read(self, ids: Sequence[int], text: str) -> None:
        """Append an observation, which is not scored."""
        self._append(torch.tensor(ids), torch.full((len(ids),), torch.nan), is_new=False)
        self.episode.observations.append(text)

    def _append(self, ids: Tensor, logprobs: Tensor, *, is_new: bool) -> None:
        self.input_ids = torch.cat([self.input_ids, ids])
        self.is_new = torch.cat([self.is_new, torch.full((len(ids),), is_new)])
        self.logprobs = torch.cat([self.logprobs, logprobs.to(self.logprobs.dtype)])


def play(
    first: Completions,
    examples: Sequence[Example],
    environment: Environment,
    continue_rows: Continue,
    tokenizer: Any,
    *,
    longest: int | None,
) -> Completions:
    """Let the environment answer first turns and the policy continue, until all episodes are over, on all processes.

    Args:
        first: the first turn of each episode; more rows than `examples` only keep a process without work in step.
        examples: of the first rows.
        environment: called after each turn, also after the last.
        continue_rows: samples the next turns; every process calls it equally often.
        tokenizer: of the model.
        longest: tokens of a row that leave room for another turn; None: any number.

    Returns:
        One row for each example. An observation is in `input_ids`, has attention 1 and is not new.
    """
    rows = [_first_row(first, index, example) for index, example in enumerate(examples)]
    going, turn = rows, 1
    while any(all_gather_objects(bool(going := _answered(going, environment, tokenizer, longest)))):
        turn += 1
        device = first.input_ids.device
        if going:
            ids = _stacked([row.input_ids for row in going], tokenizer.pad_token_id).to(device)
            mask = _stacked([torch.ones_like(row.input_ids) for row in going], 0).to(device)
        else:
            ids, mask = first.input_ids[:1], first.attention_mask[:1]
        turns = continue_rows(ids, mask, [row.number for row in going], turn)
        for index, row in enumerate(going):
            row.take(turns, index)
    return _joined(rows, first, tokenizer.pad_token_id)


def _first_row(first: Completions, index: int, example: Example) -> _Row:
    prompt = first.input_ids[index][first.attention_mask[index].bool() & ~first.is_new[index]].cpu()
    nothing = torch.full(prompt.shape, torch.nan, dtype=first.logprobs.dtype)
    row = _Row(index, Episode(example), prompt, torch.zeros_like(prompt, dtype=torch.bool), nothing, len(prompt))
    row.take(first, index)
    return row


def _answered(rows: list[_Row], environment: Environment, tokenizer: Any, longest: int | None) -> list[_Row]:
    """Let the environment answer the newest turns; return the rows that go on, with what it said."""
    replies = environment.step([Turn(row.episode, row.num_tokens, row.finished) for row in rows])
    for row, reply in zip(rows, replies, strict=True):
        _answer(row, reply, environment.max_turns, tokenizer, longest)
    return [row for row in rows if row.episode.end is None]


def _answer(row: _Row, reply: Reply | Failure, max_turns: int, tokenizer: Any, longest: int | None) -> None:
    episode = row.episode
    episode.rewards.append(None if isinstance(reply, Failure) else reply.reward)
    if isinstance(reply, Failure):
        episode.end, episode.failure = "failed", reply
    elif reply.observation is None:
        episode.end = "done"
    elif not row.finished:
        episode.end = "cut"
    elif len(episode.texts) == max_turns:
        episode.end = "max_turns"
    else:
        try:
            text = read_text(tokenizer, episode.example, reply.observation, int(row.input_ids[-1]))
        except ValueError as error:
            episode.end, episode.failure = "failed", Failure(f"its observation: {error}")
            return
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            episode.end, episode.failure = "failed", Failure("its observation has no token")
        elif longest is not None and len(row.input_ids) + len(ids) > longest:
            episode.end = "context"
        else:
            row.read(ids, _shown(reply.observation))


def read_text(tokenizer: Any, example: Example, observation: str | list[chat.Message], end: int) -> str:
    """Return an observation as the policy reads it, after a turn that ended with the token `end`.

    Raises:
        ValueError: chat messages follow a prompt that is text, or the chat template does not accept them.
    """
    if isinstance(example.source, list):
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        return chat.between_turns(tokenizer, messages, tokenizer.decode([end]))
    if not isinstance(observation, str):
        raise ValueError("it is chat messages, but the prompt is text; return a text")
    return observation


def _shown(observation: str | list[chat.Message]) -> str:
    if isinstance(observation, str):
        return observation
    return "\n".join(str(message.get("content", "")) for message in observation)


def _stacked(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Return rows of different lengths [n] as one tensor, padded on the left."""
    width = max(map(len, rows))
    return torch.stack([pad(row, (width - len(row), 0), value=fill) for row in rows])


def _joined(rows: Sequence[_Row], first: Completions, pad_id: int) -> Completions:
    """Return the episodes as [R, P + N] rows, their prompts padded on the left and the rest on the right."""
    episodes = [row.episode for row in rows]
    if not rows:
        return replace(first.first(0), episodes=episodes)
    left = max(row.num_prompt for row in rows)
    right = max(len(row.input_ids) - row.num_prompt for row in rows)
    device = first.input_ids.device

    def together(values: Sequence[Tensor], fill: float) -> Tensor:
        sides = [(left - row.num_prompt, right - len(row.input_ids) + row.num_prompt) for row in rows]
        return torch.stack([pad(v, side, value=fill) for v, side in zip(values, sides, strict=True)]).to(device)

    return Completions(
        input_ids=together([row.input_ids for row in rows], pad_id),
        attention_mask=together([torch.ones_like(row.input_ids) for row in rows], 0),
        is_new=together([row.is_new for row in rows], False),
        logprobs=together([row.logprobs for row in rows], torch.nan),
        texts=[episode.texts[-1] for episode in episodes],
        finished=[row.finished for row in rows],
        episodes=episodes,
    )
