"""From tables to figures."""

from __future__ import annotations

from persodpo.config import Profile
from persodpo.figures import FigureReport, save_figures
from persodpo.runfolder import RunFolder
from persodpo.stages.base import Need


def needs(_profile: Profile) -> list[Need]:
    """Return what figures show."""
    return [Need("train"), Need("evaluate"), Need("ablate")]


def draw(run: RunFolder, overwrite: bool = False) -> list[FigureReport]:
    """Draw the figures of a run."""
    return list(save_figures(run, overwrite=overwrite))
