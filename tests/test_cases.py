"""Which cases of a test a run of everything takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CASES, cases_left_out


def test_a_few_of_each_test_and_always_the_same() -> None:
    names = [f"f.py::test_a[{case}]" for case in range(10)] + ["f.py::test_b", "g.py::test_a[1]"]
    left_out = cases_left_out(names)
    assert len(left_out) == 10 - CASES
    assert all(name.startswith("f.py::test_a[") for name in left_out)
    assert cases_left_out(reversed(names)) == left_out


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_file_that_is_named_runs_whole(processes: str, tmp_path: Path) -> None:
    """In a project of its own with this one's conftest: 10 cases, 4 of which run unless the file is named."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\ntestpaths = ['tests']\nmarkers = ['slow', 'every_case']\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('case', range(10))\ndef test_some(case): pass\n\n"
        "@pytest.mark.every_case\n@pytest.mark.parametrize('case', range(10))\ndef test_all(case): pass\n"
    )

    def passed(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-n", processes, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.splitlines()[-1].partition(" in ")[0]

    assert passed("-m", "not slow").startswith(f"{CASES + 10} passed")
    assert passed("-m", "slow").startswith(f"{10 - CASES} passed")
    assert passed("-m", "not slow", "tests/test_it.py").startswith("20 passed")
