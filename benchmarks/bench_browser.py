"""Latency of a move in a panel: from the key to the paint, in a real JupyterLab and a real Chromium on loopback.

Run by `make bench-browser`. A key is pressed when the last move is painted, so that a move is the kernel's, the messages'
and the browser's work together; on the published responses and on the miniature's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from measuring import machine, pipes, save

from persodpo import stages
from persodpo.config import load_profile
from persodpo.files import PROJECT, RELEASE_VARIABLE
from persodpo.runfolder import RunFolder

sys.path.insert(0, str(PROJECT / "tests"))
import lab

#: The README's picture of sliders.
PICTURE = PROJECT / "docs" / "images" / "explore_quality.png"
#: Milliseconds that the median move may take on the published responses.
BOUND = 200
#: What is moved: panel, which control of its kind, keys.
MOVES = {
    "a weight": ("quality", ".noUi-handle >> nth=0", ["ArrowRight"] * 20),
    "a threshold": ("quality", ".noUi-handle >> nth=5", ["ArrowLeft"] * 10),
    "the dialogue": ("responses", "select >> nth=2", ["Space ArrowDown Enter"] * 20),
    "the smoothing": ("training", ".noUi-handle >> nth=0", ["ArrowRight"] * 15),
}


def measure(browser: lab.Browser, source: str) -> dict[str, dict[str, float]]:
    """Run the panels on a profile and time their moves."""
    panels = list(dict.fromkeys(panel for panel, _, _ in MOVES.values()))
    cells = [
        f"from persodpo import Run, explore\nrun = Run({source!r})",
        *(f"explore.{panel}(run)" for panel in panels),
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, browser.folder / "moves.ipynb")
    browser.run("moves.ipynb")
    latencies = {}
    for name, (panel, control, keys) in MOVES.items():
        cell = browser.cell(1 + panels.index(panel))
        times = browser.time_moves(cell, cell.locator(control), keys)
        middle, slow = (round(float(value), 1) for value in np.percentile(times, [50, 95]))
        latencies[name] = {"median ms": middle, "95th percentile ms": slow, "moves": len(times)}
    if source == "mini":
        browser.cell(1).locator(".jp-Cell-outputArea").screenshot(path=PICTURE)
    browser.close()
    return latencies


def main() -> None:
    """Measure and write the results."""
    if not os.environ.get(RELEASE_VARIABLE):
        raise SystemExit(f"{RELEASE_VARIABLE} is not set: name the folder of the published files.")
    with tempfile.TemporaryDirectory() as folder:
        published = load_profile("release", [f"home={folder}"])
        source = Path(folder) / "published.yaml"
        source.write_text(published.to_yaml(), encoding="utf-8")
        stages.make(published, "score")
        assert RunFolder(published).read("scores")["quality"].count() == 10_347
        with lab.lab(Path(folder) / "lab") as browser:
            measured = {"10,347 published": measure(browser, str(source)), "the miniature's": measure(browser, "mini")}
            chromium = browser.page.context.browser
            here = machine(chromium=chromium.version if chromium else "")
    rows = [
        [name, responses, f"{row['median ms']:.0f} ms", f"{row['95th percentile ms']:.0f} ms", row["moves"]]
        for responses, moves in measured.items()
        for name, row in moves.items()
    ]
    table = pipes(["moved", "responses", "median", "95th percentile", "moves"], rows)
    save("browser", {"measured": measured, "bound ms": BOUND, **here}, table)
    slowest = max(row["median ms"] for row in measured["10,347 published"].values())
    if slowest > BOUND:
        raise SystemExit(f"A move takes {slowest:.0f} ms, over {BOUND}.")


if __name__ == "__main__":
    main()
