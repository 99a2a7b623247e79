"""Run tables in, sections of tables of text out, and a line for each table that a run lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from persodpo.artifacts import MAKER, RunFolder
from persodpo.evaluation.cells import TextTable, comparison_table, number, results_table
from persodpo.evaluation.observations import IMPUTED, SUCCESSES
from persodpo.tables import SCHEMAS

ARM_TABLE = "training/<arm>/"


@dataclass(frozen=True)
class Lack:
    """Something that a run does not have.

    Attributes:
        text: What is missing; where no command helps, a sentence that says why.
        command: What makes it; None if no command does.
    """

    text: str
    command: str | None


@dataclass(frozen=True)
class Section:
    """A heading and the tables under it, one at least."""

    title: str
    tables: tuple[TextTable, ...]


def tables_of(run: RunFolder) -> list[str]:
    """Return the names of the tables in a run folder, in the order of `persodpo.tables.SCHEMAS`."""
    files = (path.relative_to(run.root).with_suffix("") for path in run.root.rglob("*.parquet"))
    names = {path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts)}
    order = list(SCHEMAS)
    return sorted((name for name in names if _kind(name) in SCHEMAS), key=lambda name: (order.index(_kind(name)), name))


def _kind(name: str) -> str:
    """Return the key in ``SCHEMAS`` of a table's name, whichever arm's it is."""
    return f"{ARM_TABLE}{name.rpartition('/')[2]}" if name.startswith("training/") else name


def cell(value: Any) -> str:
    """Write one value: text as it is, flags as words, whole numbers with thousands, others to three places."""
    if value is None or bool(pd.isna(value)):
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    whole = f"{value:,.0f}".replace("-", "−")
    return whole if float(value).is_integer() else number(float(value), 3)


def frame_table(frame: pd.DataFrame, caption: str, headings: Mapping[str, str] | None = None) -> TextTable:
    """Print a table as it is.

    Args:
        frame: The table.
        caption: What it shows.
        headings: Headings of columns that are not named by their own names.
    """
    names = [(headings or {}).get(str(name), _words(str(name))) for name in frame.columns]
    rows = tuple(tuple(map(cell, row)) for row in frame.itertuples(index=False))
    return TextTable(caption, tuple(names), rows, ())


def _words(name: str) -> str:
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


Tables = Mapping[str, pd.DataFrame]


def _results(tables: Tables) -> list[TextTable]:
    estimates = tables["evaluation/estimates"]
    return [
        results_table(estimates, reading) for reading in (IMPUTED, SUCCESSES) if estimates["reading"].eq(reading).any()
    ]


def _comparisons(tables: Tables) -> list[TextTable]:
    return [comparison_table(tables["evaluation/comparisons"])]


def _ablations(tables: Tables) -> list[TextTable]:
    return [results_table(tables["ablations/estimates"], IMPUTED)]


def _gate(tables: Tables) -> list[TextTable]:
    gate = tables["pairs/gate"]
    checks = gate.drop_duplicates("check")
    shown = pd.DataFrame({"check": checks["check"].map(_words)})
    for pair_set, own in gate.groupby("pair_set", sort=False):
        shown[str(pair_set)] = checks["check"].map(own.set_index("check")["value"])
    shown["meaning"] = checks["meaning"]
    caption = "What a pair set would teach besides the preference. Of one feature alone, 0.5 is chance."
    return [frame_table(shown, caption)]


def _scorers(tables: Tables) -> list[TextTable]:
    return [frame_table(tables["scorers"], "What the scorers report of themselves, by table.")]


def _probes(tables: Tables) -> list[TextTable]:
    return [frame_table(tables["probes"], "Texts whose score is known beforehand, and what each scorer found.")]


def _health(tables: Tables) -> list[TextTable]:
    arms = [table.assign(arm=name.split("/", 1)[1].rpartition("/")[0]) for name, table in tables.items()]
    health = pd.concat(arms, ignore_index=True)
    health["step"] = health["step"].where(health["step"] >= 0)
    shown = health[["arm", "name", "level", "step", "value", "sentence"]]
    return [frame_table(shown, "Training health: what each arm's logs say.", {"name": "Check", "sentence": "Verdict"})]


def _findings(tables: Tables) -> list[TextTable]:
    return [frame_table(tables["audit/findings"], "Findings about the release, each recomputed.", {"id": "Finding"})]


def _corrections(tables: Tables) -> list[TextTable]:
    return [frame_table(tables["audit/corrections"], "What each correction changes.", {"jaccard": "Overlap (Jaccard)"})]


def _parity(tables: Tables) -> list[TextTable]:
    return [frame_table(tables["audit/parity"], "Published numbers beside ours.")]


#: Section, what its lack is called, table and how it is printed, in the order of the page.
_PARTS: tuple[tuple[str, str, str, Callable[[Tables], list[TextTable]]], ...] = (
    ("Results", "results", "evaluation/estimates", _results),
    ("Results", "paired differences", "evaluation/comparisons", _comparisons),
    ("Ablations", "ablations", "ablations/estimates", _ablations),
    ("Pairs", "gate of the pairs", "pairs/gate", _gate),
    ("Scorers", "reports on the scorers", "scorers", _scorers),
    ("Scorers", "probes of the scorers", "probes", _probes),
    ("Training", "training health", f"{ARM_TABLE}health", _health),
    ("Audit", "audit findings", "audit/findings", _findings),
    ("Audit", "effects of the corrections", "audit/corrections", _corrections),
    ("Audit", "published numbers beside ours", "audit/parity", _parity),
)


def sections(run: RunFolder, names: Sequence[str]) -> tuple[list[Section], list[Lack]]:
    """Print the tables of a run.

    Args:
        run: The run folder.
        names: Its tables, from `tables_of`.

    Returns:
        The sections that have a table, and what the run lacks.

    Raises:
        PersodpoError: A table was edited or its stage was interrupted.
    """
    found: dict[str, list[TextTable]] = {}
    lacks: list[Lack] = []
    for title, what, kind, render in _PARTS:
        read = {name: run.read(name) for name in names if _kind(name) == kind}
        tables = {name: table for name, table in read.items() if not table.empty}
        if tables:
            found.setdefault(title, []).extend(render(tables))
        else:
            lacks.append(_lack(run, what, kind, empty=bool(read)))
    return [Section(title, tuple(tables)) for title, tables in found.items()], lacks


def _lack(run: RunFolder, what: str, kind: str, *, empty: bool) -> Lack:
    if empty:
        return Lack(f"No {what}: table {kind} has no rows.", None)
    if kind in ("scorers", "probes") and run.profile.scoring.source == "published":
        return Lack(f"No {what}: scores come from published files (scoring.source).", None)
    if kind.startswith("ablations/") and not run.profile.evaluation.ablations:
        return Lack(f"No {what}: the profile names none (evaluation.ablations).", None)
    return Lack(what, command(run, MAKER[kind.split("/", maxsplit=1)[0]]))


def by_command(lacks: Sequence[Lack]) -> list[Lack]:
    """Name in one line what one command makes."""
    found: dict[str, list[str]] = {}
    for lack in lacks:
        found.setdefault(lack.command or lack.text, []).append(lack.text)
    commands = {lack.command for lack in lacks}
    return [Lack(", ".join(texts), key) if key in commands else Lack(key, None) for key, texts in found.items()]


def command(run: RunFolder, name: str) -> str:
    """Return a command of this run, as it is typed."""
    return f"persodpo {name} --profile {run.profile.name}"
