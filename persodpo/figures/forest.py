"""Figures of the evaluation: paired differences between arms, and what each ablation does.

In: ``evaluation/comparisons`` (one row per comparison, metric and reading), ``ablations/estimates`` (one row per arm, metric
and reading), ``ablations/pairs`` (one row per ablation).

Response times are left out: a committed figure holds nothing that depends on the clock. They stand in the tables.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from persodpo.errors import NothingToShowError
from persodpo.figures.style import BLUE, DOUBLE, FAINT, GREY, VERMILLION, beside, figure, new_figure
from persodpo.metrics import LOWER_IS_BETTER, metric_label, metric_order, p_text

_ACROSS = 4
_LEVEL = 0.05


def short_names(comparisons: pd.DataFrame) -> dict[str, str]:
    """Name published arms by what they were tuned to, the untuned model as that; our arms keep their names."""
    names = {*comparisons["arm"], *comparisons["baseline"]}
    if not any("/" in name for name in names):
        return {name: name for name in names}
    return {name: name.split("/")[1] if "/" in name else "untuned" for name in names}


@figure(
    "forest_successes", ["evaluation/comparisons"], "Paired differences on held-out dialogues that both arms answered.",
    reading="successes alone", title="successes alone: dialogues that both arms answered",
)  # fmt: skip
@figure(
    "forest", ["evaluation/comparisons"], "Paired differences on held-out dialogues, failures imputed.",
    reading="failures imputed", title="failures imputed at their worst value",
)  # fmt: skip
def forest(comparisons: pd.DataFrame, *, reading: str, title: str) -> Figure:
    """Draw each difference with its interval and corrected p-value, one panel per metric, around a line at zero.

    A filled point is a difference that stays under 0.05 after correction, a blue dot where the arm is better and a
    red square where it is worse; all others are hollow and grey. A dash stands where nothing could be derived. Coherence of
    published arms is left out, as its column is scrambled (audit A1).
    """
    rows, names = comparisons[comparisons["reading"].isin([reading, "all responses"])], short_names(comparisons)
    left_out = ["response_time", *(["coherence"] if any("/" in name for name in names) else [])]
    rows = rows[~rows["metric"].isin(left_out)]
    # A metric of which nothing could be derived has nothing to show; the tables say why.
    metrics = sorted(rows.loc[rows["difference"].notna(), "metric"].unique(), key=metric_order)
    if not metrics:
        raise NothingToShowError(f"No difference was derived with {reading}; the comparisons' column reason says why.")
    pairs = list(dict.fromkeys(zip(rows["arm"], rows["baseline"], strict=True)))
    across = min(_ACROSS, len(metrics))
    down = -(-len(metrics) // across)
    fig = new_figure(0.65 + down * (0.62 + 0.19 * len(pairs)), DOUBLE)
    panels = fig.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=False):
        _differences(axes, rows[rows["metric"] == metric].set_index(["arm", "baseline"]).reindex(pairs), metric)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    panels[0].set_yticks(range(len(pairs)), [f"{names[arm]} − {names[baseline]}" for arm, baseline in pairs])
    panels[0].set_ylim(len(pairs) - 0.4, -1.1)
    fig.suptitle(f"Paired differences, {title}", x=0.01, ha="left", fontsize=8)
    looks = (
        (BLUE, BLUE, "o", "better, p < 0.05 (Holm)"), (VERMILLION, VERMILLION, "s", "worse, p < 0.05 (Holm)"),
        (GREY, "white", "o", "p ≥ 0.05 (Holm)"), ("black", "black", "", "95 % interval, not adjusted"),
    )  # fmt: skip
    handles = [
        Line2D([], [], color=edge, marker=marker, markerfacecolor=face, linewidth=1.0, label=label)
        for edge, face, marker, label in looks
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=1.0)
    return fig


def _differences(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    """Draw one metric, and the corrected p-values at the panel's right."""
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    values = table[["difference", "low", "high", "p_holm"]].to_numpy(dtype=float)
    at_floor = table["p_at_floor"].eq(True)
    for row, ((difference, low, high, p_value), bound) in enumerate(zip(values, at_floor, strict=True)):
        significant, better = p_value < _LEVEL, (difference > 0) ^ (metric in LOWER_IS_BETTER)
        colour = (BLUE if better else VERMILLION) if significant else GREY
        marker = "s" if significant and not better else "o"
        face = colour if significant else "white"
        _interval(axes, row, (difference, low, high), colour=colour, marker=marker, face=face)
        beside(axes, row, "–" if np.isnan(p_value) else p_text(p_value, "≤" if bound else ""))
    beside(axes, -0.85, "p (Holm)")
    _metric_axis(axes, metric, ticks=3)


def _interval(axes: Axes, row: int, values: tuple[float, float, float], *, colour: str, marker: str, face: str) -> None:
    """Draw an estimate and its interval in a row; what is missing is left out."""
    middle, low, high = values
    if np.isfinite(low) and np.isfinite(high):
        axes.plot([low, high], [row, row], color=colour, linewidth=1.0)
    if np.isfinite(middle):
        axes.plot(middle, row, marker, color=colour, markerfacecolor=face)


def _metric_axis(axes: Axes, metric: str, ticks: int) -> None:
    """Title a panel, and say which way is better."""
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    # Numbers with three decimals are so long that two of them fill a panel of a forest.
    axes.xaxis.set_major_locator(MaxNLocator(ticks if high - low > 0.01 else 2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(metric_label(metric))
    axes.set_xlabel("← better" if metric in LOWER_IS_BETTER else "better →")


@figure(
    "ablations", ["ablations/estimates", "ablations/pairs"],
    "One thing done otherwise: judge, quality and failures on held-out dialogues.", "arms",
)  # fmt: skip
def ablations(estimates: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """Draw how often each ablation is grounded, where there is a judge, its quality and its failures.

    The arm that every ablation changes one setting of stands on top, its interval as a band through all rows. Intervals
    are of each arm by itself; whether two arms differ is what paired comparisons say.
    """
    rows = estimates[estimates["reading"].isin(["failures imputed", "all responses"])]
    names_of_ablations = pairs["ablation"].tolist()
    names = [next(arm for arm in rows["arm"] if arm not in names_of_ablations), *names_of_ablations]
    metrics_with_means = set(rows.loc[rows["mean"].notna(), "metric"])
    metrics = [metric for metric in ("grounded", "quality", "failure_ratio") if metric in metrics_with_means]
    fig = new_figure(0.75 + 0.19 * len(names), DOUBLE)
    panels = fig.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        table = rows[rows["metric"] == metric].set_index("arm").reindex(names)
        values = table[["mean", "low", "high"]].to_numpy(dtype=float)
        axes.axvspan(values[0, 1], values[0, 2], color=FAINT, linewidth=0, zorder=0)
        axes.axvline(values[0, 0], color="black", linestyle="--", linewidth=0.8, zorder=1)
        for row, (mean, low, high) in enumerate(values):
            colour = BLUE if row else "black"
            _interval(axes, row, (mean, low, high), colour=colour, marker="o" if row else "s", face=colour)
            beside(axes, row, "–" if np.isnan(mean) else f"{mean:.3f}")
        axes.grid(axis="x")
        _metric_axis(axes, metric, ticks=4)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles = [
        Line2D([], [], color="black", linestyle="--", linewidth=0.8, label=names[0]),
        Patch(color=FAINT, label="its 95 % interval"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig
