"""Which model's responses are chosen over which model's.

In: the ``pairs/perso`` or ``pairs/simple`` table, one row a preference pair, of which are used

    chosen_model      model of the chosen response
    rejected_model    model of the rejected response

Source: the pairs stage of a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persodpo.plots.checks import require
from persodpo.plots.style import CHOSEN, REJECTED, model_styles, new_figure, styled


@styled
def draw(pairs: pd.DataFrame, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw the counts of pairs as a heat map, the sums of rows and columns as bars at its sides.

    Args:
        pairs: One row a pair, columns ``chosen_model`` and ``rejected_model``.
        labels: Labels of models, if not the short names.

    Returns:
        The figure, one column wide: chosen models as rows, rejected models as columns, both in the order of
        `persodpo.plots.style.ordered`.

    Raises:
        PersodpoError: The table is empty or lacks a column.
    """
    require(pairs, ("chosen_model", "rejected_model"), "pair_sources")
    styles = model_styles([*pairs["chosen_model"], *pairs["rejected_model"]], labels)
    counts = pd.crosstab(pairs["chosen_model"], pairs["rejected_model"]).reindex(
        index=list(styles), columns=list(styles), fill_value=0
    )
    names = [style.label for style in styles.values()]
    figure = new_figure(3.3)
    (top, corner), (heat, right) = figure.subplots(2, 2, width_ratios=(4.7, 1), height_ratios=(1, 4))
    _heat(heat, counts, names)
    positions = np.arange(len(names)) + 0.5
    columns, rows = counts.sum(axis=0).to_numpy(), counts.sum(axis=1).to_numpy()
    bars = top.bar(positions, columns, 0.8, color=REJECTED)
    top.bar_label(bars, [f"{count:,}" for count in columns], fontsize=6, padding=1.5)
    bars = right.barh(positions, rows, 0.8, color=CHOSEN)
    right.bar_label(bars, [f"{count:,}" for count in rows], fontsize=6, padding=1.5)
    _bare(top, heat, "x")
    _bare(right, heat, "y")
    corner.set_axis_off()
    corner.text(0.5, 0.5, f"{len(pairs):,}\npairs", transform=corner.transAxes, ha="center", va="center", fontsize=7)
    return figure


def _heat(axes: Axes, counts: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw the counts, each written into its cell."""
    sns.heatmap(
        counts, ax=axes, cmap="Blues", vmin=0, cbar=False, annot=True, fmt=",d", annot_kws={"fontsize": 6},
        linewidths=0.5, linecolor="white", xticklabels=names, yticklabels=names,
    )  # fmt: skip
    axes.set_xlabel("Rejected")
    axes.set_ylabel("Chosen")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=40)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


def _bare(axes: Axes, heat: Axes, shared: str) -> None:
    """Leave only bars and their numbers, over the cells they sum; the other axis starts at zero."""
    axes.set_axis_off()
    if shared == "x":
        axes.set_xlim(heat.get_xlim())
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    else:
        axes.set_ylim(heat.get_ylim())
        axes.set_xlim(0, 1.7 * axes.get_xlim()[1])
