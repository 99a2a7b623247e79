"""Estimates and comparisons in, tables of text out, as they are printed; `persodpo.evaluation.exports` gives them a format.

A cell that cannot be derived is a dash with a letter, and the note of that letter says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.observations import EVERY, FLAGS, IMPUTED
from persodpo.metrics import metric_label, metric_order

_TIME = "response_time"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextTable:
    """A table as it is printed, without escapes.

    Attributes:
        caption: What it shows, one or more sentences.
        columns: Headings.
        rows: Cells, one text a heading.
        notes: What the letters in cells stand for.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def _rows(table: pd.DataFrame) -> list[Row]:
    """Return the rows of a table by column."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _missing(value: float | str | None) -> bool:
    return bool(pd.isna(value))


class _Notes:
    """Letters for reasons, in the order in which they come up."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def letter(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        number, letters = self.reasons.index(reason), ""
        while number >= 0:
            letters, number = chr(ord("a") + number % 26) + letters, number // 26 - 1
        return f"({letters})"

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{self.letter(reason)} {reason}" for reason in self.reasons)


def number(value: float, decimals: int) -> str:
    """Write a number with a real minus sign, and without one if it rounds to zero."""
    text = f"{value:.{decimals}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text) else text.lstrip("-")


def p_text(p_value: float, bound: str = "") -> str:
    """Write a p-value to three places, with a sign before one that is a bound; one that would read as zero is smaller."""
    return "<0.001" if p_value < 0.0005 else f"{bound if p_value < 1 else ''}{p_value:.3f}"


def at_least(value: float, decimals: int) -> str:
    """Write a positive number; one that would read as zero is said to be smaller than the last place."""
    least = 10.0**-decimals
    return number(value, decimals) if value >= least / 2 else f"<{number(least, decimals)}"


def _interval(row: Row, value: str, decimals: int, notes: _Notes) -> str:
    """Write a value with its interval, as far as they could be derived.

    Raises:
        PersodpoError: The value is missing and no reason is given.
    """
    reason = row["reason"]
    if _missing(row[value]):
        if _missing(reason):
            raise PersodpoError(
                f"{metric_label(row['metric'])} of {row['arm']} has neither value nor reason; derive it again."
            )
        return f"– {notes.letter(reason)}"
    text = number(row[value], decimals)
    if _missing(row["low"]) or _missing(row["high"]):
        return text if _missing(reason) else f"{text} {notes.letter(reason)}"
    return f"{text} [{number(row['low'], decimals)}, {number(row['high'], decimals)}]"


def results_table(
    estimates: pd.DataFrame,
    reading: str = IMPUTED,
    *,
    arms: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    decimals: int = 3,
) -> TextTable:
    """Lay estimates out as the results table: one row an arm, one column a metric.

    Args:
        estimates: From `persodpo.evaluation.statistics.estimates`.
        reading: How text metrics count failures, `IMPUTED` or `SUCCESSES`.
        arms: Which arms, in this order; None: all.
        labels: Names of arms for readers.
        decimals: Places.

    Returns:
        The table. Response times have a column for each machine, and only where every timed response of an arm was
        answered by itself there: times of batches are nobody's own.

    Raises:
        PersodpoError: There are no estimates in that reading, an arm has none, or a cell has neither value nor reason.
    """
    if not estimates["reading"].eq(reading).any():
        raise PersodpoError(
            f"There are no estimates with {reading}; there are {', '.join(estimates['reading'].unique())}."
        )
    names = list(dict.fromkeys(estimates["arm"])) if arms is None else list(arms)
    silent = [arm for arm in names if not estimates["arm"].eq(arm).any()]
    if silent:
        raise PersodpoError(f"Arm '{silent[0]}' has no estimates; evaluate it, or leave it out of the table.")
    notes = _Notes()
    text = estimates[estimates["reading"].isin([reading, EVERY]) & estimates["metric"].ne(_TIME)]
    metrics = sorted(text["metric"].unique(), key=metric_order)
    machines = _machines(estimates[estimates["arm"].isin(names)])
    rows = []
    for arm in names:
        own = {row["metric"]: row for row in _rows(text[text["arm"] == arm])}
        times = _rows(estimates[estimates["arm"].eq(arm) & estimates["metric"].eq(_TIME)])
        cells = [_interval(own[metric], "mean", decimals, notes) if metric in own else "" for metric in metrics]
        cells += [_time(times, machine, decimals, notes) for machine in machines]
        rows.append(((labels or {}).get(arm, arm), *_counts(own), *cells))
    headings = [metric_label(_TIME) if len(machines) == 1 else f"{metric_label(_TIME)}, {name}" for name in machines]
    columns = ("Arm", "Seeds", "Responses", *map(metric_label, metrics), *headings)
    return TextTable(_caption(text, reading), columns, tuple(rows), notes.lines())


