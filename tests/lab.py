"""A real JupyterLab on loopback and a real Chromium that works in it: for browser tests, and for what they time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import statistics
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
#: Height of a screen on which every cell is seen whole, pixels.
TALL = 3000
#: Seconds for what has to come.
PATIENCE = 60
#: Nothing but loopback is looked up, and nothing is reported home.
FLAGS = [
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--disable-default-apps", "--disable-domain-reliability", "--disable-gpu", "--no-first-run", "--no-pings",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
#: JupyterLab's own settings: no news from outside.
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false", "checkForUpdates": False,
    },
}  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser_path() -> str | None:
    """Return the Chromium of this machine, None if there is none."""
    named = os.environ.get("PERSODPO_CHROMIUM")
    return named or next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve copies of the notebooks from ``folder``; yield the address, its token in it."""
    work = folder / "notebooks"
    shutil.copytree(NOTEBOOKS, work, ignore=shutil.ignore_patterns(".*"))
    for name, content in SETTINGS.items():
        (folder / "settings" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "settings" / name).write_text(json.dumps(content))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(16)
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    lab = {"SETTINGS_DIR": "settings", "WORKSPACES_DIR": "workspaces"}
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(folder / part) for name, part in places.items()},
        **{f"JUPYTERLAB_{name}": str(folder / part) for name, part in lab.items()},
        "JUPYTER_TOKEN": token,
    }
    settings = {
        "ServerApp.root_dir": str(work), "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.ip": "127.0.0.1", "ServerApp.open_browser": False, "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True, "LabApp.news_url": None, "LabApp.extension_manager": "readonly",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in settings.items())]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            _await(address, token, process, folder / "server.log")
            yield f"{address}/lab?token={token}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(address: str, token: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5):  # noqa: S310
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


_CONTRASTS = """cell => {
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
    const found = {};
    const walker = document.createTreeWalker(cell.querySelector('.jp-OutputArea'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
        const style = getComputedStyle(node);
        const seen = style.visibility === 'visible' && node.offsetParent;
        if (!text || !seen || node.closest('style, script, button[disabled], .jp-OutputPrompt')) continue;
        const below = ground(node), [a, b] = [light(over(parse(style.color), below)), light(below)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        found[text.slice(0, 60)] = Math.min(ratio, found[text.slice(0, 60)] ?? 21);
    }
    return found;
}"""


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

    def open(self, name: str) -> None:
        """Open a notebook and wait for its kernel."""
        run = "async name => { const app = window.jupyterapp; await app.commands.execute('docmanager:open', {path: name}); }"
        self.page.evaluate(run, name)
        self.page.wait_for_function(
            """name => {
                const panel = window.jupyterapp.shell.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return panel?.context?.path === name && kernel?.status === 'idle' && panel.content.model.cells.length > 0;
            }""",
            arg=name,
            timeout=PATIENCE * 1000,
        )

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

    def run_all(self, seconds: float) -> list[dict[str, Any]]:
        """Run all cells; return them with their outputs."""
        self.page.evaluate("() => { window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells')"
                           ".then(() => { window.ran = true; }); }")  # fmt: skip
        self.page.wait_for_function("() => window.ran", timeout=seconds * 1000)
        return self.cells()

    def cells(self) -> list[dict[str, Any]]:
        """Return the notebook's cells with their outputs, as they would be saved."""
        return self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")

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
        found = self.page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{number}"]')
        found.wait_for(timeout=PATIENCE * 1000)
        return found

    def picture(self, number: int, path: Path, part: str = "") -> None:
        """Save a picture of a cell or a part of it, all of it, on a screen that is high enough."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.set_viewport_size(SCREEN | {"height": TALL})
        try:
            cell = self.cell(number)
            self.page.wait_for_function(
                "cell => [...cell.querySelectorAll('img')].every(image => image.complete)", arg=cell.element_handle()
            )
            self.page.wait_for_timeout(200)
            (cell.locator(part) if part else cell).screenshot(path=str(path))
        finally:
            self.page.set_viewport_size(SCREEN)

    def focused(self) -> str:
        """Return the name of the control that the keyboard acts on, empty if it has none."""
        return self.page.evaluate(
            "() => document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent || ''"
        )

    def contrasts(self, cell: Locator) -> dict[str, float]:
        """Return WCAG's contrast of each text in the outputs of a cell with what it stands on."""
        return cell.evaluate(_CONTRASTS)

    def theme(self, name: str) -> None:
        """Switch JupyterLab's theme: JupyterLab Light or JupyterLab Dark."""
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        self.page.wait_for_function(
            "dark => document.body.dataset.jpThemeLight === String(!dark)", arg="Dark" in name, timeout=PATIENCE * 1000
        )
        self.page.wait_for_timeout(500)


@contextmanager
def lab(folder: Path) -> Iterator[Browser]:
    """Start both; yield the browser on JupyterLab's first page."""
    with server(folder) as address, sync_playwright() as playwright:
        path = browser_path()
        assert path, "no Chromium"
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"), executable_path=path, args=FLAGS, viewport=SCREEN,
            chromium_sandbox=os.geteuid() != 0, device_scale_factor=1,
        )  # fmt: skip
        try:
            page = context.new_page()
            made = Browser(page, folder / "notebooks")
            page.on("request", lambda request: made.outside.append(request.url) if _outside(request.url) else None)
            page.on("pageerror", lambda error: made.complaints.append(str(error)))
            page.goto(address)
            page.wait_for_function("() => window.jupyterapp?.restored", timeout=PATIENCE * 1000)
            page.evaluate("() => window.jupyterapp.restored")
            yield made
        finally:
            context.close()


