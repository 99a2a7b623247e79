"""Paired differences between arms as a forest plot: one panel a metric, one row a comparison.

In: one row a comparison and metric, with the columns

    arm, baseline   names of the two arms; the difference is arm less baseline
    metric          see `persodpo.plots.metrics.METRIC_LABELS`
    reading         how failures count in text metrics, such as ``failures imputed``; ``all responses`` for other metrics
    difference      in the metric's own unit; null where it cannot be derived
    low, high       its 95 % interval; null where there is none
    p_holm          p-value after Holm's correction over all comparisons, 0 to 1; null likewise

Source: `persodpo.evaluation.comparisons.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.metrics import LOWER_IS_BETTER, metric_label, metric_order
from persodpo.plots.style import BLUE, DOUBLE, GREY, VERMILLION, new_figure, styled

COLUMNS = ("arm", "baseline", "metric", "reading", "difference", "low", "high", "p_holm")
#: Readings of metrics that need no text.
_EVERY = "all responses"
_ACROSS = 4
_LEVEL = 0.05


@styled
def draw(
    comparisons: pd.DataFrame, reading: str = "failures imputed", *, labels: Mapping[str, str] | None = None
) -> Figure:
    """Draw each difference with its interval and corrected p-value, around a line at zero.

    A filled point is a difference that stays under 0.05 after correction, a blue dot where the arm is better and a
    red square where it is worse; all others are hollow and grey. A dash stands where nothing could be derived.

    Args:
        comparisons: One row a comparison, metric and reading; columns as in the module's docstring.
        reading: Which reading of text metrics.
        labels: Labels of arms, if not their names.

    Returns:
        The figure, two columns wide, comparisons in the table's order, metrics of which nothing could be derived left out.

    Raises:
        PersodpoError: The table is empty, lacks a column, holds nothing of this reading, a comparison twice, or no
            difference at all.
    """
    require(comparisons, COLUMNS, "forest")
    rows = comparisons[comparisons["reading"].isin([reading, _EVERY])]
    if not rows["reading"].eq(reading).any():
        raise PersodpoError(
            f"Figure forest has no comparison with {reading}; there are {', '.join(comparisons['reading'].unique())}."
        )
    if rows.duplicated(["arm", "baseline", "metric"]).any():
        raise PersodpoError("Figure forest needs one row a comparison and metric; some stand twice.")
    pairs = list(dict.fromkeys(zip(rows["arm"], rows["baseline"], strict=True)))
    # A metric of which nothing could be derived has nothing to show; the tables say why.
    metrics = sorted(rows.loc[rows["difference"].notna(), "metric"].unique(), key=metric_order)
    if not metrics:
        raise PersodpoError("Figure forest has no difference to show; the comparisons' column reason says why.")
    across = min(_ACROSS, len(metrics))
    down = -(-len(metrics) // across)
    figure = new_figure(0.45 + down * (0.62 + 0.19 * len(pairs)), DOUBLE)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=False):
        table = rows[rows["metric"] == metric].set_index(["arm", "baseline"]).reindex(pairs)
        _panel(axes, table, metric)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    named = labels or {}
    names = [f"{named.get(arm, arm)} − {named.get(baseline, baseline)}" for arm, baseline in pairs]
    panels[0].set_yticks(range(len(pairs)), names)
    panels[0].set_ylim(len(pairs) - 0.4, -1.1)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, handlelength=1.0)
    return figure


def _legend() -> list[Line2D]:
    """Return what points mean."""
    looks = (
        (BLUE, BLUE, "o", "better, p < 0.05 (Holm)"),
        (VERMILLION, VERMILLION, "s", "worse, p < 0.05 (Holm)"),
        (GREY, "white", "o", "not told from zero"),
    )
    return [
        Line2D([], [], color=edge, marker=marker, markerfacecolor=face, linewidth=1.0, label=label)
        for edge, face, marker, label in looks
    ]


def _panel(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    """Draw one metric."""
    values = table[["difference", "low", "high", "p_holm"]].to_numpy(dtype=float)
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    for row, (difference, low, high, p_value) in enumerate(values):
        _row(
            axes,
            row,
            difference,
            low=low,
            high=high,
            p_value=p_value,
            better=(difference > 0) ^ (metric in LOWER_IS_BETTER),
        )
    _right(axes, -0.85, "p (Holm)")
    # Zero stands in the middle, so that the two directions compare at a glance.
    reach = np.nanmax(np.abs(values[:, :3]), initial=0.0) or 1.0
    axes.set_xlim(-1.08 * reach, 1.08 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(metric_label(metric))
    axes.set_xlabel("← better" if metric in LOWER_IS_BETTER else "better →")


def _row(axes: Axes, row: int, difference: float, *, low: float, high: float, p_value: float, better: bool) -> None:
    """Draw one comparison, and write its p-value at the panel's right."""
    told = p_value < _LEVEL
    colour = (BLUE if better else VERMILLION) if told else GREY
    if np.isfinite(low) and np.isfinite(high):
        axes.plot([low, high], [row, row], color=colour, linewidth=1.0)
    if np.isfinite(difference):
        marker = "s" if told and not better else "o"
        axes.plot(difference, row, marker, color=colour, markerfacecolor=colour if told else "white")
    _right(axes, row, "–" if np.isnan(p_value) else "<0.001" if p_value < 0.0005 else f"{p_value:.3f}")


def _right(axes: Axes, row: float, text: str) -> None:
    """Write a text at the panel's right."""
    place = axes.get_yaxis_transform()
    axes.annotate(text, (1, row), (3, 0), xycoords=place, textcoords="offset points", va="center", fontsize=6.5)
