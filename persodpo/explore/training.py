"""How did training go, run beside run?"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from numpy.typing import NDArray

from persodpo.artifacts import RunFolder
from persodpo.errors import PersodpoError
from persodpo.explore.panel import Panel, labelled, or_sentence, page, picture
from persodpo.figures import PAPER_RUN
from persodpo.plots.style import BLACK, DOUBLE, LINES, MARKERS, PALETTE, context, new_figure
from persodpo.release import published
from persodpo.show import text_table
from persodpo.training.arms import ARMS
from persodpo.training.log import LIVE, Live, read_live

QUANTITIES = {
    "loss": "DPO loss", "grad_norm": "Gradient norm", "reward_margin": "Reward margin",
    "reward_accuracy": "Reward accuracy",
}  # fmt: skip
_STEP, _SHARE = "optimiser step", "share of the run"
#: Published runs that stand beside ours at first: the paper's own, under its true size.
_SHOWN = published.true_name(PAPER_RUN)
_PUBLISHED = " (published)"
#: Runs of which one is so many times as long as another share no axis of steps.
_UNLIKE = 5
#: Seconds between two looks at the logs of a running training.
_SECONDS = 1.0


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


def _folders(run: RunFolder) -> list[Path]:
    """Return the folders of arms that were trained, or are being."""
    files = [path for name in ("log.parquet", LIVE) for path in run.root.glob(f"training/*/{name}")]
    return sorted({path.parent for path in files})


def _state(runs: Sequence[RunFolder]) -> dict[str, object]:
    """Return what tells that a curve has changed."""
    done = {
        _title(run, folder): run.provenance(f"training/{folder.name}/log").get("sha256")
        for run in runs
        for folder in _folders(run)
    }
    return done | {name: (live.step, live.steps, live.running) for name, live in running(runs).items()}


def _title(run: RunFolder, folder: Path) -> str:
    return f"{folder.name} ({run.profile.name})"


def running(runs: Sequence[RunFolder]) -> dict[str, Live]:
    """Return the trainings that have not come to their end, by the name of their curve."""
    found = {_title(run, folder): read_live(folder) for run in runs for folder in _folders(run)}
    return {name: live for name, live in found.items() if live is not None}


def curves_of(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Return the logged steps of every arm of some runs, also while it is being trained, and of the published runs.

    Raises:
        PersodpoError: A log was edited.
    """
    frames, live = [], running(runs)
    for run in runs:
        for folder in _folders(run):
            name = _title(run, folder)
            log = live[name].log if name in live else run.read(f"training/{folder.name}/log")
            frames.append(log[log["kind"] == "train"].assign(run=name))
    released = published.training_curves()
    frames.append(released.assign(run=released["run"].map(published.true_name) + " (published)"))
    columns = ["run", "step", *QUANTITIES]
    return pd.concat([frame[columns] for frame in frames], ignore_index=True).sort_values(
        ["run", "step"], kind="stable"
    )


class TrainingPanel(Panel):
    """Curves of several runs, smoothed, with a cursor; they grow while an arm is being trained."""

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        """Start with the arms, and the paper's own run; see `training`."""
        self._folders, self._state = tuple(runs), _state(runs)
        self._curves, self._live = self._read()
        names = self._names()
        first = [name for name in names if name.partition(" ")[0] in ARMS][: len(PALETTE) - 1]
        first += [name for name in names if name == f"{_SHOWN}{_PUBLISHED}"]
        self._runs = labelled(widgets.SelectMultiple, "Runs", options=names, value=first, rows=min(8, len(names)))
        lengths = [int(self._curves[name]["step"].max()) for name in first]
        unlike = max(lengths, default=1) > _UNLIKE * min(lengths, default=1)
        self._axis = labelled(widgets.Dropdown, "Axis", options=[_STEP, _SHARE], value=_SHARE if unlike else _STEP)
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

    @property
    def watch(self) -> float:
        """Seconds between two looks at the logs."""
        return _SECONDS

    def look(self) -> None:
        """Show what has been logged since the last look; an arm that is new is shown, too."""
        state = _state(self._folders)
        if state == self._state:
            return
        before = set(self._curves)
        self._curves, self._live = self._read()
        self._state = state
        names = self._names()
        new = [name for name in names if name not in before]
        chosen = [name for name in names if name in self._runs.value or name in new]
        self._following = True
        try:
            self._runs.options, self._runs.rows = names, min(8, len(names))
            self._runs.value = chosen[: len(PALETTE)]
            at_end = self._cursor.value == self._cursor.max
            self._limit()
            if at_end:
                self._cursor.value = self._cursor.max
        finally:
            self._following = False
        self.refresh()

    def _read(self) -> tuple[dict[str, pd.DataFrame], dict[str, Live]]:
        curves = curves_of(self._folders)
        return {str(name): group for name, group in curves.groupby("run", sort=False)}, running(self._folders)

    def _names(self) -> list[str]:
        """Return the curves' names: arms, their further seeds, ablations, published runs."""

        def place(name: str) -> tuple[bool, bool, bool, str]:
            label = name.partition(" ")[0]
            return name.endswith(_PUBLISHED), label.partition("@")[0] not in ARMS, "@" in label, name

        return sorted(self._curves, key=place)

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
        return page(self._told()), self._picture(chosen), text_table(self._at_cursor(chosen))

    def _told(self) -> str:
        """Say which arms are being trained."""
        said = [
            f"{html.escape(name)} is being trained: step {live.step:,} of {live.steps:,}."
            if live.running
            else f"{html.escape(name)} was interrupted at step {live.step:,} of {live.steps:,}; "
            "<code>persodpo train</code> goes on from its last checkpoint."
            for name, live in self._live.items()
        ]
        return "".join(f"<p>{sentence}</p>" for sentence in said)

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
    return TrainingPanel(runs)
