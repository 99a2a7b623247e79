"""Panels without a browser: numbers as the package computes them, text of models that stays text, pictures when headless."""

from __future__ import annotations

import html
import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from persodpo import explore
from persodpo.completions import read_completions
from persodpo.config import load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.explore_views import differences, marked
from persodpo.gate import inspect_pairs
from persodpo.method import METRICS, SIGNALS
from persodpo.pairs import impute, measured, pair_keys, rank, rebuild
from persodpo.reproduce import NOTEBOOKS, run_notebook
from persodpo.runfolder import RunFolder
from persodpo.tables import schema_of

MODELS = ("m1", "m2", "m3", SCRIPT := '<img src=x onerror="alert(1)"> & <script>')


def full(name: str, rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([dict.fromkeys(schema_of(name).names) | row for row in rows])


def save(run: RunFolder, tables: dict[str, pd.DataFrame]) -> None:
    run.stage("saved", lambda: tables, outputs=list(tables), overwrite=True)


def completion(dialogue: int, model: int) -> str:
    words = " ".join(["castles", "near", "Rome", SCRIPT][: 1 + (dialogue + model) % 4] * (1 + dialogue % 7))
    if (dialogue + 2 * model) % 9 == 0:
        return '{"response": "' + words
    return json.dumps({"response": "same" if dialogue % 5 == 0 and model < 2 else words})


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Sixty dialogues with four answers each, some broken, some alike, scored at random but for ties."""
    profile, generator = load_profile("release"), np.random.default_rng(0)
    dialogues = full("dialogues", [
        {"dialogue_id": f"d{number:02}", "split": "train", "dataset": "x", "reference": SCRIPT,
         "personas": ["I love Gothic castles.", f"I sing {SCRIPT}."], "context": f"User1: Castle {number}?\n{SCRIPT}"}
        for number in range(60)
    ])  # fmt: skip
    rows = [
        {"dialogue_id": f"d{d:02}", "split": "train", "model": name, "completion": completion(d, m)}
        for d in range(60)
        for m, name in enumerate(MODELS)
    ]
    responses = read_completions(full("responses", rows), profile.reading)
    metrics = responses[["dialogue_id", "model"]].assign(parsed=responses["response"])
    metrics = metrics.assign(**{metric: generator.random(len(metrics)).round(2) for metric in METRICS})
    scores = rank(impute(responses, metrics, unread=False), profile).scores
    return {"dialogues": dialogues, "responses": responses, "scores": scores}


@pytest.fixture
def run(profile, tables):
    """A base, and an arm under two seeds, in two dialogues of which one has a failure."""
    quality = {"base": (0.5, 0.2), "perso": (0.9, 0.8), "perso@45": (0.7, 0.6)}
    rows = [
        {"dialogue_id": f"d{d:02}", "split": "valid", "model": model, "quality": value, "imputed": False, "words": 1,
         "completion": SCRIPT, "response": SCRIPT, "outcome": "no_json" if (model, d) == ("perso", 1) else "ok"}
        for model, values in quality.items()
        for d, value in enumerate(values)
    ]  # fmt: skip
    compared = [
        {"arm": "perso", "baseline": "base", "metric": metric, "reading": reading, "seeds_paired": False,
         "dialogues": 2, "difference": 0.4, "low": 0.3, "high": 0.5}
        for metric, reading in (("quality", "failures imputed"), ("quality", "successes alone"),
                                ("failure_ratio", "all responses"))
    ]  # fmt: skip
    answers = pd.DataFrame(rows)
    log = [{"policy": "p", "kind": kind, "step": step, "loss": 1 / step, "reward_margin": 0.1, "reward_accuracy": 0.5}
           for kind, step in (("train", 1), ("train", 2), ("eval", 2))]  # fmt: skip
    folder = RunFolder(profile)
    save(folder, {
        **tables,
        **{f"evaluation/{name}": full(name, answers.to_dict("records"))[schema_of(name).names]
           for name in ("responses", "scores")},
        "evaluation/comparisons": full("evaluation/comparisons", compared),
        "training/perso/log": full("training/perso/log", log),
    })  # fmt: skip
    return folder


def text_of(panel: explore.Panel) -> str:
    return "".join(part for part in panel.shown() if isinstance(part, str))


@pytest.mark.parametrize("change", ["seed=44", "corrections=[A4]", "scoring.normalisation=declared", "corrections=[A3]",
                                    "corrections=[A1]"])  # fmt: skip
def test_pairs_under_any_weights_are_those_of_the_package(change, tables, tmp_path_factory):
    profile = load_profile("release", [f"home={tmp_path_factory.mktemp('home')}", change])
    responses, dialogues = tables["responses"], tables["dialogues"]
    scores = rebuild(responses, measured(responses, tables["scores"]), dialogues, profile).ranking.scores
    run = RunFolder(profile)
    save(run, tables | {"scores": scores})
    pair = explore.pairs_under(run)

    @settings(max_examples=10)
    @given(
        st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(lambda w: any(w[1:])),
        st.integers(0, 10),
        st.integers(0, 10),
    )
    def check(shares, first, second):
        weights = explore.normalised(dict(zip(SIGNALS, shares, strict=True)))
        low, high = min(first, second) / 10, max(first, second) / 10
        changed = [f"scoring.weights={json.dumps(weights)}", f"pairs.low_quantile={low}", f"pairs.high_quantile={high}"]
        expected = rebuild(responses, measured(responses, scores), dialogues, with_overrides(profile, changed))
        outcome = pair(weights, low, high)
        assert (outcome.low, outcome.high) == (expected.ranking.low, expected.ranking.high)
        keys = outcome.pairs.select("dialogue_id", "model_chosen", "model_rejected").iter_rows()
        assert sorted(keys) == sorted(pair_keys(expected.pairs))

    check()


def test_the_quality_panel_shows_the_numbers_of_its_sliders(run):
    panel = explore.quality(run)
    profile = run.profile
    assert {name: panel.controls[name].value for name in SIGNALS} == profile.scoring.weights.model_dump()
    panel.controls["compliance"].value = 0.82
    panel.controls["quantiles"].value = (0.2, 0.9)
    weights = {name: panel.controls[name].value / 1.5 for name in SIGNALS}
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    changed = [f"scoring.weights={json.dumps(weights)}", "pairs.low_quantile=0.2", "pairs.high_quantile=0.9"]
    varied = rebuild(responses, measured(responses, scores), dialogues, with_overrides(profile, changed))
    gate = inspect_pairs(varied.pairs, dialogues, profile.seed).set_index("check")["value"]
    numbers, figure = panel.shown()
    assert f"<b>{len(varied.pairs):,} pairs</b> of {gate['prompts']:.0f} prompts" in numbers
    assert f"Rejected up to {varied.ranking.low:.4f}, chosen from {varied.ranking.high:.4f}" in numbers
    assert f"{gate['length_alone']:.1%}" in numbers
    heights, *_ = figure.axes[0].patches[0].get_data()
    assert heights.sum() == varied.ranking.scores["quality"].notna().sum()
    bars = [container.datavalues.sum() for container in figure.axes[1].containers]
    assert bars == [len(varied.pairs), -len(varied.pairs)]
    for name in SIGNALS:
        panel.controls[name].value = 0
    assert panel.shown() == ["<p>All weights are 0, so there is no quality; move one of them up.</p>"]


def test_a_dialogue_is_found_by_text_model_and_outcome(run):
    panel = explore.responses(run)
    menu, answered = panel.controls["dialogue"], run.read("responses")
    assert len(menu.options) == 60
    panel.finders["text"].value = "  CASTLE 17? "
    assert menu.value == "d17"
    assert "Castle 17?" in text_of(panel)
    panel.finders["text"].value = ""
    assert menu.value == "d17", "it stays while it matches"
    panel.finders["model"].value, panel.finders["outcome"].value = "m2", "truncated"
    broken = answered[(answered["model"] == "m2") & (answered["outcome"] == "truncated")]["dialogue_id"]
    assert [name for _, name in menu.options] == sorted(broken) != []
    panel.finders["text"].value = "no such text"
    assert (menu.value, text_of(panel)) == (None, "<p>No dialogue matches.</p>")


def test_text_of_models_stays_text(run):
    for panel in (explore.responses(run), explore.arms(run)):
        for _, name in panel.controls["dialogue"].options:
            panel.controls["dialogue"].value = name
            page = text_of(panel)
            assert "<script" not in page
            assert "<img" not in page
            assert html.escape(SCRIPT) in page
    panel = explore.responses(run)
    panel.controls["dialogue"].value = "d03"
    scores = run.read("scores").set_index(["dialogue_id", "model"])["quality"]
    assert all(f"<b>quality {scores['d03', name]:.3f}</b>" in text_of(panel) for name in MODELS)
    assert "<b><u>castles</u></b>" in text_of(panel)
    assert "failed: loop" in text_of(panel)


@given(st.text(max_size=60), st.sets(st.sampled_from(["castle", "über", "x"])))
def test_marks_only_add(text, words):
    shown = marked(text, words)
    assert html.unescape(re.sub(r"</?[bu]>", "", shown)) == text
    assert ("<u>" in shown) == any(word.casefold() in words for word in re.findall(r"\w+", text))


def test_differences_in_one_dialogue_by_hand(run):
    comparisons = run.read("evaluation/comparisons")
    rows = run.read("evaluation/responses").merge(run.read("evaluation/scores"), on=["dialogue_id", "model"])

    def here(dialogue: str | None, metric: str, reading: str) -> float:
        return differences(comparisons, rows, dialogue, metric, reading)["here"].item()

    assert here("d00", "quality", "failures imputed") == pytest.approx((0.9 + 0.7) / 2 - 0.5)
    assert here("d01", "quality", "failures imputed") == pytest.approx((0.8 + 0.6) / 2 - 0.2)
    assert here("d01", "quality", "successes alone") == pytest.approx(0.6 - 0.2)
    assert here("d01", "failure_ratio", "all responses") == pytest.approx(0.5)
    assert np.isnan(here(None, "quality", "failures imputed"))
    panel = explore.arms(run)
    assert "perso − base" in text_of(panel)
    assert "perso@45" not in text_of(panel)


def test_curves_of_arms_beside_the_published_ones(run):
    panel = explore.training(run)
    ticked = [name for name, control in panel.controls.items() if control.value is True]
    assert ticked == ["perso", "published Instruct-FoCus-perso-DPO"]
    panel.controls["axis"].value, panel.controls["smoothing"].value = "step", 0.5
    panel.controls[ticked[1]].value = False
    (figure,) = panel.shown()
    faint, line = figure.axes[0].lines
    assert np.array_equal(faint.get_xydata(), [(1, 1), (2, 0.5)])
    assert np.allclose(line.get_xydata(), [(1, 1), (2, (0.5 * 1 + 0.5) / 1.5)])
    panel.controls["perso"].value = False
    assert "No training is ticked" in text_of(panel)


@pytest.mark.parametrize("panel", [explore.quality, explore.responses, explore.arms], ids=lambda panel: panel.__name__)
def test_a_run_without_tables_gets_a_sentence(panel, profile):
    assert "make it with `persodpo" in panel(RunFolder(profile)).data
    assert isinstance(explore.training(RunFolder(profile)).shown()[0], Figure)
    with pytest.raises(PersodpoError, match="All weights are 0"):
        explore.normalised(dict.fromkeys(SIGNALS, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("filled", [True, False], ids=["evaluated", "nothing yet"])
def test_the_notebook_shows_pictures_and_tables_when_executed_headlessly(filled, run, tmp_path):
    profile = with_overrides(run.profile, [] if filled else [f"home={tmp_path / 'none'}"])
    source = tmp_path / "profile.yaml"
    source.write_text(profile.to_yaml())
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    parameters = {"profile": str(source), "overrides": [], "overwrite": False}
    done = run_notebook(NOTEBOOKS / "explore.ipynb", tmp_path / "copy.ipynb", parameters)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*before, done.copy]), "it wrote"
    kinds = {}
    for cell in nbformat.read(done.copy, as_version=4).cells:
        panel = re.search(r"explore\.(quality|responses|arms|training)\(run\)", cell.source)
        if panel:
            kinds[panel[1]] = [sorted(set(output["data"]) - {"text/plain"}) for output in cell.outputs]
    picture, page = ["image/png"], ["text/html"]
    shown = {"quality": [page, picture], "responses": [page], "arms": [page, page], "training": [picture]}
    assert kinds == (shown if filled else {name: [page] for name in kinds} | {"training": [picture]})


def test_published_responses_and_differences(release_run):
    panel = explore.quality(release_run)
    assert "<b>9,184 pairs</b> of 1,316 prompts" in text_of(panel)
    pair, profile = explore.pairs_under(release_run), release_run.profile
    assert len(pair(profile.scoring.weights.model_dump(), 0.4, 0.6).rated) == 10_347
    comparisons = release_run.read("evaluation/comparisons").dropna(subset="difference")
    tables = [release_run.read(f"evaluation/{name}") for name in ("responses", "scores")]
    rows = tables[0].merge(tables[1], on=["dialogue_id", "model"])
    kind = ("quality", "failures imputed")
    one = [differences(comparisons, rows, name, *kind)["here"] for name in rows["dialogue_id"].unique()]
    whole = differences(comparisons, rows, None, *kind)["difference"]
    assert np.allclose(pd.concat(one, axis=1).mean(axis=1), whole)
