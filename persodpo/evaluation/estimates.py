"""Observations in; each arm's metrics, failure ratio and response times with 95 % intervals out, as one tidy table.

Text metrics are read in two ways, both named in the column ``reading``: with failures imputed (their worst-case values stand
in the scores), and on successes alone. A number that cannot be derived is NaN, and the column ``reason`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from persodpo.evaluation.bootstrap import Cell, Resampling, Row, Spread, Statistic, stretch, table_of
from persodpo.evaluation.observations import EVERY, FLAGS, TEXT_METRICS, TIME, Floats, Grid, grid, of_arm, problem_of
from persodpo.evaluation.significance import wilson
from persodpo.method import METRICS

COLUMNS = (
    "arm", "metric", "reading", "batch_size", "hardware", "seeds", "responses", "left_out", "mean", "low", "high",
    "interval", "reason",
)  # fmt: skip
#: Rows of the results table, in the order of the published columns.
RESULT_METRICS = (TIME, *METRICS, "failure_ratio")

#: Names of intervals.
WILSON, WILSON_SEEDS = "Wilson", "Wilson, effective sample size"
PERCENTILE, PERCENTILE_SEEDS = "percentile bootstrap", "percentile bootstrap, t over seeds"


def summarise(responses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise each model's responses as the paper does, failures included with their worst-case values.

    Args:
        responses: Responses table.
        scores: Scores table of the same responses; joined on dialogue_id and model.

    Returns:
        Columns model, metric (one of `RESULT_METRICS`), responses (count), mean and std (population). A metric that is
        not there for every response of a model has a null mean: half a column is no result.
    """
    frame = responses.merge(scores, on=["dialogue_id", "model"], validate="one_to_one")
    frame["failure_ratio"] = (frame["outcome"] != "ok").astype(float)
    rows = []
    for model, group in frame.groupby("model", sort=False):
        for metric in RESULT_METRICS:
            values = group[metric].to_numpy(dtype=float)
            whole = bool(np.isfinite(values).all())
            mean, std = (values.mean(), values.std()) if whole else (None, None)
            rows.append({"model": model, "metric": metric, "responses": len(group), "mean": mean, "std": std})
    return pd.DataFrame(rows)


def estimates(
    observations: pd.DataFrame, *, metrics: Sequence[str] = TEXT_METRICS, sampling: Resampling | None = None
) -> pd.DataFrame:
    """Estimate each arm's metrics, failure ratio and response times.

    Args:
        observations: From `persodpo.evaluation.observations.observe`.
        metrics: Text metrics.
        sampling: Resamples and their seed; None: 10,000 and 0.

    Returns:
        One row per arm, metric and reading; response times have a row for each batch size and hardware, as times under
        different ones have no common mean. Columns `COLUMNS`: seeds and responses (counts), left_out (responses that
        the reading leaves out, or that were timed otherwise or not at all), mean over the seeds, its 95 % interval low
        to high and the interval's name, reason (null where nothing is missing). Flags (see `FLAGS`) have Wilson's
        interval, all else the interval of `persodpo.evaluation.bootstrap`.

    Raises:
        PersodpoError: As `persodpo.evaluation.observations.grid`.
    """
    data = grid(observations, metrics)
    cells = (cell for arm in data.seeds for cell in _cells(data, arm, metrics))
    table = table_of(cells, _numbers, COLUMNS, sampling or Resampling())
    return table.astype({"batch_size": "Int64"})


def _cells(data: Grid, arm: str, metrics: Sequence[str]) -> Iterator[Cell]:
    """Yield the rows of an arm, and what their numbers follow from."""
    seeds, every = data.seeds[arm], int(data.present[arm].to_numpy().sum())

    def cell(row: Row, table: pd.DataFrame, problem: str | None) -> Cell:
        counted = int(table.notna().to_numpy().sum())
        row = {"arm": arm, **row, "seeds": table.shape[1], "responses": counted, "left_out": every - counted}
        held = tuple(seed for seed in seeds if seed in table)
        return row | {"reason": problem}, Statistic(np.asfortranarray(table.to_numpy()), (held,))

    for metric, reading in data.readings(metrics):
        values, unknown = (of_arm(table, arm) for table in data.read(metric, reading))
        problem = problem_of(values.to_numpy(), unknown.to_numpy(), metric, reading)
        yield cell({"metric": metric, "reading": reading}, values, problem)
    times, conditions = of_arm(data.metrics[TIME], arm), of_arm(data.condition, arm)
    # Where nothing was timed, one row says so.
    for condition in data.conditions(arm) or [(0, "")]:
        held = times.where(conditions.map(lambda one, under=condition: one == under)).dropna(axis=1, how="all")
        row = {"metric": TIME, "reading": EVERY, "batch_size": condition[0] or None, "hardware": condition[1] or None}
        yield cell(row, held, None if held.shape[1] else "no response time was measured")


def _numbers(row: Row, statistic: Statistic, spread: Spread) -> Row:
    """Return mean and interval of a row that can be derived."""
    low, high = spread.low, spread.high
    name = PERCENTILE if row["seeds"] == 1 else PERCENTILE_SEEDS
    if row["metric"] in FLAGS:
        low, high, name = _share_interval(statistic.columns, spread)
    return {"mean": spread.estimate, "low": low, "high": high, "interval": None if np.isnan(low) else name}


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
        effective = min(float(total), share * (1 - share) / (spread.standard_error * stretch(spread.freedom)) ** 2)
    return *wilson(share * effective, effective), WILSON_SEEDS
