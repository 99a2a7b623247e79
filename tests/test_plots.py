"""Figures show what their tables hold, refuse tables they cannot show, and are written byte for byte the same."""

from __future__ import annotations

import json
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import BarContainer
from matplotlib.patches import StepPatch
from scipy.stats import spearmanr

from persodpo.errors import PersodpoError
from persodpo.plots import (
    attention_mask,
    failure_classes,
    metric_correlation,
    model_ranks,
    overview,
    pair_sources,
    response_time,
    score_distributions,
    scrambled,
    style,
    time_distribution,
    token_budget,
    training_curves,
)
from persodpo.plots.checks import plotted_sha256
from persodpo.plots.intervals import wilson
from persodpo.release.loops import windowed
from persodpo.runfolder import PROJECT, sha256

SEVEN = "Qwen2-7B-Instruct"
HALF = "Qwen2-0.5B-Instruct"
ARM = f"{HALF}/length_prior"
PUBLISHED_RUN = "Qwen2-5B-Instruct-FoCus-perso-DPO"


def test_attention_mask_by_hand():
    """A prompt of two positions (the last one stands at the head of each response), responses of two and one."""
    layout = pd.DataFrame({
        "position": [0, 1, 2, 1], "response": [-1, 0, 0, 1], "side": ["prompt", "chosen", "chosen", "rejected"],
    })  # fmt: skip
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert attention_mask.visible(layout).astype(int).tolist() == seen
    figure = attention_mask.draw(layout)
    (picture,) = figure.axes[0].images
    assert (np.asarray(picture.get_array()) > 0).astype(int).tolist() == seen
    assert [line.get_ydata().tolist() for line in figure.axes[1].lines] == [[0], [1, 2], [1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["prompt", "chosen", "rejected"]


def test_training_curves_by_epoch(curves):
    timed = curves.assign(epoch=curves["step"] / 574)
    figure = training_curves.draw(timed, highlight=[PUBLISHED_RUN], time="epoch")
    assert figure.axes[-1].get_xlabel() == "Epoch"
    assert max(figure.axes[0].lines[-1].get_xdata()) == pytest.approx(1700 / 574)
    with pytest.raises(PersodpoError, match="needs column epoch"):
        training_curves.draw(curves, highlight=[PUBLISHED_RUN], time="epoch")


@pytest.fixture
def results():
    return pd.DataFrame(
        {
            "model": [SEVEN, HALF, ARM],
            "responses": [1000, 1000, 1000],
            "response_time_mean": [4.02, 0.76, 0.49],
            "response_time_std": [0.48, 0.15, 0.6],
            "failures": [627, 390, 148],
        }
    )


@pytest.fixture(scope="module")
def curves():
    return pd.read_csv(PROJECT / "data" / "published" / "training_curves.csv")


@pytest.fixture(scope="module")
def scores():
    """400 responses of two models; every fourth failed and imputed, two were not scored."""
    draw = np.random.default_rng(7)
    count = 400
    table = pd.DataFrame(
        {
            "model": np.where(np.arange(count) % 2, SEVEN, "gpt-4o-mini"),
            "coherence": draw.beta(8, 1, count),
            "c_score": draw.integers(-1, 2, count).astype(float),
            "ue_score": draw.integers(0, 3, count).astype(float),
            "persona_distance": draw.beta(4, 4, count),
            "compliance": draw.beta(6, 2, count),
            "imputed": np.arange(count) % 4 == 0,
        }
    )
    table.loc[table["imputed"], ["coherence", "c_score", "ue_score", "persona_distance"]] = [0.0, -1.0, 0.0, 0.0]
    signals = ["coherence", "c_score", "ue_score", "persona_distance", "compliance"]
    table["quality"] = (table[signals] / [1, 2, 2, 1, 1]).mean(axis=1).clip(0, 1)
    table.loc[[1, 2], [*signals, "quality"]] = np.nan
    return table


def bars(axes):
    """Return the rectangles of every bar container, container by container."""
    return [list(container) for container in axes.containers if isinstance(container, BarContainer)]


def texts(axes):
    return [text.get_text() for text in axes.texts]


# --- response time ---------------------------------------------------------------------------------------------------


def test_published_bars_are_the_tables_numbers(results):
    axes = response_time.draw(results.iloc[[0, 2]], "published", labels={SEVEN: "Benchmark"}).axes[0]
    heights = [[bar.get_height() for bar in group] for group in bars(axes)]
    assert heights == [[4.02, 0.627], [0.49, 0.148]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Benchmark", "Qwen2-0.5B length prior"]
    assert axes.get_ylim()[0] == 0


def test_our_bars_carry_wilson_intervals(results):
    left, right = response_time.draw(results).axes
    assert [group[0].get_width() for group in bars(left)] == [4.02, 0.76, 0.49]
    assert [group[0].get_width() for group in bars(right)] == [0.627, 0.390, 0.148]
    whiskers = [container.lines[2][0].get_segments()[0][:, 0] for container in right.containers[1::2]]
    np.testing.assert_allclose(whiskers, [wilson(k, 1000) for k in results["failures"]])
    # The spread of a time ends at zero seconds.
    assert left.containers[-1].lines[2][0].get_segments()[0][0, 0] == pytest.approx(0)
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0


def test_results_table_turns_into_counts(results):
    long = pd.DataFrame([
        {"model": row.model, "metric": metric, "responses": row.responses, "mean": mean, "std": 0.1}
        for row in results.itertuples()
        for metric, mean in (
            ("response_time", row.response_time_mean), ("coherence", 0.5), ("failure_ratio", row.failures / 1000)
        )
    ])  # fmt: skip
    wide = response_time.from_results(long)
    assert list(wide["model"]) == list(results["model"])
    assert list(wide["failures"]) == [627, 390, 148]
    with pytest.raises(PersodpoError, match="failure_ratio"):
        response_time.from_results(long[long["metric"] == "coherence"])


def test_time_that_was_not_measured_is_a_dash(results):
    results.loc[0, ["response_time_mean", "response_time_std"]] = np.nan
    assert texts(response_time.draw(results).axes[0])[0] == "–"
    assert texts(response_time.draw(results, "published").axes[0])[0] == "–"


@pytest.mark.parametrize("failures", [-1, 1001])
def test_impossible_counts_are_refused(results, failures):
    results.loc[0, "failures"] = failures
    with pytest.raises(PersodpoError, match="between 0 and responses"):
        response_time.draw(results)


# --- training curves -------------------------------------------------------------------------------------------------


def test_published_layout_draws_the_tables_points_on_twin_axes(curves):
    run = curves[curves["run"] == PUBLISHED_RUN]
    figure = training_curves.draw(curves, layout="published", highlight=[PUBLISHED_RUN], labels={PUBLISHED_RUN: "ours"})
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), run[["step", "loss"]])
    np.testing.assert_array_equal(right.lines[0].get_xydata(), run[["step", "grad_norm"]])
    assert figure.legends[0].get_title().get_text() == "ours"


def test_our_layout_draws_all_runs_and_drops_no_point(curves):
    panels = ("loss", "grad_norm", "reward_margin", "reward_accuracy")
    figure = training_curves.draw(curves, panels, highlight=[PUBLISHED_RUN], others="published")
    run = curves[curves["run"] == PUBLISHED_RUN]
    for axes, panel, floor in zip(figure.axes, panels, (1e-4, 1e-2, -np.inf, -np.inf), strict=True):
        assert len(axes.lines) == curves["run"].nunique()
        drawn = axes.lines[-1].get_xydata()
        np.testing.assert_array_equal(drawn[:, 1], np.maximum(run[panel], floor))
        assert axes.get_ylim()[0] < drawn[:, 1].min()
    assert figure.axes[0].get_yscale() == "log"
    assert "leq" in figure.axes[0].get_yticklabels()[0].get_text()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [PUBLISHED_RUN, "published (9)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panels": ("rewards",)}, "can draw loss"),
        ({"panels": ()}, "nothing"),
        ({"highlight": ["nobody"]}, "no run 'nobody'"),
        ({}, "at most 7"),
        ({"layout": "published", "highlight": [PUBLISHED_RUN], "panels": ("loss",)}, "two panels"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(curves, arguments, message):
    with pytest.raises(PersodpoError, match=message):
        training_curves.draw(curves, **arguments)


# --- outcome classes -------------------------------------------------------------------------------------------------


def test_stack_holds_the_shares_of_outcomes():
    outcomes = ["ok"] * 6 + ["truncated"] * 3 + ["loop"]
    table = pd.DataFrame({"model": [SEVEN] * 10 + ["gpt-4-turbo"] * 10, "outcome": outcomes + ["ok"] * 10})
    axes = failure_classes.draw(table).axes[0]
    widths = np.array([[bar.get_width() for bar in group] for group in bars(axes)])
    np.testing.assert_allclose(widths.T, [[0.6, 0.3, 0.1], [1, 0, 0]])
    np.testing.assert_allclose(widths.sum(axis=0), 1)
    low, high = wilson(4, 10)
    assert texts(axes)[1] == f"40.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Qwen2-7B", "GPT-4 Turbo"]


