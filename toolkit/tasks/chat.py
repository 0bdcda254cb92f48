"""Prompts as the model sees them: the chat template, and the token for the start of a text. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.errors import ConfigError, first_line, listed

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of chat messages."""
TURN = "assistant-turn"
"""Stands for what the assistant has written."""

Message = dict[str, Any]


def wrong_with_messages(messages: Sequence[Any]) -> str | None:
    """Say what is wrong with chat messages; None if nothing is."""
    if not messages:
        return "the list of messages is empty"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message:
            has = f"; it has {listed(message, 'and')}" if isinstance(message, dict) and message else ""
            return f'message {number} is not {{"role": ..., "content": ...}}{has}'
        if message["role"] not in ROLES:
            return f"message {number} has the role {message['role']!r}; it may be {', '.join(ROLES)}"
        if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
            return f"message {number} has no content"
    return None


def check_template(tokenizer: Any, key: str) -> None:
    """Raise if the tokenizer has no chat template.

    Raises:
        ConfigError: it has none.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"{key}: the prompts are chat messages, but the tokenizer has no chat template; give the model's tokenizer "
            "one (tokenizer.chat_template), choose an instruction-tuned model, or give the prompts as text"
        )


def rendered(tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, for_completion: bool = True) -> str:
    """Return chat messages as the model sees them, `for_completion` up to where its turn begins.

    Raises:
        ValueError: the chat template does not accept them; says why.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, add_generation_prompt=for_completion
            )
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template does not accept it: {first_line(error)}") from None


def turns_of(tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[tuple[str, bool]]:
    """Return a conversation in pieces of text, each with whether it is scored: what the assistant writes.

    The token that ends a turn is scored with it; what the template writes after it is not.

    Raises:
        ValueError: the chat template does not accept them, or changes earlier turns when later ones follow.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(tokenizer, messages[:index], tools)
        after = rendered(tokenizer, messages[: index + 1], tools, for_completion=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError("the chat template changes earlier text when a turn is added, so turns cannot be scored")
        turn, end = after[len(before) :], tokenizer.eos_token or ""
        length = turn.rfind(end) + len(end) if end and end in turn else len(turn)
        pieces += [(before[len(done) :], False), (turn[:length], True)]
        done = before + turn[:length]
    return pieces


def between_turns(tokenizer: Any, messages: Sequence[Message], end: str) -> str:
    """Return what the template writes from the end of the assistant's turn on, with `messages`, up to its next turn.

    The conversation before is a made-up one: a template may change earlier turns, which have been sampled.

    Args:
        tokenizer: of the model.
        messages: what is read.
        end: the text of the token that has ended the turn; it is not written again.

    Raises:
        ValueError: the chat template does not accept them, or writes nothing of the assistant's turn.
    """
    before = [{"role": "user", "content": "question"}, {"role": "assistant", "content": TURN}]
    _, turn, rest = rendered(tokenizer, [*before, *messages]).partition(TURN)
    if not turn:
        raise ValueError("the chat template leaves out the assistant's turn before it")
    bare = rest.lstrip()
    return bare[len(end) :] if bare.startswith(end) else rest


def start_of_text(tokenizer: Any) -> str:
    """Return the token that the tokenizer puts before a text, as text; empty if it puts none."""
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if begins else ""
