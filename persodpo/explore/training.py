"""How did training go, run beside run?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import Image

from persodpo.errors import PersodpoError
from persodpo.explore.choices import Choices
from persodpo.explore.curves_picture import QUANTITIES, CurvesPicture, places, smoothed
from persodpo.explore.panel import Panel, labelled, or_sentence
from persodpo.figures.curves import PAPER_RUN
from persodpo.figures.style import PALETTE
from persodpo.release import published
from persodpo.runfolder import RunFolder
from persodpo.show import text_table
from persodpo.training.arms import ARMS

_STEP, _SHARE = "optimiser step", "share of the run"
#: Published runs that stand beside ours at first: the paper's own, under its true size.
_SHOWN = published.true_name(PAPER_RUN)
_PUBLISHED = " (published)"
#: Runs of which one is so many times as long as another share no axis of steps.
_UNLIKE = 5


def _folders(run: RunFolder) -> list[Path]:
    """Return the folders of trained arms."""
    return sorted(path.parent for path in run.root.glob("training/*/log.parquet"))


def _title(run: RunFolder, folder: Path) -> str:
    return f"{folder.name} ({run.profile.name})"


def curves_of(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Return the logged steps of every trained arm of some runs, and of the published runs.

    Raises:
        PersodpoError: A log was edited.
    """
    frames = []
    for run in runs:
        for folder in _folders(run):
            log = run.read(f"training/{folder.name}/log")
            frames.append(log[log["kind"] == "train"].assign(run=_title(run, folder)))
    released = published.training_curves()
    frames.append(released.assign(run=released["run"].map(published.true_name) + " (published)"))
    columns = ["run", "step", *QUANTITIES]
    return pd.concat([frame[columns] for frame in frames], ignore_index=True).sort_values(
        ["run", "step"], kind="stable"
    )


class TrainingPanel(Panel):
    """Curves of several runs, smoothed, with a cursor."""

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        """Start with the arms, and the paper's own run; see `training`."""
        self._drawn: tuple[Any, CurvesPicture] | None = None
        self._curves = {str(name): group for name, group in curves_of(runs).groupby("run", sort=False)}
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
        return self._picture(chosen), text_table(self._at_cursor(chosen))

    def _picture(self, chosen: Sequence[str]) -> Image:
        curves = {name: self._curves[name] for name in chosen}
        key = (tuple(chosen), self._share, self._smoothing.value)
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
