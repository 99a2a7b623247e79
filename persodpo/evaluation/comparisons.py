"""Observations in, paired comparisons of arms out: one tidy table with every test, corrected for the whole family.

Dialogues are paired by ``dialogue_id``; those that only one of two arms answered are counted and take no part. On successes
alone, a dialogue counts where both arms succeeded: that compares arms on fewer and easier dialogues, so read it beside the
comparison with failures imputed, never instead of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.bootstrap import Resampling, Spread, Statistic, bootstrap
from persodpo.evaluation.observations import EVERY, FLAGS, TEXT_METRICS, Bools, Condition, Grid, grid
from persodpo.evaluation.significance import holm, sign_test, smallest_detectable
from persodpo.evaluation.statistics import problem_of, too_few

COLUMNS = (
    "arm", "baseline", "metric", "reading", "arm_seeds", "baseline_seeds", "seeds_paired", "dialogues", "left_out",
    "unpaired", "difference", "low", "high", "standard_error", "detectable", "p_value", "p_at_floor", "p_holm", "exact_test",
    "higher", "lower", "ties", "p_exact", "p_exact_holm", "family", "reason",
)  # fmt: skip

#: Families of tests: what the judge says is the question, response times depend on the clock, all else is one family.
QUESTIONS = {"grounded": "judge", "response_time": "clock"}

#: The exact tests.
SIGN_TEST, MCNEMAR = "sign test", "McNemar"

Row = dict[str, Any]


@dataclass(frozen=True)
class _Pair:
    """Two arms on the dialogues that both answered under all their seeds.

    Attributes:
        arm: The one arm.
        baseline: The other.
        shared: Whether both answered a dialogue.
        unpaired: Dialogues that only one answered, or not under all seeds.
        columns: Columns of the two for each column of a difference.
        seeds: The seeds of those columns, as `Statistic` wants them.
    """

    arm: str
    baseline: str
    shared: Bools
    unpaired: int
    columns: tuple[list[int], list[int]]
    seeds: tuple[tuple[int, ...], ...]


def compare(
    observations: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    *,
    metrics: Sequence[str] = TEXT_METRICS,
    families: Sequence[str] = (),
    sampling: Resampling | None = None,
) -> pd.DataFrame:
    """Compare arms on the same dialogues.

    With the same seeds, two arms are paired by seed too (the same seed starts and orders both); with others, their seeds
    are drawn independently. With one seed each, the intervals speak of these two trained models only.

    Args:
        observations: From `persodpo.evaluation.observations.observe`.
        pairs: Which arm against which baseline.
        metrics: Text metrics; flags and response time are always compared.
        families: Columns that split the table further than `QUESTIONS` does, such as ``metric`` where each metric was a
            question of its own before anyone looked.
        sampling: Resamples and their seed; None: 10,000 and 0.

    Returns:
        One row a pair, metric and reading. Columns `COLUMNS`: arm_seeds and baseline_seeds (counts), dialogues compared,
        left_out (paired but not counted in this reading), unpaired; difference (arm less baseline), its 95 % interval,
        standard error and p-value from `persodpo.evaluation.bootstrap`; p_at_floor (no resample contradicts, so that the
        p-value, and p_holm, are bounds); detectable (see `smallest_detectable`); the
        exact test over dialogues with its counts, on means over seeds where there are several; p_holm and p_exact_holm,
        each corrected over all rows of the family that have such a p-value; family (their number, for p_holm); reason
        (null where nothing is missing).

    Raises:
        PersodpoError: There is no such arm, a pair stands twice or has no dialogue in common, there are too few resamples
            for so many comparisons, or as `persodpo.evaluation.observations.grid`.
    """
    sampling = sampling or Resampling()
    array = grid(observations, metrics)
    if not pairs:
        raise PersodpoError("There is nothing to compare; name at least one arm and its baseline.")
    if len(set(pairs)) < len(pairs):
        raise PersodpoError("A comparison stands twice; name each pair of arms once.")
    rows: list[Row] = []
    statistics: dict[int, Statistic] = {}
    for pair in (_pair(array, arm, baseline) for arm, baseline in pairs):
        for row, statistic in _rows(array, pair, metrics):
            if statistic is not None:
                statistics[len(rows)] = statistic
            rows.append(row)
    for number, spread in zip(statistics, bootstrap(list(statistics.values()), sampling), strict=True):
        rows[number] |= _numbers(rows[number], statistics[number], spread)
    return _corrected(pd.DataFrame(rows).reindex(columns=COLUMNS), families, sampling)


def _pair(array: Grid, arm: str, baseline: str) -> _Pair:
    """Find what two arms have in common."""
    for name in (arm, baseline):
        if name not in array.seeds:
            raise PersodpoError(f"There is no arm '{name}' to compare; there are {', '.join(array.seeds)}.")
    if arm == baseline:
        raise PersodpoError(f"Arm '{arm}' cannot be compared with itself; name another baseline.")
    sides = array.columns(arm), array.columns(baseline)
    both = [*sides[0], *sides[1]]
    shared: Bools = np.all(array.present[:, both], axis=1)
    if not shared.any():
        raise PersodpoError(
            f"Arms '{arm}' and '{baseline}' have no dialogue in common that all their seeds answered; evaluate both on the "
            "same held-out dialogues."
        )
    unpaired = int(np.any(array.present[:, both], axis=1).sum() - shared.sum())
    seeds = array.seeds[arm], array.seeds[baseline]
    if seeds[0] == seeds[1]:
        return _Pair(arm, baseline, shared, unpaired, sides, seeds[:1])
    crossed = list(itertools.product(*sides))
    return _Pair(arm, baseline, shared, unpaired, ([a for a, _ in crossed], [b for _, b in crossed]), seeds)


def _rows(array: Grid, pair: _Pair, metrics: Sequence[str]) -> Iterator[tuple[Row, Statistic | None]]:
    """Yield the rows of a pair without what needs a bootstrap, and the statistic that does."""
    seeds = len(array.seeds[pair.arm]), len(array.seeds[pair.baseline])
    readings = [*array.readings(metrics), ("response_time", EVERY)]
    for metric, reading in readings:
        row: Row = {
            "arm": pair.arm, "baseline": pair.baseline, "metric": metric, "reading": reading, "arm_seeds": seeds[0],
            "baseline_seeds": seeds[1], "seeds_paired": len(pair.seeds) == 1, "unpaired": pair.unpaired,
        }  # fmt: skip
        values, unknown = array.read(metric, reading)
        if metric == "response_time":
            unknown = np.zeros_like(unknown)
            problem = _times_apart(array, pair)
        else:
            problem = None
        left, right = pair.columns
        missing = (unknown[:, left] | unknown[:, right])[pair.shared]
        differences = np.where(pair.shared[:, None], values[:, left] - values[:, right], np.nan)
        counted = int((~np.isnan(differences)).any(axis=1).sum())
        row |= {"dialogues": counted, "left_out": int(pair.shared.sum()) - counted}
        row["reason"] = problem or problem_of(differences, missing, metric, reading)
        yield row, None if row["reason"] else Statistic(differences, pair.seeds)


def _times_apart(array: Grid, pair: _Pair) -> str | None:
    """Say why the response times of two arms cannot be compared, None if they can."""
    found: list[Condition] = []
    for arm in (pair.arm, pair.baseline):
        codes = array.condition[:, array.columns(arm)][pair.shared]
        held = sorted(set(codes[codes >= 0].tolist()))
        if len(held) != 1:
            return f"{arm} was timed under {len(held)} conditions" if held else f"{arm} was not timed"
        found.append(array.conditions[held[0]])
    if None in found[0] or None in found[1]:
        return "batch size or hardware of the times is not known"
    return None if found[0] == found[1] else "the two were timed at different batch sizes or on different hardware"


def _numbers(row: Row, statistic: Statistic, spread: Spread) -> Row:
    """Return the tests of a row."""
    few = np.isnan(spread.low)
    columns = statistic.columns
    signs = sign_test(np.nanmean(columns[~np.isnan(columns).all(axis=1)], axis=1))
    single = columns.shape[1] == 1
    return {
        "difference": spread.estimate, "low": spread.low, "high": spread.high,
        "standard_error": spread.standard_error, "p_value": spread.p_value, "p_at_floor": spread.at_floor,
        # Where no dialogue differs, nothing tells how large a difference would be seen.
        "detectable": smallest_detectable(spread.standard_error, spread.freedom) if spread.standard_error else np.nan,
         "exact_test": MCNEMAR if row["metric"] in FLAGS and single else SIGN_TEST,
        "higher": signs.higher, "lower": signs.lower, "ties": signs.ties, "p_exact": signs.p_value,
        "reason": too_few(columns) if few else None,
    }  # fmt: skip


def _corrected(table: pd.DataFrame, families: Sequence[str], sampling: Resampling) -> pd.DataFrame:
    """Add Holm's corrections, family by family."""
    number = (
        table.assign(question=table["metric"].map(QUESTIONS))
        .groupby(["question", *families], sort=False, dropna=False)
        .ngroup()
    )
    sizes = table["p_value"].notna().groupby(number).transform("sum").astype(int)
    largest = int(sizes.max())
    if largest * 2 / (sampling.resamples + 1) > 0.05:
        raise PersodpoError(
            f"{sampling.resamples:,} resamples cannot tell {largest} comparisons from chance after correction; draw at "
            f"least {40 * largest:,}."
        )
    adjusted = {
        name: table[name].astype(float).groupby(number).transform(lambda p: holm(p.to_numpy()))
        for name in ("p_value", "p_exact")
    }
    table = table.assign(p_holm=adjusted["p_value"], p_exact_holm=adjusted["p_exact"], family=sizes)
    return table.astype(dict.fromkeys(("higher", "lower", "ties"), "Int64"))
