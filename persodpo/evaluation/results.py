"""Observations in; each arm's means, and paired differences between arms, with 95 % intervals and exact tests, out.

Text metrics are read in two ways, both named in the column ``reading``: with failures imputed (their worst-case values stand
in the scores), and on successes alone. A number that cannot be derived is NaN, and the column ``reason`` says why.

Dialogues are paired by ``dialogue_id``; those that only one of two arms answered are counted and take no part. On successes
alone, a dialogue counts where both arms succeeded: that compares arms on fewer and easier dialogues, so read it beside the
comparison with failures imputed, never instead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.observations import EVERY, FLAGS, TIME, by_dialogue, problem_of, read, readings
from persodpo.evaluation.statistics import (
    FEWEST,
    Resampling,
    Spread,
    Statistic,
    bootstrap,
    holm,
    sign_test,
    smallest_detectable,
    stretch,
    wilson,
)
from persodpo.method import METRICS
from persodpo.tables import schema_of

#: Rows of the results table, in the order of the published columns.
RESULT_METRICS = (TIME, *METRICS, "failure_ratio")

#: Names of intervals and of exact tests.
WILSON, WILSON_SEEDS = "Wilson", "Wilson, effective sample size"
PERCENTILE, PERCENTILE_SEEDS = "percentile bootstrap", "percentile bootstrap, t over seeds"
SIGN_TEST, MCNEMAR = "sign test", "McNemar"
#: Families of tests: what the judge says is the question, response times depend on the clock, all else is one family.
QUESTIONS = {"grounded": "judge", TIME: "clock"}

Row = dict[str, Any]
#: A row of a table (what it is of, and its ``reason`` to have no numbers, None if it has some), and what they follow from.
Cell = tuple[Row, Statistic]


def summarise(responses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise each model's responses as the paper does, failures included with their worst-case values.

    std is the population's. A metric that is not there for every response of a model has a null mean.
    """
    frame = responses.merge(scores, on=["dialogue_id", "model"], validate="one_to_one")
    frame["failure_ratio"] = (frame["outcome"] != "ok").astype(float)
    rows = []
    for model, group in frame.groupby("model", sort=False):
        for metric in RESULT_METRICS:
            values = group[metric].to_numpy(dtype=float)
            mean, std = (values.mean(), values.std()) if np.isfinite(values).all() else (None, None)
            rows.append({"model": model, "metric": metric, "responses": len(group), "mean": mean, "std": std})
    return pd.DataFrame(rows)


def estimates(observations: pd.DataFrame, sampling: Resampling) -> pd.DataFrame:
    """Estimate each arm's metrics, failure ratio and response times.

    Returns:
        One row per arm, metric and reading; response times have a row for each batch size and hardware, as times under
        different ones have no common mean. Columns of table ``evaluation/estimates``: seeds and responses (counts), left_out
        (responses that the reading leaves out, or that were timed otherwise or not at all), mean over the seeds, its 95 %
        interval low to high and the interval's name, reason (null where nothing is missing). Flags (see `FLAGS`) have
        Wilson's interval, all else the interval of `persodpo.evaluation.statistics`.
    """
    table, times = by_dialogue(observations), observations[observations[TIME].notna()]
    arms = table["failure_ratio"].columns.unique("arm")
    cells = (cell for arm in arms for cell in _of_arm(arm, table, times[times["arm"] == arm]))
    return _table("evaluation/estimates", cells, _mean, sampling).astype({"batch_size": "Int64"})


def _table(
    name: str, cells: Iterable[Cell], numbers: Callable[[Row, Statistic, Spread], Row], sampling: Resampling
) -> pd.DataFrame:
    """Return the rows of cells, with the numbers of those that can be derived; few dialogues have no interval."""
    every = list(cells)
    sound = [cell for cell in every if cell[0]["reason"] is None]
    for (row, statistic), spread in zip(sound, bootstrap([cell[1] for cell in sound], sampling), strict=True):
        row.update(numbers(row, statistic, spread))
        if np.isnan(row["low"]):
            row["reason"] = f"{statistic.fewest} dialogues are too few for a 95 % interval, {FEWEST} are not"
    return pd.DataFrame([row for row, _ in every]).reindex(columns=schema_of(name).names)


