"""Evaluation responses and scores in, results table out: one row a model and metric."""

from __future__ import annotations

import numpy as np
import pandas as pd

from persodpo.method import METRICS

#: Rows of the results table, in the order of the published columns.
RESULT_METRICS = ("response_time", *METRICS, "failure_ratio")


def summarise(responses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise each model's responses, failures included with their worst-case values.

    Args:
        responses: Responses table.
        scores: Scores table of the same responses; joined on dialogue_id and model.

    Returns:
        Columns model, metric (one of `RESULT_METRICS`), responses (count), mean and std (population). A metric that is
        not there for every response of a model has a null mean: half a column is no result.
    """
    frame = responses.merge(scores, on=["dialogue_id", "model"], validate="one_to_one")
    frame["failure_ratio"] = (frame["outcome"] != "ok").astype(float)
    rows = []
    for model, group in frame.groupby("model", sort=False):
        for metric in RESULT_METRICS:
            values = group[metric].to_numpy(dtype=float)
            whole = bool(np.isfinite(values).all())
            mean, std = (values.mean(), values.std()) if whole else (None, None)
            rows.append({"model": model, "metric": metric, "responses": len(group), "mean": mean, "std": std})
    return pd.DataFrame(rows)
