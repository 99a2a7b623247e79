"""Panels, driven by their controls' values: numbers as the package computes them, pictures and tables without a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.display import Image

from persodpo import explore
from persodpo.completions import is_one_object, read_completions
from persodpo.config import load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.evaluation.bootstrap import Resampling
from persodpo.evaluation.comparisons import compare
from persodpo.evaluation.observations import observe
from persodpo.explore.answers import find_damage, highlighted
from persodpo.explore.curves_picture import smoothed
from persodpo.explore.moving import Pool, Setting, moved
from persodpo.explore.panel import WIDTH
from persodpo.gate import inspect_pairs
from persodpo.method import METRICS, SIGNALS
from persodpo.pairs import impute, measured, pair_keys, rank, rebuild
from persodpo.report import write_report
from persodpo.reproduce import NOTEBOOKS, run_notebook
from persodpo.runfolder import PROJECT, RunFolder
from persodpo.stages.heldout import arms_of
from persodpo.tables import schema_of, write_table

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

    run.stage("made", inputs={}, settings={}, outputs=list(named), code=__name__, build=build, overwrite=True)


@pytest.fixture(scope="module")
def tables():
    """Sixty dialogues with four answers each, some broken, some alike, scored at random but for ties."""
    profile, generator = load_profile("release"), np.random.default_rng(0)
    dialogues = full("dialogues", [
        {"dialogue_id": f"d{number:02}", "split": "train" if number < 60 else "valid", "dataset": "x",
         "personas": PERSONAS, "context": f"User1: Where is castle {number}? {SCRIPT}", "reference": "r"}
        for number in range(84)
    ])  # fmt: skip
    answered = [(d, m) for d in range(60) for m in range(len(MODELS))]
    responses = full("responses", [
        {"dialogue_id": f"d{d:02}", "split": "train", "model": MODELS[m], "completion": completion(d, m)}
        for d, m in answered
    ])  # fmt: skip
    responses = read_completions(responses, profile.reading)
    metrics = responses[["dialogue_id", "model"]].assign(parsed=responses["response"])
    for metric in METRICS:
        metrics[metric] = np.round(generator.random(len(metrics)), 2)
    metrics.loc[metrics["dialogue_id"] == "d07", list(METRICS)] = 0.5
    pool = impute(responses, metrics, unread=False)
    scores = rank(pool, profile).scores
    return responses, scores, dialogues


@pytest.fixture
def run(profile, tables):
    made = RunFolder(profile)
    save(made, responses=tables[0], scores=tables[1], dialogues=tables[2])
    return made


@pytest.fixture
def evaluated(run, tables):
    """Held-out answers of a base and two arms, one of them under two seeds, scored and compared."""
    profile = with_overrides(run.profile, ["evaluation.source=arms", "evaluation.seeds=[44, 45]",
                                           "training.arms=[perso, simple]", "scoring.source=compute"])  # fmt: skip
    made, generator = RunFolder(profile), np.random.default_rng(1)
    names = arms_of(profile)
    answered = [(d, m, name) for d in range(60, 84) for m, name in enumerate(names["model"])]
    known = {"split": "valid", "response_time": 0.1}
    rows = [{"dialogue_id": f"d{d}", "model": name, "completion": completion(d, m), **known} for d, m, name in answered]
    responses = read_completions(full("evaluation/responses", rows), profile.reading)
    metrics = responses[["dialogue_id", "model"]].assign(parsed=responses["response"])
    metrics = metrics.assign(**{metric: generator.random(len(metrics)) for metric in METRICS})
    pool = impute(responses, metrics, unread=True)
    scores = rank(pool, profile).scores
    pairs = [("perso", "base"), ("simple", "base"), ("perso", "simple")]
    compared = compare(observe(responses, scores, names), pairs, sampling=Resampling(2000, 1))
    save(made, evaluation__responses=responses, evaluation__scores=scores, evaluation__comparisons=compared)
    return made


WEIGHTS = st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(any)
RELEASE = load_profile("release")


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
    assert outcome.keys == pair_keys(expected.pairs)
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


@pytest.mark.parametrize("change", ["corrections=[A4]", "scoring.normalisation=declared", "corrections=[A3]",
                                    "corrections=[A1]"])  # fmt: skip
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
    weights = panel.setting.weights
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["coherence"] / weights["c_score"] == pytest.approx(0.14 / 0.20)
    for signal in SIGNALS:
        slider = panel.controls[signal]
        assert slider.value == round(weights[signal], 2), "a browser snaps to steps"
        slider.set_state({"value": slider.value})  # and sends back what it snapped to
    assert panel.setting.weights == weights
    assert number(panel, "pairs") == f"{panel.outcome.pairs:,}" != number(panel, "pairs", "profile")
    assert panel.outcome.pairs == panel.pool.at(Setting(weights, 0.2, 0.9)).pairs
    assert number(panel, "pairs of one of both settings only") == f"{panel.outcome.changed:.1%}" != "0.0%"
    assert panel.shown[0].data != first
    panel.controls["reset"].click()
    assert panel.setting == panel.pool.own
    assert panel.shown[0].data == first
    assert number(panel, "pairs of one of both settings only") == "0.0%"


def test_weights_that_cannot_be_are_said_and_nothing_changes(run):
    responses, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    changed = RunFolder(with_overrides(run.profile, ["corrections=[A1]", "name=corrected"]))
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


def test_differences_here_add_up_to_those_of_all_dialogues(evaluated):
    panel = explore.arms(evaluated)
    menu, comparisons = panel.controls["dialogue"], evaluated.read("evaluation/comparisons")
    for metric, reading in (("quality", "failures imputed"), ("quality", "successes alone"),
                            ("failure_ratio", "failures imputed")):  # fmt: skip
        panel.controls["metric"].value, panel.controls["reading"].value = metric, reading
        shown = {}
        for _, name in menu.options:
            menu.value = name
            for row, value in panel.shown[1].data["here"].items():
                if value != "–":
                    shown.setdefault(row, []).append(float(value.replace("−", "-")))
        rows = comparisons[(comparisons["metric"] == metric) & comparisons["reading"].isin([reading, "all responses"])]
        for row in rows.to_dict("records"):
            here = shown[f"{row['arm']} − {row['baseline']}"]
            assert len(here) == row["dialogues"]
            signs = [sum(value > 0 for value in here), sum(value < 0 for value in here)]
            assert signs == [row["higher"], row["lower"]]
            if reading != "successes alone":  # where all trainings count in every dialogue
                assert np.mean(here) == pytest.approx(row["difference"], abs=6e-4)


def test_every_arm_answers_beside_the_others(evaluated):
    panel = explore.arms(evaluated)
    page, table, picture = panel.shown
    assert [name for name in ("base", "perso", "simple") if f"<b>{name}</b>" in page.data] == [
        "base",
        "perso",
        "simple",
    ]
    assert "perso@45" not in page.data
    assert "<script" not in page.data
    assert table.data.index.name == "Quality, failures imputed"
    assert re.search(r"\[.*, .*\]", table.data["all dialogues"].iloc[0])
    panel.controls["seeds"].value = "all"
    assert "<b>perso@45</b>" in panel.shown[0].data
    panel.controls["search"].value = "castle 61"
    assert panel.controls["dialogue"].value == "d61"
    panel.controls["search"].value = "nothing like it"
    assert "No dialogue matches" in panel.shown[0].data
    assert set(panel.shown[1].data["here"]) == {"–"}
    assert isinstance(picture, Image)


@pytest.fixture
def trained(profile):
    made = RunFolder(profile)
    for arm, scale in (("perso", 1.0), ("simple", 2.0)):
        rows = [
            {"policy": "p", "kind": "train", "step": step, "loss": scale / step, "grad_norm": None if step == 3 else 1.0,
             "reward_margin": 0.1 * step, "reward_accuracy": 0.5} for step in (1, 2, 3, 4)
        ]  # fmt: skip
        rows.append({"policy": "p", "kind": "eval", "step": 4, "loss": 9.0})
        save(made, **{f"training__{arm}__log": full(f"training/{arm}/log", rows)})
    return made


def test_curves_of_arms_and_published_runs_with_cursor_and_smoothing(trained):
    panel = explore.training(trained)
    assert panel.controls["axis"].value == "share of the run", "4 steps beside 1,700"
    runs, cursor, axis, smoothing = (panel.controls[name] for name in ("runs", "cursor", "axis", "smoothing"))
    mine, paper = "perso (release)", "Qwen2-0.5B-Instruct-FoCus-perso-DPO (published)"
    assert runs.value == (mine, "simple (release)", paper)
    assert not any("Qwen2-5B" in name for name in runs.options)
    axis.value = "optimiser step"
    first = panel.shown[0].data
    runs.value = (mine,)
    assert cursor.max == 4
    assert panel.shown[0].data != first
    cursor.value = 3
    assert panel.shown[1].data.loc[mine].tolist() == [3, "0.3333", "1.0000", "0.3000", "0.5000"]
    cursor.value = 0
    assert panel.shown[1].data.loc[mine, "DPO loss"] == "–"
    axis.value = "share of the run"
    assert (cursor.max, cursor.description) == (100, "Cursor (% of run)")
    cursor.value = 50
    assert panel.shown[1].data.loc[mine, "step"] == 2
    smoothing.value = 0.5
    assert panel.shown[1].data.loc[mine, "DPO loss"] == f"{(0.5 + 0.5 * 1.0) / 1.5:.4f}"
    before = panel.shown
    runs.value = ()
    assert "Between 1 and 7 runs" in panel.message
    assert panel.shown == before
    runs.value = runs.options[:8]
    assert "not 8" in panel.message
    runs.value = (mine, paper)
    assert panel.message == ""


def test_published_curves_stand_alone_before_training(profile):
    panel = explore.training(RunFolder(profile))
    assert all(name.endswith("(published)") for name in panel.controls["runs"].options)
    assert len(panel.shown[1].data) == 1


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0, 0.95))
def test_smoothing_stays_between_what_was_logged(values, strength):
    means = smoothed(np.array(values), strength)
    assert np.allclose(smoothed(np.array(values), 0.0), values)
    assert means[0] == pytest.approx(values[0])
    assert (means <= np.maximum.accumulate(values) + 1e-9).all()
    assert (means >= np.minimum.accumulate(values) - 1e-9).all()


def test_runs_of_this_machine_and_how_far_they_are(evaluated, trained, tmp_path):
    source = saved(evaluated, tmp_path)
    table = explore.start(source).shown[0].data
    assert table.index.tolist() == ["release"]
    row = table.loc["release"]
    assert row[["dialogues", "responses", "perso pairs", "held-out responses"]].tolist() == ["84", "240", "–", "120"]
    assert row["trained"] == "perso, simple"
    rows = trained.read("training/perso/log")
    save(trained, **{f"training__{name}__log": rows for name in ("perso@45", "ablation-x")})
    other = explore.start(source, ["name=another"])
    table = other.shown[0].data
    assert table.loc["another"].eq("–").all()
    assert table.loc["release", "trained"] == "perso, simple; 1 under other seeds; 1 ablations"
    assert other.run.profile.name == "another"


def saved(run: RunFolder, folder: Path) -> str:
    path = folder / "profile.yaml"
    path.write_text(run.profile.to_yaml())
    return str(path)


def until(panel, condition) -> None:
    """Look as a kernel does, until something is so."""
    given_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < given_up, panel.shown[1].data
        time.sleep(0.05)
        panel.look()


def test_a_button_runs_its_stage_and_the_table_follows(profile, tmp_path):
    made = with_overrides(profile, [
        "dialogues.source=csv", f"dialogues.csv_file={PROJECT / 'data/example/dialogues.csv'}",
        "generation.source=csv", f"generation.csv_file={PROJECT / 'data/example/completions.csv'}",
    ])  # fmt: skip
    panel = explore.start(saved(RunFolder(made), tmp_path), ["seed=45"])
    buttons = {name: control for name, control in panel.controls.items() if name != "profile"}
    assert all(button.tooltip for button in buttons.values())
    assert buttons["stop"].disabled
    assert panel.command is None
    buttons["dialogues"].click()
    assert panel.command.arguments[:2] == ("dialogues", "--profile")
    assert panel.command.arguments[-2:] == ("--set", "seed=45")
    assert not buttons["stop"].disabled
    assert buttons["pairs"].disabled
    started = panel.command
    buttons["pairs"].click()
    assert panel.command is started, "one command at a time"
    until(panel, lambda: not buttons["pairs"].disabled)
    assert "is done" in panel.shown[1].data
    assert panel.shown[0].data.loc["release", "dialogues"] == "340"
    assert RunFolder(made).read("dialogues").shape[0] == 340


def test_a_failing_stage_says_so_and_its_words_stay_words(profile, tmp_path):
    file = tmp_path / "<b>.csv"
    made = with_overrides(profile, ["dialogues.source=csv", f"dialogues.csv_file={file}"])
    panel = explore.start(saved(RunFolder(made), tmp_path))
    panel.controls["dialogues"].click()
    until(panel, lambda: panel.controls["stop"].disabled)
    assert "has failed" in panel.shown[1].data
    assert "&lt;b&gt;.csv" in panel.shown[1].data
    assert "<b>.csv" not in panel.shown[1].data


def test_stop_interrupts_as_a_key_would(profile, tmp_path):
    panel = explore.start(saved(RunFolder(profile), tmp_path))
    panel.controls["train"].click()
    panel.controls["stop"].click()
    until(panel, lambda: panel.controls["stop"].disabled)
    assert panel.command.status != 0
    assert "was interrupted" in panel.shown[1].data


def test_another_profile_is_another_run(profile, tmp_path):
    panel = explore.start(saved(RunFolder(profile), tmp_path))
    chosen = panel.controls["profile"]
    assert {"mini", "release", "paper"} <= {label for label, _ in chosen.options}
    chosen.value = "mini"
    assert panel.run.profile.name == "mini"
    assert "run the cells below again" in panel.shown[1].data


DOORS = [explore.quality, explore.responses, explore.arms]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_run_without_tables_gets_a_sentence(door, profile):
    sentence = door(RunFolder(profile))
    assert "make it with `persodpo" in repr(sentence)
    assert "<p>" in sentence._repr_html_()


@pytest.mark.parametrize("door", [*DOORS, explore.training], ids=lambda door: door.__name__)
def test_every_control_has_a_label_and_fits(door, evaluated):
    panel = door(evaluated)
    single = [each for control in panel.controls.values() for each in getattr(control, "children", (control,))]
    assert all(control.description for control in single)
    assert panel._box.layout.max_width == f"{WIDTH}px"
    assert WIDTH <= 950
    pictures = [shown for shown in panel.shown if isinstance(shown, Image)]
    assert all(picture.width <= WIDTH and picture.alt for picture in pictures)
    assert all(picture.data.startswith(b"\x89PNG") for picture in pictures)


NOTEBOOK = """
from persodpo import explore
from persodpo.runfolder import PROJECT, RunFolder
from persodpo.completions import read_completions
from persodpo.config import load_profile
run = RunFolder(load_profile(profile))
"""


@pytest.mark.slow
def test_without_a_browser_the_first_state_is_ordinary_output(evaluated, tmp_path):
    source, book = tmp_path / "profile.yaml", nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source.write_text(evaluated.profile.to_yaml())
    parameters = nbformat.v4.new_code_cell('profile = ""')
    parameters.metadata["tags"] = ["parameters"]
    calls = ["explore.quality(run)", "explore.responses(run)", "explore.arms(run)", "explore.training(run)"]
    moves = [
        "panel = explore.quality(run)\npanel",
        "first = panel.shown[0].data",
        "panel.controls['coherence'].value = 0.5",
    ]
    cells = [NOTEBOOK, *moves[:2], *calls, moves[2]]
    book.cells = [parameters, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    nbformat.write(book, tmp_path / "n.ipynb")
    done = run_notebook(tmp_path / "n.ipynb", tmp_path / "copy.ipynb", {"profile": str(source)})
    cells = [
        cell
        for cell in nbformat.read(done.copy, as_version=4).cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    shown = [[set(out["data"]) for out in cell.outputs if out.output_type == "display_data"]
             for cell in cells[-5:-1]]  # fmt: skip
    for outputs, pictures, tables in zip(shown, (1, 0, 1, 1), (1, 1, 2, 1), strict=True):
        assert any("application/vnd.jupyter.widget-view+json" in data for data in outputs)
        assert sum("image/png" in data for data in outputs) == pictures
        assert sum("text/html" in data for data in outputs) == tables
    moved_after, unmoved = (
        [out["data"]["image/png"] for out in cells[place].outputs if "image/png" in out.get("data", {})]
        for place in (2, 4)
    )
    assert len(moved_after) == len(unmoved) == 1
    assert moved_after != unmoved, "a move replaces the picture in the cell that showed it"


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["evaluated", "nothing yet"])
def test_the_first_notebook_runs_on_whatever_is_there(there, evaluated, tmp_path):
    elsewhere = [] if there else [f"paths.runs={tmp_path / 'none'}"]
    source = tmp_path / "profile.yaml"
    source.write_text(with_overrides(evaluated.profile, elsewhere).to_yaml())
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    parameters = {"profile": str(source), "overrides": [], "overwrite": False}
    done = run_notebook(NOTEBOOKS / "00_start_here.ipynb", tmp_path / "copy.ipynb", parameters)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*before, done.copy])
    text = done.copy.read_text()
    assert ("make it with `persodpo score" in text or "make it with `persodpo generate" in text) == (not there)
    run = RunFolder(with_overrides(evaluated.profile, [f"paths.runs={tmp_path / 'shown'}"]))
    run.notebooks.mkdir(parents=True)
    shutil.copy(done.copy, run.notebooks / "00_start_here.ipynb")
    page = write_report(run).with_name("00_start_here.html").read_text()
    assert page.count("data:image/png") == (4 if there else 2)
    assert "<script" not in page


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
