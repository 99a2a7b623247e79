"""Figures of the answers: response times and failure ratios (the paper's Figure 2a), and why answers failed.

In: ``evaluation/results`` (one row per model and metric), ``responses`` and ``evaluation/responses`` (one row per answer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import binomtest

from persodpo.figures import style
from persodpo.figures.style import beside, figure, model_styles, new_figure

_EDGE: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}
#: Models of the paper's Figure 2a, and the untuned one of the tuned one's size.
BENCHMARK, UNTUNED, TUNED = "Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Qwen2-0.5B-Instruct/length_prior"

#: Outcome classes in the order of the stack: (label, colour, hatch). The success is pale: the failures are the subject.
OUTCOMES: dict[str, tuple[str, str, str]] = {
    "ok": ("parsed", style.FAINT, ""),
    "truncated": ("truncated", style.VERMILLION, ""),
    "malformed": ("malformed JSON", style.ORANGE, "////"),
    "no_json": ("no JSON", style.BLUE, ""),
    "missing_key": ("key missing", style.SKY, "...."),
    "echo": ("template echoed", style.PURPLE, ""),
    "loop": ("loop", style.GREEN, "\\\\\\\\"),
    "empty": ("empty", style.GREY, ""),
    "api_error": ("API error", style.BLACK, ""),
    "unknown": ("unknown", "#6B6B6B", "xxxx"),
}


def three_digits(value: float) -> str:
    """Write a number to three significant digits, a missing one as a dash."""
    return "–" if np.isnan(value) else f"{value:#.3g}".rstrip(".")


def wilson(count: float, total: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a share of ``count`` in ``total``."""
    low, high = binomtest(int(count), int(total)).proportion_ci(method="wilson")
    return float(low), float(high)


@figure(
    "figure_2a_published", ["evaluation/results"],
    "Figure 2a as published: two models of different size, two units on one axis (audit A6, A7).", "published",
)  # fmt: skip
def figure_2a_published(results: pd.DataFrame) -> Figure:
    """Draw two units on one axis, as the paper does."""
    rows = _from_results(results, {BENCHMARK: "Benchmark (Qwen2-7B)", TUNED: "PersoDPO (Qwen2-0.5B)"})
    styles = model_styles(rows.index)
    fig, width = new_figure(2.2), 0.8 / len(rows)
    axes = fig.add_subplot()
    for number, (model, row) in enumerate(rows.iterrows()):
        look, values = styles[str(model)], [row["seconds"], row["failures"] / row["responses"]]
        centres = np.arange(2) + (number - (len(rows) - 1) / 2) * width
        fill = {"color": look.colour, "hatch": look.hatch, "label": row["label"]}
        bars = axes.bar(centres, np.nan_to_num(values), width, **fill, **_EDGE)
        texts = [f"{three_digits(values[0])} s", three_digits(values[1])]
        axes.bar_label(bars, texts, padding=1.5, fontsize=7)
    axes.set_xticks([0, 1], ["Response time (s)", "Failure ratio"])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_ylabel("Seconds (left), ratio (right)")
    axes.margins(y=0.12)
    axes.legend(loc="upper right")
    return fig


@figure(
    "figure_2a", ["evaluation/results"], "Figure 2a with the untuned model of the tuned one's size beside it.", "published",
)  # fmt: skip
def figure_2a(results: pd.DataFrame) -> Figure:
    """Draw the published models, a panel per unit."""
    labels = {
        BENCHMARK: "Qwen2-7B\nuntuned", UNTUNED: "Qwen2-0.5B\nuntuned", TUNED: "Qwen2-0.5B\nlength_prior",
    }  # fmt: skip
    return _two_units(_from_results(results, labels), "trained under one seed")


@figure(
    "figure_2a_arms", ["evaluation/responses"],
    "Figure 2a of the arms trained here: before and after, at equal size; of several seeds the first.", "arms",
)  # fmt: skip
def figure_2a_arms(responses: pd.DataFrame) -> Figure:
    """Draw the arms trained here, a panel per unit."""
    arms = responses["model"].str.partition("@")[0]
    seeds = responses.groupby(arms)["model"].nunique().max()
    first = responses[responses["model"] == arms].groupby("model", sort=False)
    rows = pd.DataFrame(
        {
            "label": first["model"].first(),
            "seconds": first["response_time"].mean(),
            "spread": first["response_time"].std(ddof=0),
            "failures": first["outcome"].agg(lambda outcomes: int(outcomes.ne("ok").sum())),
            "responses": first.size(),
        }
    )
    return _two_units(rows, "trained under one seed" if seeds == 1 else f"the first of {seeds} seeds")


