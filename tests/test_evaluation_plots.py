"""Figures of the evaluation show what their tables hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from persodpo.errors import PersodpoError
from persodpo.plots import ablations, forest, style
from persodpo.plots.checks import plotted_sha256

READINGS = {"failure_ratio": "all responses"}


@pytest.fixture
def comparisons():
    rows = []
    for number, arm in enumerate(["simple", "perso"]):
        for metric, sign in (("failure_ratio", -1), ("quality", 1)):
            reading = READINGS.get(metric, "failures imputed")
            value = sign * (0.1 + 0.1 * number)
            rows.append(
                (arm, "base", metric, reading, value, value - 0.05, value + 0.07, 0.2 if arm == "simple" else 0.0001)
            )
    rows.append(("simple", "base", "quality", "successes alone", -0.3, -0.4, -0.2, 0.01))
    rows.append(("perso", "base", "quality", "successes alone", np.nan, np.nan, np.nan, np.nan))
    return pd.DataFrame(rows, columns=list(forest.COLUMNS))


def drawn(axes):
    """Return a panel's points with their fill, and its intervals, both by row."""
    flat = [line for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[-1]]
    points = {
        line.get_ydata()[0]: (line.get_xdata()[0], line.get_markerfacecolor())
        for line in flat
        if len(line.get_xdata()) == 1
    }
    return points, {line.get_ydata()[0]: list(line.get_xdata()) for line in flat if len(line.get_xdata()) == 2}


def test_forest_holds_the_tables_numbers(comparisons):
    figure = forest.draw(comparisons, labels={"base": "untuned"})
    quality, failures = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Quality", "Failure ratio"]
    assert [label.get_text() for label in quality.get_yticklabels()] == ["simple − untuned", "perso − untuned"]
    points, intervals = drawn(quality)
    assert points == {0: (pytest.approx(0.1), "white"), 1: (pytest.approx(0.2), style.BLUE)}
    assert intervals[1] == pytest.approx([0.15, 0.27])
    points, intervals = drawn(failures)
    assert points == {0: (pytest.approx(-0.1), "white"), 1: (pytest.approx(-0.2), style.BLUE)}
    assert intervals[0] == pytest.approx([-0.15, -0.03])
    assert [text.get_text() for text in failures.texts] == ["0.200", "<0.001", "p (Holm)"]
    assert (quality.get_xlabel(), failures.get_xlabel()) == ("better →", "← better")
    assert failures.get_xlim()[0] == -failures.get_xlim()[1]


def test_forest_shows_what_is_worse_and_what_could_not_be_derived(comparisons):
    quality = forest.draw(comparisons, "successes alone").axes[0]
    points, _ = drawn(quality)
    assert points == {0: (pytest.approx(-0.3), style.VERMILLION)}
    assert [text.get_text() for text in quality.texts] == ["0.010", "–", "p (Holm)"]


def test_figures_lay_any_number_of_metrics_out(comparisons):
    many = pd.concat([comparisons.assign(metric=f"metric {n}")[1:2] for n in range(6)])
    figure = forest.draw(many)
    assert sum(axes.axison for axes in figure.axes) == 6
    assert plotted_sha256(figure) != plotted_sha256(forest.draw(many.assign(difference=0.0)))


@pytest.fixture
def estimates():
    rows = [
        (arm, metric, READINGS.get(metric, "failures imputed"), value, value - 0.02, value + 0.03)
        for arm, quality, failures in (("a", 0.5, 0.1), ("corrected", 0.6, 0.05), ("b", 0.55, 0.2))
        for metric, value in (("quality", quality), ("failure_ratio", failures), ("c_score", quality))
    ]
    return pd.DataFrame(rows, columns=list(ablations.COLUMNS))


def test_ablations_stand_beside_the_baseline(estimates):
    quality, failures = ablations.draw(estimates, "corrected").axes
    assert [label.get_text() for label in quality.get_yticklabels()] == ["corrected", "a", "b"]
    points, intervals = drawn(failures)
    assert [points[row][0] for row in range(3)] == [0.05, 0.1, 0.2]
    assert intervals[2] == pytest.approx([0.18, 0.23])
    (band,) = quality.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.58, 0.63))
    assert [line.get_xdata() for line in quality.lines if line.get_linestyle() == "--"] == [[0.6, 0.6]]
    assert [text.get_text() for text in quality.texts] == ["0.600", "0.500", "0.550"]
    chosen = ablations.draw(estimates, "corrected", ["c_score"], arms=["b"], labels={"b": "no weights"}).axes[0]
    assert [label.get_text() for label in chosen.get_yticklabels()] == ["corrected", "no weights"]


def test_ablation_that_could_not_be_derived_is_a_dash(estimates):
    missing = estimates["arm"].eq("a") & estimates["metric"].eq("quality")
    estimates.loc[missing, ["mean", "low", "high"]] = np.nan
    quality = ablations.draw(estimates, "corrected").axes[0]
    assert set(drawn(quality)[0]) == {0, 2}
    assert [text.get_text() for text in quality.texts] == ["0.600", "–", "0.550"]


@pytest.mark.parametrize(
    ("draw", "columns"),
    [(forest.draw, forest.COLUMNS), (lambda table: ablations.draw(table, "corrected"), ablations.COLUMNS)],
)
def test_empty_tables_and_missing_columns_are_named(draw, columns):
    with pytest.raises(PersodpoError, match="without rows"):
        draw(pd.DataFrame(columns=list(columns)))
    for column in columns:
        with pytest.raises(PersodpoError, match=f"needs column {column}, the table has"):
            draw(pd.DataFrame(columns=[name for name in columns if name != column]))


def test_tables_that_cannot_be_drawn_are_refused(comparisons, estimates):
    with pytest.raises(PersodpoError, match="no comparison with wishes; there are all responses"):
        forest.draw(comparisons, "wishes")
    with pytest.raises(PersodpoError, match="some stand twice"):
        forest.draw(pd.concat([comparisons, comparisons[:1]]))
    for arguments, message in [
        (("base",), "no arm 'base'; there are a, corrected, b"),
        (("corrected", ["ue_score"]), "no ue_score with failures imputed"),
        (("corrected", []), "one to 4 metrics, not 0"),
    ]:
        with pytest.raises(PersodpoError, match=message):
            ablations.draw(estimates, *arguments)
    with pytest.raises(PersodpoError, match="no arm 'c'"):
        ablations.draw(estimates, "corrected", arms=["c"])
    with pytest.raises(PersodpoError, match="some stand twice"):
        ablations.draw(pd.concat([estimates, estimates[:1]]), "corrected")