def _outside(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in {"http", "https", "ws", "wss"} and parts.hostname != "127.0.0.1"


#: A notebook that moves the weights of the profile in a file.
PANEL = """from persodpo import explore
from persodpo.runfolder import RunFolder
from persodpo.config import load_profile

moving = explore.quality(RunFolder(load_profile("{source}")))
moving"""

#: Milliseconds from a key's press to the paint of everything that changes with it.
_TIMER = """cell => {
    window.moves = [];
    if (cell.timed) return;
    cell.timed = true;
    const area = cell.querySelector('.jp-OutputArea');
    const shown = () => [...area.querySelectorAll('.jp-OutputArea-output')].filter(
        output => !output.querySelector('.jupyter-widgets') && !output.matches('.jupyter-widgets'));
    let began = 0;
    const start = () => {
        began = performance.now();
        shown().forEach(output => [...output.children].forEach(node => { node.old = true; }));
    };
    addEventListener('keydown', start, true);
    addEventListener('change', start, true);  // a menu's own keys are the browser's
    new MutationObserver(async () => {
        const left = shown().some(output => output.children.length && [...output.children].every(node => node.old));
        if (!began || left) return;
        const pressed = began;
        began = 0;
        await Promise.all([...area.querySelectorAll('img')].map(image => image.decode()));
        requestAnimationFrame(() => requestAnimationFrame(() => window.moves.push(performance.now() - pressed)));
    }).observe(area, {childList: true, subtree: true});
}"""


def time_moves(browser: Browser, cell: Locator, handle: Locator, keys: list[str]) -> list[float]:
    """Press keys, one when the last is painted; return the milliseconds that each took.

    Several keys, set apart by blanks, make one move.
    """
    cell.evaluate(_TIMER)
    handle.focus()
    for number, move in enumerate(keys, start=1):
        for key in move.split():
            browser.page.keyboard.press(key)
        browser.page.wait_for_function("number => window.moves.length >= number", arg=number, timeout=PATIENCE * 1000)
    return browser.page.evaluate("() => window.moves")


def summary(times: list[float]) -> dict[str, float]:
    """Return median and 95th percentile, milliseconds, and how many there were."""
    ordered = sorted(times)
    return {
        "median ms": round(statistics.median(ordered), 1),
        "95th percentile ms": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
        "moves": len(ordered),
    }


def printed(cell: dict[str, Any]) -> str:
    """Return all that a cell put out, as text."""
    return json.dumps(cell.get("outputs", []))
