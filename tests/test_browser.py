"""The notebooks as researchers use them: in a real JupyterLab, in a real Chromium, under the miniature.

Run by `make test-browser`, which runs the miniature first, so that its stages skip here. `PERSODPO_SCREENSHOTS` names a
folder for pictures of the panels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import lab
import pytest

from persodpo.config import load_profile, with_overrides
from persodpo.pairs import measured, rebuild
from persodpo.reproduce import notebook_files
from persodpo.runfolder import RunFolder

pytestmark = pytest.mark.browser
EXPLORE = "explore.ipynb"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with lab.lab(tmp_path_factory.mktemp("lab")) as browser:
        yield browser


@pytest.fixture
def browser(opened):
    """The browser, with nothing open before and after; nothing may be asked of the world outside."""
    yield opened
    opened.close()
    assert opened.outside == []
    assert opened.complaints == []


def places(cells: list[dict], call: str) -> list[int]:
    """Return the numbers of the code cells that hold ``call``."""
    code = ((number, cell) for number, cell in enumerate(cells) if cell["cell_type"] == "code")
    return [number for number, cell in code if call in "".join(cell["source"])]


@pytest.mark.parametrize("name", [path.name for path in notebook_files()])
def test_all_cells_run_without_an_error_and_fit_a_laptop(name, browser):
    cells = browser.run(name)
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"] == []
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    over = """cell => Math.max(0, ...[...cell.querySelectorAll('.jp-OutputArea-output')].map(
        output => output.scrollWidth - output.clientWidth))"""
    wide = {number: browser.cell(number).evaluate(over) for number, cell in enumerate(cells) if cell.get("outputs")}
    assert wide, "something is shown"
    assert max(wide.values()) <= 1, f"pixels by which outputs are wider than their column, by cell: {wide}"


def expected_pairs(run: RunFolder, shares: dict[str, float], low: float) -> int:
    """Return the number of pairs that the package makes of weights in these proportions."""
    weights = {name: share / sum(shares.values()) for name, share in shares.items()}
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    profile = with_overrides(run.profile, [f"scoring.weights={json.dumps(weights)}", f"pairs.low_quantile={low}"])
    return len(rebuild(responses, measured(responses, scores), dialogues, profile).pairs)


def test_sliders_moved_by_key_show_the_pairs_that_the_package_makes_on_one_screen(browser):
    run = RunFolder(load_profile("mini"))
    own, low = run.profile.scoring.weights.model_dump(), run.profile.pairs.low_quantile
    (place,) = places(browser.run(EXPLORE), "explore.quality(run)")
    cell = browser.cell(place)
    first = len(run.read("pairs/perso"))
    cell.get_by_text(f"{first:,} pairs", exact=True).wait_for()
    output, screen = cell.locator(".jp-Cell-outputArea"), browser.page.locator(".jp-WindowedPanel-outer:visible")
    assert output.locator(".persodpo-view svg").count() == 1
    assert output.bounding_box()["height"] <= screen.bounding_box()["height"]
    handles = cell.locator(".noUi-handle")
    browser.time_moves(cell, handles.nth(0), ["ArrowRight"] * 20)
    shares = own | {"coherence": round(own["coherence"] + 0.2, 2)}
    moved = expected_pairs(run, shares, low)
    cell.get_by_text(f"{moved:,} pairs", exact=True).wait_for()
    browser.time_moves(cell, handles.nth(len(own)), ["ArrowLeft"] * 5)
    fewer = expected_pairs(run, shares, round(low - 0.05, 2))
    cell.get_by_text(f"{fewer:,} pairs", exact=True).wait_for()
    assert len({first, moved, fewer}) == 3


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_texts_of_panels_and_figures_are_told_from_their_ground_in_both_themes(theme, browser, tmp_path):
    cells = browser.run(EXPLORE)
    browser.theme(theme)
    folder = Path(os.environ.get("PERSODPO_SCREENSHOTS", tmp_path))
    ratios = {}
    try:
        for panel in ("quality", "responses", "arms", "training"):
            (number,) = places(cells, f"explore.{panel}(run)")
            cell = browser.cell(number)
            ratios |= {f"{panel}: {text}": ratio for text, ratio in cell.evaluate(lab.CONTRASTS).items()}
            cell.screenshot(path=folder / f"{panel}-{theme.split()[1].lower()}.png")
    finally:
        browser.theme("JupyterLab Light")
    assert any("Quality of the scored responses" in text for text in ratios), "texts of figures are looked at, too"
    assert {text: ratio for text, ratio in ratios.items() if ratio < 4.5} == {}, "WCAG's contrast"
