"""Observations in; each arm's metrics, failure ratio and response times with 95 % intervals out, as one tidy table.

Text metrics are read in two ways, both named in the column ``reading``: with failures imputed (their worst-case values stand
in the scores), and on successes alone. A number that cannot be derived is NaN, and the column ``reason`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from persodpo.evaluation.bootstrap import FEWEST, Resampling, Spread, Statistic, bootstrap
from persodpo.evaluation.intervals import wilson
from persodpo.evaluation.observations import EVERY, FLAGS, TEXT_METRICS, Bools, Floats, Grid, grid

COLUMNS = (
    "arm", "metric", "reading", "batch_size", "hardware", "seeds", "responses", "left_out", "mean", "low", "high",
    "interval", "reason",
)  # fmt: skip

#: Names of intervals.
WILSON, WILSON_SEEDS = "Wilson", "Wilson, effective sample size"
PERCENTILE, PERCENTILE_SEEDS = "percentile bootstrap", "percentile bootstrap, t over seeds"

Row = dict[str, Any]


@dataclass(frozen=True)
class _Cell:
    """A row of the table before its numbers: what it is of, and the values it counts, a column a seed."""

    row: Row
    values: Floats
    unknown: Bools
    seeds: tuple[int, ...]


def estimates(
    observations: pd.DataFrame,
    *,
    metrics: Sequence[str] = TEXT_METRICS,
    sampling: Resampling | None = None,
) -> pd.DataFrame:
    """Estimate each arm's metrics, failure ratio and response times.

    Args:
        observations: From `persodpo.evaluation.observations.observe`.
        metrics: Text metrics.
        sampling: Resamples and their seed; None: 10,000 and 0.

    Returns:
        One row an arm, metric and reading; response times have a row for each batch size and hardware, as times under
        different ones have no common mean. Columns `COLUMNS`: seeds and responses (counts), left_out (responses that
        the reading leaves out, or that were timed otherwise or not at all), mean over the seeds, its 95 % interval low
        to high and the interval's name, reason (null where nothing is missing). Flags (see
        `FLAGS`) have Wilson's interval, all else the interval of `persodpo.evaluation.bootstrap`.

    Raises:
        PersodpoError: As `persodpo.evaluation.observations.grid`.
    """
    array = grid(observations, metrics)
    cells = [cell for arm in array.seeds for cell in _cells(array, arm, metrics)]
    problems = [problem_of(cell.values, cell.unknown, cell.row["metric"], cell.row["reading"]) for cell in cells]
    sound = [cell for cell, problem in zip(cells, problems, strict=True) if problem is None]
    spreads = iter(bootstrap([Statistic(cell.values, (cell.seeds,)) for cell in sound], sampling or Resampling()))
    rows = []
    for cell, problem in zip(cells, problems, strict=True):
        counted = int((~np.isnan(cell.values)).sum())
        everything = int(array.present[:, array.columns(cell.row["arm"])].sum())
        row = {**cell.row, "seeds": len(cell.seeds), "responses": counted, "left_out": everything - counted}
        rows.append(row | ({"reason": problem} if problem else _numbers(cell, next(spreads))))
    return pd.DataFrame(rows).reindex(columns=COLUMNS).astype({"batch_size": "Int64"})


def _cells(array: Grid, arm: str, metrics: Sequence[str]) -> Iterator[_Cell]:
    """Yield what an arm's rows are computed from."""
    places, seeds = array.columns(arm), array.seeds[arm]
    for metric, reading in array.readings(metrics):
        values, unknown = array.read(metric, reading)
        yield _Cell({"arm": arm, "metric": metric, "reading": reading}, values[:, places], unknown[:, places], seeds)
    all_times, _ = array.read("response_time", EVERY)
    times, condition = all_times[:, places], array.condition[:, places]
    # Where nothing was timed, one row says so.
    for number in sorted(set(condition[condition >= 0].tolist())) or [-1]:
        held = condition == number
        size, machine = array.conditions[number] if number >= 0 else (None, None)
        row = {"arm": arm, "metric": "response_time", "reading": EVERY, "batch_size": size, "hardware": machine}
        there = [place for place in range(len(places)) if held[:, place].any()] if number >= 0 else []
        values = np.where(held, times, np.nan)[:, there]
        yield _Cell(row, values, np.zeros_like(values, dtype=bool), tuple(seeds[place] for place in there))


def problem_of(values: Floats, unknown: Bools, metric: str, reading: str) -> str | None:
    """Say why a mean cannot be derived, None if it can.

    Args:
        values: A column a seed or pair of seeds, NaN where a dialogue does not count.
        unknown: Where a value that should count is not known.
        metric: The metric.
        reading: One of the readings.
    """
    if unknown.any():
        # Half a column is no result.
        return f"no score in {int(unknown.any(axis=1).sum()):,} of {len(unknown):,} dialogues"
    empty = int(np.isnan(values).all(axis=0).sum()) if values.size else values.shape[1]
    if empty == values.shape[1]:
        return {"response_time": "no response time was measured"}.get(metric, f"nothing counts ({reading})")
    return f"nothing counts ({reading}) in {empty} of {values.shape[1]} seeds" if empty else None


def too_few(values: Floats) -> str:
    """Say why there is a mean but no bootstrap interval."""
    fewest = int((~np.isnan(values)).sum(axis=0).min())
    return f"{fewest} dialogues are too few for a 95 % interval, {FEWEST} are not"


def _numbers(cell: _Cell, spread: Spread) -> Row:
    """Return mean, interval and reason of a row that can be derived."""
    low, high, name = spread.low, spread.high, PERCENTILE if len(cell.seeds) == 1 else PERCENTILE_SEEDS
    if cell.row["metric"] in FLAGS:
        low, high, name = _share_interval(cell.values, spread)
    reason = too_few(cell.values) if np.isnan(low) else None
    return {"mean": spread.estimate, "low": low, "high": high, "interval": name if reason is None else None,
            "reason": reason}  # fmt: skip


def _share_interval(failed: Floats, spread: Spread) -> tuple[float, float, str]:
    """Return Wilson's interval of a share of responses.

    Several seeds answer the same dialogues, so their responses are not independent; what counts then is how many independent
    responses would have the bootstrap's standard error (Kish 1965, the effective sample size), stretched as its degrees of
    freedom ask.
    """
    total = int((~np.isnan(failed)).sum())
    if failed.shape[1] == 1:
        return *wilson(float(np.nansum(failed)), total), WILSON
    share = spread.estimate
    # Where all or none failed, nothing shows how far seeds repeat each other, so they are taken to.
    effective = float((~np.isnan(failed)).any(axis=1).sum())
    if 0 < share < 1 and spread.standard_error > 0:
        effective = min(float(total), share * (1 - share) / (spread.standard_error * spread.stretch) ** 2)
    return *wilson(share * effective, effective), WILSON_SEEDS
