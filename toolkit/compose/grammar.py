"""What is wrong with an override that Hydra cannot parse, and how to write it; no torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from toolkit.errors import ConfigError

LOOKS_LIKE = "an override looks like key.subkey=value or group=choice"
COMPOSABLE = ("correction", "experiment", "debug")
"""Groups of which several choices may be combined."""
_KEY = r"[~+]*[\w./@-]+"


def quoted(value: str) -> str:
    """Return a text as an override spells it, whatever signs it has."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def why_not_parsed(text: str) -> str:
    """Say why an override cannot be parsed, and what would work."""
    key, equals, value = text.strip().partition("=")
    several = re.split(rf"[\s,]+(?={_KEY}=)", text.strip())
    if not text.strip():
        return f"an override is empty; remove it ({LOOKS_LIKE})"
    if text.startswith("-"):
        return f"{text}: an override has no dashes; try: {text.lstrip('-')}"
    if len(several) > 1 and all("=" in part for part in several):
        each = " ".join(quoted(part.rstrip(",")) for part in several)
        return f"{text!r} holds {len(several)} overrides in one string; give each by itself: {each}"
    if not equals:
        likely = re.fullmatch(rf"({_KEY})[\s:]+(\S+)", text.strip())
        return f"{text} has no value; " + (f"try: {likely[1]}={likely[2]}" if likely else LOOKS_LIKE)
    tidy = f"{key.strip()}={value.strip().lstrip('=').rstrip(',')}"
    if tidy != text and _is_parsed(tidy):
        return f"{text!r} has a sign too many; try: {tidy}"
    if value.startswith("~/"):
        return f"{text}: nothing replaces ~ here; try: {key}=$HOME{value[1:]}"
    if value.startswith("(") and value.endswith(")"):
        return f"{text}: a list has square brackets; try: {key}=[{value[1:-1]}]"
    if value.startswith(("[", "{")):
        return f"{text}: brackets do not match, or an element needs quotes: \"{key}=['first','second']\""
    spelled = f"{key}={quoted(value)}"
    if _is_parsed(spelled):
        return f'{text}: the value has signs that need quotes; write "{spelled}", with both kinds of quotes in a shell'
    return f"{text} cannot be read; {LOOKS_LIKE}"


def _is_parsed(text: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([text])
    except HydraException:
        return False
    return True


def check_values(parsed: Iterable[Override], needed: Iterable[str]) -> None:
    """Raise for overrides that Hydra accepts although they do not do what they say.

    Args:
        parsed: the overrides.
        needed: the top-level keys that every configuration has.

    Raises:
        ConfigError: several choices of a group that takes one, ``None`` for ``null``, or a part that is removed.
    """
    for override in parsed:
        key, text, value = str(override.key_or_group), str(override.input_line), override.value()
        if override.is_delete() and key in needed:
            raise ConfigError(f"{text}: every run needs {key}; leave this out for its default")
        if isinstance(value, list) and "." not in key and key not in (*COMPOSABLE, "plugins"):
            raise ConfigError(f"{text}: {key} takes one choice; add -m to sweep: -m {key}={','.join(map(str, value))}")
        if text.endswith("=None") and "." in key:
            raise ConfigError(f"{text} is the text 'None'; for no value write {key}=null")
