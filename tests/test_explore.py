"""Panels, driven by their controls' values: numbers as the package computes them, pictures and tables without a browser."""

from __future__ import annotations

import html
import json
import re
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.display import Image

from persodpo import explore
from persodpo.artifacts import RunFolder
from persodpo.completions import is_one_object
from persodpo.config import load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.explore.answers import find_damage, highlighted
from persodpo.explore.moving import Pool, Setting, moved
from persodpo.explore.panel import WIDTH
from persodpo.gate import inspect_pairs
from persodpo.generation.published import read_completions
from persodpo.scoring.quality import METRICS, SIGNALS, connect
from persodpo.scoring.run import impute, rank
from persodpo.tables import schema_of, write_table
from persodpo.variants import measured, pair_keys, rebuild

MODELS = ("m1", "m2", "m3", "m4")
SCRIPT = '<img src=x onerror="alert(1)"> & <script>'
PERSONAS = ["I love Gothic castles.", f"I sing {SCRIPT}."]


def completion(dialogue: int, model: int) -> str:
    words = " ".join(["castles", "near", "Rome", SCRIPT][: 1 + (dialogue + model) % 4] * (1 + dialogue % 7))
    if (dialogue + 2 * model) % 9 == 0:
        return '{"response": "' + words
    return json.dumps({"response": "same" if dialogue % 5 == 0 and model < 2 else words})


