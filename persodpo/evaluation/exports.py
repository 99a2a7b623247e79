"""Estimates and comparisons in, tables as they are printed out, as CSV, Markdown and LaTeX (booktabs).

A cell that cannot be derived is a dash with a letter, and the note of that letter says why. CSV holds the tidy table with
all its digits.
"""

from __future__ import annotations

import re
import string
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.observations import EVERY, FLAGS, TIME
from persodpo.files import write_atomically, write_text
from persodpo.metrics import PLACES, metric_label, metric_order, number, p_text

#: What LaTeX reads as a command or its usual fonts lack, and how it prints it instead.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "$-$", "–": "--", "≤": r"$\leq$",
}  # fmt: skip


class TextTable(NamedTuple):
    """A table as it is printed, without escapes: what it shows, its cells, and what the letters in them stand for."""

    caption: str
    cells: pd.DataFrame
    notes: list[str]


class _Letters(dict[str, str]):
    """The letter of each reason, given in the order in which they are asked for."""

    def __missing__(self, reason: str) -> str:
        place = len(self)
        return self.setdefault(reason, f"({string.ascii_lowercase[place % 26] * (place // 26 + 1)})")

    def notes(self) -> list[str]:
        return [f"{letter} {reason}" for reason, letter in self.items()]


def _rows(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return rows by column, None where nothing stands."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _interval(row: dict[Any, Any], name: str, letters: _Letters) -> str:
    """Write a value with its interval, as far as they could be derived, else the letter of the reason."""
    value, reason = row[name], row["reason"]
    if value is None and reason is None:
        raise PersodpoError(f"{row['metric']} of {row['arm']} has neither value nor reason; derive it again.")
    if value is not None and row["low"] is not None:
        return f"{number(value)} [{number(row['low'])}, {number(row['high'])}]"
    text = "–" if value is None else number(value)
    return f"{text} {letters[reason]}" if reason else text


def results_table(estimates: pd.DataFrame, reading: str) -> TextTable:
    """Lay estimates out as the results table: one row per arm, one column per metric, in one reading of failures.

    Response times are those of answers given one at a time: those of batches are nobody's own.
    """
    rows = estimates[estimates["reading"].isin([reading, EVERY])].copy()
    times = rows["metric"] == TIME
    batches = times & rows["batch_size"].astype("Int64").gt(1).fillna(False)
    several = times & rows.duplicated(["arm", "metric"], keep=False)
    rows.loc[batches | several, ["mean", "low", "high"]] = np.nan
    rows.loc[batches, "reason"] = "answered in batches, which have no response time of their own"
    rows.loc[several, "reason"] = "timed under several conditions, which have no common mean"
    letters = _Letters()
    cell = {(row["arm"], row["metric"]): row for row in _rows(rows)}
    arms, metrics = list(rows["arm"].unique()), sorted(rows["metric"].unique(), key=metric_order)
    counts = rows[~rows["metric"].isin([*FLAGS, TIME])].groupby("arm")[["seeds", "responses"]].max()
    cells = pd.DataFrame(
        {"Arm": arm, "Seeds": str(counts["seeds"][arm]), "Responses": f"{counts['responses'][arm]:,}"}
        | {metric_label(metric): _interval(cell[arm, metric], "mean", letters) for metric in metrics}
        for arm in arms
    )
    caption = f"Means with 95 % intervals, {reading} in text metrics"
    caption += "; shares of responses with Wilson's interval." if set(FLAGS) & set(metrics) else "."
    seeds = rows["seeds"].max()
    caption += (
        " One seed an arm: intervals cover the draw of dialogues, not that of another training." if seeds == 1
        else f" Means over {seeds} seeds at most; intervals cover dialogues and seeds."
    )  # fmt: skip
    return TextTable(caption, cells, letters.notes())


def comparison_table(comparisons: pd.DataFrame) -> TextTable:
    """Lay paired comparisons out, one row per comparison, metric and reading."""
    letters, rows, least = _Letters(), [], 10.0**-PLACES
    for row in _rows(comparisons):
        bound, exact, detectable = "≤" if row["p_at_floor"] else "", row["p_exact_holm"], row["detectable"]
        p_value, p_holm = ("" if row[name] is None else p_text(row[name], bound) for name in ("p_value", "p_holm"))
        rows.append({
            "Difference of": f"{row['arm']} − {row['baseline']}", "Metric": metric_label(row["metric"]),
            "Reading": row["reading"], "Dialogues": f"{row['dialogues']:,}",
            "Difference": _interval(row, "difference", letters), "p": p_value, "p (Holm)": p_holm,
            "p exact (Holm)": "" if exact is None else f"{p_text(exact)} ({row['exact_test']})",
            "Detectable": "" if detectable is None else number(detectable) if detectable >= least / 2 else f"<{least}",
        })  # fmt: skip
    low, high = comparisons["family"].min(), comparisons["family"].max()
    family = f"{high} tests" if low == high else f"families of {low} to {high} tests"
    seeds = comparisons[["arm_seeds", "baseline_seeds"]].to_numpy().max()
    caption = (
        f"Paired differences with 95 % bootstrap intervals; p-values corrected over {family} (Holm). Detectable: the "
        f"true difference found four times in five, by itself. {'One seed' if seeds == 1 else f'{seeds} seeds'} an arm"
        f"{'' if seeds == 1 else ' at most'}."
    )
    return TextTable(caption, pd.DataFrame(rows), letters.notes())


def markdown(table: TextTable) -> str:
    """Return a table as Markdown: caption, pipe table, notes; names with characters of markup stand as they are."""

    def plain(text: str) -> str:
        return " ".join(re.sub(r"([\\|*_`<>#~])", r"\\\1", text).split())

    cells = [list(table.cells), *table.cells.to_numpy().tolist()]
    rows = [[plain(str(cell)) for cell in row] for row in cells]
    rows.insert(1, ["---"] * len(rows[0]))
    notes = ["", *(f"{plain(note)}  " for note in table.notes)] if table.notes else []
    return "\n".join([plain(table.caption), "", *(f"| {' | '.join(row)} |" for row in rows), *notes]) + "\n"


def latex(table: TextTable, label: str) -> str:
    """Return a table as a LaTeX ``table`` with the rules of booktabs; names with characters of LaTeX stand as they are."""

    def tex(text: str) -> str:
        return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))

    numbers = [table.cells[name].str.match(r"[−–<≤\d]|$").all() for name in table.cells]
    text = table.cells.map(tex).rename(columns=tex).style.hide(axis="index").to_latex(
        hrules=True, column_format="".join("r" if right else "l" for right in numbers), caption=tex(table.caption),
        label=label, position_float="centering",
    )  # fmt: skip
    # At the start of a row, the \\ before it would take a bracket or star for its own.
    text = re.sub(r"(?m)^([\[*])", r"{}\1", text)
    notes = "".join(f"\\par\\footnotesize {tex(note)}\n" for note in table.notes)
    return "% needs \\usepackage{booktabs}\n" + text.replace("\\end{table}", f"{notes}\\end{{table}}")


def write_exports(folder: Path, name: str, tidy: pd.DataFrame, table: TextTable) -> None:
    """Write a table as CSV (all of ``tidy``), and as it is printed as Markdown and LaTeX, labelled ``tab:name``."""
    texts = {
        "csv": tidy.to_csv(index=False, lineterminator="\n"), "md": markdown(table),
        "tex": latex(table, f"tab:{name.replace('_', '-')}"),
    }  # fmt: skip
    for suffix, text in texts.items():
        write_atomically(folder / f"{name}.{suffix}", partial(write_text, text=text))
