"""What is wrong with an override that Hydra cannot parse, and how to write it; no torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from toolkit.compose.diagnosis import choices_shown, groups_in
from toolkit.compose.schemas import conf_dir
from toolkit.errors import ConfigError, listed

LOOKS_LIKE = "an override looks like key.subkey=value or group=choice"
COMPOSABLE = ("correction", "experiment", "debug")
"""Groups of which several choices may be combined."""
_KEY = r"[~+]*[\w./@-]+"


def quoted(value: str) -> str:
    """Return a text as an override spells it, whatever signs it has."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def why_not_parsed(text: str, following: str | None = None) -> str:
    """Say why an override cannot be parsed, and what would work; `following` is the next word of the command line."""
    key, equals, value = text.strip().partition("=")
    several = re.split(rf"[\s,]+(?={_KEY}=)", text.strip())
    if not text.strip():
        return f"an override is empty; remove it ({LOOKS_LIKE})"
    if text.startswith("-"):
        return f"{text}: an override has no dashes; {_without_dashes(text, following)}"
    if len(several) > 1 and all("=" in part for part in several):
        each = " ".join(quoted(part.rstrip(",")) for part in several)
        return f"{text!r} holds {len(several)} overrides in one string; give each by itself: {each}"
    if not equals and following is not None and following.startswith("= "):
        return f"{text} {following} has spaces around the sign; try: {text.strip()}={following[2:]}"
    if not equals:
        likely = re.fullmatch(rf"({_KEY})[\s:]+(\S+)", text.strip())
        return f"{text} has no value; " + (f"try: {likely[1]}={likely[2]}" if likely else _with_value(text, following))
    if key == "kl" and re.fullmatch(r"\w+=[\d.e-]+", value):
        choice, _, coefficient = value.partition("=")
        return f"{text} has two signs; its coefficient is a setting: kl={choice} loss.kl_loss_coef={coefficient}"
    without = re.sub(r",\s*([\]}])", r"\1", text)
    if without != text and _is_parsed(without):
        return f"{text} has a comma before the closing bracket; try: {without}"
    tidy = f"{key.strip()}={value.strip().lstrip('=').rstrip(',')}"
    if tidy != text and _is_parsed(tidy):
        return f"{text!r} has a sign too many; try: {tidy}"
    if value.startswith("~/"):
        return f"{text}: nothing replaces ~ here; try: {key}=$HOME{value[1:]}"
    if value.startswith("(") and value.endswith(")"):
        return f"{text}: a list has square brackets; try: {key}=[{value[1:-1]}]"
    is_balanced = all(value.count(left) == value.count(right) for left, right in ("[]", "{}"))
    if value.startswith(("[", "{")) and not value.endswith(("]", "}")) and is_balanced:
        return f'{text}: a text that begins with a bracket needs quotes: "{key}={quoted(value)}"'
    if value.startswith(("[", "{")):
        return f"{text}: brackets do not match, or an element needs quotes: \"{key}=['first','second']\""
    spelled = f"{key}={quoted(value)}"
    if _is_parsed(spelled):
        return f'{text}: the value has signs that need quotes; write "{spelled}", with both kinds of quotes in a shell'
    return f"{text} cannot be read; {LOOKS_LIKE}"


def _without_dashes(text: str, following: str | None) -> str:
    """Say what to write for an option, such as ``--kl k3`` or ``--lr=1e-4``."""
    from toolkit.peers import counterpart  # only a mistake needs it

    key, equals, value = text.lstrip("-").partition("=")
    key = key.replace("-", "_")
    groups = groups_in(conf_dir())
    value = value if equals or following is None or following.startswith("-") or "=" in following else following
    elsewhere = counterpart(key, value or None) if key not in groups and "." not in key else None
    if elsewhere is not None:
        return elsewhere
    key = key if key in groups or "." in key else setting_called(key) or key
    written = f"[{value}]" if key == "plugins" and value and not value.startswith("[") else value
    return f"try: {key}={written}" if value else _with_value(key, None)


def is_override(name: str) -> bool:
    """Whether a name, which somebody wrote as an option, is a group, a key or a word of another project."""
    from toolkit.peers import counterpart  # only a mistake needs it

    is_known = name in groups_in(conf_dir()) or setting_called(name) is not None
    return "." in name or is_known or counterpart(name.replace("-", "_")) is not None