def full(name: str, rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([dict.fromkeys(schema_of(name).names) | row for row in rows])


def save(run: RunFolder, **tables: pd.DataFrame) -> None:
    named = {name.replace("__", "/"): table for name, table in tables.items()}

    def build(targets):
        for name, table in named.items():
            write_table(targets[name], name, table)

    run.stage("made", inputs={}, settings={}, outputs=list(named), code=[], build=build, overwrite=True)


@pytest.fixture(scope="module")
def tables():
    """Sixty dialogues with four answers each, some broken, some alike, scored at random but for ties."""
    profile, generator = load_profile("release", ["engine.threads=1"]), np.random.default_rng(0)
    dialogues = full("dialogues", [
        {"dialogue_id": f"d{number:02}", "split": "train" if number < 60 else "valid", "dataset": "x",
         "personas": PERSONAS, "context": f"User1: Where is castle {number}? {SCRIPT}", "reference": "r"}
        for number in range(64)
    ])  # fmt: skip
    answered = [(d, m) for d in range(60) for m in range(len(MODELS))]
    responses = full("responses", [
        {"dialogue_id": f"d{d:02}", "split": "train", "model": MODELS[m], "completion": completion(d, m)}
        for d, m in answered
    ])  # fmt: skip
    responses = read_completions(responses, profile.completions)
    metrics = responses[["dialogue_id", "model"]].assign(parsed=responses["response"])
    for metric in METRICS:
        metrics[metric] = np.round(generator.random(len(metrics)), 2)
    metrics.loc[metrics["dialogue_id"] == "d07", list(METRICS)] = 0.5
    pool = impute(responses, metrics, profile.scoring.worst_case, unread=False)
    scores = rank(connect(profile.engine, ""), pool, profile.scoring, profile.pairs).scores
    return responses, scores, dialogues


@pytest.fixture
def run(profile, tables):
    made = RunFolder(profile)
    save(made, responses=tables[0], scores=tables[1], dialogues=tables[2])
    return made


WEIGHTS = st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(any)
RELEASE = load_profile("release", ["engine.threads=1"])


def overrides(setting: Setting) -> list[str]:
    weights = json.dumps(dict(setting.weights))
    return [
        f"scoring.weights={weights}",
        f"pairs.low_quantile={setting.low}",
        f"pairs.high_quantile={setting.high}",
    ]


def assert_same(pool: Pool, setting: Setting, tables, profile) -> None:
    responses, scores, dialogues = tables
    outcome = pool.at(setting)
    varied = with_overrides(profile, overrides(setting))
    expected = rebuild(responses, measured(responses, scores), dialogues, varied)
    known = expected.ranking.scores.dropna(subset="quality")
    assert (outcome.low, outcome.high) == (expected.ranking.low, expected.ranking.high)
    assert sorted(outcome.quality) == sorted(known["quality"])
    assert pool.keys(outcome) == pair_keys(expected.pairs)
    assert outcome.pairs == len(expected.pairs) == outcome.sources.sum()
    counts = expected.pairs.groupby(["chosen_model", "rejected_model"]).size()
    assert all(
        outcome.sources[pool.models.index(chosen), pool.models.index(rejected)] == count
        for (chosen, rejected), count in counts.items()
    )
    means = known.groupby("model")["quality"].mean().loc[pool.models]
    assert np.allclose(outcome.means, means, rtol=0, atol=1e-12)
    gate = inspect_pairs(expected.pairs, dialogues, profile.seed).set_index("check")["value"]
    assert outcome.prompts == gate["prompts"]
    assert outcome.length_alone == pytest.approx(gate["length_alone"], abs=1e-12, nan_ok=True)


@settings(max_examples=25)
@given(WEIGHTS, st.integers(0, 10), st.integers(0, 10))
def test_any_setting_is_what_the_package_computes(tables, weights, first, second):
    shares = dict(zip(SIGNALS, np.array(weights) / sum(weights), strict=True))
    setting = Setting(shares, min(first, second) / 10, max(first, second) / 10)
    assert_same(Pool(*tables, RELEASE), setting, tables, RELEASE)


@pytest.mark.parametrize("change", ["pairs.serialisation=corrected", "scoring.normalisation=declared",
                                    "scoring.format_check=corrected", "scoring.coherence=corrected"])  # fmt: skip
def test_other_settings_of_the_profile_hold(tables, change):
    profile = with_overrides(RELEASE, [change])
    responses, scores, dialogues = tables
    own = rebuild(responses, measured(responses, scores), dialogues, profile).ranking.scores
    made = (responses, own, dialogues)
    pool = Pool(*made, profile)
    assert_same(pool, pool.own, made, profile)


@given(
    st.lists(st.tuples(st.sampled_from(SIGNALS), st.sampled_from([0.0, 0.01, 0.3, 0.77, 1.0])), min_size=1, max_size=20)
)
def test_weights_stay_a_mixture(moves):
    own = RELEASE.scoring.weights.model_dump()
    weights = own
    for signal, value in moves:
        before, weights = weights, moved(weights, signal, value, own)
        assert weights[signal] == value
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        others = [name for name in SIGNALS if name != signal and before[name] > 0]
        ratios = [weights[name] / before[name] for name in others]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else True


def number(panel, row: str, column: str = "now") -> str:
    return panel.shown[1].data.loc[row, column]


def test_sliders_move_together_and_go_back(run):
    panel = explore.quality(run)
    first = panel.shown[0].data
    panel.controls["compliance"].value = 0.8
    panel.controls["quantiles"].value = (0.2, 0.9)
    sliders = {signal: panel.controls[signal].value for signal in SIGNALS}
    assert sum(sliders.values()) == pytest.approx(1.0)
    assert sliders["coherence"] / sliders["c_score"] == pytest.approx(0.14 / 0.20)
    assert number(panel, "pairs") == f"{panel.outcome.pairs:,}" != number(panel, "pairs", "profile")
    assert panel.outcome.pairs == panel.pool.at(Setting(sliders, 0.2, 0.9)).pairs
    assert number(panel, "pairs of one of both settings only") == f"{panel.outcome.changed:.1%}" != "0.0%"
    assert panel.shown[0].data != first
    panel.controls["reset"].click()
    assert panel.setting == panel.pool.own
    assert panel.shown[0].data == first
    assert number(panel, "pairs of one of both settings only") == "0.0%"


def test_weights_that_cannot_be_are_said_and_nothing_changes(run):
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    changed = RunFolder(with_overrides(run.profile, ["scoring.coherence=corrected", "name=corrected"]))
    save(changed, responses=responses, scores=scores, dialogues=dialogues)
    panel = explore.quality(changed)
    before = panel.shown
    panel.controls["coherence"].value = 1.0
    assert "it has all the weight" in panel.message
    assert panel.shown == before
    panel.controls["coherence"].value = 0.5
    assert panel.message == ""
    with pytest.raises(PersodpoError, match="Quantiles must rise"):
        panel.pool.at(Setting(panel.pool.own.weights, 0.6, 0.4))


@pytest.mark.parametrize(("text", "marked", "reason"), [
    ('{"response": "Yes."}', [], ""),
    (' {"response": "Yes."}\n', [], ""),
    ('Sure: {"response": "Yes."}', ["Sure: "], "text before its object"),
    ('{"response": "Yes."} And more', [" And more"], "goes on after its object"),
    ('Oh {"answer": "Yes."} And', ["Oh ", " And"], "text before its object, goes on after its object, has no key"),
    ('{"response": "Yes, and then', [""], "breaks off inside its text"),
    ('{"response": "Yes" "No"}', ['"No"}'], "not JSON from here on: expecting ',' delimiter"),
    ('{"response": ', [""], "not JSON from here on: expecting value"),
    ("Yes.", ["Yes."], "no JSON object"),
    ("", [""], "no JSON object"),
    ('{"a":' * 100_000, ['{"a":' * 100_000], "nested too deeply"),
    ('{"response": ' + "9" * 5000 + "}", ['{"response": ' + "9" * 5000 + "}"], "a number too long"),
])  # fmt: skip
def test_damage_is_found_where_it_is(text, marked, reason):
    damage = find_damage(text)
    assert [text[start:end] for start, end in damage.spans] == marked
    assert damage.reason.startswith(reason) or reason in damage.reason
    assert bool(damage.reason) == bool(reason)


@given(st.text(alphabet='{}[]":, \\nresponse1é<&', max_size=60))
def test_damage_is_none_exactly_for_one_object(text):
    damage = find_damage(text)
    assert bool(damage.reason) == (not is_one_object(text) or bool(text[: text.find("{")].strip()))
    assert all(0 <= start <= end <= len(text) for start, end in damage.spans)


@given(st.text(max_size=60), st.sets(st.sampled_from(["castle", "über", "x"])))
def test_highlighting_only_adds(text, words):
    shown = highlighted(text, words)
    assert html.unescape(re.sub(r"</?b[^>]*>", "", shown)) == text
    assert ("<b " in shown) == any(word.casefold() in words for word in re.findall(r"\w+", text))


def test_a_dialogue_is_found_by_text_model_and_class(run):
    panel = explore.responses(run)
    search, model, outcome, menu = (panel.controls[name] for name in ("search", "model", "outcome", "dialogue"))
    answered = run.read("responses")
    assert len(panel.matches) == 60
    search.value = "  CASTLE 17? "
    assert panel.matches == [menu.value] == ["d17"]
    assert "castle 17?" in panel.shown[0].data
    search.value = ""
    assert menu.value == "d17", "the dialogue that is shown stays while it matches"
    model.value, outcome.value = "m2", "truncated"
    expected = answered[(answered["model"] == "m2") & (answered["outcome"] == "truncated")]["dialogue_id"]
    assert panel.matches == sorted(expected) != []
    assert "m2</b> (failed: truncated)" in panel.shown[0].data
    search.value = "no such text"
    assert panel.matches == []
    assert menu.value is None
    assert "No dialogue matches" in panel.shown[0].data
    model.value = outcome.value = "any"
    search.value = ""
    menu.value = "d31"
    assert "<h4>d31</h4>" in panel.shown[0].data


def test_answers_stand_side_by_side_with_scores_marks_and_no_markup_of_their_own(run):
    panel = explore.responses(run)
    panel.controls["dialogue"].value = "d03"
    page = panel.shown[0].data
    scores = run.read("scores").set_index(["dialogue_id", "model"])
    for name in MODELS:
        assert f"<b>{name}</b>" in page
        assert f"Quality {scores.loc[('d03', name), 'quality']:.3f}" in page
    assert "<script" not in page
    assert "<img" not in page
    assert html.escape(SCRIPT) in page
    assert '<b style="background-color: #56B4E955">castles</b>' in page
    assert "breaks off inside its text" in page
    assert "display: grid" in page


DOORS = [explore.quality, explore.responses]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_run_without_tables_gets_a_sentence(door, profile):
    sentence = door(RunFolder(profile))
    assert "make it with `persodpo" in repr(sentence)
    assert "<p>" in sentence._repr_html_()


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_control_has_a_label_and_fits(door, run):
    panel = door(run)
    assert all(control.description for control in panel.controls.values())
    assert panel._box.layout.max_width == f"{WIDTH}px"
    assert WIDTH <= 950
    assert all(picture.width <= WIDTH for picture in panel.shown if isinstance(picture, Image))


def test_the_published_responses_move_at_once(release_run):
    panel = explore.quality(release_run)
    assert panel.outcome.pairs == 9_184
    assert len(panel.outcome.quality) == 10_347
    gate = release_run.read("pairs/gate").set_index(["pair_set", "check"])["value"]
    assert panel.outcome.length_alone == pytest.approx(gate["perso", "length_alone"])
    seconds = []
    for value in np.linspace(0, 1, 9):
        started = time.perf_counter()
        panel.controls["coherence"].value = value
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 0.2
    tables = [release_run.read(name) for name in ("responses", "scores", "dialogues")]
    panel.controls["ue_score"].value = 0.4
    panel.controls["quantiles"].value = (0.3, 0.75)
    assert_same(panel.pool, panel.setting, tables, release_run.profile)
