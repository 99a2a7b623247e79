"""Quality and thresholds: hand-computed values, and agreement with pandas and numpy to the last bit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persodpo.config import load_profile
from persodpo.errors import PersodpoError
from persodpo.method import METRICS, measure_scale, thresholds
from persodpo.pairs import WORST_CASE, impute, rank, rate, scale_of, word_counter

PROFILE = load_profile("release")
ROWS = pd.DataFrame({
    "coherence": [0.0, 0.5, 1.0, 0.9],
    "c_score": [-1.0, 0.0, 1.0, 1.0],
    "ue_score": [0.0, 2.0, 1.0, 0.0],
    "persona_distance": [0.0, 0.25, 0.5, 0.4],
    "words": [10, 40, 60, 90],
    "one_object": [False, True, True, False],
})  # fmt: skip


def rated(frame: pd.DataFrame, *overrides: str) -> pd.DataFrame:
    profile = load_profile("release", overrides)
    return rate(frame, scale_of(frame, profile.scoring), profile)


def test_hand_computed_quality():
    """L is the mean length, 50; row 1: .14*.5 + .20*.5 + .18*1 + .16*.5 + .32*.96."""
    frame = rated(ROWS)
    assert frame["compliance"].tolist() == [0.36, 0.96, 0.96, 0.36]
    expected = [
        0.1152,
        0.07 + 0.1 + 0.18 + 0.08 + 0.3072,
        0.14 + 0.2 + 0.09 + 0.16 + 0.3072,
        0.126 + 0.2 + 0.128 + 0.1152,
    ]
    assert frame["quality"].tolist() == pytest.approx(expected, abs=1e-12)
    ranking = rank(ROWS, PROFILE)
    assert ranking.scores["quality"].tolist() == frame["quality"].tolist()
    assert (ranking.low, ranking.high) == pytest.approx(np.quantile(expected, [0.4, 0.6]))
    assert ranking.scale.responses == 4


def test_mean_length_is_truncated_and_can_be_set_and_compliance_never_falls_below_zero():
    frame = pl.from_pandas(ROWS.assign(words=[10, 40, 60, 93]))
    assert measure_scale(frame).target_words == 50  # mean 50.75
    assert measure_scale(frame, target_words=110).target_words == 110
    frame = rated(ROWS.assign(words=[0, 10, 20, 400]), "scoring.target_words=50")
    assert frame["compliance"].tolist() == [0.0, 0.36, 0.64, 0.0]


def test_corrections_of_quality():
    """A3: the bonus of 0.3 comes. A1: coherence is left out and its weight shared."""
    assert rated(ROWS, "corrections=[A3]")["compliance"].tolist() == pytest.approx([0.36, 1.26, 1.26, 0.36])
    corrected = "corrections=[A1]"
    frame = rated(ROWS, corrected)
    assert frame["quality"].equals(rated(ROWS.assign(coherence=[0.3, 0.1, 0.2, 0.0]), corrected)["quality"])
    assert frame["quality"][1] == pytest.approx((0.1 + 0.18 + 0.08 + 0.3072) / 0.86)


def test_declared_ranges_do_not_depend_on_the_pool():
    declared = ("scoring.normalisation=declared", "scoring.target_words=50")
    whole, part = rated(ROWS, *declared), rated(ROWS[1:3], *declared)
    assert whole["quality"][1:3].tolist() == part["quality"].tolist()
    assert whole["quality"][2] == pytest.approx(0.14 + 0.2 + 0.09 + 0.16 * 0.75 + 0.32 * 0.96)


def test_a_metric_without_spread_counts_nothing_and_rows_without_metrics_are_not_scored():
    assert rated(ROWS.assign(c_score=1.0))["quality"][0] == pytest.approx(0.1152)
    assert rated(ROWS.assign(coherence=[None, 0.5, 1.0, 0.9]))["quality"].isna().tolist() == [True, False, False, False]


def test_nothing_to_rank_and_broken_values():
    with pytest.raises(PersodpoError, match="No response is scored"):
        rated(ROWS.assign(coherence=np.nan))
    with pytest.raises(PersodpoError, match="coherence has values that are not finite"):
        rated(ROWS.assign(coherence=[0.0, np.inf, 1.0, 1.0]))
    with pytest.raises(PersodpoError, match="target_words"):
        rated(ROWS.assign(words=0))


VALUES = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=60)


@settings(max_examples=200)
@given(VALUES, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_thresholds_are_numpys_to_the_last_bit(values, quantiles):
    frame = pl.DataFrame({"quality": [*values, None]})
    assert thresholds(frame, *quantiles) == tuple(float(np.quantile(values, q)) for q in quantiles)


@settings(max_examples=100)
@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 4, st.integers(1, 120)), min_size=2, max_size=40))
def test_quality_is_the_released_pandas_formula_to_the_last_bit(rows):
    frame = pd.DataFrame(rows, columns=[*METRICS, "words"]).assign(one_object=True)
    length, weights = int(frame["words"].mean()), PROFILE.scoring.weights
    quality = 0.0
    for metric in METRICS:
        low, high = frame[metric].min(), frame[metric].max()
        scaled = (frame[metric] - low) / (high - low) if high > low else 0.0
        quality = quality + getattr(weights, metric) * scaled
    closeness = np.maximum(0, 1 - ((frame["words"] - length) / length) ** 2).round(3)
    assert rated(frame)["quality"].tolist() == (quality + weights.compliance * closeness).tolist()


def test_imputation_by_outcome():
    responses = pd.DataFrame({
        "dialogue_id": ["a", "b", "c", "d"], "model": "m", "outcome": ["ok", "truncated", "no_json", "ok"],
        "response": ["one two", "cut", None, "unscored"], "completion": ['{"response": "one two"}', "x", "y", "z"],
    })  # fmt: skip
    metrics = responses[["dialogue_id", "model"]].assign(
        parsed=["one two", None, None, "other"], **dict.fromkeys(METRICS, 0.7)
    )
    pool = impute(responses, metrics, unread=False)
    assert pool["coherence"].fillna(-9).tolist() == [0.7, WORST_CASE["coherence"], -9, -9]
    assert pool["c_score"].fillna(-9).tolist() == [0.7, -1.0, -9, -9]
    assert pool["words"].tolist() == [2, 1, 0, 1]
    assert pool["one_object"].tolist() == [True, False, False, False]
    assert impute(responses, metrics, unread=True)["imputed"].tolist() == [False, True, True, False]


def test_a_sentence_that_is_said_again_adds_no_length_under_b1():
    texts = ["It is old. It is closed. It is closed. It is closed.", "It is old. It is closed."]
    responses = pd.DataFrame(
        {"dialogue_id": ["a", "b"], "model": "m", "outcome": "ok", "response": texts, "completion": ""}
    )
    metrics = responses[["dialogue_id", "model"]].assign(parsed=texts, **dict.fromkeys(METRICS, 0.7))
    for corrections, words in (("[]", [12, 6]), ("[B1]", [6, 6])):
        count = word_counter(load_profile("mini", [f"corrections={corrections}"]))
        assert impute(responses, metrics, unread=False, count=count)["words"].tolist() == words
