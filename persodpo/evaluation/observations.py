"""Responses and scores in; one table of observations, and the same by dialogue, out.

An observation is what one arm, trained under one seed, made of one dialogue. Everything joins on ``dialogue_id``; the order
of rows never matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.evaluation.statistics import Floats
from persodpo.method import SIGNALS

#: Metrics of a response's text, all better when higher. ROUGE-L against the reference is in no quality score.
TEXT_METRICS = ("quality", *SIGNALS, "rouge_l")
#: Flags of every response, failed or not. ``grounded`` is the judgement of `persodpo.miniature.judge`.
FLAGS = ("grounded", "repeats", "failure_ratio")
TIME = "response_time"

#: The two ways to count failures in a text metric, and the one way of what needs no text.
IMPUTED, SUCCESSES, EVERY = "failures imputed", "successes alone", "all responses"

_JUDGED = ["grounded", "repeats", "rouge_l"]
COLUMNS = ("arm", "seed", "dialogue_id", *FLAGS, *TEXT_METRICS, TIME, "batch_size", "hardware")


def observe(
    responses: pd.DataFrame,
    scores: pd.DataFrame,
    arms: pd.DataFrame | None = None,
    judged: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Join responses and scores, and name the arm and the seed of each.

    Args:
        responses: Responses table.
        scores: Scores table of the same responses.
        arms: Columns model, arm and seed (whole, 0 or more): which arm and seed each model is; other models are left out.
            None: each model is an arm of one seed, 0.
        judged: Judgements of the same responses, if there are any.

    Returns:
        One row per response, columns as in `COLUMNS`: flags are 0 or 1, failure_ratio 1 for anything but outcome ``ok``; a
        metric that is not known is NaN; response_time in seconds with its batch_size and hardware.

    Raises:
        PersodpoError: A response has no scores, or a model of ``arms`` has no responses.
    """
    key = ["dialogue_id", "model"]
    frame = responses.merge(scores, on=key, how="left", validate="one_to_one", indicator=True)
    for row in frame[frame["_merge"] != "both"].to_dict("records"):
        raise PersodpoError(
            f"The response of {row['model']} to dialogue {row['dialogue_id']} has no row in the scores; run the score "
            "stage on these responses."
        )
    if arms is None:
        arms = pd.DataFrame({"model": frame["model"].unique()}).assign(arm=lambda table: table["model"], seed=0)
    if silent := set(arms["model"]).difference(frame["model"]):
        raise PersodpoError(f"Model {min(silent)} has no responses to evaluate; generate them, or leave it out.")
    frame = frame.merge(arms[["model", "arm", "seed"]], on="model", validate="many_to_one")
    if judged is not None:
        frame = frame.merge(judged[[*key, *_JUDGED]], on=key, how="left")
    frame["failure_ratio"] = frame["outcome"] != "ok"
    metrics = [*FLAGS, *TEXT_METRICS, TIME]
    numbers = {name: frame[name].astype(float) if name in frame else np.nan for name in metrics}
    return frame.assign(**numbers)[list(COLUMNS)].reset_index(drop=True)


def by_dialogue(observations: pd.DataFrame) -> pd.DataFrame:
    """Give observations a row per dialogue and a column per metric, arm and seed, all sorted; NaN where there is nothing."""
    if observations.empty:
        raise PersodpoError("There is nothing to evaluate; generate and score held-out responses first.")
    table = observations.drop(columns=["batch_size", "hardware"]).pivot(index="dialogue_id", columns=["arm", "seed"])  # noqa: PD010
    infinite = table.isin([np.inf, -np.inf]).any()
    if infinite.any():
        first = infinite[infinite].index.get_level_values(0)[0]
        raise PersodpoError(f"{first} has values that are not finite; score those responses again.")
    return table.sort_index().sort_index(axis=1)


def readings(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield the metrics of `by_dialogue` that are known of any response: flags, then text metrics in both readings."""
    for metric in (*FLAGS, *TEXT_METRICS):
        if table[[metric]].notna().any(axis=None):
            yield from ((metric, reading) for reading in ([EVERY] if metric in FLAGS else [IMPUTED, SUCCESSES]))


def read(table: pd.DataFrame, arm: str, metric: str, reading: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return an arm's values of a metric by seed, NaN where they do not count, and where one that should is not known."""
    failed, values = (cast(pd.DataFrame, table[name, arm]) for name in ("failure_ratio", metric))
    used = failed == 0 if reading == SUCCESSES else failed.notna()
    values = values.where(used)
    return values, used & values.isna()


def problem_of(values: Floats, unknown: pd.DataFrame, metric: str, reading: str) -> str | None:
    """Say why no mean can be derived of a column per seed (NaN: does not count), None if one can.

    Where a value that should count is unknown, there is none: half a column is no result.
    """
    incomplete, empty = int(unknown.any(axis=1).sum()), int(np.isnan(values).all(axis=0).sum())
    if incomplete and metric != TIME:
        return f"no score in {incomplete:,} of {len(unknown):,} dialogues"
    if empty == values.shape[1]:
        return "no response time was measured" if metric == TIME else f"nothing counts ({reading})"
    return f"nothing counts ({reading}) in {empty} of {values.shape[1]} seeds" if empty else None
