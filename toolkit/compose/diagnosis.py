"""What is wrong with an override, and which one would work; no torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from toolkit.compose.schemas import SCHEMAS, conf_dir
from toolkit.compose.settings import Setting, settings_in
from toolkit.errors import ConfigError, did_you_mean, first_line, listed, nearest
from toolkit.functional.advantages import advantage, advantage_names
from toolkit.functional.policy.registry import policy_loss, policy_loss_names
from toolkit.schema import Config

OPTIONAL_GROUPS = ("experiment", "debug", "aggregation", "kl", "correction")
"""Groups that need no choice."""
ALIKE = 0.7
"""How much a name must resemble a choice to be a misspelling of it: gpso and gspo 0.75, focal and oreal 0.6."""
TRIED = 5
"""Settings spelled like a wrong one that are tried, the nearest first, until one takes its value."""
NO_GROUPS = ("launch",)
"""Folders of conf/ with files for another program: ``accelerate launch --config_file``."""


def groups_in(*folders: str) -> dict[str, list[str]]:
    """Return every group of these configuration folders with its choices, plugins' losses included."""
    groups: dict[str, set[str]] = {"policy_loss": set(policy_loss_names()), "advantage": set(advantage_names())}
    for folder in folders:
        for path in Path(folder).glob("*/**/*.yaml"):
            group, *choice = path.relative_to(folder).with_suffix("").parts
            if group not in NO_GROUPS:
                groups.setdefault(group, set()).add("/".join(choice))
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def choices_shown(choices: list[str], wrong_choice: str = "") -> list[str]:
    """Return the choices to print; presets, which are many, only if the `wrong_choice` is one (of that project)."""
    folder = wrong_choice.rpartition("/")[0]
    inside = [choice for choice in choices if folder and choice.startswith(f"{folder}/")]
    plain = [choice for choice in choices if "/" not in choice]
    peers = {choice.rpartition("/")[0] for choice in choices if "/" in choice}
    return inside or [*plain, *(f"{peer}/..." for peer in sorted(peers) if wrong_choice.startswith("preset"))] + (
        ["preset/<peer>/<name>"] if peers and not wrong_choice.startswith("preset") else []
    )


def unknown_choice(parsed: list[Override], groups: dict[str, list[str]]) -> str | None:
    """Say which override names a choice that its group does not have; None if all choices exist."""
    for override in parsed:
        key, value = str(override.key_or_group), override.value()
        if key not in groups or override.is_delete():
            continue
        if (key in OPTIONAL_GROUPS and value is None) or (key in ("debug", "experiment") and value == "none"):
            return f"{override.input_line}: leave it out; {key} chooses nothing unless you name a preset"
        wanted = [str(choice) for choice in value] if isinstance(value, list) else [str(value)]
        unknown = [choice for choice in wanted if choice not in groups[key]]
        if unknown:
            from toolkit.peers import counterpart_choice  # only a mistake needs it

            file, _, function = unknown[0].partition(".py:")
            if function and key in ("policy_loss", "advantage"):
                instead = f"plugins=[{file}.py] {key}={function}"
                return f"{override.input_line}: a file is read as a plugin, and then it is a choice; try: {instead}"
            choice = _of_project(unknown[0], groups[key])
            if choice in groups[key]:
                return f"{override.input_line} is not a choice of {key}; try: {key}={choice}"
            elsewhere = counterpart_choice(key, choice, groups)
            if elsewhere is not None:
                return f"{override.input_line} is not a choice of {key}; {elsewhere}"
            best = None if _is_known(choice, groups) else nearest(choice, groups[key], cutoff=ALIKE)
            hint = f"; try: {key}={best}" if best else ""
            likely = choices_shown(groups[key], choice)
            custom = "" if best else _otherwise(key, choice, groups[key], parsed)
            return f"{override.input_line} is not a choice of {key}: choose {listed(likely)}{hint}{custom}"
    return None


def _of_project(choice: str, choices: Collection[str]) -> str:
    """Return ``preset/ms_swift/gspo`` for ``preset/ms-swift/gspo``; the choice as it is if it names no project."""
    projects = {preset.split("/")[1] for preset in choices if preset.startswith("preset/")}
    project, _, name = choice.removeprefix("preset/").partition("/")
    meant = nearest(project.lower().replace("-", "_"), projects, cutoff=ALIKE)
    return f"preset/{meant}/{name}" if name and meant else choice


