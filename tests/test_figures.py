"""Figures show what their tables hold, take names as text, and are written byte for byte the same."""

from __future__ import annotations

import itertools
import json
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer
from matplotlib.patches import StepPatch
from scipy.stats import binomtest, spearmanr

from persodpo.completions import OUTCOMES
from persodpo.errors import NothingToShowError
from persodpo.figures import FIGURES, answers, curves, scores, style
from persodpo.files import PROJECT, sha256

SEVEN, HALF, ARM = "Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Qwen2-0.5B-Instruct/length_prior"
NAMES = ["gpt$4$mini", "a$_$b", r"$\frac{$", "m_1^2"]


def draw(name, *tables):
    return FIGURES[name].draw(*tables)


def bars(axes):
    """Return the rectangles of every bar container, container by container."""
    return [list(container) for container in axes.containers if isinstance(container, BarContainer)]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def rows(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def wilson(count, total):
    return list(binomtest(count, total).proportion_ci(method="wilson"))


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results():
    values = {SEVEN: (4.0213, 0.48, 0.627), HALF: (0.76, 0.15, 0.39), ARM: (0.4936, 0.6, 0.148)}
    return pd.DataFrame([
        {"model": model, "metric": metric, "responses": 1000, "mean": mean, "std": std}
        for model, (seconds, spread, ratio) in values.items()
        for metric, mean, std in (("response_time", seconds, spread), ("coherence", 0.5, 0.1), ("failure_ratio", ratio, 0.4))
    ])  # fmt: skip


def test_bars_are_the_tables_numbers_and_ours_carry_intervals_and_the_number_of_seeds(results):
    axes = draw("figure_2a_published", results).axes[0]
    assert [[bar.get_height() for bar in group] for group in bars(axes)] == [[4.0213, 0.627], [0.4936, 0.148]]
    assert texts(axes) == ["4.02 s", "0.627", "0.494 s", "0.148"]
    drawn = draw("figure_2a", results)
    left, right = drawn.axes
    assert [group[0].get_width() for group in bars(left)] == [4.0213, 0.76, 0.4936]
    assert [group[0].get_width() for group in bars(right)] == [0.627, 0.390, 0.148]
    assert (texts(left), texts(right)) == (["4.02", "0.760", "0.494"], ["0.627", "0.390", "0.148"])
    whiskers = [container.lines[2][0].get_segments()[0][:, 0] for container in right.containers[1::2]]
    np.testing.assert_allclose(whiskers, [wilson(count, 1000) for count in (627, 390, 148)])
    # The spread of a time ends at zero seconds.
    assert left.containers[-1].lines[2][0].get_segments()[0][0, 0] == pytest.approx(0)
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert drawn.get_suptitle() == "1,000 answers each; trained under one seed"


def test_arms_stand_under_their_first_seed():
    table = pd.DataFrame({
        "model": ["base"] * 4 + ["perso"] * 4 + ["perso@45"] * 4, "response_time": [0.1, None, None, None] * 3,
        "outcome": ["ok", "ok", "loop", "empty"] + ["ok", "ok", "ok", "empty"] + ["loop"] * 4,
    })  # fmt: skip
    drawn = draw("figure_2a_arms", table)
    assert [group[0].get_width() for group in bars(drawn.axes[1])] == [0.5, 0.25]
    assert texts(drawn.axes[0]) == ["0.100", "0.100"]
    assert drawn.get_suptitle() == "4 answers each; the first of 2 seeds"
    never_timed = draw("figure_2a_arms", table.assign(response_time=np.nan))
    assert texts(never_timed.axes[0]) == ["–", "–"]


def test_stack_holds_the_shares_of_outcomes():
    outcomes = ["ok"] * 6 + ["truncated"] * 3 + ["loop"]
    table = pd.DataFrame({"model": [SEVEN] * 10 + ["gpt-4-turbo"] * 10, "outcome": outcomes + ["ok"] * 10})
    axes = draw("failure_classes", table).axes[0]
    widths = np.array([[bar.get_width() for bar in group] for group in bars(axes)])
    np.testing.assert_allclose(widths.T, [[0.6, 0.3, 0.1], [1, 0, 0]])
    low, high = wilson(4, 10)
    assert texts(axes)[1] == f"40.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert rows(axes) == ["Qwen2-7B", "GPT-4 Turbo"]
    assert set(answers.OUTCOMES) == set(OUTCOMES)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored():
    """400 responses of two models; every fourth failed and imputed, two were not scored."""
    random, count = np.random.default_rng(7), 400
    table = pd.DataFrame({
        "model": np.where(np.arange(count) % 2, SEVEN, "gpt-4o-mini"), "coherence": random.beta(8, 1, count),
        "c_score": random.integers(-1, 2, count).astype(float), "ue_score": random.integers(0, 3, count).astype(float),
        "persona_distance": random.beta(4, 4, count), "compliance": random.beta(6, 2, count),
        "imputed": np.arange(count) % 4 == 0,
    })  # fmt: skip
    table.loc[table["imputed"], ["coherence", "c_score", "ue_score", "persona_distance"]] = [0.0, -1.0, 0.0, 0.0]
    table["quality"] = (table[list(scores.SIGNALS)] / [1, 2, 2, 1, 1]).mean(axis=1).clip(0, 1)
    table.loc[[1, 2], [*scores.SIGNALS, "quality"]] = np.nan
    return table


THRESHOLDS = pd.DataFrame({"name": ["low", "high"], "value": [0.3, 0.5]})


def test_metric_histograms_hold_every_measured_response(scored):
    drawn = draw("score_metrics", scored)
    measured = scored[~scored["imputed"] & scored["quality"].notna()]
    counts = measured["model"].value_counts()
    assert rows(drawn.axes[0]) == [f"Qwen2-7B\nn = {counts[SEVEN]}", f"GPT-4o mini\nn = {counts['gpt-4o-mini']}"]
    for axes, signal in zip(drawn.axes, scores.SIGNALS, strict=True):
        means = [line.get_xdata()[0] for line in axes.lines]
        np.testing.assert_allclose(means, measured.groupby("model")[signal].mean()[[SEVEN, "gpt-4o-mini"]])
        for row, patch in enumerate(patch for patch in axes.patches if isinstance(patch, StepPatch)):
            tops, edges, base = patch.get_data()
            values = measured.loc[measured["model"] == (SEVEN, "gpt-4o-mini")[row], signal]
            heights = np.nan_to_num(base - tops)
            shares = np.histogram(values, edges)[0] / len(values)
            np.testing.assert_allclose(heights / heights.sum(), shares, atol=1e-12)
    absent = draw("score_metrics", scored.assign(coherence=np.nan)).axes[0]
    assert texts(absent) == ["not measured"]


def test_quality_histogram_counts_parsed_and_failed(scored):
    axes = draw("quality", scored, THRESHOLDS).axes[0]
    (parsed, edges, _), (top, _, base) = (patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch))
    rated = scored.dropna(subset="quality")
    np.testing.assert_array_equal(parsed, np.histogram(rated.loc[~rated["imputed"], "quality"], edges)[0])
    failed = np.histogram(rated.loc[rated["imputed"], "quality"], edges)[0]
    np.testing.assert_array_equal(np.nan_to_num(top - base), failed)
    assert [line.get_xdata()[0] for line in axes.lines] == [0.3, 0.5]
    low, high = rated[rated["quality"] <= 0.3], rated[rated["quality"] >= 0.5]
    assert texts(axes) == [
        f"rejected: ≤ 0.300\n{len(low)} ({100 * low['imputed'].mean():.0f} % failed)",
        f"chosen: ≥ 0.500\n{len(high)} ({100 * high['imputed'].mean():.0f} % failed)",
    ]


