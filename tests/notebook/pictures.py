"""Take the pictures of the widgets: ``python -m tests.notebook.pictures RUN`` with the folder of a run.

Needs JupyterLab and Chromium. Writes ``explorer.png``, ``tokens.png`` and ``watch.png`` into ``tutorials/images``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import toolkit
from tests.notebook.browser import Page, browser, lab, run_all

ROOT = Path(toolkit.__file__).parents[1]
IMAGES = ROOT / "tutorials/images"
WIDGETS = {
    "explorer": ("loss_explorer(compare=['sapo', 'cispo'])", "document.querySelectorAll('.tk-curve').length === 12"),
    "tokens": (
        "import json\nsamples = map(json.loads, open({run!r} + '/samples.jsonl'))\n"
        "token_view([each for each in samples if each['step'] == 10], color='coefficient')",
        "document.querySelector('.tk-scroll canvas')?.height > 0 && !!document.querySelector('rect.tk-bar')",
    ),
    "watch": ("watch({run!r})", "document.body.innerText.includes('ended after')"),
}
"""Name of the picture -> the cell, and what is on the page when it is there."""
OUTPUT = "document.querySelector('.jp-OutputArea-output .lm-Widget')"


def take(page: Page, name: str) -> None:
    """Write a picture of the first output of the notebook."""
    page.js(f"{OUTPUT}.scrollIntoView()")
    left, top, width, height = page.js(
        f"(() => {{ const b = {OUTPUT}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
    )
    page.shot(name, {"x": left, "y": top, "width": width, "height": min(height, 1100), "scale": 1})


def main(run: str) -> None:
    """Open each widget in JupyterLab and write its picture."""
    for name, (cell, is_there) in WIDGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            cells = [f"from toolkit.notebook import *\n{cell.format(run=run)}"]
            with lab(Path(folder), cells, ROOT) as address, browser(Path(folder), (1620, 1250)) as page:
                run_all(page, address, is_there)
                page.folder = IMAGES
                take(page, name)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
