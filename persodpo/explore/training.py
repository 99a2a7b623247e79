"""How did training go, run beside run?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from numpy.typing import NDArray

from persodpo.artifacts import RunFolder
from persodpo.errors import PersodpoError
from persodpo.explore.panel import Panel, labelled, or_sentence, picture
from persodpo.figures import PAPER_RUN
from persodpo.plots.style import BLACK, DOUBLE, LINES, MARKERS, PALETTE, context, new_figure
from persodpo.release import published
from persodpo.show import text_table

QUANTITIES = {
    "loss": "DPO loss", "grad_norm": "Gradient norm", "reward_margin": "Reward margin",
    "reward_accuracy": "Reward accuracy",
}  # fmt: skip
_STEP, _SHARE = "optimiser step", "share of the run"
#: Published runs that stand beside ours at first: the paper's own, under its true size.
_SHOWN = published.true_name(PAPER_RUN)


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


def curves_of(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Return the logged steps of every trained arm of some runs, and of the published runs.

    Raises:
        PersodpoError: A log was edited.
    """
    frames = []
    for run in runs:
        for path in sorted(run.root.glob("training/*/log.parquet")):
            log = run.read(f"training/{path.parent.name}/log")
            steps = log[log["kind"] == "train"]
            frames.append(steps.assign(run=f"{path.parent.name} ({run.profile.name})"))
    released = published.training_curves()
    frames.append(released.assign(run=released["run"].map(published.true_name) + " (published)"))
    columns = ["run", "step", *QUANTITIES]
    return pd.concat([frame[columns] for frame in frames], ignore_index=True).sort_values(
        ["run", "step"], kind="stable"
    )


class TrainingPanel(Panel):
    """Curves of several runs, smoothed, with a cursor."""

    def __init__(self, curves: pd.DataFrame) -> None:
        """Start with every run that is not published, and the paper's own; see `training`."""
        self._curves = {str(name): group for name, group in curves.groupby("run", sort=False)}
        names = sorted(self._curves, key=lambda name: (name.endswith("(published)"), name))
        first = [name for name in names if not name.endswith("(published)")][: len(PALETTE) - 1]
        first += [name for name in names if name == f"{_SHOWN} (published)"]
        self._runs = labelled(widgets.SelectMultiple, "Runs", options=names, value=first, rows=min(8, len(names)))
        self._axis = labelled(widgets.Dropdown, "Axis", options=[_STEP, _SHARE])
        self._smoothing = labelled(
            widgets.FloatSlider, "Smoothing", value=0.0, min=0.0, max=0.95, step=0.05, readout_format=".2f"
        )
        self._cursor = labelled(widgets.IntSlider, "Cursor (step)", value=0, min=0, max=1)
        self._limit()
        self._cursor.value = self._cursor.max
        controls = {
            "runs": self._runs, "axis": self._axis, "smoothing": self._smoothing, "cursor": self._cursor,
        }  # fmt: skip
        super().__init__(controls, self._render)

    def follow(self, change: Any) -> None:
        """Let the cursor reach to the end of the axis."""
        if change["owner"] in {self._axis, self._runs}:
            self._limit()

    def _limit(self) -> None:
        steps = self._axis.value == _STEP
        longest = max((int(self._curves[name]["step"].max()) for name in self._runs.value), default=1)
        self._cursor.description = "Cursor (step)" if steps else "Cursor (% of run)"
        self._cursor.max = longest if steps else 100

    def _chosen(self) -> list[str]:
        chosen = list(self._runs.value)
        if not 1 <= len(chosen) <= len(PALETTE):
            raise PersodpoError(
                f"Between 1 and {len(PALETTE)} runs can be told apart, not {len(chosen)}; choose others."
            )
        return chosen

    def _places(self, curve: pd.DataFrame) -> NDArray[np.float64]:
        """Return where the steps of a run stand on the axis."""
        steps = curve["step"].to_numpy(dtype=float)
        return steps if self._axis.value == _STEP else 100.0 * steps / steps.max()

    def _render(self) -> Sequence[Any]:
        chosen = self._chosen()
        return self._picture(chosen), text_table(self._at_cursor(chosen))

    def _picture(self, chosen: Sequence[str]) -> Image:
        with context():
            figure = new_figure(3.6 + 0.07 * len(chosen), DOUBLE)
            panels = figure.subplots(2, 2, sharex=True).ravel()
            for axes, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
                for number, name in enumerate(chosen):
                    self._draw(axes, self._curves[name], quantity, number, name)
                axes.axvline(self._cursor.value, color=BLACK, linewidth=0.6, linestyle=":")
                axes.set_ylabel(label)
                axes.grid(axis="y")
            for axes in panels[2:]:
                axes.set_xlabel("Optimiser step" if self._axis.value == _STEP else "Share of the run (%)")
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=2, labelspacing=0.25)
            return picture(figure, f"Training curves of {', '.join(chosen)}; the numbers at the cursor stand below.")

    def _draw(self, axes: Axes, curve: pd.DataFrame, quantity: str, number: int, name: str) -> None:
        """Draw a quantity of a run, what was logged faintly behind where it is smoothed."""
        values = curve[quantity].to_numpy(dtype=float)
        logged = ~np.isnan(values)
        places, strength = self._places(curve)[logged], float(self._smoothing.value)
        colour = PALETTE[number]
        if strength > 0:
            axes.plot(places, values[logged], color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(
            places, smoothed(values[logged], strength), color=colour, linestyle=LINES[number], marker=MARKERS[number],
            markersize=2.8, markevery=max(1, int(logged.sum()) // 12), label=name,
        )  # fmt: skip

    def _at_cursor(self, chosen: Sequence[str]) -> pd.DataFrame:
        """Return what was logged last at or before the cursor, smoothed as drawn."""
        rows = []
        for name in chosen:
            curve = self._curves[name]
            before = self._places(curve) <= self._cursor.value
            row: dict[str, Any] = {
                "run": name,
                "step": int(curve["step"].to_numpy()[before][-1]) if before.any() else None,
            }
            for quantity, label in QUANTITIES.items():
                means = smoothed(curve[quantity].to_numpy(dtype=float), float(self._smoothing.value))[before]
                known = means[~np.isnan(means)]
                row[label] = f"{known[-1]:.4f}" if len(known) else "–"
            rows.append(row)
        return pd.DataFrame(rows).astype({"step": object}).set_index("run")


@or_sentence
def training(*runs: RunFolder) -> Panel:
    """Set the training curves of arms of one or several runs beside each other and beside the published ones.

    Args:
        runs: Runs whose arms were trained; without any, or before training, the published curves stand alone.

    Returns:
        The panel, with the controls ``runs``, ``axis``, ``smoothing`` and ``cursor``; a sentence if a log was edited.
    """
    return TrainingPanel(curves_of(runs))
