"""Who sees whom in a grouped row: one prompt, its distinct responses, and the mask that keeps them apart.

In: one row a position of the packed row, in order, with the columns

    position    position id that the model sees
    response    number of the response the position predicts a token of, -1 in the prompt
    side        "prompt", "chosen", "rejected" or "both": how the pairs use that response

Source: ``position_ids`` and ``owner`` of `persodpo.training.packing.PackedRows`, padding left out.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from persodpo.plots.checks import require
from persodpo.plots.style import BLUE, CHOSEN, GREY, REJECTED, new_figure, styled

_LABELS = {"chosen": "chosen", "rejected": "rejected", "both": "chosen and rejected"}
_COLOURS = {"prompt": GREY, "chosen": CHOSEN, "rejected": REJECTED, "both": BLUE}


def visible(layout: pd.DataFrame) -> np.ndarray:
    """Return which position (row) sees which (column): what stands before it, in the prompt or in its own response."""
    response = layout["response"].to_numpy()
    before = np.tri(len(response), dtype=bool)
    shown: np.ndarray = before & ((response == -1)[None, :] | (response[:, None] == response[None, :]))
    return shown


@styled
def draw(layout: pd.DataFrame) -> Figure:
    """Draw the mask and, below it, the position ids.

    Args:
        layout: One row a position, columns as in the module's docstring.

    Returns:
        The figure, one column wide. Upper panel: queries down, keys across, in the colour of the query's part.

    Raises:
        PersodpoError: The table is empty or lacks a column.
    """
    require(layout, ("position", "response", "side"), "attention_mask")
    figure = new_figure(4.1)
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    _mask(upper, layout)
    _positions(lower, layout)
    sides = [side for side in _LABELS if side in set(layout["side"])]
    handles = [Patch(color=_COLOURS["prompt"], label="prompt")]
    handles += [Patch(color=_COLOURS[side], label=_LABELS[side]) for side in sides]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1, handlelength=1)
    return figure


def _starts(layout: pd.DataFrame) -> list[int]:
    """Return where a part of the row starts, and its end."""
    response = layout["response"].to_numpy()
    return [0, *(np.flatnonzero(np.diff(response)) + 1).tolist(), len(response)]


def _mask(axes: Axes, layout: pd.DataFrame) -> None:
    """Draw seen keys in the colour of their query."""
    kinds = list(_COLOURS)
    codes = layout["side"].map(kinds.index).to_numpy() + 1
    picture = np.where(visible(layout), codes[:, None], 0)
    colours = ListedColormap(["white", *_COLOURS.values()])
    axes.imshow(picture, cmap=colours, vmin=0, vmax=len(kinds), interpolation="nearest", aspect="auto")
    for edge in _starts(layout)[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.5)
    axes.set_ylabel("Query (position in the row)")


def _positions(axes: Axes, layout: pd.DataFrame) -> None:
    """Draw the position ids, which start again with every response."""
    edges = _starts(layout)
    for start, end in itertools.pairwise(edges):
        part = layout.iloc[start:end]
        axes.add_line(Line2D(range(start, end), part["position"], color=_COLOURS[part["side"].iloc[0]], linewidth=1.5))
    axes.set_ylim(0, 1.1 * layout["position"].max())
    axes.set_ylabel("Position id")
    axes.set_xlabel("Key (position in the row)")
    axes.grid(axis="y")