def test_quality_by_model_stacks_the_shares_of_each_model(scored):
    axes = draw("quality_by_model", scored, THRESHOLDS).axes[0]
    assert rows(axes) == ["Qwen2-7B", "GPT-4o mini"]
    layers = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)][:4]
    sums = [np.nan_to_num(base - tops).sum() for tops, _, base in layers]
    failed = scored.dropna(subset="quality").groupby("model")["imputed"].mean()
    assert sums[1] / (sums[0] + sums[1]) == pytest.approx(failed[SEVEN])
    assert sums[3] / (sums[2] + sums[3]) == pytest.approx(failed["gpt-4o-mini"])
    assert sums[0] + sums[1] == pytest.approx(sums[2] + sums[3])


def test_correlations_are_spearmans_with_and_without_imputed_rows(scored):
    drawn = draw("metric_correlation", scored)
    rated, lower = scored.dropna(subset="quality"), np.tril_indices(5)
    for axes, part in zip(drawn.axes, (rated[~rated["imputed"]], rated), strict=False):
        assert f"n = {len(part)}" in axes.get_title(loc="left")
        expected = spearmanr(part[[*scores.SIGNALS, "quality"]]).statistic[1:, :-1]
        np.testing.assert_allclose(axes.collections[0].get_array().reshape(5, 5)[lower], expected[lower])
    assert texts(draw("metric_correlation", scored.assign(coherence=1.0)).axes[0])[0] == "–"


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_heat_map_counts_pairs_and_sums_them_at_its_sides():
    table = pd.DataFrame({"chosen_model": ["gpt-4-turbo"] * 3 + [HALF], "rejected_model": [SEVEN, SEVEN, HALF, SEVEN]})
    top, corner, heat, right = draw("pair_sources", table).axes
    np.testing.assert_array_equal(heat.collections[0].get_array().reshape(3, 3), [[0, 1, 0], [0, 0, 0], [1, 2, 0]])
    assert [bar.get_height() for bar in bars(top)[0]] == [1, 3, 0]
    assert [bar.get_width() for bar in bars(right)[0]] == [1, 0, 3]
    assert texts(corner) == ["4\npairs"]
    # A bar stands over the column it sums.
    assert (top.get_xlim(), right.get_ylim()) == (heat.get_xlim(), heat.get_ylim())


