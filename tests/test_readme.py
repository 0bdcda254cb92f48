"""README stays true: its Python runs, its commands are understood, its error message is the real one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit
from toolkit.compose.tree import check_command_line
from toolkit.errors import ConfigError
from toolkit.functional.policy import registry

ROOT = Path(toolkit.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("source", blocks("python"), ids=lambda source: source.splitlines()[0])
def test_python_runs_as_printed(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.policy_loss_names()
    monkeypatch.setattr(registry.POLICY_LOSSES, "entries", dict(registry.POLICY_LOSSES.entries))
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("toolkit-train") and "--" not in line and "resume" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (loss,) = (block for block in blocks("python") if block.startswith("# my_loss.py"))
    Path("my_loss.py").write_text(loss)
    monkeypatch.setattr(registry.POLICY_LOSSES, "entries", dict(registry.POLICY_LOSSES.entries))
    monkeypatch.delitem(sys.modules, "my_loss", raising=False)
    words = shlex.split(command)[1:]
    check_command_line([word for word in words if word != "-m"], multirun="-m" in words)


def test_the_error_message_is_the_real_one() -> None:
    (shown,) = (block for block in blocks("text") if "error:" in block)
    command, message = shown.strip().splitlines()
    with pytest.raises(ConfigError) as caught:
        check_command_line(shlex.split(command)[2:])
    assert f"error: {caught.value}" == message


@pytest.mark.parametrize("name", ["train", "test"])
def test_ci_finds_both_commands(name: str) -> None:
    script = (ROOT / ".ci/run").read_text()
    function = script[script.index("command_of() {") : script.index("run_command() {")]
    found = subprocess.run(
        ["bash", "-c", f"{function}\ncommand_of {name}"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert len(found.strip().splitlines()) == 1
    assert found.startswith("python3 -m venv .venv")
    assert found.strip().endswith({"train": "-m toolkit.train", "test": "-m pytest"}[name])


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
