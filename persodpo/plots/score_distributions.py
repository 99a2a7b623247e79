"""Distributions of the five signals by model, and of the quality score with the thresholds that make pairs.

In: the ``scores`` table, one row a response, of which are used

    model               name; see `persodpo.plots.style.MODEL_STYLES`
    coherence           0 to 1
    c_score             agreement with the persona, -1 (contradiction) to 1 (entailment)
    ue_score            utterance entailment, 0 upward
    persona_distance    cosine with the persona, a similarity despite its name; up to 1
    compliance          length and format, 0 to 1, or above with the format bonus
    imputed             True for failed responses, whose first four signals are worst-case values, not measurements
    quality             weighted sum of the normalised signals, 0 to 1; null if not scored

Source: ``scores`` or ``evaluation/scores`` of a run folder, thresholds from its ``thresholds`` table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import BLUE, CHOSEN, DOUBLE, GREY, REJECTED, ModelStyle, model_styles, new_figure, styled

Floats = NDArray[np.float64]

#: The five signals: label, usual range, width of a bin. Ranges grow where a table goes beyond them.
SIGNALS: dict[str, tuple[str, tuple[float, float], float]] = {
    "coherence": ("Coherence", (0.0, 1.0), 0.05),
    "c_score": ("C score", (-1.0, 1.0), 0.125),
    "ue_score": ("UE score", (0.0, 2.0), 0.125),
    "persona_distance": ("Persona distance\n(cosine)", (0.0, 1.0), 0.05),
    "compliance": ("Compliance", (0.0, 1.0), 0.05),
}
_QUALITY_BIN = 0.025
_RIDGE = 0.78  # height of the tallest bar, in rows
_MEAN: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "black", "markersize": 2.2, "label": "mean"}
_FAILED: dict[str, Any] = {"facecolor": "white", "edgecolor": "#555555", "hatch": "//////", "linewidth": 0.4}


@styled
def draw_metrics(scores: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw a histogram of each signal for each model, over the responses that were measured.

    Imputed rows are left out: their values say that a response failed, not how good it is. A dot marks the mean. The bars
    of a column share one scale, so that areas compare between models.

    Args:
        scores: One row a response, columns as in the module's docstring; rows without a quality are left out, and a
            signal that was not measured at all gets an empty panel.
        labels: Labels of models, if not the short names.

    Returns:
        The figure, two columns wide: a row a model with its number of responses, a column a signal.

    Raises:
        PersodpoError: The table is empty, lacks a column, or holds no measured response.
    """
    require(scores, ("model", "imputed", "quality", *SIGNALS), "score_metrics")
    measured = scores[~scores["imputed"].astype(bool) & scores["quality"].notna()]
    if measured.empty:
        raise PersodpoError("Figure score_metrics needs responses that were scored; all are imputed or lack a quality.")
    styles = model_styles(scores["model"], labels)
    figure = new_figure(0.6 + 0.36 * len(styles), DOUBLE)
    panels = figure.subplots(1, len(SIGNALS), sharey=True, gridspec_kw={"wspace": 0.08})
    for axes, signal in zip(panels, SIGNALS, strict=True):
        _signal(axes, measured, signal, styles)
    counts = measured["model"].value_counts()
    names = [f"{style.label}\nn = {counts.get(model, 0):,}" for model, style in styles.items()]
    panels[0].set_yticks([row - 0.3 for row in range(len(styles))], names)
    # The corner below the models' names is free in every table.
    figure.legend(handles=[Line2D([], [], **_MEAN)], loc="lower left", borderaxespad=0.8)
    return figure


def _signal(axes: Axes, measured: pd.DataFrame, signal: str, styles: Mapping[str, ModelStyle]) -> None:
    """Draw one signal's histogram and mean for each model."""
    label, limits, width = SIGNALS[signal]
    values = {model: _values(measured, model, signal) for model in styles}
    edges = _edges(list(values.values()), limits, width)
    heights = {model: np.histogram(found, edges)[0] / max(len(found), 1) for model, found in values.items()}
    unit = max(float(height.max()) for height in heights.values()) or 1.0
    for row, (model, style) in enumerate(styles.items()):
        _ridge(axes, row, edges, [(heights[model] / unit, _fill(style))])
        if len(values[model]):
            axes.plot(values[model].mean(), row + 0.1, **_MEAN)
    _rows(axes, len(styles))
    if not any(map(len, values.values())):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=7)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(label)


