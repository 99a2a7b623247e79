"""What each ablation does to a metric: one panel a metric, one row an arm, the baseline as a line through all rows.

In: one row an arm and metric, with the columns

    arm          name of the ablation, or of the baseline
    metric       see `persodpo.plots.metrics.METRIC_LABELS`
    reading      how failures count in text metrics, such as ``failures imputed``; ``all responses`` for other metrics
    mean         in the metric's own unit; null where it cannot be derived
    low, high    its 95 % interval; null where there is none

Source: `persodpo.evaluation.statistics.estimates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.metrics import LOWER_IS_BETTER, metric_label
from persodpo.plots.style import BLUE, DOUBLE, FAINT, new_figure, styled

COLUMNS = ("arm", "metric", "reading", "mean", "low", "high")
_EVERY = "all responses"
_MOST = 4


@styled
def draw(
    estimates: pd.DataFrame,
    baseline: str,
    metrics: Sequence[str] = ("quality", "failure_ratio"),
    reading: str = "failures imputed",
    *,
    arms: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draw each arm's mean and 95 % interval beside the baseline's.

    The intervals are of each arm by itself; whether two arms differ is what paired comparisons say.

    Args:
        estimates: One row an arm, metric and reading; columns as in the module's docstring.
        baseline: The arm that every ablation changes one setting of.
        metrics: One panel each, at most four.
        reading: Which reading of text metrics.
        arms: Which ablations, in this order; None: all, in the table's order.
        labels: Labels of arms, if not their names.

    Returns:
        The figure, two columns wide; the baseline on top, then the ablations.

    Raises:
        PersodpoError: The table is empty, lacks a column, a metric or the baseline, or holds an arm's metric twice.
    """
    require(estimates, COLUMNS, "ablations")
    if not 0 < len(metrics) <= _MOST:
        raise PersodpoError(f"Figure ablations draws one to {_MOST} metrics, not {len(metrics)}.")
    rows = estimates[estimates["reading"].isin([reading, _EVERY]) & estimates["metric"].isin(metrics)]
    absent = [metric for metric in metrics if metric not in set(rows["metric"])]
    if absent:
        raise PersodpoError(f"Figure ablations has no {absent[0]} with {reading}; estimate it first.")
    if rows.duplicated(["arm", "metric"]).any():
        raise PersodpoError("Figure ablations needs one row an arm and metric; some stand twice.")
    names = [baseline, *(arm for arm in dict.fromkeys(rows["arm"] if arms is None else arms) if arm != baseline)]
    silent = [arm for arm in names if arm not in set(rows["arm"])]
    if silent:
        raise PersodpoError(f"Figure ablations has no arm '{silent[0]}'; there are {', '.join(rows['arm'].unique())}.")
    figure = new_figure(0.75 + 0.19 * len(names), DOUBLE)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=True):
        _panel(axes, rows[rows["metric"] == metric].set_index("arm").reindex(names), metric)
    panels[0].set_yticks(range(len(names)), [(labels or {}).get(arm, arm) for arm in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    shown = (labels or {}).get(baseline, baseline)
    handles = [
        Line2D([], [], color="black", linestyle="--", linewidth=0.8, label=shown),
        Patch(color=FAINT, label="its 95 % interval"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    """Draw one metric, the baseline in the first row."""
    values = table[["mean", "low", "high"]].to_numpy(dtype=float)
    mean, low, high = values[0]
    if np.isfinite(low) and np.isfinite(high):
        axes.axvspan(low, high, color=FAINT, linewidth=0, zorder=0)
    if np.isfinite(mean):
        axes.axvline(mean, color="black", linestyle="--", linewidth=0.8, zorder=1)
    for row, (mean, low, high) in enumerate(values):
        colour = BLUE if row else "black"
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([low, high], [row, row], color=colour, linewidth=1.0)
        if np.isfinite(mean):
            axes.plot(mean, row, "o" if row else "s", color=colour)
        text = "–" if np.isnan(mean) else f"{mean:.3f}"
        axes.annotate(
            text,
            (1, row),
            (3, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(metric_label(metric))
    axes.set_xlabel("← better" if metric in LOWER_IS_BETTER else "better →")
