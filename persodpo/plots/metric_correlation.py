"""How far the five signals and the quality score rank responses alike, with and without the imputed failures.

In: the ``scores`` table, one row a response, of which are used

    coherence, c_score, ue_score, persona_distance, compliance    the five signals
    quality                                                       their weighted sum, 0 to 1; null if not scored
    imputed                                                       True for failed responses

Failed responses get the worst value of every signal at once, so over all rows the signals seem to agree; over the
measured rows they agree only as far as they measure the same. The two matrices stand side by side for that reason.

Source: ``scores`` or ``evaluation/scores`` of a run folder.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import DOUBLE, new_figure, styled

#: The columns that are compared, and their labels.
SIGNALS = {
    "coherence": "Coherence",
    "c_score": "C score",
    "ue_score": "UE score",
    "persona_distance": "Persona distance",
    "compliance": "Compliance",
    "quality": "Quality",
}


@styled
def draw(scores: pd.DataFrame) -> Figure:
    """Draw Spearman's rank correlations over measured responses, and beside them over all.

    Args:
        scores: One row a response, columns as in the module's docstring; rows without a quality are left out.

    Returns:
        The figure, two columns wide: the lower triangle of each matrix, coefficients from -1 to 1 written in; a dash
        where a column does not vary.

    Raises:
        PersodpoError: The table is empty, lacks a column, or holds fewer than three measured responses.
    """
    require(scores, (*SIGNALS, "imputed"), "metric_correlation")
    scored = scores[scores["quality"].notna()]
    measured = scored[~scored["imputed"].astype(bool)]
    if len(measured) < 3:
        raise PersodpoError(f"Figure metric_correlation needs three measured responses, the table has {len(measured)}.")
    figure = new_figure(2.9, DOUBLE)
    left, right = figure.subplots(1, 2, sharey=True)
    _triangle(left, measured, f"(a) measured responses, n = {len(measured):,}")
    _triangle(right, scored, f"(b) with imputed failures, n = {len(scored):,}")
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), "RdBu_r"), ax=[left, right], shrink=0.8, pad=0.01, aspect=25)
    bar.set_label("Spearman's ρ")
    bar.outline.set_visible(False)
    return figure


def _triangle(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    """Draw the lower triangle of a correlation matrix."""
    matrix = rows[list(SIGNALS)].astype(float).corr(method="spearman").iloc[1:, :-1]
    hidden = np.triu(np.ones(matrix.shape, dtype=bool), k=1)
    texts = matrix.map(lambda value: "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−"))
    names = list(SIGNALS.values())
    sns.heatmap(
        matrix.fillna(0), mask=hidden, ax=axes, cmap="RdBu_r", vmin=-1, vmax=1, cbar=False, annot=texts, fmt="",
        annot_kws={"fontsize": 7}, linewidths=0.8, linecolor="white", xticklabels=names[:-1], yticklabels=names[1:],
    )  # fmt: skip
    axes.set_title(title, fontweight="normal")
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=30)
    axes.tick_params(axis="y", rotation=0)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