def _from_results(results: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Return label, seconds, spread (its standard deviation), failures and responses by model."""
    times, failed = (
        results[results["metric"] == metric].set_index("model").loc[list(labels)]
        for metric in ("response_time", "failure_ratio")
    )
    return pd.DataFrame(
        {
            "label": pd.Series(labels),
            "seconds": times["mean"].astype(float),
            "spread": times["std"].astype(float),
            "failures": (failed["mean"] * failed["responses"]).round(),
            "responses": failed["responses"],
        }
    ).loc[list(labels)]


def _two_units(rows: pd.DataFrame, seeds: str) -> Figure:
    """Draw one panel per unit, one row per model."""
    styles = model_styles(rows.index)
    looks = [styles[model] for model in rows.index]
    fig = new_figure(0.95 + 0.27 * len(rows))
    left, right = fig.subplots(1, 2, sharey=True)
    seconds, spread, failures, responses = rows[["seconds", "spread", "failures", "responses"]].to_numpy(float).T
    ratios, bounds = failures / responses, np.array(list(map(wilson, failures, responses)))
    # A time below zero does not exist, so a wide spread stops there.
    for axes, values, errors in (
        (left, seconds, np.array([np.minimum(spread, seconds), spread])),
        (right, ratios, np.abs(bounds.T - ratios)),
    ):
        ends = np.nan_to_num(values + errors[1])
        for row, (look, value, end) in enumerate(zip(looks, values, ends, strict=True)):
            axes.barh(row, np.nan_to_num(value), 0.68, color=look.colour, hatch=look.hatch, **_EDGE)
            error = np.nan_to_num(errors[:, [row]])
            axes.errorbar(np.nan_to_num(value), row, xerr=error, fmt="none", ecolor="#333333", elinewidth=0.8)
            axes.annotate(three_digits(value), (end, row), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_xlim(0, 1.45 * float(ends.max()) or 1.0)  # room for the numbers, which stand outside the bars
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("Response time (s),\nmean ± s.d.")
    right.set_xlabel("Failure ratio,\n95 % interval")
    left.set_yticks(range(len(rows)), rows["label"])
    left.invert_yaxis()
    fig.suptitle(f"{rows['responses'].iloc[0]:,.0f} answers each; {seeds}", fontsize=7)
    return fig


@figure(
    "failure_classes_evaluation", ["evaluation/responses"],
    "Why held-out responses failed; unknown where no completion was published (audit A16, A17).",
)  # fmt: skip
@figure("failure_classes", ["responses"], "Why train responses failed, by model.")
def failure_classes(responses: pd.DataFrame) -> Figure:
    """Draw a stacked bar per model, and its failure ratio with Wilson's 95 % interval beside it."""
    styles = model_styles(responses["model"])
    counts = pd.crosstab(responses["model"], responses["outcome"]).reindex(list(styles))
    counts = counts[[outcome for outcome in OUTCOMES if outcome in counts.columns]]
    fig = new_figure(max(1.3, 0.55 + 0.23 * len(counts) + 0.14 * -(-counts.shape[1] // 3)))
    axes = fig.add_subplot()
    _stack(axes, counts)
    totals = counts.sum(axis=1)
    beside(axes, -0.75, "% failed [95 % CI]", 4, 7)
    failures = totals - counts.get("ok", 0)
    for row, (failed, total) in enumerate(zip(failures, totals, strict=True)):
        low, high = wilson(failed, total)
        beside(axes, row, f"{100 * failed / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]", 4, 7)
    same = totals.min() == totals.max()
    names = [look.label if same else f"{look.label} ({totals[name]:,})" for name, look in styles.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"Share of responses (n = {totals.iloc[0]:,} per model)" if same else "Share of responses")
    handles = axes.get_legend_handles_labels()
    fig.legend(*handles, loc="outside upper left", ncols=3, labelspacing=0.3, handlelength=1.4)
    return fig


def _stack(axes: Axes, counts: pd.DataFrame) -> None:
    """Stack the shares of each model's outcomes from the left."""
    shares = counts.div(counts.sum(axis=1), axis=0)
    left, rows = np.zeros(len(counts)), range(len(counts))
    for outcome in counts.columns:
        label, colour, hatch = OUTCOMES[outcome]
        width = shares[outcome].to_numpy()
        axes.barh(rows, width, 0.72, left, edgecolor="white", linewidth=0, label=label, color=colour, hatch=hatch)
        left += width
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