def _counts(own: Mapping[str, Row]) -> tuple[str, str]:
    """Write how many seeds an arm has, and how many responses its text metrics count."""
    rows = list(own.values())
    counted = [row["responses"] for row in rows if row["metric"] not in FLAGS] or [row["responses"] for row in rows]
    return f"{max(row['seeds'] for row in rows)}", f"{max(counted):,}"


def _caption(rows: pd.DataFrame, reading: str) -> str:
    """Say what the numbers are, and what one seed is."""
    words = f"Means with 95 % intervals, {reading} in text metrics"
    words += "; shares of responses with Wilson's interval." if set(FLAGS) & set(rows["metric"]) else "."
    if rows["seeds"].max() == 1:
        return f"{words} One seed an arm: intervals cover the draw of dialogues, not that of another training."
    return f"{words} Means over {rows['seeds'].max()} seeds at most; intervals cover dialogues and seeds."


def _machine(row: Row) -> str:
    return "hardware not known" if _missing(row["hardware"]) else str(row["hardware"])


def _alone(row: Row) -> bool:
    """Tell whether times are those of single answers; where only the server knows, it answered each by itself."""
    return _missing(row["batch_size"]) or bool(row["batch_size"] == 1)


def _machines(estimates: pd.DataFrame) -> list[str]:
    """Return the machines that get a column of response times; one at least, for the notes to stand in."""
    times = _rows(estimates[estimates["metric"].eq(_TIME)])
    shown = [_machine(row) for row in times if _alone(row) and not _missing(row["mean"])]
    return list(dict.fromkeys(shown)) or ["one by one"]


def _time(rows: Sequence[Row], machine: str, decimals: int, notes: _Notes) -> str:
    """Write an arm's response time on one machine."""
    if len(rows) == 1 and (_missing(rows[0]["mean"]) or (_alone(rows[0]) and _machine(rows[0]) == machine)):
        return _interval(rows[0], "mean", decimals, notes)
    if not rows:
        return f"– {notes.letter('no response time was measured')}"
    if len(rows) > 1:
        return f"– {notes.letter('timed under several conditions, which have no common mean')}"
    return "– " + notes.letter(
        f"timed on {_machine(rows[0])}"
        if _alone(rows[0])
        else "answered in batches, which have no response time of their own"
    )


def comparison_table(
    comparisons: pd.DataFrame, *, labels: Mapping[str, str] | None = None, decimals: int = 3
) -> TextTable:
    """Lay paired comparisons out, one row a comparison, metric and reading.

    Args:
        comparisons: From `persodpo.evaluation.comparisons.compare`, whole or some of its rows; corrections stay those of
            the whole family.
        labels: Names of arms for readers.
        decimals: Places of differences.

    Returns:
        The table.

    Raises:
        PersodpoError: There are no comparisons, or one has neither value nor reason.
    """
    if comparisons.empty:
        raise PersodpoError("There are no comparisons to print; compare at least two arms.")
    notes, named = _Notes(), labels or {}
    rows: list[tuple[str, ...]] = []
    for row in _rows(comparisons):
        pair = f"{named.get(row['arm'], row['arm'])} − {named.get(row['baseline'], row['baseline'])}"
        bound = "≤" if row["p_at_floor"] is True or row["p_at_floor"] == 1 else ""
        tests = ["" if _missing(row[name]) else p_text(row[name], bound) for name in ("p_value", "p_holm")]
        tests.append("" if _missing(row["p_exact_holm"]) else p_text(row["p_exact_holm"]))
        if tests[2]:
            tests[2] += f" ({row['exact_test']})"
        detectable = "" if _missing(row["detectable"]) else at_least(row["detectable"], decimals)
        cells = [_interval(row, "difference", decimals, notes), *tests, detectable]
        rows.append((pair, metric_label(row["metric"]), row["reading"], f"{row['dialogues']:,}", *cells))
    low, high = comparisons["family"].min(), comparisons["family"].max()
    family = f"{high} tests" if low == high else f"families of {low} to {high} tests"
    seeds = comparisons[["arm_seeds", "baseline_seeds"]]
    caption = (
        f"Paired differences with 95 % bootstrap intervals; p-values corrected over {family} (Holm). Detectable: the "
        "true difference found four times in five, by itself."
    )
    caption += " One seed an arm." if seeds.max().max() == 1 else f" {seeds.max().max()} seeds an arm at most."
    columns = (
        "Difference of", "Metric", "Reading", "Dialogues", "Difference", "p", "p (Holm)", "p exact (Holm)", "Detectable",
    )  # fmt: skip
    return TextTable(caption, columns, tuple(rows), notes.lines())
