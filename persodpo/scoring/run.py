"""Responses in, scores table and thresholds out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from persodpo.completions import is_one_object
from persodpo.release.published import PublishedSet, read_set
from persodpo.scoring.compliance import count_words
from persodpo.scoring.quality import METRICS, Scale, measure_scale, rate_sql, thresholds
from persodpo.settings import MetricValues, Pairs, Scoring
from persodpo.tables import with_none


def published_metrics(files: dict[str, Path], sets: Iterable[PublishedSet], responses: pd.DataFrame) -> pd.DataFrame:
    """Read the published scores of parsed responses.

    Args:
        files: Manifest path -> local file.
        sets: Which published sets.
        responses: Responses table; gives the dialogue ids.

    Returns:
        dialogue_id, model, the four metrics and parsed, the text that was scored (None where the published parse
        failed; its metrics are then the release's own worst-case values).
    """
    frames = []
    for which in sets:
        frame = read_set(files, which)
        ids = responses.loc[responses["model"] == which.model, "dialogue_id"].to_numpy()
        frames.append(frame.assign(dialogue_id=ids, model=which.model))
    return pd.concat(frames, ignore_index=True)[["dialogue_id", "model", "parsed", *METRICS]]


def impute(responses: pd.DataFrame, metrics: pd.DataFrame, worst: MetricValues, *, unread: bool) -> pd.DataFrame:
    """Give failed responses the worst-case metric values, and unscored ones none.

    Args:
        responses: Responses table.
        metrics: dialogue_id, model, the four metrics, and parsed: the text that was scored.
        worst: Values for failed responses.
        unread: Whether failures without any text are given them too (results tables count every failure, the pool of
            pairs leaves those out).

    Returns:
        One row a response, in the order of ``responses``: dialogue_id, model, the four metrics (NaN: not scored),
        words, one_object and imputed. A response that reads well but whose text nobody scored is not scored.
    """
    frame = with_none(responses).merge(metrics, on=["dialogue_id", "model"], how="left", validate="one_to_one")
    failed = frame["outcome"] != "ok"
    imputed = failed if unread else failed & frame["response"].notna()
    scored = ~failed & (frame["parsed"] == frame["response"])
    for metric in METRICS:
        frame[metric] = np.where(imputed, getattr(worst, metric), frame[metric].where(scored))
    frame["imputed"] = imputed
    frame["words"] = [count_words(text or "") for text in frame["response"]]
    frame["one_object"] = [is_one_object(text) for text in frame["completion"]]
    return frame[["dialogue_id", "model", *METRICS, "words", "one_object", "imputed"]]


@dataclass(frozen=True)
class Ranking:
    """What `rank` gives.

    Attributes:
        scores: The pool with compliance and quality.
        scale: What quality was measured against.
        low: Threshold at or below which a response may be rejected.
        high: Threshold at or above which a response may be chosen.
    """

    scores: pd.DataFrame
    scale: Scale
    low: float
    high: float


def rank(connection: duckdb.DuckDBPyConnection, pool: pd.DataFrame, scoring: Scoring, pairs: Pairs) -> Ranking:
    """Measure the scale on the pool of responses, rate them, and find the two thresholds.

    Args:
        connection: An open DuckDB.
        pool: Metric values from `impute`.
        scoring: Weights, normalisation and compliance settings.
        pairs: The two quantiles.

    Returns:
        The rated pool, its scale and thresholds.

    Raises:
        PersodpoError: No response is scored, or a score is not finite.
    """
    connection.register("pool", pool)
    scale = measure_scale(connection, "pool", scoring)
    scores = rate(connection, pool, scale, scoring)
    connection.register("rated_pool", scores)
    low, high = thresholds(connection, "rated_pool", (pairs.low_quantile, pairs.high_quantile))
    return Ranking(scores, scale, low, high)


def rate(connection: duckdb.DuckDBPyConnection, values: pd.DataFrame, scale: Scale, settings: Scoring) -> pd.DataFrame:
    """Add compliance and quality to the rows of ``values`` (from `impute`), keeping their order."""
    connection.register("metric_values", values)
    return connection.execute(rate_sql("metric_values", scale, settings)).df()