def setting_called(name: str) -> str | None:
    """Return the setting of a run that has this name, such as ``training.resume``; None if none, or several, have."""
    from toolkit.training.run_config import RunConfig  # only a mistake needs it

    name = name.replace("-", "_")
    if name in RunConfig.model_fields:
        return name
    parts = {part: getattr(field.annotation, "model_fields", {}) for part, field in RunConfig.model_fields.items()}
    matches = [f"{part}.{name}" for part, fields in parts.items() if name in fields]
    return matches[0] if len(matches) == 1 else None


def is_list(key: str) -> bool:
    """Whether a setting of a run, such as ``optimizer.betas``, holds several values."""
    from toolkit.training.run_config import RunConfig  # only a mistake needs it

    part, _, name = key.partition(".")
    field = RunConfig.model_fields.get(part)
    settings = getattr(field.annotation, "model_fields", {}) if field is not None else {}
    return name in settings and isinstance(settings[name].default, (tuple, list))


def _with_value(word: str, following: str | None) -> str:
    """Say what to write for a word without ``=``: the name of a choice, or a key whose value is the next word."""
    groups = groups_in(conf_dir())
    if following is not None and "=" not in following and (word in groups or "." in word):
        return f"try: {word}={following}"
    word = word.rstrip(":")
    pair = re.fullmatch(r"(\w+?)[-:](\S+)", word)
    if pair and pair[1] in groups and pair[2] in groups[pair[1]]:
        return f"try: {pair[1]}={pair[2]}"
    if word in groups and following is not None and "=" not in following:
        return f"try: {word}={following}"
    if word in groups:
        return f"choose {listed(choices_shown(groups[word]))}, e.g. {word}={groups[word][0]}"
    if word == "help":
        return "try: --help"
    if word.endswith(".py"):
        return f"try: plugins=[{word}]"
    if not any(word in choices for choices in groups.values()):
        word = word.lower().replace("-", "_")
    ways = {group: f"{group}={word}" for group, choices in groups.items() if word in choices}
    for group in ("bench", "experiment"):  # a recipe sets more than the loss that it is called by
        if len(ways) > 1:
            ways.pop(group, None)
    if ways:
        return f"try: {' or '.join(ways.values())}"
    return LOOKS_LIKE


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
    parsed = list(parsed)
    check_repeated([override for override in parsed if _is_choice(str(override.key_or_group))])
    for override in parsed:
        key, text, value = str(override.key_or_group), str(override.input_line), override.value()
        if override.is_sweep_override():
            raise ConfigError(f"{text} names several values; name one (toolkit-train -m runs one job for each)")
        if override.is_delete() and key in needed:
            raise ConfigError(f"{text}: every run needs {key}; leave this out for its default")
        if isinstance(value, list) and _is_choice(key) and key not in (*COMPOSABLE, "plugins"):
            several = "add -m to sweep: -m" if len(value) > 1 else "try:"
            raise ConfigError(f"{text}: {key} takes one choice; {several} {key}={','.join(map(str, value))}")
        if text.endswith("=None") and "." in key:
            raise ConfigError(f"{text} is the text 'None'; for no value write {key}=null")


def check_repeated(parsed: Iterable[Override]) -> None:
    """Raise if two overrides set one key to different values, of which Hydra would take the last.

    On a command line that is a slip. In a list of a program, such as ``[*usual, "training.steps=5"]``, a later value is
    meant to replace an earlier one; a later choice is not, because it takes back all that the earlier one set.

    Raises:
        ConfigError: they do; the message says what to write instead.
    """
    earlier: dict[str, Override] = {}
    for override in parsed:
        key = str(override.key_or_group)
        if key.startswith("hydra") or override.is_force_add():
            continue
        first = earlier.setdefault(key, override)
        if first.value() != override.value():
            both = [str(each.input_line).partition("=")[2].strip("[]") for each in (first, override)]
            combined = f", or combine them: {key}=[{','.join(both)}]" if key in (*COMPOSABLE, "plugins") else ""
            raise ConfigError(
                f"{first.input_line} and {override.input_line} set {key} twice; leave one out{combined} (in a script, "
                f"++{override.input_line} replaces an earlier value)"
                if not _is_choice(key)
                else f"{first.input_line} and {override.input_line} choose {key} twice; leave one out{combined}, or "
                f"run both with -m {key}={','.join(both)}"
            )


def _is_choice(key: str) -> bool:
    """Whether a key chooses files: of a group, or plugins."""
    return key == "plugins" or Path(conf_dir(), key).is_dir()
