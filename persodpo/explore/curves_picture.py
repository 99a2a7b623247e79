"""The picture of `persodpo.explore.training`: curves drawn once, then only the cursor is drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray

from persodpo.explore.panel import encoded
from persodpo.figures.style import (
    BLACK,
    DOUBLE,
    LINES,
    MARKERS,
    PALETTE,
    SCREEN_DPI,
    context,
    new_figure,
)

QUANTITIES = {
    "loss": "DPO loss", "grad_norm": "Gradient norm", "reward_margin": "Reward margin",
    "reward_accuracy": "Reward accuracy",
}  # fmt: skip


def smoothed(values: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Return exponentially weighted means of what came so far.

    Args:
        values: A quantity at each logged step, NaN where it was not logged.
        strength: Weight of the past, 0 (nothing changes) to below 1.

    Returns:
        The means, in which the first value weighs no more than any other; NaN where nothing was logged.
    """
    series = pd.Series(values)
    means = series.ewm(alpha=1.0 - strength, ignore_na=True).mean()
    return means.where(series.notna()).to_numpy(dtype=float)


def places(curve: pd.DataFrame, *, share: bool) -> NDArray[np.float64]:
    """Return where the steps of a run stand on the axis: its steps, or percent of its last one."""
    steps = curve["step"].to_numpy(dtype=float)
    return 100.0 * steps / steps.max() if share and len(steps) else steps


class CurvesPicture:
    """Four quantities of some runs over their steps, with a cursor."""

    def __init__(self, curves: Mapping[str, pd.DataFrame], *, share: bool, strength: float, end: float) -> None:
        """Draw the curves.

        Args:
            curves: Logged steps by name, at most as many as there are colours.
            share: Whether the axis is the share of each run rather than its steps.
            strength: As `smoothed`.
            end: Where the axis ends.
        """
        self._names = ", ".join(curves)
        with context():
            figure = new_figure(3.6 + 0.07 * len(curves), DOUBLE)
            panels = figure.subplots(2, 2, sharex=True).ravel()
            for axes, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
                for number, (name, curve) in enumerate(curves.items()):
                    values = curve[quantity].to_numpy(dtype=float)
                    _draw(axes, places(curve, share=share), values, strength=strength, number=number, name=name)
                axes.set_ylabel(label)
                axes.grid(axis="y")
            panels[0].set_xlim(-0.02 * end, 1.02 * end)
            for axes in panels[2:]:
                axes.set_xlabel("Share of the run (%)" if share else "Optimiser step")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=2, labelspacing=0.25)
            style = {"color": BLACK, "linewidth": 0.6, "linestyle": ":", "animated": True}
            self._cursors = [axes.axvline(0.0, **style) for axes in panels]
            figure.set_dpi(SCREEN_DPI)
            canvas: Any = FigureCanvasAgg(figure)
            canvas.draw()
        self._canvas = canvas
        self._ground = canvas.copy_from_bbox(figure.bbox)

    def at(self, cursor: float) -> Image:
        """Return the picture with the cursor at a place."""
        self._canvas.restore_region(self._ground)
        for line in self._cursors:
            line.set_xdata([cursor, cursor])
            line.draw(self._canvas.get_renderer())
        return encoded(self._canvas, f"Training curves of {self._names}; the numbers at the cursor stand below.")


def _draw(
    axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], *, strength: float, number: int, name: str
) -> None:
    """Draw a quantity of a run, what was logged faintly behind where it is smoothed."""
    logged = ~np.isnan(values)
    colour = PALETTE[number]
    if strength > 0:
        axes.plot(steps[logged], values[logged], color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(
        steps[logged], smoothed(values[logged], strength), color=colour, linestyle=LINES[number], marker=MARKERS[number],
        markersize=2.8, markevery=max(1, int(logged.sum()) // 12), label=name,
    )  # fmt: skip
