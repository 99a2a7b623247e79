"""Metric values in, quality scores and the two thresholds out, in DuckDB and out of core.

Quality is a weighted sum of the four metrics, each scaled to 0..1, and of compliance. Everything works on a relation (a
table, a view or ``read_parquet(...)``) with the columns coherence, c_score, ue_score, persona_distance, words and
one_object; a row whose metrics are null is not scored and takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.compliance import compliance_sql
from persodpo.settings import Engine, MetricValues, Scoring

METRICS = ("coherence", "c_score", "ue_score", "persona_distance")
SIGNALS = (*METRICS, "compliance")

#: Ranges by definition: UniEval gives a probability, C score -1..1, UE score 0..2, a cosine of mean vectors -1..1.
DECLARED_LOW = MetricValues(coherence=0.0, c_score=-1.0, ue_score=0.0, persona_distance=-1.0)
DECLARED_HIGH = MetricValues(coherence=1.0, c_score=1.0, ue_score=2.0, persona_distance=1.0)

_SCORED = " AND ".join(f"{metric} IS NOT NULL" for metric in METRICS)


@dataclass(frozen=True)
class Scale:
    """What quality is measured against; scores on one scale can be compared.

    Attributes:
        low: The value of each metric that becomes 0.
        high: The value of each metric that becomes 1.
        target_words: The length that compliance rewards.
        responses: How many scored responses it was measured on.
        mean_words: Their mean length.
    """

    low: MetricValues
    high: MetricValues
    target_words: int
    responses: int
    mean_words: float


def connect(engine: Engine, spill: str) -> duckdb.DuckDBPyConnection:
    """Open an in-memory DuckDB that keeps to the engine's limits and spills to the folder ``spill``."""
    connection = duckdb.connect(config={"temp_directory": spill, "autoinstall_known_extensions": "false"})
    connection.execute(f"SET memory_limit = '{int(engine.memory_gib * 1024)}MiB'")
    if engine.threads:
        connection.execute(f"SET threads = {engine.threads}")
    return connection


def one_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """Run a query whose result is one row, and close it."""
    rows: list[tuple[Any, ...]] = connection.execute(query).fetchall()
    return rows[0]


def measure_scale(connection: duckdb.DuckDBPyConnection, relation: str, settings: Scoring) -> Scale:
    """Measure the scale over all scored responses.

    Args:
        connection: An open DuckDB.
        relation: Rows to measure, see the module's docstring.
        settings: Normalisation and target length; with ``target_words`` None it is the mean length, truncated.

    Returns:
        The scale.

    Raises:
        PersodpoError: No response is scored, a score is not finite, or the mean length is under one word.
    """
    ranges = ", ".join(f"min({metric}), max({metric})" for metric in METRICS)
    row = one_row(connection, f"SELECT count(*), avg(words), {ranges} FROM {relation} WHERE {_SCORED}")
    if not row[0]:
        raise PersodpoError("No response is scored, so there is nothing to rank; run the score stage on responses.")
    responses, mean_words, *bounds = row
    broken = [metric for metric, pair in zip(METRICS, _pairwise(bounds), strict=True) if not np.isfinite(pair).all()]
    if broken:
        raise PersodpoError(f"{broken[0]} has values that are not finite; score those responses again.")
    target = settings.target_words or math.floor(mean_words)
    if target < 1:
        raise PersodpoError(f"The mean length is {mean_words:.2f} words; set scoring.target_words to 1 or more.")
    if settings.normalisation == "declared":
        return Scale(DECLARED_LOW, DECLARED_HIGH, target, responses, mean_words)
    low, high = (MetricValues(**dict(zip(METRICS, bounds[end::2], strict=True))) for end in (0, 1))
    return Scale(low, high, target, responses, mean_words)


def _pairwise(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def effective_weights(settings: Scoring) -> dict[str, float]:
    """Return the weights that act.

    With ``coherence: corrected`` the scrambled coherence column (audit A1) is left out and its weight shared by the
    others in proportion.
    """
    weights: dict[str, float] = settings.weights.model_dump()
    if settings.coherence == "corrected" and settings.source == "published":
        dropped = weights.pop("coherence")
        if dropped >= 1.0:
            raise PersodpoError("scoring.coherence: corrected leaves coherence out, but it has all the weight.")
        weights = {"coherence": 0.0} | {signal: weight / (1.0 - dropped) for signal, weight in weights.items()}
    return weights


def quality_sql(scale: Scale, settings: Scoring) -> str:
    """Return quality as a SQL expression over the metric columns and ``compliance``.

    The sum runs in the order of `SIGNALS`, so that it agrees with the released method to the last bit.

    Args:
        scale: From `measure_scale`.
        settings: The weights.

    Returns:
        The expression; in 0..1 on the scale's own responses, plus the weighted format bonus where there is one.
    """
    weights = effective_weights(settings)
    low, high = scale.low.model_dump(), scale.high.model_dump()
    terms = []
    for metric in METRICS:
        width = high[metric] - low[metric]
        scaled = f"({metric} - {low[metric]!r}::DOUBLE) / {width!r}::DOUBLE" if width else "0e0"
        terms.append(f"{weights[metric]!r}::DOUBLE * ({scaled})")
    terms.append(f"{weights['compliance']!r}::DOUBLE * compliance")
    return " + ".join(terms)


def rate_sql(relation: str, scale: Scale, settings: Scoring, keep: str = "*") -> str:
    """Return a query that adds ``compliance`` and ``quality`` to the rows of ``relation``.

    Args:
        relation: Rows to rate.
        scale: From `measure_scale`, on these or on other rows.
        settings: Weights and compliance settings.
        keep: Columns of ``relation`` to keep.

    Returns:
        The query; both columns are null where a metric is.
    """
    rated = f"SELECT *, CASE WHEN {_SCORED} THEN {compliance_sql(settings, scale.target_words)} END AS compliance"
    kept = keep if keep == "*" else f"{keep}, compliance"
    return f"SELECT {kept}, {quality_sql(scale, settings)} AS quality FROM ({rated} FROM {relation})"


def thresholds(connection: duckdb.DuckDBPyConnection, relation: str, quantiles: Sequence[float]) -> list[float]:
    """Return exact quantiles of ``quality``, interpolated linearly as numpy and pandas do.

    Args:
        connection: An open DuckDB.
        relation: Rows with a ``quality`` column; nulls take no part.
        quantiles: Fractions in 0..1.

    Returns:
        One threshold a quantile.

    Raises:
        PersodpoError: No row has a quality.
    """
    count = one_row(connection, f"SELECT count(quality) FROM {relation}")[0]
    if not count:
        raise PersodpoError("No response has a quality score, so there are no thresholds; run the score stage.")
    positions = [quantile * (count - 1) for quantile in quantiles]
    ranks = sorted({min(rank, count - 1) for p in positions for rank in (math.floor(p), math.floor(p) + 1)})
    middles = ", ".join(repr((rank + 0.5) / count) for rank in ranks)
    found = one_row(connection, f"SELECT quantile_disc(quality, [{middles}]) FROM {relation}")[0]
    value = dict(zip(ranks, found, strict=True))
    return [_between(value, position, count) for position in positions]


def _between(value: dict[int, float], position: float, count: int) -> float:
    """Interpolate between the two order statistics around ``position``."""
    below = math.floor(position)
    pair = [value[below], value[min(below + 1, count - 1)]]
    return float(np.quantile(pair, position - below))
