"""Overrides that cannot be parsed, or that Hydra accepts without doing what they say: what works is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from toolkit import ConfigError, LossRunner
from toolkit.compose.grammar import quoted
from toolkit.compose.overrides import options_first, parse
from toolkit.compose.tree import check_command_line, load_loss
from toolkit.explain.__main__ import main as explain

SHELL = ", with both kinds of quotes in a shell"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.resume=résumé", f"write \"training.resume='résumé'\"{SHELL}"),
        ("training.resume=runs/epoch=3", f"write \"training.resume='runs/epoch=3'\"{SHELL}"),
        ("training.resume=a#b", f"write \"training.resume='a#b'\"{SHELL}"),
        ("training.resume=it's", f"write \"training.resume='it\\'s'\"{SHELL}"),
        ("training.resume=~/runs", "try: training.resume=$HOME/runs"),
        ("tracker.project=123", "quote it: \"tracker.project='123'\""),
        ("training.steps=3 seed=2", "holds 2 overrides in one string; give each by itself: 'training.ste"),
        ("training.steps=3, seed=2", "give each by itself: 'training.steps=3' 'seed=2'"),
        ("training.steps=3,", "try: training.steps=3"),
        ("policy_loss==gspo", "try: policy_loss=gspo"),
        ("policy_loss =gspo", "try: policy_loss=gspo"),
        ("policy_loss gspo", "try: policy_loss=gspo"),
        ("policy_loss:gspo", "try: policy_loss=gspo"),
        ("--policy_loss=gspo", "an override has no dashes; try: policy_loss=gspo"),
        ("", "an override is empty"),
        ("optimizer.betas=(0.9,0.99)", "try: optimizer.betas=[0.9,0.99]"),
        ("optimizer.betas=[0.9,0.99", "brackets do not match"),
        ("kl=[k1,full]", "kl takes one choice; add -m to sweep: -m kl=k1,full"),
        ("loss=[grpo,ce]", "loss takes one choice"),
        ("loss.softcap=None", "for no value write loss.softcap=null"),
        ("training.resume=None", "for no value write training.resume=null"),
        ("~seed", "every run needs seed"),
        ("~training", "every run needs training"),
        ("policy_loss.eps=..", "try: policy_loss.cliprange_low="),
    ],
)  # fmt: skip
def test_what_to_write_instead(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command_line([text])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Exception" not in str(caught.value)


@pytest.mark.parametrize("value", ["résumé", "runs/epoch=3", "a#b", "it's", "a, b", "123", "null", "[a", "~/x", "a b"])
def test_what_is_quoted_is_read_as_it_is(value: str) -> None:
    (override,) = parse([f"training.resume={quoted(value)}"])
    assert override.value() == value


def test_what_stays_allowed() -> None:
    (config,) = check_command_line(["correction=[tis,geo_rs]", "loss.softcap=NULL", "~kl", "seed=3"]).configs
    assert config.seed == 3
    assert check_command_line(["training.resume='None'"]).configs[0].training.resume == "None"


def test_dashes_before_an_override() -> None:
    with pytest.raises(ConfigError, match="--policy_loss=gspo: an override has no dashes; try: policy_loss=gspo"):
        options_first(["seed=1", "--policy_loss=gspo"], get_args_parser())
    assert options_first(["seed=1", "--config-dir=x"], get_args_parser()) == ["--config-dir=x", "seed=1"]


# -------------------------------------------------------------------- files of the user's own


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# x\nmode: !mine x\n", "/loss/own.yaml, line 2: could not determine a constructor for the tag '!mine'"),
        ("# x\n- a\n", "/loss/own.yaml holds a list; write settings"),
        ("# x\n# caf\xe9\nmode: eager\n", "/loss/own.yaml, line 2: byte 0xe9 is not UTF-8"),
        ("mode: eager\n", "loss has no _target_; its file must name a config class"),
        ("_target: toolkit.losses.config.GRPOLossConfig\n", "loss has no _target_ but '_target'"),
        ("_target_: toolkit.losses.config.GRPOLosConfig\n", "'GRPOLosConfig' (did you mean 'GRPOLossConfig'?)"),
        ("_target_: GRPOLossConfig\n", "write package.module.GRPOLossConfig"),
    ],
)  # fmt: skip
def test_files_that_hold_no_choice(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "own.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        LossRunner.from_overrides(["loss=own"], config_dir=tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_class_of_a_plugin_file_is_a_target_and_its_fields_are_settings(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "plug_task.py").write_text(
        "from toolkit.tasks.config import SpellBackwardConfig\n\n\n"
        'class Mine(SpellBackwardConfig):\n    """Mine."""\n\n    extra: int = 3\n    """An extra."""\n'
    )
    (tmp_path / "task" / "own.yaml").write_text("_target_: plug_task.Mine\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", f"plugins=[{tmp_path / 'plug_task.py'}]", "task=own"]
    (config,) = check_command_line([*words, "task.num_heldout=12", "task.extra=4"]).configs
    assert (config.task.num_heldout, config.task.extra) == (12, 4)  # type: ignore[attr-defined]


def test_tables_of_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toolkit-explain", "--markdown", "README.md"])
    with pytest.raises(SystemExit):
        explain()
    said = capsys.readouterr().err
    assert said.startswith(f"error: --markdown README.md: there is no such file in {tmp_path}; ")
    assert "Errno" not in said


def test_in_a_list_of_a_program_a_later_value_replaces_an_earlier_one() -> None:
    usual = ["policy_loss.cliprange_low=0.1", "kl=k3"]
    assert load_loss([*usual, "policy_loss.cliprange_low=0.3", "kl=k3"]).policy_options["cliprange_low"] == 0.3
    with pytest.raises(ConfigError, match="kl=k3 and kl=k1 choose kl twice"):
        load_loss([*usual, "kl=k1"])
    with pytest.raises(ConfigError, match=r"set policy_loss\.cliprange_low twice"):
        check_command_line([*usual, "policy_loss.cliprange_low=0.3"])
    (config,) = check_command_line([*usual, "++policy_loss.cliprange_low=0.3"]).configs
    assert config.loss.policy_options["cliprange_low"] == 0.3