# --- curves ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return pd.read_csv(PROJECT / "data" / "published" / "training_curves.csv")


def test_curves_stand_on_twin_axes_as_published_and_small_values_on_the_last_line_of_ours(published):
    paper = published[published["run"] == curves.PAPER_RUN]
    for axes, quantity in zip(draw("figure_2b_published", published).axes, ("loss", "grad_norm"), strict=True):
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xydata(), paper[["step", quantity]])
    loss, norm = draw("figure_2b", published).axes
    line = loss.lines[-1]
    np.testing.assert_array_equal(line.get_ydata(), paper["loss"].clip(lower=1e-4))
    assert (loss.get_yscale(), rows(loss)[0]) == ("log", "≤ 10⁻⁴")
    assert len(norm.lines) == published["run"].nunique()
    assert loss.get_xlim() == (0, pytest.approx(1.03 * 1700))


def test_axes_fit_the_arms_and_not_the_papers_run(published):
    log = pd.DataFrame({
        "kind": ["train", "train", "health"], "epoch": [0.5, 1.0, 1.0], "reward_margin": [0.1, 0.4, None],
        "reward_accuracy": [0.5, 0.9, None], "policy": "tiny",
    })  # fmt: skip
    drawn = draw("figure_2c_arms", {"perso": log}, published)
    margin, _ = drawn.axes
    paper, ours = margin.lines
    assert ours.get_xydata().tolist() == [[0.5, 0.1], [1.0, 0.4]]
    assert margin.get_ylim()[1] < 0.5 < paper.get_ydata().max()
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        "perso: tiny", f"{curves.PAPER_RUN_LABEL}, partly off the axes",
    ]  # fmt: skip


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparisons():
    table = [
        (arm, "base", metric, reading, value, value - 0.05, value + 0.07, p_value)
        for arm, size, p_value in (("simple", 0.1, 0.2), ("perso", 0.2, 0.0001))
        for metric, reading, value in (
            ("response_time", "all responses", 9.0), ("failure_ratio", "all responses", -size),
            ("quality", "failures imputed", size),
        )
    ]  # fmt: skip
    table.append(("simple", "base", "quality", "successes alone", -0.3, -0.4, -0.2, 0.01))
    table.append(("perso", "base", "quality", "successes alone", np.nan, np.nan, np.nan, np.nan))
    columns = ["arm", "baseline", "metric", "reading", "difference", "low", "high", "p_holm"]
    return pd.DataFrame(table, columns=columns).assign(p_at_floor=lambda rows: rows["p_holm"] == 0.01)


