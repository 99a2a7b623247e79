"""The notebooks as researchers use them: in a real JupyterLab, in a real Chromium, under the miniature.

Run by `make test-browser`, which runs the miniature first, so that its stages skip here. `PERSODPO_SCREENSHOTS` names a
folder for pictures of every cell that shows something.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import lab
import nbformat
import pytest

from persodpo import stages
from persodpo.config import load_profile, with_overrides
from persodpo.explore.moving import moved
from persodpo.method import SIGNALS
from persodpo.pairs import measured, rebuild
from persodpo.reproduce import notebook_files
from persodpo.runfolder import PROJECT, RELEASE_VARIABLE, RunFolder

pytestmark = pytest.mark.browser
START = "00_start_here.ipynb"
BOOKS = sorted(path.name for path in notebook_files())
#: Seconds for all cells of a notebook whose stages have nothing to do.
LONGEST = 300
#: Milliseconds for a move of a slider, from the key to the paint, on a quiet machine.
AT_ONCE = 200
SHOWN = {"image/png", "text/html", "application/vnd.jupyter.widget-view+json"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    if lab.browser_path() is None:
        pytest.fail(
            "There is no Chromium: `apt install chromium`, or name one with PERSODPO_CHROMIUM=/path/to/chromium."
        )
    with lab.lab(tmp_path_factory.mktemp("lab")) as browser:
        yield browser


@pytest.fixture
def browser(opened):
    """The browser, with nothing open before and after; nothing may be asked of the world outside."""
    yield opened
    opened.close()
    assert opened.outside == []
    assert opened.complaints == []


def places(cells: list[dict], call: str) -> int:
    """Return the number of the code cell that holds ``call``."""
    (found,) = [
        number for number, cell in enumerate(cells) if cell["cell_type"] == "code" and call in "".join(cell["source"])
    ]
    return found


def errors(cells: list[dict]) -> list[str]:
    """Return errors, and what was written to stderr."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [
        json.dumps(output)[:2000]
        for output in outputs
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def showing(cells: list[dict]) -> list[int]:
    """Return the numbers of the cells that show a picture, a table or controls."""
    return [
        number
        for number, cell in enumerate(cells)
        if any(SHOWN & set(output.get("data", {})) for output in cell.get("outputs", []))
    ]


@pytest.mark.parametrize("name", BOOKS)
def test_all_cells_run_and_fit_a_laptop(name, browser, tmp_path):
    browser.open(name)
    cells = browser.run_all(LONGEST)
    assert errors(cells) == []
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    folder = Path(os.environ.get("PERSODPO_SCREENSHOTS", tmp_path))
    wide = {}
    for number in showing(cells):
        cell = browser.cell(number)
        over = cell.evaluate("""cell => Math.max(0, ...[...cell.querySelectorAll('.jp-OutputArea-output')].map(
            output => output.scrollWidth - output.clientWidth))""")
        if over > 1:
            wide[number] = over
        browser.picture(number, folder / f"{name[:2]}-{number:02}.png")
    assert wide == {}, "pixels by which outputs are wider than their column, by cell"
    assert showing(cells), "something is shown"


def pair_count(browser, cell) -> int:
    """Return the number of pairs that the panel shows."""
    text = cell.locator("tr", has_text=re.compile(r"^\s*pairs\s")).first.locator("td").last.inner_text()
    return int(text.replace(",", ""))


def expected_pairs(run: RunFolder, weights: dict[str, float], low: float, high: float) -> int:
    """Return the number of pairs that the package makes of these settings."""
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    changed = [f"scoring.weights={json.dumps(weights)}", f"pairs.low_quantile={low}", f"pairs.high_quantile={high}"]
    made = rebuild(responses, measured(responses, scores), dialogues, with_overrides(run.profile, changed))
    return len(made.pairs)


def test_moved_sliders_show_the_pairs_that_the_package_makes(browser):
    run = RunFolder(load_profile("mini"))
    own = run.profile.scoring.weights.model_dump()
    browser.open(START)
    cells = browser.run_all(LONGEST)
    cell = browser.cell(places(cells, "explore.quality"))
    assert pair_count(browser, cell) == len(run.read("pairs/perso"))
    handles = cell.locator(".noUi-handle")
    lab.time_moves(browser, cell, handles.nth(0), ["ArrowRight"] * 20)
    weights = own
    for step in range(1, 21):
        weights = moved(weights, "coherence", round(own["coherence"] + 0.01 * step, 2), own)
    assert pair_count(browser, cell) == expected_pairs(run, weights, 0.4, 0.6) != len(run.read("pairs/perso"))
    lab.time_moves(browser, cell, handles.nth(len(SIGNALS)), ["ArrowLeft"] * 5)  # the low threshold
    assert pair_count(browser, cell) == expected_pairs(run, weights, 0.35, 0.6)
    cell.get_by_role("button", name="Back to the profile's").press("Enter")
    until = time.monotonic() + lab.PATIENCE
    while pair_count(browser, cell) != len(run.read("pairs/perso")):
        assert time.monotonic() < until
        browser.page.wait_for_timeout(50)


