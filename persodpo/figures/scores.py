"""Figures of scores and pairs: signals by model, quality between the thresholds, how far signals rank alike, who is chosen.

In: ``scores`` or ``evaluation/scores``, one row per response; ``thresholds``; ``pairs/perso`` or ``pairs/simple``. Rows
without a quality are left out. Imputed rows hold worst-case values, not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from persodpo.errors import NothingToShowError
from persodpo.figures.style import BLUE, CHOSEN, DOUBLE, GREY, REJECTED, figure, model_styles, new_figure, slanted
from persodpo.method import SIGNALS
from persodpo.metrics import metric_label, number

Floats = NDArray[np.float64]

#: Usual range of a signal, and width of a bin; of those that are not named, 0 to 1 and 0.05. Ranges grow where a table goes
#: beyond them.
RANGES = {"c_score": ((-1.0, 1.0), 0.125), "ue_score": ((0.0, 2.0), 0.125)}
_QUALITY_BIN = 0.025
_RIDGE = 0.78  # height of the tallest bar, in rows
_MEAN: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "black", "markersize": 2.2, "label": "mean"}
_FAILED: dict[str, Any] = {"facecolor": "white", "edgecolor": "#555555", "hatch": "//////", "linewidth": 0.4}


@figure(
    "score_metrics_evaluation", ["evaluation/scores"], "The five signals of parsed held-out responses.", every_model=False,
)  # fmt: skip
@figure("score_metrics", ["scores"], "The five signals of parsed responses.")
def score_metrics(scores: pd.DataFrame, *, every_model: bool = True) -> Figure:
    """Draw a histogram of each signal for each model, over the responses that were measured.

    The bars of a column share one scale, so that areas compare between models. A model without any measured response, such
    as the one held-out set that was published without scores, may be left out.
    """
    parsed = scores[~scores["imputed"] & scores["quality"].notna()]
    if parsed.empty:
        raise NothingToShowError("The signals have nothing to show: every response is imputed or lacks a quality.")
    styles = model_styles((scores if every_model else parsed)["model"])
    fig = new_figure(0.6 + 0.36 * len(styles), DOUBLE)
    panels = fig.subplots(1, len(SIGNALS), sharey=True, gridspec_kw={"wspace": 0.08})
    for axes, signal in zip(panels, SIGNALS, strict=True):
        by_model = parsed.groupby("model")[signal]
        values = {model: by_model.get_group(model).dropna().to_numpy(float) for model in by_model.groups}
        _signal(axes, signal, [(values.get(model, np.array([])), look.colour) for model, look in styles.items()])
    counts = parsed["model"].value_counts()
    names = [f"{look.label}\nn = {counts.get(model, 0):,}" for model, look in styles.items()]
    panels[0].set_yticks([row - 0.3 for row in range(len(styles))], names)
    # The corner below the models' names is free in every table.
    fig.legend(handles=[Line2D([], [], **_MEAN)], loc="lower left", borderaxespad=0.8)
    return fig


def _signal(axes: Axes, signal: str, rows: Sequence[tuple[Floats, str]]) -> None:
    """Draw one signal's histogram and mean, one row per model."""
    limits, width = RANGES.get(signal, ((0.0, 1.0), 0.05))
    edges = _edges(np.concatenate([values for values, _ in rows]), limits, width, centred=True)
    heights = [np.histogram(values, edges)[0] / max(len(values), 1) for values, _ in rows]
    unit = max(float(height.max()) for height in heights) or 1.0
    for row, ((values, colour), height) in enumerate(zip(rows, heights, strict=True)):
        _ridge(axes, row, edges, [(height / unit, {"facecolor": colour, "linewidth": 0.0})])
        if len(values):
            axes.plot(values.mean(), row + 0.1, **_MEAN)
    _rows(axes, len(rows))
    if not any(len(values) for values, _ in rows):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=7)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(metric_label(signal) + ("\n(cosine)" if signal == "persona_distance" else ""))


