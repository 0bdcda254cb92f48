"""The widgets in JupyterLab in headless Chromium: keyboard, mouse, no error in the console; pictures in tmp_path."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import toolkit
from tests.notebook.browser import CHROMIUM, browser, lab, run_all

ROOT = Path(toolkit.__file__).parents[1]
NEEDED = ("jupyterlab", "ipywidgets", "anywidget", "websocket")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
    pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]
CURVES = "[...document.querySelectorAll('.tk-curve')].map((each) => each.getAttribute('d')).join()"
HYDRA = "document.querySelector('.tk-text code')?.textContent"
TIP = "document.querySelector('.tk-tip').textContent"
LABELS = "[...document.querySelectorAll('.widget-label')].map((each) => each.textContent)"
STATUS = f"{LABELS}.find((text) => text.includes('completions,'))"
PAGE = "[...document.querySelectorAll('.widget-toggle-button')].find((each) => each.textContent === '{}').click()"


def test_loss_explorer(tmp_path: Path) -> None:
    cells = ["from toolkit.notebook import loss_explorer\nloss_explorer(compare=['sapo', 'cispo'])"]
    with lab(tmp_path, cells, ROOT) as address, browser(tmp_path) as page:
        run_all(page, address, "document.querySelectorAll('.tk-curve').length === 12")
        assert page.js(HYDRA) == "policy_loss=vanilla"
        before = page.js(CURVES)
        page.js("document.querySelectorAll('.noUi-handle')[1].focus()")
        page.key("ArrowRight")
        after = page.wait_change(CURVES, before)
        assert page.js(HYDRA) == "policy_loss=vanilla policy_loss.cliprange_high=0.21"

        left, top, width, height = page.box(".noUi-handle")
        page.drag(left + width / 2, top + height / 2, left + width / 2 + 40, top + height / 2)
        page.wait_change(CURVES, after)
        overrides = page.js(HYDRA)
        assert "policy_loss.cliprange_low=0." in overrides
        assert overrides.endswith("policy_loss.cliprange_high=0.21")

        left, top, width, height = page.box(".tk-chart svg")
        page.move(left + width * 0.9, top + height / 2)
        assert "no gradient" in page.wait("document.querySelector('.tk-read').textContent")
        page.shot("explorer")
        page.js(PAGE.format("KL"))
        page.wait("document.body.innerText.includes('Expected gradient')")
        page.shot("explorer_kl")
        page.js(PAGE.format("aggregation"))
        page.wait("document.body.innerText.includes('Share of the completion')")
        page.shot("explorer_aggregation")
        assert page.errors == []


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_ten_thousand_tokens(tmp_path: Path, theme: str) -> None:
    cells = [
        "from tests.notebook.made import token_samples\nfrom toolkit.notebook import token_view\n"
        "token_view(token_samples(100, 100), color='ratio')"
    ]
    with lab(tmp_path, cells, ROOT, theme) as address, browser(tmp_path) as page:
        drawn = "document.querySelector('.tk-scroll canvas')?.height > 0"
        run_all(page, address, f"{drawn} && document.querySelectorAll('rect.tk-bar').length > 0")
        assert page.js(STATUS) == "100 of 100 completions, 10,000 tokens"
        left, top, *_ = page.box(".tk-scroll")
        page.move(left + 60, top + 40)
        tip = page.wait(f"document.querySelector('.tk-tip').style.visibility === 'visible' && {TIP}")
        for field in ("position", "ratio", "advantage", "entropy", "coefficient", "weight", "status", "kl", "mismatch"):
            assert field in tip
        page.shot("tokens_hover")

        page.js("document.querySelector('.tk-scroll').focus()")
        page.key("n")
        assert "ratio" in page.wait_change(TIP, tip)
        first = page.js(TIP)
        page.key("ArrowRight")
        assert page.wait_change(TIP, first)

        started = time.monotonic()
        page.js("document.querySelector('input[placeholder^=text]').focus()")
        page.type("prompt 12")
        assert page.wait_change(STATUS, "100 of 100 completions, 10,000 tokens") == "4 of 100 completions, 400 tokens"
        assert time.monotonic() - started < 5
        page.js("[...document.querySelectorAll('.widget-checkbox input')][0].click()")
        time.sleep(1)
        page.shot("tokens_side_by_side")

        page.js("document.querySelector('rect.tk-bar').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
        page.wait_change(STATUS, "4 of 100 completions, 400 tokens")
        assert page.errors == []
