"""What became of each model's completions: shares of outcome classes, and the failure ratio with its interval.

In: one row a completion, with the columns

    model      name; see `persodpo.plots.style.MODEL_STYLES`
    outcome    outcome class; see `OUTCOMES`. Everything but ``ok`` is a failure.

Source: ``responses`` or ``evaluation/responses`` of a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.intervals import wilson
from persodpo.plots.style import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    model_styles,
    new_figure,
    styled,
)

#: Outcome classes in the order of the stack: (label, colour, hatch). The success is pale: the failures are the subject.
OUTCOMES: dict[str, tuple[str, str, str]] = {
    "ok": ("parsed", FAINT, ""),
    "truncated": ("truncated", VERMILLION, ""),
    "malformed": ("malformed JSON", ORANGE, "////"),
    "no_json": ("no JSON", BLUE, ""),
    "missing_key": ("key missing", SKY, "...."),
    "echo": ("template echoed", PURPLE, ""),
    "loop": ("loop", GREEN, "\\\\\\\\"),
    "empty": ("empty", GREY, ""),
    "api_error": ("API error", BLACK, ""),
    "unknown": ("unknown", "#6B6B6B", "xxxx"),
}


@styled
def draw(responses: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw a stacked bar a model, and its failure ratio with the Wilson 95 % interval beside it.

    Args:
        responses: One row a completion, columns ``model`` and ``outcome``.
        labels: Labels of models, if not the short names.

    Returns:
        The figure, one column wide; models in the order of `persodpo.plots.style.ordered`, only classes that occur.

    Raises:
        PersodpoError: The table is empty, lacks a column, or holds an outcome that is none of `OUTCOMES`.
    """
    require(responses, ("model", "outcome"), "failure_classes")
    strange = set(responses["outcome"].astype(str)).difference(OUTCOMES)
    if strange:
        raise PersodpoError(f"Figure failure_classes knows {', '.join(OUTCOMES)}, not {', '.join(sorted(strange))}.")
    styles = model_styles(responses["model"], labels)
    counts = pd.crosstab(responses["model"], responses["outcome"]).reindex(list(styles))
    counts = counts[[outcome for outcome in OUTCOMES if outcome in counts.columns]]
    legend_rows = -(-counts.shape[1] // 3)
    figure = new_figure(0.55 + 0.23 * len(counts) + 0.14 * legend_rows)
    axes = figure.add_subplot()
    _stack(axes, counts)
    _ratios(axes, counts)
    totals = counts.sum(axis=1)
    same = totals.min() == totals.max()
    names = [style.label if same else f"{style.label} ({totals[name]:,})" for name, style in styles.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"Share of responses (n = {totals.iloc[0]:,} a model)" if same else "Share of responses")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, labelspacing=0.3, handlelength=1.4
    )
    return figure


def _stack(axes: Axes, counts: pd.DataFrame) -> None:
    """Stack the shares of each model's outcomes from the left."""
    shares = counts.div(counts.sum(axis=1), axis=0)
    left = np.zeros(len(counts))
    for outcome in counts.columns:
        label, colour, hatch = OUTCOMES[outcome]
        width = shares[outcome].to_numpy()
        axes.barh(
            range(len(counts)), width, 0.72, left, label=label, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        left += width
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()


def _ratios(axes: Axes, counts: pd.DataFrame) -> None:
    """Write each model's failure ratio and interval, in per cent, at the right of its bar."""
    totals = counts.sum(axis=1)
    failures = totals - (counts["ok"] if "ok" in counts.columns else 0)
    place: dict[str, Any] = {
        "xycoords": axes.get_yaxis_transform(),
        "textcoords": "offset points",
        "fontsize": 7,
        "va": "center",
    }
    axes.annotate("% failed [95 % CI]", (1, -0.75), (4, 0), **place)
    for row, (failed, total) in enumerate(zip(failures, totals, strict=True)):
        low, high = wilson(failed, total)
        text = f"{100 * failed / total:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        axes.annotate(text, (1, row), (4, 0), **place)