@figure("quality", ["scores", "thresholds"], "Quality and the two thresholds.")
def quality(scores: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    """Draw a histogram of quality, parsed and failed responses apart."""
    scored, edges = _scored(scores)
    fig = new_figure(2.3)
    axes = fig.add_subplot()
    parsed, failed = _parsed_and_failed(scored, edges)
    axes.stairs(parsed, edges, fill=True, color=BLUE, label="parsed")
    # Empty bins are gaps, or the outline of the failed would run along the parsed.
    top = np.where(failed > 0, parsed + failed, np.nan)
    axes.stairs(top, edges, baseline=parsed, fill=True, label="failed (imputed)", **_FAILED)
    axes.set_ylim(0, 1.05 * float((parsed + failed).max()))
    axes.set_ylabel("Responses")
    _thresholds(fig, scored, thresholds, edges)
    return fig


@figure(
    "quality_by_model", ["scores", "thresholds"],
    "Quality and the two thresholds, by model, in shares of its responses.",
)  # fmt: skip
def quality_by_model(scores: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    """Draw a histogram of quality for each model, parsed and failed responses apart."""
    scored, edges = _scored(scores)
    styles = model_styles(scored["model"])
    fig = new_figure(0.8 + 0.3 * len(styles))
    axes = fig.add_subplot()
    parts = [_parsed_and_failed(scored[scored["model"] == model], edges) for model in styles]
    shares = [(parsed / (parsed + failed).sum(), failed / (parsed + failed).sum()) for parsed, failed in parts]
    unit = max(float((parsed + failed).max()) for parsed, failed in shares)
    for row, ((parsed, failed), look) in enumerate(zip(shares, styles.values(), strict=True)):
        fill = {"facecolor": look.colour, "linewidth": 0.0}
        _ridge(axes, row, edges, [(parsed / unit, fill), (failed / unit, _FAILED)])
    _rows(axes, len(styles))
    axes.set_yticks([row - 0.3 for row in range(len(styles))], [look.label for look in styles.values()])
    axes.stairs([0.0], [0.0, 0.0], fill=True, color=GREY, label="parsed")
    axes.stairs([0.0], [0.0, 0.0], fill=True, label="failed (imputed)", **_FAILED)
    _thresholds(fig, scored, thresholds, edges)
    return fig


def _scored(scores: pd.DataFrame) -> tuple[pd.DataFrame, Floats]:
    """Return the rows that have a quality, and the edges of bins over it."""
    scored = scores[scores["quality"].notna()]
    if scored.empty:
        raise NothingToShowError("Quality has nothing to show: every quality is null.")
    return scored, _edges(scored["quality"].to_numpy(float), (0.0, 1.0), _QUALITY_BIN)


def _parsed_and_failed(scored: pd.DataFrame, edges: Floats) -> tuple[Floats, Floats]:
    """Count parsed and failed responses in each bin."""
    failed = scored["imputed"].astype(bool)
    counts = [np.histogram(scored.loc[side, "quality"], edges)[0].astype(float) for side in (~failed, failed)]
    return counts[0], counts[1]


def _thresholds(fig: Figure, scored: pd.DataFrame, thresholds: pd.DataFrame, edges: Floats) -> None:
    """Shade what may be rejected and chosen, and say how many responses that is."""
    (axes,), value = fig.axes, thresholds.set_index("name")["value"]
    quality, failed = scored["quality"], scored["imputed"].astype(bool)
    low, high = float(value["low"]), float(value["high"])
    for text, threshold, end, colour, side, align in (
        (f"rejected: ≤ {low:.3f}", low, edges[0], REJECTED, quality <= low, "left"),
        (f"chosen: ≥ {high:.3f}", high, edges[-1], CHOSEN, quality >= high, "right"),
    ):
        axes.axvspan(threshold, end, color=colour, alpha=0.10, linewidth=0, zorder=0)
        axes.axvline(threshold, color="black", linewidth=0.7, linestyle=(0, (4, 2)), zorder=4)
        share = 100 * float(failed[side].mean()) if side.any() else 0.0
        axes.annotate(
            f"{text}\n{int(side.sum()):,} ({share:.0f} % failed)", (float(align == "right"), 1), (0, 2), fontsize=7,
            xycoords="axes fraction", textcoords="offset points", ha=align, va="bottom",
        )  # fmt: skip
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("Quality score")
    fig.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def _edges(values: Floats, limits: tuple[float, float], width: float, *, centred: bool = False) -> Floats:
    """Return bin edges over the usual range, grown by whole bins to hold all values.

    Centred bins have the limits at their middle: signals that take a few whole values then stand over their ticks.
    """
    low, high = float(values.min(initial=limits[0])), float(values.max(initial=limits[1]))
    first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return np.asarray((np.arange(first, last + 1 + centred) - 0.5 * centred) * width, dtype=np.float64)


def _ridge(axes: Axes, row: int, edges: Floats, layers: Sequence[tuple[Floats, Mapping[str, Any]]]) -> None:
    """Stack histograms upward from a row's base line; a height of 1 reaches almost to the next row."""
    base: Floats = np.full(len(edges) - 1, float(row))
    for heights, look in layers:
        top = np.where(heights > 0, base - _RIDGE * heights, np.nan)
        axes.stairs(top, edges, baseline=base, fill=True, **look)
        base = np.subtract(base, _RIDGE * heights, dtype=np.float64)


def _rows(axes: Axes, count: int) -> None:
    """Prepare the axis of rows: the first on top, a base line under each."""
    axes.set_ylim(count - 0.78, -0.95)
    axes.hlines(range(count), 0, 1, transform=axes.get_yaxis_transform(), color=GREY, linewidth=0.5, zorder=2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


@figure("metric_correlation", ["scores"], "Rank correlation, failures left out and imputed.")
def metric_correlation(scores: pd.DataFrame) -> Figure:
    """Draw how far signals rank alike.

    Failed responses get the worst value of every signal at once, so over all rows the signals seem to agree; over the
    measured rows they agree only as far as they measure the same.
    """
    scored = scores[scores["quality"].notna()]
    parsed = scored[~scored["imputed"].astype(bool)]
    if len(parsed) < 3:
        raise NothingToShowError("Rank correlation has nothing to show: under three responses were measured.")
    fig = new_figure(2.9, DOUBLE)
    left, right = fig.subplots(1, 2, sharey=True)
    _triangle(left, parsed, f"(a) measured responses, n = {len(parsed):,}")
    _triangle(right, scored, f"(b) with imputed failures, n = {len(scored):,}")
    bar = fig.colorbar(ScalarMappable(Normalize(-1, 1), "RdBu_r"), ax=[left, right], shrink=0.8, pad=0.01, aspect=25)
    bar.set_label("Spearman's ρ")
    bar.outline.set_visible(False)
    return fig


def _triangle(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """Draw the lower triangle of a matrix of Spearman's rank correlations."""
    columns = [*SIGNALS, "quality"]
    names = [metric_label(column) for column in columns]
    matrix = rows[columns].astype(float).corr(method="spearman").iloc[1:, :-1]
    texts = matrix.map(lambda value: "–" if np.isnan(value) else number(value, 2))
    sns.heatmap(
        matrix.fillna(0), mask=np.triu(np.ones(matrix.shape, dtype=bool), k=1), ax=axes, cmap="RdBu_r", vmin=-1, vmax=1,
        cbar=False, annot=texts, fmt="", annot_kws={"fontsize": 7}, linewidths=0.8, linecolor="white",
        xticklabels=names[:-1], yticklabels=names[1:],
    )  # fmt: skip
    axes.set_title(title, fontweight="normal")
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0)
    axes.tick_params(axis="y", rotation=0)
    slanted(axes, 30)


@figure("pair_sources_simple", ["pairs/simple"], "Which model is preferred to which, simple pairs.")
@figure("pair_sources", ["pairs/perso"], "Which model is preferred to which, perso pairs.")
def pair_sources(pairs: pd.DataFrame) -> Figure:
    """Draw the counts of pairs, chosen model by rejected model, with their sums as bars at the sides."""
    styles = model_styles([*pairs["chosen_model"], *pairs["rejected_model"]])
    models, names = list(styles), [look.label for look in styles.values()]
    counts = pd.crosstab(pairs["chosen_model"], pairs["rejected_model"])
    counts = counts.reindex(index=models, columns=models, fill_value=0)
    fig = new_figure(3.3)
    (top, corner), (heat, right) = fig.subplots(2, 2, width_ratios=(4.7, 1), height_ratios=(1, 4))
    sns.heatmap(
        counts, ax=heat, cmap="Blues", vmin=0, cbar=False, annot=True, fmt=",d", annot_kws={"fontsize": 6},
        linewidths=0.5, linecolor="white", xticklabels=names, yticklabels=names,
    )  # fmt: skip
    heat.set(xlabel="Rejected", ylabel="Chosen")
    heat.tick_params(length=0)
    slanted(heat, 40)
    places = np.arange(len(models)) + 0.5
    above = top.bar(places, counts.sum(axis=0), 0.8, color=REJECTED)
    beside = right.barh(places, counts.sum(axis=1), 0.8, color=CHOSEN)
    for axes, bars in ((top, above), (right, beside)):
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=6, padding=1.5)
        axes.set_axis_off()
    # Bars stand over the cells they sum; the other axis starts at zero and has room for the numbers.
    top.set(xlim=heat.get_xlim(), ylim=(0, 1.2 * top.get_ylim()[1]))
    right.set(ylim=heat.get_ylim(), xlim=(0, 1.7 * right.get_xlim()[1]))
    corner.set_axis_off()
    corner.text(0.5, 0.5, f"{len(pairs):,}\npairs", transform=corner.transAxes, ha="center", va="center", fontsize=7)
    return fig