def _is_known(choice: str, groups: dict[str, list[str]]) -> bool:
    """Whether the last part of a choice is the name of another loss, not a misspelling of one that it resembles."""
    from toolkit.peers import counterpart_choice  # only a mistake needs it

    name = choice.rpartition("/")[2]
    return "/" in choice and (name in groups["policy_loss"] or counterpart_choice("loss", name, groups) is not None)


def _otherwise(group: str, choice: str, choices: Collection[str], parsed: list[Override]) -> str:
    """Say what to do instead of a choice that resembles none; empty if that is unclear."""
    if re.fullmatch(r"[\d.e-]+", choice) and group == "kl":
        return f"; its coefficient is a setting: kl=k3 loss.kl_loss_coef={choice}"
    if choice.lower() in ("false", "off", "no") and "none" in choices:
        return f"; try: {group}=none"
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", choice) or choice.lower() in ("true", "on", "yes", "false", "off", "no"):
        return ""
    if group == "model":
        return f"; for a folder or a model of the hub: model=pretrained model.path={choice}"
    if group in ("policy_loss", "advantage"):
        plugins = [str(override.input_line) for override in parsed if override.key_or_group == "plugins"]
        if plugins:
            names = registered_by_plugins(group)
            what = "policy loss" if group == "policy_loss" else "advantage estimator"
            how = f"write @register_{group}({choice!r}) above its function"
            return f"; {plugins[0]} registers {listed(names, 'and') if names else f'no {what}; {how}'}"
        return f"; a function of yours is read with plugins=[my_file.py], which registers it as {choice!r}"
    return f"; a file of yours, my_conf/{group}/{choice}.yaml, is read with --config-dir my_conf"


def unreadable_file(parsed: list[Override], folders: Iterable[str]) -> str | None:
    """Say which chosen YAML file of these folders is not UTF-8 or holds a list; None if there is none."""
    for override in parsed:
        values = override.value()
        for choice in values if isinstance(values, list) else [values]:
            for folder in folders:
                path = Path(folder, str(override.key_or_group), f"{choice}.yaml")
                if path.is_file() and (why := _why_no_settings(path)):
                    return why
    return None


def _why_no_settings(path: Path) -> str | None:
    content = path.read_bytes()
    try:
        node = OmegaConf.create(content.decode())
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return f"{path}, line {line}: byte {content[error.start]:#x} is not UTF-8; save the file as UTF-8"
    except (YAMLError, OmegaConfBaseException):  # reported where it is composed
        return None
    return f"{path} holds a list; write settings, one a line: key: value" if isinstance(node, ListConfig) else None


def choices_composed(parsed: list[Override], groups: dict[str, list[str]], root: str) -> DictConfig:
    """Compose the configuration with the choices of these overrides, but without their values.

    Must be called where ``compose(root)`` works.

    Raises:
        ConfigError: a user's YAML file is invalid.
    """
    choosing = [o for o in parsed if str(o.key_or_group) in groups or o.key_or_group == "hydra.searchpath"]
    try:
        return compose(root, overrides=[str(o.input_line) for o in choosing])
    except YAMLError as error:
        raise ConfigError(_in_one_line(error)) from None
    except (HydraException, OmegaConfBaseException, ValueError):
        return compose(root)


