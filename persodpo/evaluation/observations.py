"""Responses and scores of one or several seeds in, one table of observations out, and as arrays by dialogue.

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
Bools = NDArray[np.bool_]
#: Batch size and hardware of a response time.
Condition = tuple[int | None, str | None]

#: Metrics of a response's text, all better when higher. ROUGE-L against the reference is in no quality score.
TEXT_METRICS = ("quality", *SIGNALS, "rouge_l")
#: Flags of every response, failed or not. ``grounded`` is the judgement of `persodpo.miniature.judge`.
FLAGS = ("grounded", "repeats", "failure_ratio")

#: The two ways to count failures in a text metric, and the one way of what needs no text.
IMPUTED, SUCCESSES, EVERY = "failures imputed", "successes alone", "all responses"

_KEY = ["arm", "seed", "dialogue_id"]
COLUMNS = (*_KEY, "failed", "grounded", "repeats", *TEXT_METRICS, "response_time", "batch_size", "hardware")


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
        One row a response, columns as in `COLUMNS`: failed (anything but outcome ``ok``), the metrics (NaN: not
        scored), response_time in seconds with its batch_size and hardware.

    Raises:
        PersodpoError: A response has no scores, or a model of ``arms`` has no responses.
    """
    frame = responses.merge(scores, on=["dialogue_id", "model"], how="left", validate="one_to_one", indicator=True)
    if not frame["_merge"].eq("both").all():
        first = frame[frame["_merge"] != "both"].iloc[0]
        raise PersodpoError(
            f"The response of {first['model']} to dialogue {first['dialogue_id']} has no row in the scores; run the score "
            "stage on these responses."
        )
    if arms is None:
        frame = frame.assign(arm=frame["model"], seed=0)
    else:
        silent = set(arms["model"]).difference(frame["model"])
        if silent:
            raise PersodpoError(f"Model {min(silent)} has no responses to evaluate; generate them, or leave it out.")
        frame = frame.merge(arms[["model", "arm", "seed"]], on="model", validate="many_to_one")
    flags = ["grounded", "repeats", "rouge_l"]
    if judged is not None:
        frame = frame.merge(judged[["dialogue_id", "model", *flags]], on=["dialogue_id", "model"], how="left")
    for flag in flags:
        frame[flag] = frame[flag].astype(float) if flag in frame else np.nan
    frame["failed"] = frame["outcome"] != "ok"
    return frame[list(COLUMNS)].reset_index(drop=True)


@dataclass(frozen=True)
class Grid:
    """Observations as arrays: a row a dialogue, a column an arm and seed, both sorted.

    Attributes:
        seeds: The seeds of each arm, ascending.
        place: The column of each arm and seed.
        present: Whether there is an observation.
        failed: Whether it is a failure.
        values: Each metric, NaN where it is not known.
        conditions: The batch size and hardware of response times, None where not known, in order.
        condition: Which of them each response was timed under; -1 where its time is not known.
    """

    seeds: Mapping[str, tuple[int, ...]]
    place: Mapping[tuple[str, int], int]
    present: Bools
    failed: Bools
    values: Mapping[str, Floats]
    conditions: tuple[Condition, ...]
    condition: NDArray[np.int64]

    def readings(self, metrics: Sequence[str]) -> list[tuple[str, str]]:
        """Return metrics with their readings: flags that are known of any response, then text metrics in both readings."""
        flags = [flag for flag in FLAGS if not np.isnan(self.values[flag]).all()]
        return [*((flag, EVERY) for flag in flags), *itertools.product(metrics, (IMPUTED, SUCCESSES))]

    def columns(self, arm: str) -> list[int]:
        """Return the columns of an arm, by ascending seed."""
        return [self.place[arm, seed] for seed in self.seeds[arm]]

    def read(self, metric: str, reading: str) -> tuple[Floats, Bools]:
        """Return a metric's values, NaN where they do not count, and where one that should count is not known."""
        values = self.values[metric]
        counted = self.present & ~self.failed if reading == SUCCESSES else self.present
        return np.where(counted, values, np.nan), counted & np.isnan(values)


def grid(observations: pd.DataFrame, metrics: Sequence[str]) -> Grid:
    """Arrange observations by dialogue.

    Args:
        observations: From `observe`.
        metrics: Text metrics to arrange; failures and response times always are.

    Returns:
        The arrays.

    Raises:
        PersodpoError: The table is empty, lacks a column, holds a response twice or without a name, or a value that is not
            finite.
    """
    wanted = (*_KEY, "failed", "grounded", "repeats", *metrics, "response_time", "batch_size", "hardware")
    missing = [column for column in wanted if column not in observations.columns]
    if missing:
        raise PersodpoError(f"The observations lack {', '.join(missing)}; make them with `observe`.")
    if observations.empty:
        raise PersodpoError("There is nothing to evaluate; generate and score held-out responses first.")
    if observations[_KEY].isna().any(axis=None) or observations["seed"].lt(0).any():
        raise PersodpoError("An observation lacks its arm, seed (0 or more) or dialogue_id; make them with `observe`.")
    twice = observations.duplicated(_KEY)
    if twice.any():
        first = observations[twice].iloc[0]
        raise PersodpoError(
            f"Arm {first['arm']}, seed {first['seed']}, answers dialogue {first['dialogue_id']} twice; keep one of them."
        )
    rows, order = pd.factorize(observations["dialogue_id"], sort=True)
    names = [(str(arm), int(seed)) for arm, seed in zip(observations["arm"], observations["seed"], strict=True)]
    keys = sorted(set(names))
    place = {key: number for number, key in enumerate(keys)}
    spots = np.array([place[name] for name in names])
    seeds = {arm: tuple(seed for other, seed in keys if other == arm) for arm, _ in keys}

    def spread(column: str) -> Floats:
        found = np.full((len(order), len(keys)), np.nan)
        found[rows, spots] = observations[column].to_numpy(dtype=float, na_value=np.nan)
        if np.isinf(found).any():
            raise PersodpoError(f"{column} has values that are not finite; score those responses again.")
        return found

    failed = spread("failed")
    values = {name: spread(name) for name in (*metrics, "response_time", "grounded", "repeats")} | {
        "failure_ratio": failed
    }
    names_of, codes = _conditions(observations)
    condition = np.full(failed.shape, -1)
    condition[rows, spots] = codes
    return Grid(seeds, place, ~np.isnan(failed), failed == 1, values, names_of, condition)


def _conditions(observations: pd.DataFrame) -> tuple[tuple[Condition, ...], NDArray[np.int64]]:
    """Number the conditions of response times."""
    found: list[Condition | None] = [
        (None if pd.isna(size) else int(size), None if pd.isna(machine) else str(machine)) if seconds >= 0 else None
        for seconds, size, machine in zip(
            observations["response_time"], observations["batch_size"], observations["hardware"], strict=True
        )
    ]
    distinct = sorted({one for one in found if one}, key=lambda one: (one[0] or 0, one[1] or ""))
    number = {one: place for place, one in enumerate(distinct)}
    return tuple(distinct), np.array([-1 if one is None else number[one] for one in found])