@styled
def draw_quality(
    scores: pd.DataFrame,
    low: float,
    high: float,
    *,
    by: Literal["reading", "model"] = "reading",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the distribution of the quality score between the two thresholds, failed responses stacked on parsed ones.

    Args:
        scores: One row a response, columns ``model``, ``imputed`` and ``quality``; null qualities are left out.
        low: Quality at or below which a response may be rejected.
        high: Quality at or above which it may be chosen.
        by: ``reading`` draws one histogram in counts, ``model`` a row a model in shares of its responses.
        labels: Labels of models, if not the short names.

    Returns:
        The figure, one column wide.

    Raises:
        PersodpoError: The table is empty, lacks a column or holds no quality, or the thresholds are reversed.
    """
    scored = _scored(scores, low, high)
    edges = _edges([scored["quality"].to_numpy(float)], (0.0, 1.0), _QUALITY_BIN, centred=False)
    styles = model_styles(scored["model"], labels)
    figure = _by_model(scored, edges, styles) if by == "model" else _by_reading(scored, edges)
    axes = figure.axes[0]
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("Quality score")
    _thresholds(axes, scored, low, high, edges)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _scored(scores: pd.DataFrame, low: float, high: float) -> pd.DataFrame:
    """Return the rows that have a quality, after checking that there is something to draw."""
    require(scores, ("model", "imputed", "quality"), "score_quality")
    if low > high:
        raise PersodpoError(f"Figure score_quality got a low threshold above the high one ({low} > {high}).")
    scored = scores[scores["quality"].notna()]
    if scored.empty:
        raise PersodpoError("Figure score_quality needs scored responses; every quality is null.")
    return scored


def _by_reading(scored: pd.DataFrame, edges: Floats) -> Figure:
    """Draw one histogram of counts, failed on parsed."""
    figure = new_figure(2.3)
    axes = figure.add_subplot()
    parsed, failed = _split(scored, edges)
    axes.stairs(parsed, edges, fill=True, color=BLUE, label="parsed")
    # Empty bins are gaps, or the outline of the failed would run along the parsed.
    top = np.where(failed > 0, parsed + failed, np.nan)
    axes.stairs(top, edges, baseline=parsed, fill=True, label="failed (imputed)", **_FAILED)
    axes.set_ylim(0, 1.05 * float((parsed + failed).max()))
    axes.set_ylabel("Responses")
    return figure


def _by_model(scored: pd.DataFrame, edges: Floats, styles: Mapping[str, ModelStyle]) -> Figure:
    """Draw a row a model, in shares of its responses."""
    figure = new_figure(0.8 + 0.3 * len(styles))
    axes = figure.add_subplot()
    parts = {model: _split(scored[scored["model"].eq(model)], edges) for model in styles}
    totals = {model: float((parsed + failed).sum()) for model, (parsed, failed) in parts.items()}
    unit = max(float((parsed + failed).max()) / totals[model] for model, (parsed, failed) in parts.items())
    for row, (model, (parsed, failed)) in enumerate(parts.items()):
        scale = totals[model] * unit
        _ridge(axes, row, edges, [(parsed / scale, _fill(styles[model])), (failed / scale, _FAILED)])
    _rows(axes, len(styles))
    axes.set_yticks([row - 0.3 for row in range(len(styles))], [style.label for style in styles.values()])
    axes.stairs([0.0], [0.0, 0.0], fill=True, color=GREY, label="parsed")
    axes.stairs([0.0], [0.0, 0.0], fill=True, label="failed (imputed)", **_FAILED)
    return figure


def _split(scored: pd.DataFrame, edges: Floats) -> tuple[Floats, Floats]:
    """Count parsed and failed responses in each bin."""
    failed = scored["imputed"].astype(bool)
    quality = scored["quality"].to_numpy(float)
    parsed_counts, failed_counts = (np.histogram(quality[side], edges)[0] for side in (~failed, failed))
    return parsed_counts.astype(float), failed_counts.astype(float)


def _thresholds(axes: Axes, scored: pd.DataFrame, low: float, high: float, edges: Floats) -> None:
    """Shade what may be rejected and chosen, and say how many responses that is."""
    quality, failed = scored["quality"], scored["imputed"].astype(bool)
    sides = (
        (low, edges[0], REJECTED, "rejected", "≤", quality <= low, (0.0, "left")),
        (high, edges[-1], CHOSEN, "chosen", "≥", quality >= high, (1.0, "right")),
    )
    for threshold, end, colour, name, sign, side, (place, align) in sides:
        axes.axvspan(threshold, end, color=colour, alpha=0.10, linewidth=0, zorder=0)
        axes.axvline(threshold, color="black", linewidth=0.7, linestyle=(0, (4, 2)), zorder=4)
        share = 100 * float(failed[side].mean()) if side.any() else 0.0
        text = f"{name}: {sign} {threshold:.3f}\n{int(side.sum()):,} ({share:.0f} % failed)"
        axes.annotate(
            text, (place, 1), xycoords="axes fraction", xytext=(0, 2), textcoords="offset points", ha=align, va="bottom",
            fontsize=7, color="black",
        )  # fmt: skip


def _values(measured: pd.DataFrame, model: str, signal: str) -> Floats:
    return measured.loc[measured["model"].eq(model), signal].dropna().to_numpy(float)


def _edges(values: Sequence[Floats], limits: tuple[float, float], width: float, *, centred: bool = True) -> Floats:
    """Return bin edges over the usual range, grown by whole bins to hold all values.

    Centred bins have the limits at their middle: signals that take a few whole values then stand over their ticks.
    """
    found = np.concatenate([np.asarray(list(limits)), *values])
    first, last = math.floor(found.min() / width + 1e-9), math.ceil(found.max() / width - 1e-9)
    shift = 0.5 if centred else 0.0
    edges: Floats = (np.arange(first, last + 1 + centred) - shift) * width
    return edges


def _fill(style: ModelStyle) -> dict[str, Any]:
    # Rows carry names, so arms need no hatch here; it would fray the small bars.
    return {"facecolor": style.colour, "linewidth": 0.0}


def _ridge(axes: Axes, row: int, edges: Floats, layers: Sequence[tuple[Floats, Mapping[str, Any]]]) -> None:
    """Stack histograms upward from a row's base line; a height of 1 reaches almost to the next row."""
    base = np.full(len(edges) - 1, float(row))
    for heights, look in layers:
        top = np.where(heights > 0, base - _RIDGE * heights, np.nan)
        axes.stairs(top, edges, baseline=base, fill=True, **look)
        base = base - _RIDGE * heights


def _rows(axes: Axes, count: int) -> None:
    """Prepare the axis of rows: the first on top, a base line under each."""
    axes.set_ylim(count - 0.78, -0.95)
    axes.hlines(range(count), 0, 1, transform=axes.get_yaxis_transform(), color=GREY, linewidth=0.5, zorder=2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