def test_controls_are_reached_by_key_in_their_order_and_named(browser):
    browser.open(START)
    cells = browser.run_all(LONGEST)
    for call in ("explore.responses", "explore.arms", "explore.training", "explore.start"):
        cell = browser.cell(places(cells, call))
        controls = cell.locator(".jupyter-widgets").locator("select, input, button:not([disabled])")
        names = controls.evaluate_all("all => all.map(one => one.labels?.[0]?.textContent || one.textContent)")
        assert all(names)
        assert len(set(names)) == len(names)
        controls.first.focus()
        reached = [browser.focused()]
        for _ in names[1:]:
            browser.page.keyboard.press("Tab")
            reached.append(browser.focused())
        expected = [name for name in names if name in reached]
        assert [name for name in reached if name in names] == expected
        assert expected == names


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_texts_are_told_from_their_ground_in_both_themes(theme, browser, tmp_path):
    browser.open(START)
    cells = browser.run_all(LONGEST)
    browser.theme(theme)
    folder = Path(os.environ.get("PERSODPO_SCREENSHOTS", tmp_path))
    faint = {}
    try:
        for number in showing(cells):
            cell = browser.cell(number)
            faint |= {f"{number}: {text}": ratio for text, ratio in browser.contrasts(cell).items() if ratio < 4.5}
            browser.picture(number, folder / f"{theme.split()[1].lower()}-{number:02}.png")
    finally:
        browser.theme("JupyterLab Light")
    assert faint == {}, "WCAG's contrast, below 4.5"


def notebook(browser, *cells: str) -> str:
    """Write a notebook beside the others and open it."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, browser.folder / "made.ipynb")
    browser.open("made.ipynb")


@pytest.mark.skipif(not os.environ.get(RELEASE_VARIABLE), reason=f"{RELEASE_VARIABLE} is not set: no published files")
def test_the_published_responses_move_at_once(browser, tmp_path):
    source = tmp_path / "published.yaml"
    profile = load_profile("release", [f"paths.{name}={tmp_path / name}" for name in ("runs", "figures", "release")])
    source.write_text(profile.to_yaml())
    stages.make(profile, "score")
    notebook(browser, *lab.PANEL.format(source=source).split("\n\n"))
    cells = browser.run_all(LONGEST)
    cell = browser.cell(places(cells, "explore.quality"))
    assert pair_count(browser, cell) == 9_184
    times = lab.time_moves(browser, cell, cell.locator(".noUi-handle").nth(0), ["ArrowRight"] * 15)
    # `make bench-browser` holds the bound itself on a quiet machine; here others may be at work.
    assert lab.summary(times)["median ms"] < 2 * AT_ONCE


EXAMPLE = [
    "name=mine", "dialogues.source=csv", f"dialogues.csv_file={PROJECT / 'data/example/dialogues.csv'}",
    "generation.source=csv", f"generation.csv_file={PROJECT / 'data/example/completions.csv'}", "policy.model=small",
    "scoring.compute.accept_failed_probes=[coherence, c_score, ue_score]", "training.arms=[perso]",
]  # fmt: skip


def test_a_button_trains_an_arm(browser, tmp_path):
    source = tmp_path / "mine.yaml"
    folders = [f"paths.{name}={tmp_path / name}" for name in ("runs", "figures")]
    profile = load_profile("mini", [*EXAMPLE, *folders])
    source.write_text(profile.to_yaml())
    stages.make(profile, "pairs")
    notebook(browser, "from persodpo import explore", f"explore.start({str(source)!r})")
    assert errors(browser.run_all(LONGEST)) == []
    browser.page.get_by_role("button", name="train", exact=True).click()
    browser.page.get_by_text(re.compile("persodpo train --profile .* is done")).wait_for(timeout=1000 * LONGEST)
    assert RunFolder(profile).read("training/perso/log")["step"].max() > 2
