"""A notebook in JupyterLab in headless Chromium, driven over the browser's debugging protocol.

The driver is a few lines over websocket-client, which JupyterLab brings along: no package to install beside it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 90.0
"""Seconds to wait for anything: a kernel starts slowly on a busy machine."""
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Enter": 13, "Tab": 9, "Home": 36, "End": 35, "n": 78}
IGNORED = ("favicon", "ERR_NAME_NOT_RESOLVED", "ERR_INTERNET_DISCONNECTED", "ERR_PROXY", "ERR_CONNECTION_REFUSED")
"""Parts of messages about a network that a test does not have."""


class Page:
    """One tab."""

    def __init__(self, address: str, folder: Path) -> None:
        import websocket

        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.folder = folder
        self.number = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        text = None
        if message.get("method") == "Runtime.exceptionThrown":
            text = json.dumps(params["exceptionDetails"])[:500]
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
            text = " ".join(str(each.get("value", each.get("description"))) for each in params["args"])
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            text = f"{params['entry']['text']} {params['entry'].get('url', '')}"
        if text is not None and not any(part in text for part in IGNORED):
            self.errors.append(text)

    def js(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression: str, what: str = "") -> Any:
        """Return the value of an expression as soon as it is true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := self.js(expression):
                return value
            time.sleep(0.1)
        self.shot("waited_in_vain")
        raise AssertionError(f"waited for {what or expression}; errors: {self.errors}")

    def wait_change(self, read: str, before: Any) -> Any:
        """Return the value of `read` as soon as it is not `before`."""
        return self.wait(f"(() => {{ const now = {read}; return now !== {json.dumps(before)} && now; }})()")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Return left, top, width and height of the first element, after scrolling it into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{found}.scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.js(
            f"(() => {{ const b = {found}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
        )
        return left, top, width, height

    def mouse(self, kind: str, x: float, y: float, button: str = "left") -> None:
        pressed = {"buttons": 1} if kind != "mouseMoved" or button == "left" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, **pressed)

    def move(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y, "none")

    def click(self, x: float, y: float) -> None:
        self.move(x, y)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.move(x, y)
        self.mouse("mousePressed", x, y)
        for share in (0.25, 0.5, 0.75, 1.0):
            self.mouse("mouseMoved", x + share * (to_x - x), y + share * (to_y - y))
        self.mouse("mouseReleased", to_x, to_y)

    def key(self, name: str) -> None:
        text = {"text": name} if len(name) == 1 else {}
        common: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def shot(self, name: str, clip: dict[str, float] | None = None) -> Path:
        """Write a picture of the tab, or of a part of it: x, y, width, height and scale."""
        path, part = self.folder / f"{name}.png", {} if clip is None else {"clip": clip}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **part)["data"]))
        return path


@contextlib.contextmanager
def browser(folder: Path, size: tuple[int, int] = (1500, 1100)) -> Iterator[Page]:
    """Start Chromium with one empty tab."""
    profile = folder / "browser"
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    arguments += [f"--window-size={size[0]},{size[1]}", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    with running([str(CHROMIUM), *arguments, "about:blank"], folder / "chromium.log"):
        port_file = profile / "DevToolsActivePort"
        wait_until(port_file.is_file, "the browser")
        port = port_file.read_text().split()[0]
        wait_until(lambda: _tabs(port), "a tab")
        yield Page(_tabs(port)[0]["webSocketDebuggerUrl"], folder)


def _tabs(port: str) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        return [each for each in json.load(answer) if each["type"] == "page"]
    return []


@contextlib.contextmanager
def lab(folder: Path, cells: Sequence[str], path: Path, theme: str = "JupyterLab Light") -> Iterator[str]:
    """Write a notebook of these cells, serve it by JupyterLab, and yield its address."""
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    root = folder / "notebooks"
    root.mkdir(exist_ok=True)
    nbformat.write(notebook, root / "test.ipynb")
    settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')  # it would cover the page
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    port = free_port()
    folders = {f"JUPYTER_{name.upper()}_DIR": str(folder / name) for name in ("config", "data", "runtime")}
    environment = {**os.environ, "PYTHONPATH": str(path), **folders}
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--LabApp.news_url=None"]
    with running(command, folder / "lab.log", environment):
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_served(f"{address}/api"), "JupyterLab")
        yield f"{address}/lab/tree/test.ipynb?reset"


def is_served(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address) as answer:
        return bool(answer.status == 200)
    return False


def run_all(page: Page, address: str, done: str) -> None:
    """Open a notebook, run its cells, and wait until `done` is true on the page."""
    page.call("Page.navigate", url=address)
    page.wait("document.querySelectorAll('.jp-Notebook .jp-CodeCell').length > 0", "the notebook")
    left, top, width, height = page.box(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    page.click(left + width / 2, top + height / 2)  # the status bar describes the notebook that was clicked last
    # Before the kernel is idle in the status bar, running cells opens a dialog that asks for a kernel.
    page.wait("document.body.innerText.includes('| Idle')", "the kernel")
    time.sleep(0.5)
    for name in ("Run", "Run All Cells"):
        label = "(each.querySelector('.lm-MenuBar-itemLabel, .lm-Menu-itemLabel') || each).textContent.trim()"
        items = "[...document.querySelectorAll('.lm-MenuBar-item, .lm-Menu-item')]"
        item = f"{items}.find((each) => {label} === '{name}')"
        page.wait(f"!!{item}", name)
        left, top, width, height = page.js(
            f"(() => {{ const b = {item}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
        )
        page.click(left + width / 2, top + height / 2)
    page.wait(done, "the widgets")


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()


def wait_until(is_done: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_done():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
