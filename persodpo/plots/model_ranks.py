"""Which model stands where under which way of scoring.

In: a table with one row a way of scoring and model, of which are used

    way        name of the way, such as "as released"
    model      name; see `persodpo.plots.style.MODEL_STYLES`
    quality    mean quality of the model's responses, comparable within a way only

Source: `persodpo.pairs.rank` under different settings.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import DOUBLE, model_styles, new_figure, styled


@styled
def draw(table: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw each model's rank as a line over the ways of scoring, its mean quality written at each point.

    Args:
        table: One row a way and model, columns as in the module's docstring; ways stand in the table's order.
        labels: Labels of models, if not the short names.

    Returns:
        The figure, two columns wide: ways from left to right, the best model on top; equal means share the better rank.

    Raises:
        PersodpoError: The table is empty, lacks a column, or a way lacks a model.
    """
    require(table, ("way", "model", "quality"), "model_ranks")
    wide = table.pivot_table(index="model", columns="way", values="quality")[list(dict.fromkeys(table["way"]))]
    if wide.isna().any(axis=None):
        raise PersodpoError("Figure model_ranks needs the quality of every model under every way of scoring.")
    ranks = wide.rank(ascending=False, method="min")
    styles = model_styles(wide.index, labels)
    figure = new_figure(0.9 + 0.27 * len(styles), DOUBLE)
    axes = figure.add_subplot()
    places = range(len(wide.columns))
    for model, style in styles.items():
        axes.plot(
            places, ranks.loc[model], color=style.colour, marker=style.marker, linestyle=style.line, label=style.label,
            markersize=4, linewidth=1.2,
        )  # fmt: skip
        for place, (rank, mean) in enumerate(zip(ranks.loc[model].to_numpy(), wide.loc[model].to_numpy(), strict=True)):
            axes.annotate(
                f"{mean:.3f}", (place, rank), xytext=(0, 4), textcoords="offset points", fontsize=6, ha="center",
                va="bottom", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}, zorder=5,
            )  # fmt: skip
    axes.set_xticks(list(places), list(wide.columns))
    axes.set_yticks(range(1, len(styles) + 1))
    axes.set_ylim(len(styles) + 0.5, 0.4)
    axes.set_xlim(-0.3, len(wide.columns) - 0.7)
    axes.set_ylabel("Rank by mean quality")
    figure.legend(loc="outside right upper")
    return figure
