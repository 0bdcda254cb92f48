"""The page: its data, and what a browser without a network makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.made import curve, made_samples, make_run, make_sweep
from toolkit.errors import ConfigError
from toolkit.report.page import page
from toolkit.report.runs import read_runs

pytestmark = pytest.mark.filterwarnings("ignore:the loss of .* cannot be explained")  # made-up settings
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(text: str) -> dict:  # type: ignore[type-arg]
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)  # type: ignore[no-any-return]


def test_the_data_of_a_comparison(tmp_path: Path) -> None:
    make_sweep(tmp_path, {"vanilla": 0.95, "sapo": 0.8})
    data = data_of(page(read_runs([tmp_path])))
    assert [choice["label"] for choice in data["choices"]] == ["policy_loss=vanilla", "policy_loss=sapo"]
    assert data["choices"][1]["differing"]["loss.policy_loss_cfg.loss_type"] == "sapo"
    assert data["choices"][1]["behind"]["clear"] is True
    assert [phase["name"] for phase in data["phases"]] == ["main"]
    assert [metric["name"] for metric in data["phases"][0]["metrics"] if metric["main"]][:2] == ["reward", "entropy"]
    assert len(data["samples"]) == 72
    assert data["runs"][0]["curves"]["main"]["reward"][0][0] == 1


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rewards=[float("nan"), 0.5], samples=made_samples(3))
    text = page(read_runs([folder]))
    assert text.count("</script>") == 2
    data = data_of(text)
    assert data["samples"][0]["prompt"] == "word 0 <b>&amp;</script>"
    assert data["runs"][0]["curves"]["main"]["reward"] == [[2, 0.5]]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_samples_are_thinned_evenly_and_say_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rewards=[0.1], samples=made_samples(100))
    data = data_of(page(read_runs([folder]), most_samples=30))
    assert [sample["step"] * 4 + sample["prompt_index"] for sample in data["samples"]] == [*range(0, 100, 4)]
    assert data["sampled"] == "25 of 100 samples that were kept, one in 4; --samples all shows all."
    assert len(data_of(page(read_runs([folder]), most_samples=None))["samples"]) == 100
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(ConfigError, match="later version: schema 99, this one reads 1"):
        page(read_runs([folder]), most_samples=None)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rewards=curve(0.9, 0)[:10])
    command = [sys.executable, "-m", "toolkit.report"]
    done = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert "It has not come to its end: 10 of 40 steps" in done.stdout
    assert (tmp_path / "a" / "report.html").is_file()
    failed = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1300, 500])
def test_in_a_browser_without_a_network(tmp_path: Path, width: int) -> None:
    make_sweep(tmp_path / "sweep", {"vanilla": 0.95, "sapo": 0.8})
    dom = rendered(tmp_path, page(read_runs([tmp_path / "sweep"])), width)
    assert "policy_loss=vanilla is ahead of policy_loss=sapo" in dom
    assert dom.count("<svg") >= 5
    assert "1 to 20 of 72 samples" in dom
    assert 'class="token clipped"' in dom
    assert dom.count('class="bar"') == 3  # rewards 0, 0.5 and 1
    assert "word 0 &lt;b&gt;&amp;amp;&lt;/script&gt;" in dom


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_fifty_megabytes_of_samples_in_a_browser(tmp_path: Path) -> None:
    long = [{**sample, "completion": "x" * 5000} for sample in made_samples(10_000)]
    folder = make_run(tmp_path / "a", rewards=[0.1, 0.2], samples=long)
    text = page(read_runs([folder]), most_samples=None)
    assert len(text) > 50e6
    assert "1 to 20 of 10,000 samples" in rendered(tmp_path, text, 1000)


def rendered(folder: Path, text: str, width: int) -> str:
    """Return the document as a browser has it when its scripts have run; fails on a message in its console."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    done = subprocess.run(
        [str(BROWSER), *quiet, *offline, f"--user-data-dir={folder / 'browser'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    return done.stdout
