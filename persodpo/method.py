"""The method on one screen: compliance, quality, thresholds, simple and perso pairs, on polars frames.

Metric values of responses come in, pairs go out. Every function takes an eager frame (a notebook, a slider) or a lazy one
(a Parquet file that memory does not hold) and gives back its kind. A row is a response; its columns are dialogue_id, the
four metrics, words, one_object, and whatever else its pairs are to carry. A row with a null metric is not scored: it takes
no part. Numbers agree with the released code to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl

from persodpo.errors import PersodpoError

#: The metrics, and their ranges by definition: UniEval gives a probability, C score -1..1, UE score 0..2, a cosine -1..1.
DECLARED = {"coherence": (0.0, 1.0), "c_score": (-1.0, 1.0), "ue_score": (0.0, 2.0), "persona_distance": (-1.0, 1.0)}
METRICS = tuple(DECLARED)
SIGNALS = (*METRICS, "compliance")

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)


@dataclass(frozen=True)
class Scale:
    """What quality is measured against; scores on one scale can be compared.

    Attributes:
        ranges: The values of each metric that become 0 and 1.
        target_words: The length that compliance rewards, L.
        responses: How many scored responses it was measured on.
        mean_words: Their mean length.
    """

    ranges: Mapping[str, tuple[float, float]]
    target_words: int
    responses: int
    mean_words: float


def is_scored() -> pl.Expr:
    """Tell which rows have all four metrics."""
    return pl.all_horizontal(pl.col(METRICS).is_not_null())


def measure_scale(frame: Frame, *, target_words: int | None = None, declared: bool = False) -> Scale:
    """Measure the scale over all scored responses.

    Args:
        frame: The responses.
        target_words: L; None takes the mean length, truncated.
        declared: Take each metric's range by definition, in place of the observed one.

    Raises:
        PersodpoError: No response is scored, a metric is not finite, or L is under one word.
    """
    columns = [pl.len(), pl.col("words").mean().alias("mean_words")]
    for metric in METRICS:
        column = pl.col(metric)
        finite = column.is_finite().all()
        columns += [column.min().alias(f"{metric}_low"), column.max().alias(f"{metric}_high"), finite.alias(metric)]
    (row,) = frame.lazy().filter(is_scored()).select(columns).collect(engine="streaming").rows(named=True)
    if not row["len"]:
        raise PersodpoError("No response is scored, so there is nothing to rank; run the score stage on responses.")
    for metric in METRICS:
        if not row[metric]:
            raise PersodpoError(f"{metric} has values that are not finite; score those responses again.")
    target = target_words or math.floor(row["mean_words"])
    if target < 1:
        raise PersodpoError(f"The mean length is {row['mean_words']:.2f} words; set scoring.target_words to 1 or more.")
    observed = {metric: (row[f"{metric}_low"], row[f"{metric}_high"]) for metric in METRICS}
    return Scale(DECLARED if declared else observed, target, row["len"], row["mean_words"])


def _divided(value: pl.Expr, divisor: float) -> pl.Expr:
    """Divide by a column, for polars takes a constant's inverse as a factor: another number in the last bit."""
    return value / (value * 0 + divisor)


def compliance(target_words: int, bonus: float = 0.0) -> pl.Expr:
    """Return ``max(0, 1 - ((words - L) / L)^2)``, rounded half to even to three decimals; 0 to 1 + bonus.

    Args:
        target_words: L.
        bonus: Added where the completion is exactly one JSON object.
    """
    away = _divided(pl.col("words") - target_words, target_words)
    closeness = (1 - away * away).clip(lower_bound=0)
    if bonus:
        closeness = closeness + pl.when("one_object").then(bonus).otherwise(0.0)
    return closeness.round(3, mode="half_to_even")


def quality(scale: Scale, weights: Mapping[str, float]) -> pl.Expr:
    """Return the weighted sum of the metrics, each scaled to 0..1, and of compliance.

    Args:
        scale: What 0 and 1 are.
        weights: One weight for each of `SIGNALS`.
    """
    total = pl.lit(0.0)
    for metric in METRICS:
        low, high = scale.ranges[metric]
        scaled = _divided(pl.col(metric) - low, high - low) if high > low else pl.lit(0.0)
        total = total + weights[metric] * scaled
    return total + weights["compliance"] * pl.col("compliance")


def rate(frame: Frame, scale: Scale, weights: Mapping[str, float], bonus: float = 0.0) -> Frame:
    """Add the columns compliance and quality; both are null where a response is not scored."""
    rated = frame.with_columns(pl.when(is_scored()).then(compliance(scale.target_words, bonus)).alias("compliance"))
    return rated.with_columns(pl.when(is_scored()).then(quality(scale, weights)).alias("quality"))


def thresholds(frame: Frame, low: float, high: float) -> tuple[float, float]:
    """Return two quantiles of quality over all scored responses, interpolated linearly.

    Raises:
        PersodpoError: No response has a quality.
    """
    values = frame.lazy().select("quality").drop_nulls().collect(engine="streaming")["quality"].to_numpy()
    if not len(values):
        raise PersodpoError("No response has a quality score, so there are no thresholds; run the score stage.")
    quantiles = np.quantile(values, [low, high])
    return float(quantiles[0]), float(quantiles[1])


def perso_pairs(frame: Frame, low: float, high: float) -> Frame:
    """Set every response with quality at or above ``high`` against every one at or below ``low`` of its dialogue.

    Returns:
        dialogue_id, and every other column twice, ending in ``_chosen`` and ``_rejected``. Where both thresholds are equal,
        a response stands against none of the same quality. If there is a column text, the two texts differ; if there is a
        column repeats, it is false of every chosen response.
    """
    chosen, rejected = frame.filter(pl.col("quality") >= high), frame.filter(pl.col("quality") <= low)
    return _crossed(chosen, rejected).filter(pl.col("quality_chosen") > pl.col("quality_rejected"))


def simple_pairs(frame: Frame) -> Frame:
    """Set every parsed completion (outcome ``ok``) against every failed one of its dialogue; see `perso_pairs`."""
    parsed = pl.col("outcome") == "ok"
    return _crossed(frame.filter(parsed), frame.filter(~parsed))


def _crossed(chosen: Frame, rejected: Frame) -> Frame:
    """Join two parts of a frame by dialogue."""
    others = pl.exclude("dialogue_id").name
    pairs = chosen.select("dialogue_id", others.suffix("_chosen")).join(
        rejected.select("dialogue_id", others.suffix("_rejected")), on="dialogue_id"
    )
    names = pairs.collect_schema().names()
    if "text_chosen" in names:
        pairs = pairs.filter(pl.col("text_chosen") != pl.col("text_rejected"))
    return pairs.filter(~pl.col("repeats_chosen")) if "repeats_chosen" in names else pairs