def _in_one_line(error: YAMLError) -> str:
    """Say where a YAML file is wrong and how."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{problem or ' '.join(str(error).split())}"


def diagnose(parsed: Sequence[Override], groups: dict[str, list[str]], base: DictConfig) -> str | None:
    """Say which key is wrong and which one would work; None if all exist.

    `groups` and `base` are what `groups_in` and `choices_composed` return.
    """
    from toolkit.peers import counterpart  # only a mistake needs it

    listed_keys = _dotted(OmegaConf.to_container(base, resolve=False))
    known = [*listed_keys, *(s.key for s in settings_in(base) if s.key not in listed_keys)]
    settings = {setting.key: setting for setting in settings_in(base)}
    for override in parsed:
        key = str(override.key_or_group)
        is_added = override.is_add() or override.is_force_add() or override.is_delete()
        if override.is_add() and key in known and key not in groups:
            text = str(override.input_line).lstrip("+")
            return f"+{text}: {key} is a setting already; leave out the sign: {text}"
        if key in groups or key in known or key.startswith("hydra") or is_added:
            continue
        elsewhere = counterpart(key.replace("-", "_"), str(override.input_line).partition("=")[2], known)
        if elsewhere is not None:
            return f"{key} is not a setting; {elsewhere}"
        choice = _choice_with(key) if key.partition(".")[0] in groups else None
        if choice is not None:
            return f"{key} is a setting of {choice}; try: {choice} {override.input_line}"
        return unknown_key(key, override, known, groups, settings)
    return None


def _choice_with(key: str) -> str | None:
    """Return the choice of its group, as an override, whose config class has this setting; None if there is none."""
    group, *names = key.split(".")
    for schema in SCHEMAS:
        fields = schema.model_fields
        for name in names:
            if name not in fields:
                break
            inner = fields[name].default
            fields = type(inner).model_fields if isinstance(inner, Config) else {}
        else:
            for path in sorted(Path(conf_dir(), group).glob("*.yaml")):
                if names and f"/schema/{schema.__name__}@" in path.read_text():
                    return f"{group}={path.stem}"
    return None


def what_hydra_says(error: Exception) -> str:
    """Return the message of an error of Hydra in one line."""
    return " ".join(str(error).splitlines()[:2]) or why_unreadable(error)


def why_unreadable(error: BaseException) -> str:
    """Return the first line of an error's message; some errors of OmegaConf do not have one."""
    if str(error).strip():
        return first_line(error)
    return f"a value cannot be read ({type(error).__name__}); look for a ${{ without its }}"


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_dotted(value, f"{prefix}{key}.")]
    return [key for key in keys if not key.endswith("_target_")]


def unknown_key(
    key: str, override: Override, known: list[str], groups: dict[str, list[str]], settings: Mapping[str, Setting]
) -> str:
    """Say that `key` is not a setting, and name the nearest of the `known` ones that takes its value."""
    value, shown = override.value(), str(override.input_line).partition("=")[2]
    value = value.text if isinstance(value, QuotedString) else value

    def takes(name: str) -> bool:
        if name in groups:
            return shown in groups[name]
        return name not in settings or settings[name].takes(value)

    def nearest_of(word: str, names: Mapping[str, str], cutoff: float = 0.6) -> str | None:
        """Return the name, of those by how they are spelled, that resembles the word most and takes the value."""
        matches = get_close_matches(word, names, n=TRIED, cutoff=cutoff)
        return next((names[match] for match in matches if takes(names[match])), None)

    parent, _, last = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    best = nearest_of(last, {k.rpartition(".")[2]: k for k in siblings})
    # A bare name: "steps" means training.steps before that of any other part.
    namesakes = sorted((k for k in known if k.rpartition(".")[2] == last), key=lambda k: not k.startswith("training."))
    if not best and len(namesakes) > 1:
        return f"{key} is not a setting; {listed(namesakes)} are; try: {namesakes[0]}={shown}"
    if not best and siblings and parent:  # the part is right: a setting of another one only if its name is alike
        best = nearest_of(last, {k.rpartition(".")[2]: k for k in known}, cutoff=ALIKE)
    elif not best:
        best = nearest_of(key, {k: k for k in (*known, *groups)})
    best = best or next(filter(takes, namesakes), None)
    if best:
        return f"{key} is not a setting{did_you_mean(key, [best]) or f' (did you mean {best!r}?)'}; try: {best}={shown}"
    if key != key.lower() and (key.lower() in known or key.lower() in groups):
        return f"{key} is not a setting; try: {key.lower()}={shown}"
    keys = siblings if parent and siblings else [*dict.fromkeys([*(k for k in known if "." not in k), *groups])]
    where = parent if siblings and parent else "the top level"
    return f"{key} is not a setting; {where} has: {', '.join(k.rpartition('.')[2] for k in keys)}"


def registered_by_plugins(group: str) -> list[str]:
    """Return the names of ``policy_loss`` or ``advantage`` that functions of a user have."""
    get, names = (policy_loss, policy_loss_names()) if group == "policy_loss" else (advantage, advantage_names())
    return [name for name in names if not get(name).function.__module__.startswith("toolkit.")]
