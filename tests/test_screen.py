"""What is composed without Hydra, to find mistakes early, is what Hydra composes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from toolkit.compose.overrides import config_folders_in, parse
from toolkit.compose.schemas import register_schemas
from toolkit.compose.screen import choices_of, missing_keys, with_values
from toolkit.compose.tree import LOSS_ONLY, TRAIN, Root, compose_config, groups_of

register_schemas()  # the commands do so first
LINES = (
    "",
    "seed=3 plugins=[] optimizer.betas=[0.8,0.9] optimizer.lr=1e-3",
    "correction=[tis,geo_rs] kl=k3 kl_control=adaptive",
    "experiment=grpo_kl loss.chunk_size=64 loss.aggregation.name=constant",
    "experiment=grpo_kl kl=k1",
    "experiment=[supervised,dr_grpo] debug=smoke",
    "correction=icepop loss.correction.icepop.1.lower=0.2",
    "debug=[coin_flip,overfit] training.steps=7",
    "loss=preset/verl/gspo aggregation=constant loss.aggregation.length=9",
    "mode=eager policy_loss=gspo policy_loss.cliprange_low=1e-4",
)
ALONE = tuple(
    f"{group}={choice}"
    for group, choices in groups_of(TRAIN).items()
    for choice in choices
    if not choice.startswith("preset/")
)


def compare(line: str, root: Root, *others: str) -> None:
    overrides = [*line.split(), *others]
    parsed = parse(overrides)
    base = choices_of(parsed, root.name, config_folders_in(parsed))
    assert base is not None
    screened = OmegaConf.to_container(with_values(base, parsed))
    assert screened == OmegaConf.to_container(compose_config(overrides, root=root))


@pytest.mark.parametrize("line", [*LINES, *random.Random(0).sample(ALONE, 8)])
def test_it_is_what_hydra_composes(line: str) -> None:
    compare(line, TRAIN)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in ALONE if not line.endswith("=null")])
def test_every_choice_is_what_hydra_composes(line: str) -> None:
    compare(line, TRAIN)


@pytest.mark.parametrize("line", ["loss=preset/trl/dapo kl=k3_is_corrected", "policy_loss=cispo mode=eager"])
def test_the_loss_alone(line: str) -> None:
    compare(line, LOSS_ONLY)


def test_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("defaults: [/optimizer/adamw@_here_]\nlr: 0.5\n")
    compare("optimizer=mine", TRAIN, f"hydra.searchpath=['file://{tmp_path}']")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nloss: {policy_loss_cfg: {delta: 4.0}}\n")
    assert choices_of(parse(["experiment=mine"]), "config", [str(tmp_path)]) is None  # it is ${policy_loss}
    (tmp_path / "optimizer" / "odd.yaml").write_text("defaults: [adamw, _self_]\nlr: 0.5\n")
    assert choices_of(parse(["optimizer=odd"]), "config", [str(tmp_path)]) is None


@pytest.mark.parametrize("line", ["~kl", "kl=k1,k3", "+kl=k1", "hydra.job.chdir=true", "seed=${x}", "loss=grop"])
def test_what_is_not_plain_is_left_to_hydra(line: str) -> None:
    assert choices_of(parse([line]), "config", []) is None


def test_missing_keys() -> None:
    parsed = parse(["optimizer.lr=1", "optimizer.lrr=1", "++optimizer.new=1", "optimizer.lr.x=1", "foo=2", "kl=k3"])
    base = choices_of(parsed, "config", [])
    assert base is not None
    assert missing_keys(base, parsed) == ["optimizer.lrr", "optimizer.lr.x", "foo"]
