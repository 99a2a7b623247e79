"""Figures of the pairs: which model's responses are chosen over which model's.

In: ``pairs/perso`` or ``pairs/simple``, one row per pair.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from persodpo.figures.style import CHOSEN, REJECTED, figure, model_styles, new_figure, slanted


@figure("pair_sources_simple", ["pairs/simple"], "Which model is preferred to which, simple pairs.")
@figure("pair_sources", ["pairs/perso"], "Which model is preferred to which, perso pairs.")
def pair_sources(pairs: pd.DataFrame) -> Figure:
    """Draw the counts of pairs, chosen model by rejected model, with their sums as bars at the sides."""
    styles = model_styles([*pairs["chosen_model"], *pairs["rejected_model"]])
    models, names = list(styles), [look.label for look in styles.values()]
    counts = pd.crosstab(pairs["chosen_model"], pairs["rejected_model"])
    counts = counts.reindex(index=models, columns=models, fill_value=0)
    drawn = new_figure(3.3)
    (top, corner), (heat, right) = drawn.subplots(2, 2, width_ratios=(4.7, 1), height_ratios=(1, 4))
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
    return drawn