def test_outcomes_are_those_of_the_reader():
    from persodpo.completions import OUTCOMES

    assert set(failure_classes.OUTCOMES) == set(OUTCOMES)
    with pytest.raises(PersodpoError, match="not odd"):
        failure_classes.draw(pd.DataFrame({"model": [SEVEN], "outcome": ["odd"]}))


# --- scores ----------------------------------------------------------------------------------------------------------


def test_metric_histograms_hold_every_measured_response(scores):
    figure = score_distributions.draw_metrics(scores)
    measured = scores[~scores["imputed"] & scores["quality"].notna()]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [
        f"{label}\nn = {(measured['model'] == model).sum()}"
        for label, model in (("Qwen2-7B", SEVEN), ("GPT-4o mini", "gpt-4o-mini"))
    ]
    for axes, signal in zip(figure.axes, score_distributions.SIGNALS, strict=True):
        means = [line.get_xdata()[0] for line in axes.lines]
        np.testing.assert_allclose(means, measured.groupby("model")[signal].mean()[[SEVEN, "gpt-4o-mini"]])
        for row, patch in enumerate(p for p in axes.patches if isinstance(p, StepPatch)):
            tops, edges, base = patch.get_data()
            values = measured.loc[measured["model"] == (SEVEN, "gpt-4o-mini")[row], signal]
            shares = np.histogram(values, edges)[0] / len(values)
            heights = np.nan_to_num(base - tops)
            np.testing.assert_allclose(heights / heights.sum(), shares, atol=1e-12)


