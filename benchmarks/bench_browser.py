"""How long a move takes, from the key to the paint, in a real JupyterLab and a real Chromium on loopback.

Run by `make bench-browser`. A key is pressed when the last move is painted: the number is what a hand feels, kernel,
messages, and the browser's work together. The published responses and the miniature's, sliders and menus.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from persodpo import stages
from persodpo.config import load_profile
from persodpo.runfolder import PROJECT, RELEASE_VARIABLE, RunFolder, git_commit, versions, write_json

sys.path.insert(0, str(PROJECT / "tests"))
import lab

RESULTS = PROJECT / "benchmarks" / "results"
#: The README's picture of sliders that were moved.
PICTURE = PROJECT / "figures" / "mini" / "explore_quality.png"
#: Milliseconds that the median move may take on the published responses.
BOUND = 200
#: What is moved: call, which control of its kind, keys.
MOVES = {
    "a weight": ("quality", ".noUi-handle >> nth=0", ["ArrowRight"] * 20),
    "a threshold": ("quality", ".noUi-handle >> nth=5", ["ArrowLeft"] * 10),
    "the dialogue": ("responses", "select >> nth=2", ["Space ArrowDown Enter"] * 20),
    "the cursor": ("training", ".noUi-handle >> nth=1", ["ArrowLeft"] * 20),
}
SETUP = """from persodpo import explore
from persodpo.runfolder import RunFolder
from persodpo.config import load_profile

run = RunFolder(load_profile({source!r}))"""


def measure(browser: lab.Browser, source: str) -> dict[str, dict[str, float]]:
    """Open the panels on a profile and time their moves."""
    doors = list(dict.fromkeys(door for door, _, _ in MOVES.values()))
    cells = [SETUP.format(source=source), *(f"panel = explore.{door}(run)\npanel" for door in doors)]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, browser.folder / "made.ipynb")
    browser.open("made.ipynb")
    browser.run_all(300)
    found = {}
    for name, (door, control, keys) in MOVES.items():
        cell = browser.cell(1 + doors.index(door))
        found[name] = lab.summary(lab.time_moves(browser, cell, cell.locator(control), keys))
    if source == "mini":
        browser.picture(1, PICTURE, ".jp-OutputArea")
    browser.close()
    return found


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Return the table that the README shows."""
    lines = ["| moved | responses | median | 95th percentile | moves |", "| --- " * 5 + "|"]
    for responses, moves in measured.items():
        for name, row in moves.items():
            times = f"{row['median ms']:.0f} ms | {row['95th percentile ms']:.0f} ms"
            lines.append(f"| {name} | {responses} | {times} | {row['moves']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    if not os.environ.get(RELEASE_VARIABLE):
        raise SystemExit(f"{RELEASE_VARIABLE} is not set: name the folder of the published files.")
    with tempfile.TemporaryDirectory() as folder:
        places = [f"paths.{name}={folder}/{name}" for name in ("runs", "figures", "release")]
        published = load_profile("release", places)
        source = Path(folder) / "published.yaml"
        source.write_text(published.to_yaml(), encoding="utf-8")
        stages.make(published, "score")
        sources = {"10,347 published": str(source), "the miniature's": "mini"}
        assert len(RunFolder(published).read("scores").dropna(subset="quality")) == 10_347
        with lab.lab(Path(folder) / "lab") as browser:
            measured = {name: measure(browser, each) for name, each in sources.items()}
            chromium = browser.page.context.browser
            noted = {
                "measured": measured, "bound ms": BOUND, "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(), "chromium": chromium.version if chromium else "", "commit": git_commit(),
                "versions": versions(),
            }  # fmt: skip
    (RESULTS / "browser.md").write_text(table(measured), encoding="utf-8")
    write_json(RESULTS / "browser.json", noted)
    print(table(measured))
    slowest = max(row["median ms"] for row in measured["10,347 published"].values())
    if slowest > BOUND:
        raise SystemExit(f"A move takes {slowest:.0f} ms, over {BOUND}.")


if __name__ == "__main__":
    main()
