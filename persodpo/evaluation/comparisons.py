"""Observations in, paired comparisons of arms out: one tidy table with every test, corrected for the whole family.

Dialogues are paired by ``dialogue_id``; those that only one of two arms answered are counted and take no part. On successes
alone, a dialogue counts where both arms succeeded: that compares arms on fewer and easier dialogues, so read it beside the
comparison with failures imputed, never instead of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.bootstrap import Cell, Resampling, Row, Spread, Statistic, table_of
from persodpo.evaluation.observations import EVERY, FLAGS, TEXT_METRICS, TIME, Grid, grid, problem_of
from persodpo.evaluation.significance import holm, sign_test, smallest_detectable

COLUMNS = (
    "arm", "baseline", "metric", "reading", "arm_seeds", "baseline_seeds", "seeds_paired", "dialogues", "left_out",
    "unpaired", "difference", "low", "high", "standard_error", "detectable", "p_value", "p_at_floor", "p_holm", "exact_test",
    "higher", "lower", "ties", "p_exact", "p_exact_holm", "family", "reason",
)  # fmt: skip

#: Families of tests: what the judge says is the question, response times depend on the clock, all else is one family.
QUESTIONS = {"grounded": "judge", TIME: "clock"}

#: The exact tests.
SIGN_TEST, MCNEMAR = "sign test", "McNemar"


def compare(
    observations: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    *,
    metrics: Sequence[str] = TEXT_METRICS,
    sampling: Resampling | None = None,
) -> pd.DataFrame:
    """Compare arms on the same dialogues.

    With the same seeds, two arms are paired by seed too (the same seed starts and orders both); with others, their seeds
    are drawn independently. With one seed each, the intervals speak of these two trained models only.

    Args:
        observations: From `persodpo.evaluation.observations.observe`.
        pairs: Which arm against which baseline.
        metrics: Text metrics; flags and response time are always compared.
        sampling: Resamples and their seed; None: 10,000 and 0.

    Returns:
        One row per pair, metric and reading. Columns `COLUMNS`: arm_seeds and baseline_seeds (counts), dialogues compared,
        left_out (paired but not counted in this reading), unpaired; difference (arm less baseline), its 95 % interval,
        standard error and p-value from `persodpo.evaluation.bootstrap`; p_at_floor (no resample contradicts, so that the
        p-value, and p_holm, are bounds); detectable (see `smallest_detectable`); the exact test over dialogues with its
        counts, on means over seeds where there are several; p_holm and p_exact_holm, each corrected over all rows of the
        family that have such a p-value; family (their number, for p_holm); reason (null where nothing is missing).

    Raises:
        PersodpoError: There is no such arm, a pair stands twice or has no dialogue in common, there are too few resamples
            for so many comparisons, or as `persodpo.evaluation.observations.grid`.
    """
    sampling = sampling or Resampling()
    data = grid(observations, metrics)
    if not pairs:
        raise PersodpoError("There is nothing to compare; name at least one arm and its baseline.")
    if len(set(pairs)) < len(pairs):
        raise PersodpoError("A comparison stands twice; name each pair of arms once.")
    cells = (cell for arm, baseline in pairs for cell in _cells(data, arm, baseline, metrics))
    return _corrected(table_of(cells, _numbers, COLUMNS, sampling), sampling)


def _cells(data: Grid, arm: str, baseline: str, metrics: Sequence[str]) -> Iterator[Cell]:
    """Yield the rows of a pair, and the differences by dialogue that their numbers follow from."""
    shared, unpaired = _shared(data, arm, baseline)
    seeds = data.seeds[arm], data.seeds[baseline]
    paired = seeds[0] == seeds[1]
    # Without common seeds, each of the one side meets each of the other.
    sides = (
        [number for number in range(len(seeds[0])) for _ in range(1 if paired else len(seeds[1]))],
        [*range(len(seeds[1]))] * (1 if paired else len(seeds[0])),
    )
    for metric, reading in [*data.readings(metrics), (TIME, EVERY)]:
        values, unknown = data.read(metric, reading)
        left, right = (values[name].to_numpy()[:, side] for name, side in zip((arm, baseline), sides, strict=True))
        differences = np.where(shared.to_numpy()[:, None], left - right, np.nan)
        counted = int((~np.isnan(differences)).any(axis=1).sum())
        missing, reason = unknown.loc[shared, [arm, baseline]].to_numpy(), None
        if metric == TIME:
            missing, reason = np.zeros_like(missing), _times_apart(data, arm, baseline, shared)
        row: Row = {
            "arm": arm, "baseline": baseline, "metric": metric, "reading": reading, "arm_seeds": len(seeds[0]),
            "baseline_seeds": len(seeds[1]), "seeds_paired": paired, "unpaired": unpaired, "dialogues": counted,
            "left_out": int(shared.sum()) - counted,
            "reason": reason or problem_of(differences, missing, metric, reading),
        }  # fmt: skip
        yield row, Statistic(np.asfortranarray(differences), seeds[:1] if paired else seeds)


def _shared(data: Grid, arm: str, baseline: str) -> tuple[pd.Series[bool], int]:
    """Return which dialogues two arms answered under all their seeds, and how many others either answered."""
    for name in (arm, baseline):
        if name not in data.seeds:
            raise PersodpoError(f"There is no arm '{name}' to compare; there are {', '.join(data.seeds)}.")
    if arm == baseline:
        raise PersodpoError(f"Arm '{arm}' cannot be compared with itself; name another baseline.")
    present = data.present[[arm, baseline]]
    shared = present.all(axis=1)
    if not shared.any():
        raise PersodpoError(
            f"Arms '{arm}' and '{baseline}' have no dialogue in common that all their seeds answered; evaluate both on the "
            "same held-out dialogues."
        )
    return shared, int(present.any(axis=1).sum() - shared.sum())


def _times_apart(data: Grid, arm: str, baseline: str, shared: pd.Series[bool]) -> str | None:
    """Say why the response times of two arms cannot be compared, None if they can."""
    conditions = []
    for name in (arm, baseline):
        held = data.conditions(name, shared)
        if len(held) != 1:
            return f"{name} was timed under {len(held)} conditions" if held else f"{name} was not timed"
        conditions += held
    if not all(all(condition) for condition in conditions):
        return "batch size or hardware of the times is not known"
    alike = conditions[0] == conditions[1]
    return None if alike else "the two were timed at different batch sizes or on different hardware"


def _numbers(row: Row, statistic: Statistic, spread: Spread) -> Row:
    """Return the tests of a row."""
    columns = statistic.columns
    signs = sign_test(np.nanmean(columns[~np.isnan(columns).all(axis=1)], axis=1))
    return {
        "difference": spread.estimate, "low": spread.low, "high": spread.high,
        "standard_error": spread.standard_error, "p_value": spread.p_value, "p_at_floor": spread.at_floor,
        # Where no dialogue differs, nothing tells how large a difference would be seen.
        "detectable": smallest_detectable(spread.standard_error, spread.freedom) if spread.standard_error else np.nan,
        "exact_test": MCNEMAR if row["metric"] in FLAGS and columns.shape[1] == 1 else SIGN_TEST,
        "higher": signs.higher, "lower": signs.lower, "ties": signs.ties, "p_exact": signs.p_value,
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
        table[corrected] = table[name].astype(float).groupby(family).transform(lambda p: holm(p.to_numpy()))
    return table.assign(family=sizes).astype(dict.fromkeys(("higher", "lower", "ties"), "Int64"))
