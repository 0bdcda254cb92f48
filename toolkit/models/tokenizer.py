"""The tokenizer of a model, with a token that ends a text and one to pad with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from toolkit.errors import ConfigError, described

LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What transformers raises for what it cannot load."""
MOST_NAMED = 3
"""Tokens in a message."""


def load_tokenizer(path: str, where: str, special: Mapping[str, str | None], *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer; padding goes to the left, with the token that ends a text if it names no other.

    Args:
        path: folder or hub id.
        where: the setting that names it, for messages.
        special: "eos_token" and "pad_token" -> a token of the vocabulary, or None for the tokenizer's choice.
        trust_remote_code: whether Python code that comes with it may run.

    Raises:
        ConfigError: it cannot be loaded, or lacks one of these tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
    except Exception as error:
        if isinstance(error, LOADING) or type(error) is Exception:  # tokenizers raises plain ones
            raise ConfigError(f"{where}: its tokenizer cannot be loaded: {described(error)}") from None
        raise
    for name, token in special.items():
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(
                f"model.{name}={token!r} is not a token of the tokenizer in {where}; choose one of its vocabulary, "
                f"such as {_candidates(tokenizer)}"
            )
        setattr(tokenizer, name, token)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{where}: its tokenizer names no token that ends a text, so no completion would end; set model.eos_token "
            f"to one of its vocabulary, such as {_candidates(tokenizer)}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _candidates(tokenizer: Any) -> str:
    """Name tokens that look like special ones, else the last ones of the vocabulary."""
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = [token for token in tokens if token.startswith("<") and token.endswith(">") and len(token) > 2]
    return ", ".join(map(repr, special[:MOST_NAMED] or tokens[-MOST_NAMED:]))
