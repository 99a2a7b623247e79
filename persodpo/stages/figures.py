"""From tables to figures/<profile>/."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pandas as pd

from persodpo.config import PairSet
from persodpo.errors import NothingToShowError, PersodpoError
from persodpo.files import files_are_unchanged, read_json, sha256
from persodpo.imports import code_of
from persodpo.progress import bar
from persodpo.release import published
from persodpo.runfolder import RunFolder, StageReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from persodpo.figures.style import FigureSpec


def draw(run: RunFolder, overwrite: bool = False) -> list[StageReport]:
    """Write every figure whose tables the profile makes, with a progress bar."""
    names = bar(figure_names(run), "figures")
    return [save_figure(run, name, overwrite=overwrite) for name in names]


def figure_names(run: RunFolder) -> list[str]:
    """Return the figures whose tables the profile makes."""
    from persodpo.figures import FIGURES

    profile = run.profile
    absent = {f"pairs/{name}" for name in get_args(PairSet) if name not in profile.pairs.sets}
    if not profile.evaluation.ablations:
        absent.add("ablations/estimates")
    return [
        name
        for name, spec in FIGURES.items()
        if spec.source in {None, profile.evaluation.source} and not absent & set(spec.tables)
    ]


def draw_figure(run: RunFolder, name: str) -> Figure:
    """Draw a figure from the run's tables, without writing it."""
    spec = _spec(name)
    tables = [{arm: _read(run, table) for arm, table in _tables(run, pattern).items()} for pattern in spec.tables]
    return spec.draw(*(by_arm.get("", by_arm) for by_arm in tables))


def save_figure(run: RunFolder, name: str, *, overwrite: bool = False) -> StageReport:
    """Draw a figure and write it to figures/<profile>/, unless its tables and code are those it was drawn from."""
    started, spec, stage = time.perf_counter(), _spec(name), f"figure {name}"
    sources = {table: _path(run, table) for pattern in spec.tables for table in _tables(run, pattern).values()}
    inputs = {table: sha256(path) for table, path in sources.items()} | figure_code(name)
    files = [run.figures / f"{name}.{suffix}" for suffix in ("pdf", "png", "json")]
    run.files |= {*sources.values(), *files}
    record = read_json(files[-1])
    if not overwrite and record.get("inputs") == inputs and files_are_unchanged(run.figures, record):
        return StageReport(stage, True, {}, 0.0)
    try:
        figure = draw_figure(run, name)
    except NothingToShowError:
        for path in files:
            path.unlink(missing_ok=True)
        return StageReport(stage, False, {}, 0.0, ("left out, as the run has nothing that it could show",))
    from persodpo.figures import style

    style.save(figure, name, run.figures, inputs, spec.note)
    return StageReport(stage, False, {}, time.perf_counter() - started)


def figure_code(name: str) -> dict[str, str]:
    """Return the sha256 of the code that draws a figure, within `persodpo.figures`, and of the style sheet."""
    from persodpo.figures.style import STYLE

    return {"code": code_of(_spec(name).draw.__module__, within="persodpo.figures"), "style": sha256(STYLE)}


def _spec(name: str) -> FigureSpec:
    from persodpo.figures import FIGURES

    if name not in FIGURES:
        raise PersodpoError(f"There is no figure '{name}'; there are {', '.join(FIGURES)}.")
    return FIGURES[name]


def _tables(run: RunFolder, pattern: str) -> dict[str, str]:
    """Return the tables that a name with ``<arm>`` stands for, by arm; any other stands for itself, under no arm."""
    arms = run.profile.training.arms if "<arm>" in pattern else [""]
    return {arm: pattern.replace("<arm>", arm) for arm in arms}


def _path(run: RunFolder, table: str) -> Path:
    return published.fact_files()[table] if table.startswith("published/") else run.checked_path(table)


def _read(run: RunFolder, table: str) -> pd.DataFrame:
    return pd.read_csv(_path(run, table)) if table.startswith("published/") else run.read(table)