def drawn_rows(axes):
    """Return a panel's points with their fill, and its intervals, both by row."""
    flat = [line for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[-1]]
    single, double = ([line for line in flat if len(line.get_xdata()) == length] for length in (1, 2))
    points = {line.get_ydata()[0]: (line.get_xdata()[0], line.get_markerfacecolor()) for line in single}
    return points, {line.get_ydata()[0]: list(line.get_xdata()) for line in double}


def test_forest_holds_the_tables_numbers(comparisons):
    drawn = draw("forest", comparisons)
    quality, failures = drawn.axes
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["Quality", "Failure ratio"]
    assert rows(quality) == ["simple − base", "perso − base"]
    points, intervals = drawn_rows(quality)
    assert points == {0: (pytest.approx(0.1), "white"), 1: (pytest.approx(0.2), style.BLUE)}
    assert intervals[1] == pytest.approx([0.15, 0.27])
    points, intervals = drawn_rows(failures)
    assert points == {0: (pytest.approx(-0.1), "white"), 1: (pytest.approx(-0.2), style.BLUE)}
    assert texts(failures) == ["0.200", "<0.001", "p (Holm)"]
    # The axis reaches from zero to the widest interval, and no further to the other side.
    low, high = quality.get_xlim()
    assert -0.05 < low < 0
    assert 0.27 < high < 0.32


def test_forests_differ_in_title_and_show_what_is_worse_or_missing(comparisons):
    imputed, successes = draw("forest", comparisons), draw("forest_successes", comparisons)
    assert imputed.get_suptitle() != successes.get_suptitle()
    assert drawn_rows(successes.axes[0])[0] == {0: (pytest.approx(-0.3), style.VERMILLION)}
    assert texts(successes.axes[0]) == ["≤0.010", "–", "p (Holm)"]
    with pytest.raises(NothingToShowError):
        draw("forest", comparisons.assign(difference=np.nan))


def test_numbers_under_a_narrow_panel_do_not_touch(comparisons):
    row = comparisons.iloc[0].to_dict() | {"difference": -0.002, "low": -0.005, "high": 0.0}
    names = ["repeats", "failure_ratio", "grounded", "grounded_too"]
    drawn = draw("forest", pd.DataFrame([row | {"metric": name} for name in names]))
    for axes in drawn.axes:
        labels = [label for label in axes.get_xticklabels() if axes.get_xlim()[0] <= label.get_position()[0]]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) > 1
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_ablations_stand_beside_what_they_change():
    estimates = pd.DataFrame([
        (arm, metric, reading, value, value - 0.02, value + 0.03)
        for arm, quality, failures in (("a", 0.5, 0.1), ("corrected", 0.6, 0.05), ("b", np.nan, 0.2))
        for metric, reading, value in (
            ("quality", "failures imputed", quality), ("quality", "successes alone", 0.9),
            ("failure_ratio", "all responses", failures),
        )
    ], columns=["arm", "metric", "reading", "mean", "low", "high"])  # fmt: skip
    quality, failures = draw("ablations", estimates, pd.DataFrame({"ablation": ["b", "a"]})).axes
    assert rows(quality) == ["corrected", "b", "a"]
    assert texts(quality) == ["0.600", "–", "0.500"]
    points, intervals = drawn_rows(failures)
    assert [points[row][0] for row in range(3)] == [0.05, 0.2, 0.1]
    assert intervals[1] == pytest.approx([0.18, 0.23])
    (band,) = quality.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.58, 0.63))
    judged = pd.concat([estimates, estimates.query("metric == 'failure_ratio'").assign(metric="grounded")])
    first, *_ = draw("ablations", judged, pd.DataFrame({"ablation": ["b", "a"]})).axes
    assert texts(first) == ["0.050", "0.200", "0.100"]


