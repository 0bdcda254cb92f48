"""Composing plain command lines without Hydra, to find mistakes in a fifth of its time; no torch here.

Hydra composes what a command runs with. Before it does, the same files are merged here, so a wrong key or value is
reported without the search path, defaults list and copies that Hydra needs for its general case. Whatever is not plain
(sweeps, removed or added keys, unusual ``defaults``) is left to Hydra. `tests/test_screen.py` compares both.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.compose.schemas import conf_dir, stored_node

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Tree = dict[str, Any]
_PACKAGE = re.compile(r"^# @package (\S+)", re.MULTILINE)
_HERE = re.compile(r"/?([\w/]+)@_here_")
_OVERRIDDEN = re.compile(r"override /?([\w/]+)")
LATE = ("experiment", "debug")
"""Groups whose files change what other groups have set."""


class NotPlain(Exception):
    """Only Hydra can compose this."""


def choices_of(parsed: Sequence[Override], root: str, folders: Sequence[str]) -> DictConfig | None:
    """Compose a command line without its values, as `toolkit.compose.diagnosis.choices_composed` does.

    Args:
        parsed: the overrides.
        root: name of the YAML file in ``conf/``.
        folders: additional configuration folders.

    Returns:
        The configuration; None if it is not plain, or a file does not exist.
    """
    try:
        return OmegaConf.create(_composed(parsed, root, [conf_dir(), *folders]))
    except (NotPlain, OmegaConfBaseException):  # or an interpolation that cannot be read
        return None


def with_values(base: DictConfig, parsed: Sequence[Override]) -> DictConfig:
    """Return a configuration with the values of the overrides; a key that does not exist is added."""
    cfg = copy.deepcopy(base)
    for override in parsed:
        key = str(override.key_or_group)
        if _sets_a_value(override):
            OmegaConf.update(cfg, key, override.value(), force_add=True)
    return cfg


def missing_keys(base: DictConfig, parsed: Sequence[Override]) -> list[str]:
    """Return the keys of overrides that a configuration does not have."""
    keys = [str(o.key_or_group) for o in parsed if _sets_a_value(o) and not _is_added(o)]
    return [key for key in keys if not _has(base, key)]


def adds_what_exists(base: DictConfig, parsed: Sequence[Override]) -> bool:
    """Whether an override with a plus names a key that a configuration has, which Hydra refuses."""
    return any(o.is_add() and _sets_a_value(o) and _has(base, str(o.key_or_group)) for o in parsed)


def _has(node: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in node:
            node = node[part]
        else:
            return False
    return True


def _sets_a_value(override: Override) -> bool:
    key = str(override.key_or_group)
    return not _is_choice(override) and not key.startswith("hydra.")


def _is_choice(override: Override) -> bool:
    key = str(override.key_or_group)
    return "." not in key and (Path(conf_dir(), key).is_dir() or key in LATE)


def _composed(parsed: Sequence[Override], root: str, folders: Sequence[str]) -> Tree:
    if Path(conf_dir(), "local", "default.yaml").is_file() or not all(map(_is_plain, parsed)):
        raise NotPlain
    body, listed = _file(str(Path(conf_dir(), f"{root}.yaml")))
    chosen = {str(o.key_or_group): o.value() for o in parsed if _is_choice(o)}
    defaults = [next(iter(entry.items())) if isinstance(entry, dict) else (entry, None) for entry in listed]
    groups = [group for group, _ in defaults]
    if not set(chosen) <= set(groups) or None in chosen.values():
        raise NotPlain
    presets = [(group, choice) for group in LATE for choice in _as_list(chosen.get(group))]
    changed = dict(change for preset in presets for change in _changes(*preset, folders))
    tree: Tree = {}
    for group, default in defaults:
        if group == "_self_":
            _merge(tree, {key: value for key, value in body.items() if key != "hydra"})
        elif not group.startswith(("optional ", "override ")):
            for choice in _as_list(chosen.get(group, changed.get(group, default))):
                package, node = _node(group, str(choice), folders)
                at_package = functools.reduce(lambda inner, part: {part: inner}, reversed(package), node)
                _merge(tree, at_package, has_targets=True)
    tree.pop("hydra", None)  # of a user's preset
    return tree


def _is_plain(override: Override) -> bool:
    key, text = str(override.key_or_group), str(override.input_line)
    is_changed = override.is_delete() or override.is_sweep_override() or (_is_added(override) and _is_choice(override))
    return key == "hydra.searchpath" or not (is_changed or "$" in text or "@" in key or key.startswith("hydra"))


def _is_added(override: Override) -> bool:
    return override.is_add() or override.is_force_add()


def _as_list(choice: Any) -> list[Any]:
    return choice if isinstance(choice, list) else [] if choice is None else [choice]


def _changes(group: str, choice: str, folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the choices that a preset makes in other groups."""
    for entry in _file(_path_of(group, str(choice), folders))[1]:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            overridden = _OVERRIDDEN.fullmatch(key)
            if overridden is not None:
                yield overridden[1], value


def _node(group: str, choice: str, folders: Sequence[str]) -> tuple[list[str], Tree]:
    """Return where a choice belongs in the configuration, and what it holds."""
    stored = stored_node(group, choice)
    if stored is not None and not Path(conf_dir(), group, f"{choice}.yaml").is_file():
        return group.split("/"), stored
    path = _path_of(group, choice, folders)
    body, defaults = _file(path)
    tree: Tree = {}
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        here = _HERE.fullmatch(entry) if isinstance(entry, str) else None
        if entry == "_self_":
            _merge(tree, body)
        elif here is not None:
            inherited, _, name = here[1].rpartition("/")
            _merge(tree, _node(inherited, name, folders)[1])
        elif not (group in LATE and isinstance(entry, dict) and all(map(_OVERRIDDEN.fullmatch, entry))):
            raise NotPlain
    package = _package(path)
    if package is None or package == "_group_":
        return group.split("/"), tree
    return [] if package == "_global_" else package.split("."), tree


def _path_of(group: str, choice: str, folders: Sequence[str]) -> str:
    for folder in folders:
        path = Path(folder, group, f"{choice}.yaml")
        if path.is_file():
            return str(path)
    raise NotPlain


def _file(path: str) -> tuple[Tree, list[Any]]:
    """Return what a YAML file holds besides its defaults, and its defaults."""
    try:
        body = yaml.load(_text(path), Loader=LOADER) or {}
    except yaml.YAMLError:
        raise NotPlain from None
    if not isinstance(body, dict) or not isinstance(body.get("defaults", []), list):
        raise NotPlain
    return body, body.pop("defaults", [])


def _package(path: str) -> str | None:
    header = _PACKAGE.search(_text(path))
    return None if header is None else header[1]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except ValueError:
        raise NotPlain from None


def _merge(tree: Tree, other: Tree, *, has_targets: bool = False) -> None:
    """Merge mappings in place, as OmegaConf merges: lists and values are replaced.

    Args:
        tree: changed.
        other: what is merged into it.
        has_targets: `tree` is the configuration, in which interpolations have what they refer to; OmegaConf then merges
            into that, so it is left to Hydra.
    """
    for key, value in other.items():
        if has_targets and isinstance(value, dict) and isinstance(tree.get(key), str):
            raise NotPlain
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, has_targets=has_targets)
        else:
            tree[key] = copy.deepcopy(value)