def _of_arm(arm: str, table: pd.DataFrame, times: pd.DataFrame) -> Iterator[Cell]:
    """Yield the rows of an arm, and what their numbers follow from."""
    every = int(table["failure_ratio"][[arm]].notna().to_numpy().sum())

    def cell(metric: str, reading: str, values: pd.DataFrame, reason: str | None, **condition: Any) -> Cell:
        count = int(values.count().sum())
        row = {
            "arm": arm, "metric": metric, "reading": reading, **condition, "seeds": values.shape[1],
            "responses": count, "left_out": every - count, "reason": reason,
        }  # fmt: skip
        return row, Statistic(values.to_numpy(), (tuple(map(int, values.columns)),))

    for metric, reading in readings(table):
        values, unknown = read(table, arm, metric, reading)
        yield cell(metric, reading, values, problem_of(values.to_numpy(), unknown, metric, reading))
    for (size, machine), rows in times.groupby(["batch_size", "hardware"], dropna=False):
        values = rows.pivot(index="dialogue_id", columns="seed", values=TIME).reindex(table.index)  # noqa: PD010
        yield cell(TIME, EVERY, values, None, batch_size=size, hardware=machine)
    if times.empty:
        yield cell(TIME, EVERY, pd.DataFrame(index=table.index), "no response time was measured")


def _mean(row: Row, statistic: Statistic, spread: Spread) -> Row:
    """Return mean and interval of a row that can be derived."""
    low, high = spread.low, spread.high
    name = PERCENTILE if row["seeds"] == 1 else PERCENTILE_SEEDS
    if row["metric"] in FLAGS:
        low, high, name = _share_interval(statistic, spread)
    return {"mean": spread.estimate, "low": low, "high": high, "interval": None if np.isnan(low) else name}


def _share_interval(statistic: Statistic, spread: Spread) -> tuple[float, float, str]:
    """Return Wilson's interval of a share of responses.

    Several seeds answer the same dialogues, so their responses are not independent; what counts then is how many independent
    responses would have the bootstrap's standard error (Kish 1965, the effective sample size), stretched as its degrees of
    freedom ask.
    """
    flags, share = statistic.columns, spread.estimate
    total = int((~np.isnan(flags)).sum())
    if flags.shape[1] == 1:
        return *wilson(float(np.nansum(flags)), total), WILSON
    # Where all or none failed, nothing shows how far seeds repeat each other, so they are taken to.
    effective = float(statistic.dialogues)
    if 0 < share < 1 and spread.standard_error > 0:
        effective = min(float(total), share * (1 - share) / (spread.standard_error * stretch(spread.freedom)) ** 2)
    return *wilson(share * effective, effective), WILSON_SEEDS


def compare(observations: pd.DataFrame, pairs: Sequence[tuple[str, str]], sampling: Resampling) -> pd.DataFrame:
    """Compare arms on the same dialogues.

    With the same seeds, two arms are paired by seed too (the same seed starts and orders both); with others, their seeds
    are drawn independently. With one seed each, the intervals speak of these two trained models only.

    Args:
        observations: From `persodpo.evaluation.observations.observe`.
        pairs: Which arm against which baseline.
        sampling: Resamples and their seed.

    Returns:
        One row per pair, metric and reading. Columns of table ``evaluation/comparisons``: arm_seeds and baseline_seeds
        (counts), dialogues compared, left_out (paired but not counted in this reading), unpaired; difference (arm less
        baseline), its 95 % interval, standard error and p-value from `persodpo.evaluation.statistics`; p_at_floor (no
        resample contradicts, so that the p-value, and p_holm, are bounds); detectable (see `smallest_detectable`); the exact
        test over dialogues with its counts, on means over seeds where there are several; p_holm and p_exact_holm, each
        corrected over all rows of the family that have such a p-value; family (their number, for p_holm); reason.
    """
    table, times = by_dialogue(observations), observations[observations[TIME].notna()]
    if not pairs:
        raise PersodpoError("There is nothing to compare; name at least one arm and its baseline.")
    if len(set(pairs)) < len(pairs):
        raise PersodpoError("A comparison stands twice; name each pair of arms once.")
    cells = (cell for arm, baseline in pairs for cell in _of_pair(arm, baseline, table, times))
    return _corrected(_table("evaluation/comparisons", cells, _difference, sampling), sampling)


