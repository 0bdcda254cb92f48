"""README and the pages of ``tutorials/reference`` stay true: code runs, commands compose, messages are real."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import toolkit
from toolkit import PolicyTerms
from toolkit.compose.schemas import conf_dir
from toolkit.compose.tree import check_command_line
from toolkit.errors import ConfigError
from toolkit.explain.__main__ import main

ROOT = Path(toolkit.__file__).parents[1]
README = ROOT / "README.md"
REFERENCE = ROOT / "tutorials/reference"
PAGES = [README, *sorted(REFERENCE.rglob("*.md"))]
MOST_LINES = 200
"""README is read in the first hour; everything longer is a page of its own."""


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.text.splitlines()[0]}"


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(page, language, text) for language, text in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    Block(block.page, "bash", command)
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.splitlines()
    if (command := re.sub(r"\s+#.*", "", line).strip())
]
COMPOSED = [
    command
    for command in COMMANDS
    if re.match(r"(toolkit-train|toolkit-explain|python -m toolkit\.(train|explain)) ", command.text)
    and not re.search(r" --\w| -sc |resume=", command.text)
]
ERRORS = [block for block in BLOCKS if block.language == "text" and "\nerror: " in block.text]


def loss_file() -> str:
    """Return the loss that pages put into a file, the same on each."""
    (loss,) = {block.text for block in PYTHON if block.text.startswith("# my_loss.py")}
    return loss


# -------------------------------------------------------------------- code and commands


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs_as_printed(block: Block) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = compile(block.text, block.page.name, "exec", dont_inherit=True)  # without the __future__ of this file
        exec(code, {"__name__": "readme"})
    after = block.page.read_text().partition(f"```python\n{block.text}```\n\n")[2]
    if after.startswith("```text\n"):
        assert printed.getvalue() == after.removeprefix("```text\n").partition("```")[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", COMPOSED, ids=str)
def test_commands_are_understood(command: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(loss_file())
    monkeypatch.delitem(sys.modules, "my_loss", raising=False)
    words = shlex.split(command.text)
    words = words[3:] if words[0] == "python" else words[1:]
    check_command_line([word for word in words if word != "-m"], multirun="-m" in words)


@pytest.mark.every_case
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_modules_and_files_of_commands_exist(command: Block) -> None:
    for module in re.findall(r"-m (toolkit[\w.]*)", command.text):
        assert importlib.util.find_spec(module) is not None, module
    for name in re.findall(r"\btoolkit-\w+", command.text):
        assert f"\n{name} = " in (ROOT / "pyproject.toml").read_text(), name
    for path in re.findall(r"\b(?:conf|tutorials)/[\w/.]+", command.text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_loss_file_passes_its_check(tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(loss_file())
    (command,) = {block.text for block in COMMANDS if "check my_loss.py" in block.text}
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", ERRORS, ids=str)
def test_error_messages_are_the_real_ones(block: Block) -> None:
    command, message = block.text.strip().splitlines()
    with pytest.raises(ConfigError) as caught:
        check_command_line(shlex.split(command)[2:])
    assert f"error: {caught.value}" == message


def test_there_is_an_error_message() -> None:
    assert ERRORS


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_explanation_is_the_real_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = (block for block in BLOCKS if block.text.startswith("$ python -m toolkit.explain"))
    command, *lines = shown.text.splitlines()
    monkeypatch.setattr(sys, "argv", shlex.split(command)[3:])
    main()
    said = " ".join(capsys.readouterr().out.split())
    for line in lines:
        assert " ".join(line.removesuffix("...").split()) in said, line


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


# -------------------------------------------------------------------- length, links and tables


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.every_case
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], link


def test_every_page_is_linked_from_readme() -> None:
    for page in PAGES[1:]:
        if page.parent == REFERENCE:
            assert f"(tutorials/reference/{page.name}" in README.read_text(), page.name
        else:  # trainers/trl.md: from trainers.md
            index = page.parent.with_suffix(".md")
            assert f"({page.parent.name}/{page.name})" in index.read_text(), page.name


def table_after(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a line that starts with these words, without its head."""
    text = page.read_text()
    table = re.search(r"(^\|.*\n)+", text[text.index(f"\n{heading}") :], flags=re.MULTILINE)
    assert table is not None
    return [line.strip("| ").split(" | ") for line in table[0].splitlines()[2:]]


def test_the_choices_exist() -> None:
    rows = table_after(README, "## The choices")
    assert [re.match(r"`(\w+)=`", row[0])[1] for row in rows] == [  # type: ignore[index]
        "policy_loss", "kl", "aggregation", "correction", "advantage", "mode",
    ]  # fmt: skip
    for name, options, _ in rows:
        for option in re.findall(r"`(\w+)`", options):
            assert Path(conf_dir(), name.split("=`")[0].strip("`"), f"{option}.yaml").is_file(), option


def test_the_table_of_t_is_complete() -> None:
    shown = {name for row in table_after(README, "## Your own loss") for name in re.findall(r"`(\w+)", row[0])}
    behind_metrics = {"reported", "reported_means", "reports", "reported_difference", "means", "without_graph"}
    public = {name for name in {*PolicyTerms.__dataclass_fields__, *vars(PolicyTerms)} if not name.startswith("_")}
    assert shown == public - behind_metrics


def test_the_comparison_is_what_was_measured() -> None:
    measured = {
        row[0]: [row[3], row[4], row[5]] for row in table_after(REFERENCE / "head.md", "<!-- table: bench=bars -->")
    }
    shown = table_after(README, "## How it compares")
    assert shown
    for name, *cells in shown:
        assert measured[name] == cells, name


def loaded(path: Path) -> ModuleType:
    """Return a file outside the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figure_draws_the_table() -> None:
    rows = loaded(REFERENCE / "img/draw_head.py").rows()
    assert len(rows) == len(table_after(REFERENCE / "head.md", "<!-- table: bench=bars -->"))
    assert rows[1] == ("toolkit", 0.87, 220.0)


def test_a_package_index_gets_no_link_that_leads_nowhere() -> None:
    description = loaded(ROOT / "hatch_build.py").description
    made = description("a\n<!-- x -->\n![p](q.png)\n\n[b](c.md#d) [e](https://f) ![g](http://h)\n")
    assert made == "a\nb [e](https://f) ![g](http://h)\n"
    text = description(README.read_text())
    assert not re.search(r"\]\((?!https?://)", text)
    assert text.count("```") == README.read_text().count("```")
