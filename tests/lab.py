"""A real JupyterLab on loopback and a real Chromium that works in it: for browser tests, and for what they time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, sync_playwright

from persodpo.reproduce import NOTEBOOKS

#: A laptop's screen, with JupyterLab's side bar open.
SCREEN = {"width": 1366, "height": 768}
#: Seconds for what has to come, and for all cells of a notebook whose stages have nothing to do.
PATIENCE, LONGEST = 60, 300
#: Nothing but loopback is looked up, and nothing is reported home.
FLAGS = [
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--disable-default-apps", "--disable-domain-reliability", "--disable-gpu", "--no-first-run", "--no-pings",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
#: WCAG's contrast of each text in the outputs of a cell with what it stands on.
CONTRASTS = """cell => {
    const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const over = (top, below) => [0, 1, 2].map(k => top[k] * top[3] + below[k] * (1 - top[3])).concat(1);
    const ground = node => {
        const own = node ? parse(getComputedStyle(node).backgroundColor) : [255, 255, 255, 1];
        return own[3] === 1 ? own : over(own, ground(node.parentElement));
    };
    const light = colour => {
        const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = colour.slice(0, 3).map(value => linear(value / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratios = {};
    const walker = document.createTreeWalker(cell.querySelector('.jp-OutputArea'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim().slice(0, 60);
        const style = getComputedStyle(node), seen = node.ownerSVGElement || node.offsetParent;
        if (!text || !seen || style.visibility !== 'visible' || node.closest('style, script, .jp-OutputPrompt')) continue;
        const colour = parse(node.ownerSVGElement ? style.fill : style.color), below = ground(node);
        const [a, b] = [light(over(colour, below)), light(below)];
        ratios[text] = Math.min((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), ratios[text] ?? 21);
    }
    return ratios;
}"""
#: Milliseconds from a key's press to the paint of the view that it changes.
TIMER = """cell => {
    window.moves = [];
    if (cell.timed) return;
    cell.timed = true;
    let pressed = 0;
    const start = () => { pressed = performance.now(); };
    addEventListener('keydown', start, true);
    addEventListener('change', start, true);  // a menu's own keys are the browser's
    new MutationObserver(changes => {
        const nodes = changes.flatMap(change => [...change.addedNodes]);
        if (!pressed || !nodes.some(node => node.querySelector?.('.persodpo-view'))) return;
        const began = pressed;
        pressed = 0;
        requestAnimationFrame(() => requestAnimationFrame(() => window.moves.push(performance.now() - began)));
    }).observe(cell, {childList: true, subtree: true});
}"""


def browser_path() -> str | None:
    """Return the Chromium of this machine, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("PERSODPO_CHROMIUM") or next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve copies of the notebooks from ``folder``; yield the address, its token in it."""
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    news = folder / "lab_settings" / NEWS
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    parts = ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")
    places = {f"JUPYTER{part}_DIR": str(folder / part.lower()) for part in parts}
    settings = {
        "ServerApp.root_dir": str(folder / "notebooks"), "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.ip": "127.0.0.1", "ServerApp.open_browser": False, "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True, "LabApp.news_url": None, "LabApp.extension_manager": "readonly",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in settings.items())]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **places, "JUPYTER_TOKEN": token}, stdout=log, stderr=log
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _await(f"{address}/api/status?token={token}", process, folder / "server.log")
            yield f"{address}/lab?token={token}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@dataclass
class Browser:
    """A page in JupyterLab.

    Attributes:
        page: The page.
        folder: Where its notebooks lie.
        outside: Addresses that were asked for and are not on loopback.
        complaints: What the page's own code complained of.
    """

    page: Page
    folder: Path
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def run(self, name: str) -> list[dict[str, Any]]:
        """Open a notebook and run all cells; return them with their outputs."""
        open_it = "name => window.jupyterapp.commands.execute('docmanager:open', {path: name}).then(() => null)"
        self.page.evaluate(open_it, name)
        self.page.wait_for_function(
            """name => {
                const panel = window.jupyterapp.shell.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return panel?.context?.path === name && kernel?.status === 'idle' && panel.content.model.cells.length > 0;
            }""",
            arg=name,
            timeout=PATIENCE * 1000,
        )
        self.page.evaluate("() => { window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells')"
                           ".then(() => { window.ran = true; }); }")  # fmt: skip
        self.page.wait_for_function("() => window.ran", timeout=LONGEST * 1000)
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")

    def close(self) -> None:
        """Close the notebook without saving, and shut its kernel down."""
        self.page.evaluate(
            """async () => {
                const panel = window.jupyterapp.shell.currentWidget;
                await panel.sessionContext.shutdown();
                panel.context.model.dirty = false;
                panel.dispose();
            }"""
        )

    def cell(self, number: int) -> Locator:
        """Scroll to a cell and return it."""
        self.page.evaluate(
            """async number => {
                const book = window.jupyterapp.shell.currentWidget.content;
                book.activeCellIndex = number;
                await book.scrollToItem(number, 'start', 0);
            }""",
            number,
        )
        cell = self.page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{number}"]')
        cell.wait_for(timeout=PATIENCE * 1000)
        return cell

    def theme(self, name: str) -> None:
        """Switch JupyterLab's theme: JupyterLab Light or JupyterLab Dark."""
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        self.page.wait_for_function(
            "dark => document.body.dataset.jpThemeLight === String(!dark)", arg="Dark" in name, timeout=PATIENCE * 1000
        )
        self.page.wait_for_timeout(500)

    def time_moves(self, cell: Locator, handle: Locator, keys: list[str]) -> list[float]:
        """Press keys, one move when the last is painted; several keys, set apart by blanks, make one move.

        Returns:
            Milliseconds that each move took.
        """
        cell.evaluate(TIMER)
        handle.focus()
        for number, move in enumerate(keys, start=1):
            for key in move.split():
                self.page.keyboard.press(key)
            self.page.wait_for_function("number => window.moves.length >= number", arg=number, timeout=PATIENCE * 1000)
        return self.page.evaluate("() => window.moves")


@contextmanager
def lab(folder: Path) -> Iterator[Browser]:
    """Start both; yield the browser on JupyterLab's first page."""
    path = browser_path()
    if path is None:
        raise RuntimeError(
            "There is no Chromium: `apt install chromium`, or name one with PERSODPO_CHROMIUM=/path/to/chromium."
        )
    with server(folder) as address, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"), executable_path=path, args=FLAGS, viewport=SCREEN,
            chromium_sandbox=os.geteuid() != 0, device_scale_factor=1,
        )  # fmt: skip
        try:
            browser = Browser(context.new_page(), folder / "notebooks")
            page = browser.page
            page.on("request", lambda request: browser.outside.append(request.url) if _outside(request.url) else None)
            page.on("pageerror", lambda error: browser.complaints.append(str(error)))
            page.goto(address)
            page.wait_for_function("() => window.jupyterapp?.restored", timeout=PATIENCE * 1000)
            page.evaluate("() => window.jupyterapp.restored.then(() => null)")
            yield browser
        finally:
            context.close()


def _outside(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in {"http", "https", "ws", "wss"} and parts.hostname != "127.0.0.1"
