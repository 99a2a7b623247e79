"""Responses and scores in, one table of observations out, and the same by dialogue, arm and seed.

An observation is what one arm, trained under one seed, made of one dialogue. Everything joins on ``dialogue_id``; the order
of rows never matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from persodpo.errors import PersodpoError
from persodpo.method import SIGNALS

Floats = NDArray[np.float64]
#: Batch size and hardware of a response time; 0 and an empty text where they are not known.
Condition = tuple[int, str]

#: Metrics of a response's text, all better when higher. ROUGE-L against the reference is in no quality score.
TEXT_METRICS = ("quality", *SIGNALS, "rouge_l")
#: Flags of every response, failed or not. ``grounded`` is the judgement of `persodpo.miniature.judge`.
FLAGS = ("grounded", "repeats", "failure_ratio")
TIME = "response_time"

#: The two ways to count failures in a text metric, and the one way of what needs no text.
IMPUTED, SUCCESSES, EVERY = "failures imputed", "successes alone", "all responses"

_KEY = ["arm", "seed", "dialogue_id"]
_JUDGED = ["grounded", "repeats", "rouge_l"]
COLUMNS = (*_KEY, "failed", "grounded", "repeats", *TEXT_METRICS, TIME, "batch_size", "hardware")


def observe(
    responses: pd.DataFrame,
    scores: pd.DataFrame,
    arms: pd.DataFrame | None = None,
    judged: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Join responses and scores, and name the arm and the seed of each.

    Args:
        responses: Responses table.
        scores: Scores table of the same responses, failures with the values that stand for them.
        arms: Columns model, arm and seed (whole, 0 or more): which arm and seed each model of the two tables is; other
            models are left out. None: each model is an arm of one seed, 0.
        judged: Judgements of the same responses, failures with a ROUGE-L of 0; None: there are none.

    Returns:
        One row per response, columns as in `COLUMNS`: failed (anything but outcome ``ok``), the metrics (NaN: not
        scored), response_time in seconds with its batch_size and hardware.

    Raises:
        PersodpoError: A response has no scores, or a model of ``arms`` has no responses.
    """
    key = ["dialogue_id", "model"]
    frame = responses.merge(scores, on=key, how="left", validate="one_to_one", indicator=True)
    for lost in frame[frame["_merge"] != "both"].to_dict("records"):
        raise PersodpoError(
            f"The response of {lost['model']} to dialogue {lost['dialogue_id']} has no row in the scores; run the score "
            "stage on these responses."
        )
    if arms is None:
        arms = pd.DataFrame({"model": frame["model"].unique()}).assign(arm=lambda table: table["model"], seed=0)
    if silent := set(arms["model"]).difference(frame["model"]):
        raise PersodpoError(f"Model {min(silent)} has no responses to evaluate; generate them, or leave it out.")
    frame = frame.merge(arms[["model", "arm", "seed"]], on="model", validate="many_to_one")
    if judged is not None:
        frame = frame.merge(judged[[*key, *_JUDGED]], on=key, how="left")
    judgements = {name: frame[name].astype(float) if name in frame else np.nan for name in _JUDGED}
    return frame.assign(**judgements, failed=frame["outcome"] != "ok")[list(COLUMNS)].reset_index(drop=True)


@dataclass(frozen=True)
class Grid:
    """Observations by dialogue: tables with a row per dialogue and a column per arm and seed, both sorted.

    Attributes:
        seeds: The seeds of each arm, ascending.
        present: Whether there is an observation.
        failed: Whether it is a failure.
        metrics: Each metric, NaN where it is not known.
        condition: What each response was timed under; NaN where its time is not known.
    """

    seeds: Mapping[str, tuple[int, ...]]
    present: pd.DataFrame
    failed: pd.DataFrame
    metrics: Mapping[str, pd.DataFrame]
    condition: pd.DataFrame

    def readings(self, metrics: Sequence[str]) -> list[tuple[str, str]]:
        """Return metrics with their readings: flags that are known of any response, then text metrics in both readings."""
        flags = [flag for flag in FLAGS if self.metrics[flag].notna().any(axis=None)]
        return [*((flag, EVERY) for flag in flags), *itertools.product(metrics, (IMPUTED, SUCCESSES))]

    def read(self, metric: str, reading: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return a metric's values, NaN where they do not count, and where one that should count is not known."""
        counted = self.present & ~self.failed if reading == SUCCESSES else self.present
        values = self.metrics[metric].where(counted)
        return values, counted & values.isna()

    def conditions(self, arm: str, dialogues: pd.Series[bool] | None = None) -> list[Condition]:
        """Return what an arm was timed under, in order, in all dialogues or in some."""
        table = self.condition[arm] if dialogues is None else self.condition.loc[dialogues, arm]
        return sorted({one for one in table.to_numpy().ravel() if isinstance(one, tuple)})


def grid(observations: pd.DataFrame, metrics: Sequence[str]) -> Grid:
    """Arrange observations by dialogue.

    Args:
        observations: From `observe`.
        metrics: Text metrics to arrange; flags and response times always are.

    Raises:
        PersodpoError: The table is empty, or a value is not finite.
    """
    if observations.empty:
        raise PersodpoError("There is nothing to evaluate; generate and score held-out responses first.")
    frame = observations.reset_index(drop=True)
    sizes, machines = frame["batch_size"].fillna(0).astype(int), frame["hardware"].astype(object).fillna("")
    conditions = pd.Series(list(zip(sizes, machines, strict=True)), dtype=object)
    frame = frame.assign(condition=conditions.where(frame[TIME] >= 0)).set_index(_KEY)

    def by_dialogue(column: pd.Series) -> pd.DataFrame:
        return column.unstack(["arm", "seed"]).sort_index().sort_index(axis=1)  # noqa: PD010 - nothing is aggregated

    values = {
        name: by_dialogue(frame[name].astype(float)) for name in (*metrics, TIME, "grounded", "repeats", "failed")
    }
    for name, table in values.items():
        if np.isinf(table.to_numpy()).any():
            raise PersodpoError(f"{name} has values that are not finite; score those responses again.")
    failed = values.pop("failed")
    seeds: dict[str, tuple[int, ...]] = {}
    for arm, seed in sorted(set(zip(observations["arm"], observations["seed"], strict=True))):
        seeds[arm] = (*seeds.get(arm, ()), int(seed))
    values["failure_ratio"] = failed
    return Grid(seeds, failed.notna(), failed == 1, values, by_dialogue(frame["condition"]))


def of_arm(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Return an arm's columns of a table of `Grid`, by seed."""
    return table.loc[:, [arm]].droplevel("arm", axis=1)


def problem_of(values: Floats, unknown: NDArray[np.bool_], metric: str, reading: str) -> str | None:
    """Say why a mean cannot be derived, None if it can.

    Args:
        values: A column per seed or pair of seeds, NaN where a dialogue does not count.
        unknown: Where a value that should count is not known.
        metric: The metric.
        reading: One of the readings.
    """
    if unknown.any():
        # Half a column is no result.
        return f"no score in {int(unknown.any(axis=1).sum()):,} of {len(unknown):,} dialogues"
    empty = int(np.isnan(values).all(axis=0).sum())
    if empty == values.shape[1]:
        return "no response time was measured" if metric == TIME else f"nothing counts ({reading})"
    return f"nothing counts ({reading}) in {empty} of {values.shape[1]} seeds" if empty else None
