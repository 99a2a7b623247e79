"""The same scores kept by two loops: a straight one, and the released one that scrambles them (audit A1).

In: a table with one row a response, in the order in which they were scored, of which are used

    straight     the response's own score
    scrambled    what the released loop kept in this row
    owner        the row of the response that this score belongs to

Source: `persodpo.scoring.engine` and `persodpo.release.loops` on the same responses.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persodpo.plots.checks import require
from persodpo.plots.style import BLUE, DOUBLE, FAINT, VERMILLION, new_figure, styled


@styled
def draw(table: pd.DataFrame, label: str = "Coherence") -> Figure:
    """Draw both columns over the row number, one above the other.

    Args:
        table: Columns as in the module's docstring, one row a response.
        label: What the scores are.

    Returns:
        The figure, two columns wide: the rows whose scores the released loop keeps at all are shaded above; below they
        return again and again.

    Raises:
        PersodpoError: The table is empty or lacks a column.
    """
    require(table, ("straight", "scrambled", "owner"), "scrambled")
    figure = new_figure(2.4, DOUBLE)
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    rows = range(len(table))
    kept = int(table["owner"].max()) + 1
    _points(
        top, rows, table["straight"], BLUE, f"straight: row k is response k (shaded: the {kept} that are kept below)"
    )
    _points(bottom, rows, table["scrambled"], VERMILLION, "released: row k is response k // 8 + k % 8")
    top.axvspan(-0.5, kept - 0.5, color=FAINT, linewidth=0, zorder=0)
    bottom.set_xlabel("Row of the scores file")
    figure.supylabel(label, fontsize=8)
    return figure


def _points(axes: Axes, rows: range, values: pd.Series, colour: str, title: str) -> None:
    """Draw one column as points on stems that lead the eye from row to row."""
    axes.plot(rows, values.to_numpy(float), color=colour, linewidth=0.5, alpha=0.5)
    axes.plot(rows, values.to_numpy(float), color=colour, marker="o", markersize=1.8, linestyle="none")
    axes.set_title(title, fontweight="normal", fontsize=7, loc="left")
