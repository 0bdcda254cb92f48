"""The widgets in JupyterLab in headless Chromium: keyboard, mouse, no error in the console; pictures in tmp_path."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import toolkit
from tests.notebook.browser import CHROMIUM, browser, lab, run_all
from tests.notebook.made import token_samples
from tests.notebook.test_watch import add

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
BUTTON = "[...document.querySelectorAll('button')].find((each) => each.textContent.trim() === '{}').click()"
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


def test_a_run_is_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cells = [
        f"from toolkit.notebook import watch\nwatch({str(run)!r}, every=0.3)",
        "from tests.notebook.test_batch_model import BOUNDS, packed\nfrom toolkit.notebook import batch_view\n"
        "batch_view([packed()], cu_seq_lens_list=BOUNDS)",
    ]
    with lab(tmp_path, cells, ROOT) as address, browser(tmp_path) as page:
        run_all(page, address, "document.body.innerText.includes('the folder does not exist')")
        for step in range(3):
            add(run, {"phase": "main", "step": step, "reward": 0.1 * step, "entropy": 2.0 - step, "kl_old": 0.01 * step,
                      "clip_fraction_low": 0.02, "clip_fraction_high": 0.05, "tokens_per_second": 900.0})  # fmt: skip
        page.wait("document.body.innerText.includes('3 steps') && document.querySelectorAll('.tk-curve').length === 6")
        before = page.js(CURVES)
        add(run, {"phase": "main", "step": 3, "reward": 0.9})
        page.wait_change(CURVES, before)
        (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in token_samples(4, 20)))
        page.js(BUTTON.format("show samples"))
        page.wait("document.querySelectorAll('.tk-scroll').length === 2", "the samples")
        page.shot("watch")
        (run / "summary.json").write_text(json.dumps({"wall_seconds": 3.0}))
        page.wait("document.body.innerText.includes('ended after 4 steps')")
        page.js("[...document.querySelectorAll('.tk-scroll')].at(-1).scrollIntoView({block: 'center'})")
        page.wait("document.body.innerText.includes('the weights sum to 1')")
        page.shot("batch")
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