# --- all figures -----------------------------------------------------------------------------------------------------


def test_names_are_text(tmp_path):
    table = pd.DataFrame({"model": NAMES * 2, "outcome": ["ok"] * 4 + ["loop"] * 4})
    drawn = draw("failure_classes", table)
    heat = draw("pair_sources", pd.DataFrame({"chosen_model": NAMES, "rejected_model": NAMES[::-1]}))
    for picture, axes in ((drawn, drawn.axes[0]), (heat, heat.axes[2])):
        assert sorted(rows(axes)) == sorted(NAMES)
        assert not any(label.get_parse_math() for label in axes.get_yticklabels())
        style.save(picture, "names", tmp_path, {}, "")
        assert picture._repr_png_()
    assert style.model_styles(["two\r\nlines"])["two\r\nlines"].label == "two lines"


def test_a_name_in_another_script_takes_a_font_of_the_machine(monkeypatch):
    """STIX, which comes with matplotlib, has a sign that DejaVu Sans lacks, as a machine's fonts have Chinese."""
    table = pd.DataFrame({"model": ["\ue0d2"], "outcome": ["ok"]})
    with pytest.warns(UserWarning, match="missing from font"):
        draw("failure_classes", table)
    monkeypatch.setattr(style, "FALLBACK_FONTS", ("no such font", "STIXNonUnicode"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw("failure_classes", table)


def test_every_figure_says_what_it_shows_and_refuses_an_empty_table():
    for name, spec in FIGURES.items():
        assert spec.note.endswith("."), name
        if not any("<arm>" in table for table in spec.tables):
            with pytest.raises(NothingToShowError):
                spec.draw(*(pd.DataFrame() for _ in spec.tables))


def test_models_look_the_same_in_every_figure():
    assert style.model_styles(["gpt-4-turbo", SEVEN]) == style.model_styles([SEVEN, SEVEN, "gpt-4-turbo"])
    assert list(style.model_styles(["z", "gpt-4-turbo", ARM, HALF])) == [HALF, ARM, "gpt-4-turbo", "z"]
    arm = style.model_styles([ARM])[ARM]
    assert (arm.label, arm.colour) == ("Qwen2-0.5B length prior", style.MODEL_STYLES[HALF].colour)
    assert arm.hatch
    strangers = style.model_styles([f"tiny-{n}" for n in range(9)]).values()
    assert len({look.colour for look in strangers}) == 7


def test_files_are_the_same_byte_for_byte_whatever_a_user_has_set(tmp_path, results):
    inputs = {"evaluation/results": "f" * 64, "code": "0" * 64}
    drawn = draw("figure_2a", results)
    first = style.save(drawn, "figure_2a", tmp_path / "a", inputs, "Beside Figure 2a.")
    picture, size = drawn._repr_png_()
    assert (picture[:4], size) == (b"\x89PNG", {"width": round(drawn.get_figwidth() * style.SCREEN_DPI)})
    with mpl.rc_context({"font.size": 20, "font.family": "serif", "axes.grid": True, "text.parse_math": True}):
        other = style.save(draw("figure_2a", results), "figure_2a", tmp_path / "b", inputs, "Beside Figure 2a.")
    again = style.save(drawn, "figure_2a", tmp_path / "c", inputs, "Beside Figure 2a.")
    expected = [path.read_bytes() for path in first]
    assert [[path.read_bytes() for path in files] for files in (other, again)] == [expected, expected]
    assert [path.name for path in first] == ["figure_2a.pdf", "figure_2a.png", "figure_2a.json"]
    record = json.loads(first[2].read_text())
    assert record["inputs"] == inputs
    assert record["files"] == {path.name: sha256(path) for path in first[:2]}
    assert set(record["versions"]) == {"matplotlib", "seaborn"}
    assert b"Type3" not in first[0].read_bytes()