def _of_pair(arm: str, baseline: str, table: pd.DataFrame, times: pd.DataFrame) -> Iterator[Cell]:
    """Yield the rows of a pair, and the differences by dialogue that their numbers follow from."""
    shared, unpaired = _shared(table, arm, baseline)
    timed = times[times["dialogue_id"].isin(table.index[shared])]
    for metric, reading in [*readings(table), (TIME, EVERY)]:
        (first, problem), (second, other_problem) = (read(table, name, metric, reading) for name in (arm, baseline))
        seeds = tuple(tuple(map(int, side.columns)) for side in (first, second))
        left, right, paired = first.to_numpy(), second.to_numpy(), seeds[0] == seeds[1]
        # Without common seeds, each of the one side meets each of the other.
        differences = left - right if paired else left[:, :, None] - right[:, None, :]
        differences[~shared] = np.nan
        statistic = Statistic(differences, seeds[:1] if paired else seeds)
        reason = _times_apart(timed, arm, baseline) if metric == TIME else None
        unknown = pd.concat([problem, other_problem], axis=1)[shared]
        row: Row = {
            "arm": arm, "baseline": baseline, "metric": metric, "reading": reading, "arm_seeds": len(seeds[0]),
            "baseline_seeds": len(seeds[1]), "seeds_paired": paired, "unpaired": unpaired,
            "dialogues": statistic.dialogues, "left_out": int(shared.sum()) - statistic.dialogues,
            "reason": reason or problem_of(statistic.columns, unknown, metric, reading),
        }  # fmt: skip
        yield row, statistic


def _shared(table: pd.DataFrame, arm: str, baseline: str) -> tuple[np.ndarray, int]:
    """Return which dialogues two arms answered under all their seeds, and how many others either answered."""
    arms = table["failure_ratio"].columns.unique("arm")
    for name in (arm, baseline):
        if name not in arms:
            raise PersodpoError(f"There is no arm '{name}' to compare; there are {', '.join(arms)}.")
    if arm == baseline:
        raise PersodpoError(f"Arm '{arm}' cannot be compared with itself; name another baseline.")
    present = table["failure_ratio"][[arm, baseline]].notna().to_numpy()
    shared = np.asarray(present.all(axis=1))
    if not shared.any():
        raise PersodpoError(
            f"Arms '{arm}' and '{baseline}' have no dialogue in common that all their seeds answered; evaluate both on the "
            "same held-out dialogues."
        )
    return shared, int(present.any(axis=1).sum() - shared.sum())


def _times_apart(times: pd.DataFrame, arm: str, baseline: str) -> str | None:
    """Say why the response times of two arms cannot be compared, None if they can."""
    conditions = times[["arm", "batch_size", "hardware"]].drop_duplicates().set_index("arm")
    for name in (arm, baseline):
        count = int((conditions.index == name).sum())
        if count != 1:
            return f"{name} was timed under {count} conditions" if count else f"{name} was not timed"
    both = conditions.loc[[arm, baseline]]
    if both.isna().any(axis=None):
        return "batch size or hardware of the times is not known"
    alike = len(both.drop_duplicates()) == 1
    return None if alike else "the two were timed at different batch sizes or on different hardware"


def _difference(row: Row, statistic: Statistic, spread: Spread) -> Row:
    """Return the tests of a row."""
    columns = statistic.columns
    by_dialogue = np.nanmean(columns[~np.isnan(columns).all(axis=1)], axis=1)
    return {
        "difference": spread.estimate, "low": spread.low, "high": spread.high,
        "standard_error": spread.standard_error, "p_value": spread.p_value, "p_at_floor": spread.at_floor,
        # Where no dialogue differs, nothing tells how large a difference would be seen.
        "detectable": smallest_detectable(spread.standard_error, spread.freedom) if spread.standard_error else np.nan,
        "exact_test": MCNEMAR if row["metric"] in FLAGS and columns.shape[1] == 1 else SIGN_TEST,
        **sign_test(by_dialogue),
    }  # fmt: skip


def _corrected(table: pd.DataFrame, sampling: Resampling) -> pd.DataFrame:
    """Add Holm's corrections, family by family."""
    family = table["metric"].map(QUESTIONS).fillna("all else")
    sizes = table["p_value"].notna().groupby(family).transform("sum").astype(int)
    largest = int(sizes.max())
    if largest * 2 / (sampling.resamples + 1) > 0.05:
        raise PersodpoError(
            f"{sampling.resamples:,} resamples cannot tell {largest} comparisons from chance after correction; draw at "
            f"least {40 * largest:,}."
        )
    for name, corrected in (("p_value", "p_holm"), ("p_exact", "p_exact_holm")):
        table[corrected] = table[name].astype(float).groupby(family).transform(holm)
    return table.assign(family=sizes).astype(dict.fromkeys(("higher", "lower", "ties"), "Int64"))
