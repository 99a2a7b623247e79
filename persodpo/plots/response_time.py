"""Figure 2a of the paper: response time and failure ratio by model.

In: one row a model, with the columns

    model                 name; see `persodpo.plots.style.MODEL_STYLES`
    responses             number of responses asked for, at least 1
    response_time_mean    mean seconds a response; null if they were not measured
    response_time_std     population standard deviation of those seconds; null likewise
    failures              responses that could not be read, 0 to ``responses``

Source: the released metric files, or ``evaluation/results`` of a run folder by way of `from_results`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.intervals import wilson
from persodpo.plots.style import ModelStyle, model_styles, new_figure, styled

COLUMNS = ("model", "responses", "response_time_mean", "response_time_std", "failures")
_BAR: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}


@styled
def draw(
    results: pd.DataFrame, layout: Literal["published", "ours"] = "ours", *, labels: Mapping[str, str] | None = None
) -> Figure:
    """Draw response time and failure ratio, the models in the table's order.

    Args:
        results: One row a model, columns as in the module's docstring.
        layout: ``published`` puts both quantities on one axis pair, without intervals, as the paper does; ``ours``
            gives each its own panel, time as mean ± standard deviation, failures with their Wilson 95 % interval.
        labels: Labels of models, such as ``{"Qwen2-7B-Instruct": "Benchmark (Qwen2-7B)"}``.

    Returns:
        The figure, one column wide.

    Raises:
        PersodpoError: The table is empty, lacks a column, names a model twice, or holds impossible counts.
    """
    require(results, COLUMNS, "response_time")
    if results["model"].duplicated().any():
        raise PersodpoError("Figure response_time needs one row a model; filter the table to one row each.")
    if not ((results["responses"] > 0) & results["failures"].between(0, results["responses"])).all():
        raise PersodpoError("Figure response_time needs failures between 0 and responses, and at least one response.")
    styles = model_styles(results["model"], labels)
    return _published(results, styles) if layout == "published" else _ours(results, styles)


def from_results(results: pd.DataFrame) -> pd.DataFrame:
    """Turn the results table, one row a model and metric, into what `draw` takes.

    Args:
        results: Columns model, metric, responses, mean, std; the metrics ``response_time`` (seconds) and
            ``failure_ratio`` (0 to 1) are used.

    Returns:
        One row a model, columns as in the module's docstring, in the order of the first occurrence.

    Raises:
        PersodpoError: The table is empty or lacks a column or one of the two metrics.
    """
    require(results, ("model", "metric", "responses", "mean", "std"), "response_time")
    times, failed = (
        results[results["metric"].eq(name)].set_index("model") for name in ("response_time", "failure_ratio")
    )
    if times.empty or failed.empty:
        raise PersodpoError("Figure response_time needs the metrics response_time and failure_ratio in the results.")
    times = times.reindex(failed.index)
    return pd.DataFrame(
        {
            "model": failed.index,
            "responses": failed["responses"].to_numpy(),
            "response_time_mean": times["mean"].to_numpy(dtype=float),
            "response_time_std": times["std"].to_numpy(dtype=float),
            "failures": (failed["mean"] * failed["responses"]).round().astype(int).to_numpy(),
        }
    )


def _ratio(results: pd.DataFrame) -> pd.Series[float]:
    return results["failures"] / results["responses"]


def _text(value: float, digits: str, unit: str = "") -> str:
    """Write a number; a dash if it was not measured."""
    return "–" if np.isnan(value) else f"{value:{digits}}{unit}"


def _published(results: pd.DataFrame, styles: Mapping[str, ModelStyle]) -> Figure:
    """Draw two groups of bars that share an axis although their units differ, as published."""
    figure = new_figure(2.2)
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    columns = zip(results["model"], results["response_time_mean"], _ratio(results), strict=True)
    for number, (model, seconds, ratio) in enumerate(columns):
        look = styles[model]
        centres = np.arange(2) + (number - (len(results) - 1) / 2) * width
        bars = axes.bar(
            centres,
            np.nan_to_num([seconds, ratio]),
            width,
            color=look.colour,
            hatch=look.hatch,
            label=look.label,
            **_BAR,
        )
        axes.bar_label(bars, [_text(seconds, ".2f", " s"), _text(ratio, ".3f")], padding=1.5, fontsize=7)
    axes.set_xticks([0, 1], ["Response time (s)", "Failure ratio"])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_ylabel("Seconds (left), ratio (right)")
    axes.margins(y=0.12)
    axes.legend(loc="upper right")
    return figure


def _ours(results: pd.DataFrame, styles: Mapping[str, ModelStyle]) -> Figure:
    """Draw one panel a unit, the models as rows."""
    figure = new_figure(0.75 + 0.27 * len(results))
    left, right = figure.subplots(1, 2, sharey=True)
    ratio = _ratio(results).to_numpy()
    mean, std = (results[f"response_time_{name}"].to_numpy(dtype=float) for name in ("mean", "std"))
    bounds = np.array([wilson(k, n) for k, n in zip(results["failures"], results["responses"], strict=True)])
    # A time below zero does not exist, so a wide spread stops there.
    spread = np.array([np.minimum(std, mean), std])
    looks = [styles[model] for model in results["model"]]
    _bars(left, looks, mean, spread, [_text(float(value), ".2f") for value in mean])
    _bars(right, looks, ratio, np.abs(bounds.T - ratio), [_text(float(value), ".3f") for value in ratio])
    left.set_xlabel("Response time (s),\nmean ± s.d.")
    right.set_xlabel("Failure ratio,\n95 % interval")
    left.set_yticks(range(len(looks)), [look.label for look in looks])
    left.invert_yaxis()
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter("{x:g}")
    return figure


def _bars(axes: Axes, looks: list[ModelStyle], values: np.ndarray, spread: np.ndarray, texts: list[str]) -> None:
    """Draw a row a model: a bar from zero, its interval, and the number at the interval's end."""
    values, spread = np.nan_to_num(values), np.nan_to_num(spread)
    for row, (look, value) in enumerate(zip(looks, values, strict=True)):
        axes.barh(row, value, 0.68, color=look.colour, hatch=look.hatch, **_BAR)
        axes.errorbar(value, row, xerr=spread[:, [row]], fmt="none", ecolor="#333333", elinewidth=0.8)
        end = (float(value + spread[1, row]), float(row))
        axes.annotate(texts[row], end, (3, 0), textcoords="offset points", va="center", fontsize=7)
    # Room for the numbers, which stand outside the bars.
    axes.set_xlim(0, 1.38 * float((values + spread[1]).max()) or 1.0)
