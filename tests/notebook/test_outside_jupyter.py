"""Tutorials without JupyterLab: as HTML without a kernel or a network, and served live by voila."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import toolkit
from tests.notebook.browser import CHROMIUM, browser, free_port, running, wait_until

ROOT = Path(toolkit.__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.skipif(find_spec("websocket") is None, reason="needs websocket-client"),
]
OUTPUTS = "[...document.querySelectorAll('.jp-OutputArea-output')]"
IMAGES = "[...document.images]"
CURVES = "[...document.querySelectorAll('.tk-curve')].map((each) => each.getAttribute('d')).join()"


@pytest.mark.parametrize("name", ["103_what_each_policy_loss_does", "303_diagnosing_rollout_mismatch"])
def test_every_output_is_shown_without_a_kernel_or_a_network(name: str, tmp_path: Path) -> None:
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    with browser(tmp_path) as page:
        page.call("Network.enable")
        page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        page.call("Page.navigate", url=file.as_uri())
        page.wait("document.readyState === 'complete'", "the page")
        shown = page.js(f"{OUTPUTS}.map((each) => each.querySelector('img, svg') ? 'picture' : each.innerText.trim())")
        assert len(shown) == len(outputs)
        assert all(shown)
        assert shown.count("picture") == len(pictures) > 0
        assert page.js(f"{IMAGES}.length") == len(pictures)
        assert page.js(f"{IMAGES}.every((each) => each.complete && each.naturalWidth > 100 && each.clientWidth > 100)")
        page.shot(name)


def test_voila_serves_the_explorer_live(tmp_path: Path) -> None:
    for name in ("voila", "ipywidgets", "anywidget"):
        pytest.importorskip(name)
    port = free_port()
    folders = {f"JUPYTER_{name.upper()}_DIR": str(tmp_path / name) for name in ("config", "data", "runtime")}
    command = [sys.executable, "-m", "voila", str(TUTORIALS / "103_what_each_policy_loss_does.ipynb")]
    command += ["--no-browser", f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **folders}
    with running(command, tmp_path / "voila.log", environment), browser(tmp_path) as page:
        log = tmp_path / "voila.log"  # a request would run the notebook
        wait_until(lambda: f":{port}/" in log.read_text(errors="replace"), "voila")
        page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        page.wait("document.querySelectorAll('.tk-curve').length >= 12", "the curves of the explorer")
        page.wait("document.querySelectorAll('.noUi-handle').length > 1", "the sliders")
        before = page.js(CURVES)
        page.js("document.querySelectorAll('.noUi-handle')[1].focus()")
        page.key("ArrowRight")
        page.wait_change(CURVES, before)
        assert "policy_loss.cliprange_high=0.21" in page.js("document.body.innerText")
        page.shot("voila")