def test_signal_without_values_is_said_to_be_missing(scores):
    axes = score_distributions.draw_metrics(scores.assign(coherence=np.nan)).axes[0]
    assert texts(axes) == ["not measured"]


def test_quality_histogram_counts_parsed_and_failed(scores):
    axes = score_distributions.draw_quality(scores, 0.3, 0.5).axes[0]
    (parsed, edges, _), (top, _, base) = (patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch))
    scored = scores.dropna(subset="quality")
    failed = scored["imputed"]
    np.testing.assert_array_equal(parsed, np.histogram(scored.loc[~failed, "quality"], edges)[0])
    np.testing.assert_array_equal(np.nan_to_num(top - base), np.histogram(scored.loc[failed, "quality"], edges)[0])
    assert [line.get_xdata()[0] for line in axes.lines] == [0.3, 0.5]
    low, high = scored[scored["quality"] <= 0.3], scored[scored["quality"] >= 0.5]
    assert texts(axes) == [
        f"rejected: ≤ 0.300\n{len(low)} ({100 * low['imputed'].mean():.0f} % failed)",
        f"chosen: ≥ 0.500\n{len(high)} ({100 * high['imputed'].mean():.0f} % failed)",
    ]


def test_quality_by_model_has_a_row_a_model(scores):
    axes = score_distributions.draw_quality(scores, 0.3, 0.5, by="model", labels={SEVEN: "seven"}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seven", "GPT-4o mini"]


def test_quality_refuses_reversed_thresholds_and_unscored_tables(scores):
    with pytest.raises(PersodpoError, match="above the high one"):
        score_distributions.draw_quality(scores, 0.6, 0.4)
    with pytest.raises(PersodpoError, match="every quality is null"):
        score_distributions.draw_quality(scores.assign(quality=np.nan), 0.4, 0.6)
    with pytest.raises(PersodpoError, match="imputed"):
        score_distributions.draw_metrics(scores[scores["imputed"]])


def test_correlations_are_spearmans_with_and_without_imputed_rows(scores):
    figure = metric_correlation.draw(scores)
    scored = scores.dropna(subset="quality")
    for axes, rows in zip(figure.axes, (scored[~scored["imputed"]], scored), strict=False):
        assert f"n = {len(rows)}" in axes.get_title(loc="left")
        drawn = axes.collections[0].get_array().reshape(5, 5)
        expected = spearmanr(rows[list(metric_correlation.SIGNALS)]).statistic[1:, :-1]
        lower = np.tril_indices(5)
        np.testing.assert_allclose(drawn[lower], expected[lower])
    assert abs(figure.axes[1].collections[0].get_array().reshape(5, 5)[0, 0]) > 0.3


def test_constant_signal_has_no_correlation(scores):
    axes = metric_correlation.draw(scores.assign(coherence=1.0)).axes[0]
    assert texts(axes)[0] == "–"
    with pytest.raises(PersodpoError, match="three measured"):
        metric_correlation.draw(scores.assign(imputed=True))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_heat_map_counts_pairs_and_sums_them_at_its_sides():
    table = pd.DataFrame(
        {
            "chosen_model": ["gpt-4-turbo"] * 3 + [HALF],
            "rejected_model": [SEVEN, SEVEN, HALF, SEVEN],
        }
    )
    top, corner, heat, right = pair_sources.draw(table).axes
    counts = heat.collections[0].get_array().reshape(3, 3)
    np.testing.assert_array_equal(counts, [[0, 1, 0], [0, 0, 0], [1, 2, 0]])
    assert [bar.get_height() for bar in bars(top)[0]] == [1, 3, 0]
    assert [bar.get_width() for bar in bars(right)[0]] == [1, 0, 3]
    assert texts(corner) == ["4\npairs"]
    # A bar stands over the column it sums.
    assert top.get_xlim() == heat.get_xlim()
    assert right.get_ylim() == heat.get_ylim()


# --- all figures -----------------------------------------------------------------------------------------------------

CALLS = [
    (response_time.draw, response_time.COLUMNS, ()),
    (response_time.from_results, ("model", "metric", "responses", "mean", "std"), ()),
    (training_curves.draw, ("run", "step", "loss", "grad_norm"), ()),
    (attention_mask.draw, ("position", "response", "side"), ()),
    (failure_classes.draw, ("model", "outcome"), ()),
    (score_distributions.draw_metrics, ("model", "imputed", "quality", *score_distributions.SIGNALS), ()),
    (score_distributions.draw_quality, ("model", "imputed", "quality"), (0.4, 0.6)),
    (pair_sources.draw, ("chosen_model", "rejected_model"), ()),
    (metric_correlation.draw, (*metric_correlation.SIGNALS, "imputed"), ()),
    (scrambled.draw, ("straight", "scrambled", "owner"), ()),
    (model_ranks.draw, ("way", "model", "quality"), ()),
]


@pytest.mark.parametrize(("draw", "columns", "arguments"), CALLS)
def test_empty_tables_and_missing_columns_are_named(draw, columns, arguments):
    with pytest.raises(PersodpoError, match="without rows"):
        draw(pd.DataFrame(columns=list(columns)), *arguments)
    for column in columns:
        with pytest.raises(PersodpoError, match=f"needs column {column}, the table has"):
            draw(pd.DataFrame(columns=[name for name in columns if name != column]), *arguments)


def test_overview_names_every_stage_inside_the_picture():
    figure = overview.draw()
    assert {heading for heading, _ in overview.STAGES} <= set(texts(figure.axes[0]))
    figure.draw_without_rendering()
    page = figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1


def test_models_look_the_same_in_every_figure():
    assert style.model_styles(["gpt-4-turbo", SEVEN]) == style.model_styles([SEVEN, SEVEN, "gpt-4-turbo"])
    assert style.ordered(["z", "gpt-4-turbo", ARM, HALF]) == [HALF, ARM, "gpt-4-turbo", "z"]
    arm = style.model_styles([ARM])[ARM]
    assert arm == style.model_styles([SEVEN, ARM, HALF])[ARM]
    assert (arm.label, arm.colour) == ("Qwen2-0.5B length prior", style.MODEL_STYLES[HALF].colour)
    assert arm.hatch
    strangers = style.model_styles([f"tiny-{n}" for n in range(7)]).values()
    assert len({look.colour for look in strangers}) == 7
    assert len(style.model_styles([f"tiny-{n}" for n in range(9)])) == 9


def test_own_settings_of_a_user_do_not_leak_in(results):
    expected = plotted_sha256(response_time.draw(results))
    with mpl.rc_context({"font.size": 20, "font.family": "serif", "axes.grid": True, "axes.labelsize": 30}):
        figure = response_time.draw(results)
    assert figure.axes[0].xaxis.label.get_size() == 8
    assert plotted_sha256(figure) == expected


def test_files_are_the_same_byte_for_byte(tmp_path, results):
    inputs = {"evaluation/results": "f" * 64, "audit": "0" * 64}
    first = style.save(
        response_time.draw(results), "figure_2a", tmp_path / "a", inputs=inputs, note="Beside Figure 2a."
    )
    figure = response_time.draw(results)
    for folder in ("b", "c"):
        again = style.save(figure, "figure_2a", tmp_path / folder, inputs=inputs, note="Beside Figure 2a.")
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]
    assert [path.name for path in first] == ["figure_2a.pdf", "figure_2a.png", "figure_2a.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in first)
    record = json.loads(first[2].read_text())
    assert record["inputs"] == inputs
    assert record["note"] == "Beside Figure 2a."
    assert record["files"] == {path.name: sha256(path) for path in first[:2]}
    assert set(record["versions"]) == {"matplotlib", "seaborn"}
    assert b"Type3" not in first[0].read_bytes()


def test_digest_follows_the_plotted_numbers_only(results):
    digest = plotted_sha256(response_time.draw(results))
    relabelled = plotted_sha256(response_time.draw(results, labels={SEVEN: "seven"}))
    changed = plotted_sha256(response_time.draw(results.assign(failures=[626, 390, 148])))
    assert digest == relabelled
    assert digest != changed


def test_figures_show_themselves_in_a_notebook(results):
    figure = response_time.draw(results)
    picture, size = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert size == {"width": round(figure.get_figwidth() * style.SCREEN_DPI)}


def timed(model: str, seconds: list[float], batch_size: int | None = 1, hardware: str | None = None) -> pd.DataFrame:
    rows = {"model": model, "response_time": seconds, "batch_size": batch_size, "hardware": hardware}
    return pd.DataFrame(rows).astype({"batch_size": "Int64"})


def test_response_times_share_a_line_only_where_they_may():
    table = pd.concat([
        timed("gpt-4o-mini", [3.0, 1.0, 2.0], None), timed("small", [0.2, 0.1], 1, "cpu"), timed("small", [9.0], 1, "gpu"),
        timed("small", [5.0] * 7, 8, "cpu"),
    ])  # fmt: skip
    axes = time_distribution.draw(table).axes[0]
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn == {
        "GPT-4o mini": ([1.0, 2.0, 3.0], [1 / 3, 2 / 3, 1.0]),
        "small (cpu)": ([0.1, 0.2], [0.5, 1.0]),
        "small (gpu)": ([9.0], [1.0]),
    }
    with pytest.raises(PersodpoError, match=r"answers of batches only.*mode latency"):
        time_distribution.draw(timed("small", [5.0], 8))


def test_cut_off_answers_are_longer_than_what_is_there():
    """By hand: 60 answers, 20 of one word, 20 cut off at two, 20 of three; then one that is neither."""
    rows = [("ok", "a"), ("truncated", "a b"), ("ok", "a b c")] * 20 + [("malformed", "a b c d")]
    table = pd.DataFrame(rows, columns=["outcome", "response"]).assign(model="small")
    found = token_budget.answer_lengths(table)
    assert found["words"].tolist() == [1, 2, 3]
    assert found["longer"].tolist() == pytest.approx([2 / 3, 2 / 3, 0.0])
    fewer = token_budget.answer_lengths(table.drop(index=[2, 5]))  # 18 are left beyond two words
    assert fewer["words"].max() == 2
    figure = token_budget.draw(table, 110)
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert list(line.get_ydata()) == found["longer"].tolist()
    with pytest.raises(PersodpoError, match="no answer that ended by itself"):
        token_budget.answer_lengths(table[table["outcome"] == "truncated"])


def test_plots_import_neither_torch_nor_a_stage():
    modules = sorted(path.stem for path in (PROJECT / "persodpo" / "plots").glob("*.py") if path.stem != "__init__")
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module('persodpo.plots.' + name)\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "stages = {name for name in sys.modules if name.startswith('persodpo.')} - "
        "{'persodpo.errors', 'persodpo.profile_text', 'persodpo.corrections', 'persodpo.config', "
        "'persodpo.tables', 'persodpo.runfolder', 'persodpo.imports'}\n"
        "print(heavy | {name for name in stages if not name.startswith('persodpo.plots')})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "set()"


def test_scrambled_rows_stand_below_the_straight_ones():
    straight = [float(n) for n in range(20)]
    kept = windowed(lambda part: part, straight)
    table = pd.DataFrame({"straight": straight, "scrambled": kept, "owner": [int(value) for value in kept]})
    top, bottom = scrambled.draw(table).axes
    assert top.lines[-1].get_ydata().tolist() == straight
    assert bottom.lines[-1].get_ydata().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5]
    assert "the 9 that are kept" in top.get_title(loc="left")


def test_ranks_of_models_are_those_of_their_means():
    table = pd.DataFrame({
        "way": ["one"] * 3 + ["two"] * 3, "model": [SEVEN, HALF, "gpt-4-turbo"] * 2,
        "quality": [0.5, 0.7, 0.6, 0.3, 0.2, 0.3],
    })  # fmt: skip
    axes = model_ranks.draw(table).axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == {
        "Qwen2-0.5B": [1, 3], "Qwen2-7B": [3, 1], "GPT-4 Turbo": [2, 1],
    }  # fmt: skip
    assert "0.700" in texts(axes)
    with pytest.raises(PersodpoError, match="every model under every way"):
        model_ranks.draw(table[:-1])
