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

from persodpo.artifacts import RunFolder
from persodpo.errors import PersodpoError
from persodpo.explore.choices import Choices
from persodpo.explore.curves_picture import QUANTITIES, CurvesPicture, places, smoothed
from persodpo.explore.panel import Panel, labelled, or_sentence, page
from persodpo.figures import PAPER_RUN
from persodpo.plots.style import PALETTE
from persodpo.release import published
from persodpo.show import text_table
from persodpo.training.arms import ARMS
from persodpo.training.log import LIVE, Live, read_live

_STEP, _SHARE = "optimiser step", "share of the run"
#: Published runs that stand beside ours at first: the paper's own, under its true size.
_SHOWN = published.true_name(PAPER_RUN)
_PUBLISHED = " (published)"
#: Runs of which one is so many times as long as another share no axis of steps.
_UNLIKE = 5
#: Seconds between two looks at the logs of a running training.
_SECONDS = 1.0


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
        self._drawn: tuple[Any, CurvesPicture] | None = None
        self._curves, self._live = self._read()
        names = self._names()
        first = [name for name in names if name.partition(" ")[0] in ARMS][: len(PALETTE) - 1]
        first += [name for name in names if name == f"{_SHOWN}{_PUBLISHED}"]
        self._runs = Choices(names, first)
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
            self._runs.offer(names, chosen[: len(PALETTE)])
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
        longest = max((int(self._curves[name]["step"].max()) for name in self._runs.value), default=1)
        self._cursor.description = "Cursor (% of run)" if self._share else "Cursor (step)"
        self._cursor.max = 100 if self._share else longest

    def _chosen(self) -> list[str]:
        chosen = list(self._runs.value)
        if not 1 <= len(chosen) <= len(PALETTE):
            raise PersodpoError(
                f"Between 1 and {len(PALETTE)} runs can be told apart, not {len(chosen)}; choose others."
            )
        return chosen

    @property
    def _share(self) -> bool:
        return bool(self._axis.value == _SHARE)

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
        curves = {name: self._curves[name] for name in chosen}
        key = (tuple(chosen), self._share, self._smoothing.value, self._state)
        if self._drawn is None or self._drawn[0] != key:
            made = CurvesPicture(
                curves, share=self._share, strength=float(self._smoothing.value), end=float(self._cursor.max)
            )
            self._drawn = (key, made)
        return self._drawn[1].at(float(self._cursor.value))

    def _at_cursor(self, chosen: Sequence[str]) -> pd.DataFrame:
        """Return what was logged last at or before the cursor, smoothed as drawn."""
        rows = []
        for name in chosen:
            curve = self._curves[name]
            before = places(curve, share=self._share) <= self._cursor.value
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
