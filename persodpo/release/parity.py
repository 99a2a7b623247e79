"""Published numbers in, each beside ours with a verdict out.

``reproduced``: our number, computed from the published files, is the published one at its printed precision (a mean loss:
at the four decimals of the log it is computed from). Rows of a training log test the log against itself.
``differs``: the files lead to another number. ``not derivable``: nothing that was published leads to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from persodpo.release import published
from persodpo.release.published import METRICS, SETS, PublishedSet, read_set

REPRODUCED, DIFFERS, NOT_DERIVABLE = "reproduced", "differs", "not derivable"

#: Row of the results table -> label of the published set it must come from; None where nothing was published for it.
RESULT_ROWS: dict[str, str | None] = {
    "Qwen2-7B-benchmark": "Qwen2-7B-benchmark",
    "Qwen2-5B-avg-1855-complete": None,
    "Qwen2-5B-length_prior-1855-complete": None,
    "Qwen2-5B-Instruct-train": "Qwen2-5B-Instruct-train",
    "Qwen2-5B-Instruct-length_prior": "Qwen2-5B-Instruct-length_prior",
    "Qwen2-5B-Instruct-simple 12452": "Qwen2-5B-Instruct-simple",
    "Qwen2-5B-Instruct-perso old": None,
    "Qwen2-5B-Instruct-perso check-2304": None,
    "Qwen2-5B-Instruct-perso": "Qwen2-5B-Instruct-perso",
}

#: The bars of Figure 2a -> label of the set they come from.
FIGURE_2A = {
    "Benchmark (Qwen2-7B)": "Qwen2-7B-benchmark",
    "PersoDPO (Qwen2-0.5B, length_prior run)": "Qwen2-5B-Instruct-length_prior",
}

#: Pairs of one optimiser step in both saved runs: per-device batch 4, accumulation 4.
STEP_PAIRS = 16


class Row(NamedTuple):
    """One line of the parity table; the columns of ``audit/parity``."""

    group: str
    quantity: str
    published: str
    ours: str
    verdict: str
    source: str


def _row(group: str, quantity: str, theirs: object, ours: object, source: str, *, same: bool | None = None) -> Row:
    """Set a published number beside ours; ``ours`` None says that nothing leads to it."""
    if ours is None:
        return Row(group, quantity, str(theirs), "-", NOT_DERIVABLE, source)
    equal = theirs == ours if same is None else same
    return Row(group, quantity, str(theirs), str(ours), REPRODUCED if equal else DIFFERS, source)


def parity_table(files: dict[str, Path], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Set every published number beside ours.

    Args:
        files: Manifest path -> published file.
        tables: dialogues, responses, scores, thresholds, pairs/simple and pairs/perso, made ``as_released``.

    Returns:
        The columns of `Row`.
    """
    counts = published.counts()
    sets = {which.label: which for which in SETS}
    rows = [
        *_preparation(counts["preparation"], tables["dialogues"]),
        *_responses(counts["responses"], tables["responses"]),
        *_quality(counts["quality"], tables),
        *_pairs(counts["pairs"], tables),
        *_training(counts["training"], tables),
        *_results_table(files, sets),
        *_figure_2a(counts["figure_2a"], files, sets),
    ]
    return pd.DataFrame(rows, columns=list(Row._fields))


def _preparation(counts: dict[str, Any], dialogues: pd.DataFrame) -> list[Row]:
    train = dialogues[dialogues["split"] == "train"]
    longest = max(len(reference.split()) for reference in train["reference"])
    group, source = "preparation", "dialogues"
    limit = counts["max_response_words"]
    return [
        _row(group, "train dialogues before the filter", counts["train_dialogues_before_filter"], None, "FoCus JSON"),
        _row(
            group, "longest reference before the filter", counts["max_response_words_before_filter"], None, "FoCus JSON"
        ),
        _row(
            group, "word limit of train references", f"<= {limit}", f"longest {longest}", source, same=longest <= limit
        ),
        _row(group, "train dialogues", counts["train_sample"], len(train), source),
        _row(group, "valid dialogues", counts["valid_dialogues"], int((dialogues["split"] == "valid").sum()), source),
    ]


def _responses(counts: dict[str, Any], responses: pd.DataFrame) -> list[Row]:
    parsed = responses["outcome"] == "ok"
    recovered = ~parsed & responses["response"].notna()
    group, source = "responses", "responses"
    by_model = responses[parsed].groupby("model").size()
    return [
        _row(group, "models", counts["models"], responses["model"].nunique(), source),
        _row(group, "responses", counts["total"], len(responses), source),
        _row(group, "unusable", counts["unusable"], int((~parsed & ~recovered).sum()), source),
        _row(group, "parsed", counts["parsed"], int(parsed.sum()), source),
        _row(group, "recovered failures", counts["recovered_failures"], int(recovered.sum()), source),
        *(
            _row(
                group, f"parsed, {published.true_name(label)}", count, int(by_model[published.true_name(label)]), source
            )
            for label, count in counts["parsed_per_model"].items()
        ),
    ]


def _quality(counts: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Row]:
    value = tables["thresholds"].set_index("name")["value"]
    quality = tables["scores"]["quality"].dropna()
    low, high = float(value["low"]), float(value["high"])
    group, source = "quality", "scores"
    return [
        _row(group, "mean words, truncated", counts["mean_words_truncated"], int(value["target_words"]), source),
        _row(group, "low threshold", repr(counts["thresholds"][0]), repr(low), source),
        _row(group, "high threshold", repr(counts["thresholds"][1]), repr(high), source),
        _row(group, "responses at or above high", counts["at_or_above_high"], int((quality >= high).sum()), source),
        _row(group, "responses at or below low", counts["at_or_below_low"], int((quality <= low).sum()), source),
    ]


def _pairs(counts: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Row]:
    perso = tables["pairs/perso"]
    sides = {
        side: perso[["dialogue_id", f"{side}_model"]].set_axis(["d", "m"], axis=1) for side in ("chosen", "rejected")
    }
    distinct = pd.concat(sides.values()).drop_duplicates()
    group, source = "pairs", "pairs/perso"
    return [
        _row(group, "simple pairs", counts["simple"], len(tables["pairs/simple"]), "pairs/simple"),
        _row(group, "perso pairs", counts["perso"], len(perso), source),
        _row(group, "prompts of perso pairs", counts["perso_prompts"], perso["dialogue_id"].nunique(), source),
        _row(group, "distinct sequences of perso pairs", counts["perso_distinct_sequences"], len(distinct), source),
    ]


def _training(counts: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Row]:
    losses, rows = published.training_losses(), []
    for run in ("simple", "perso"):
        log, pairs = counts[run], len(tables[f"pairs/{run}"])
        steps = math.ceil(log["pairs"] / STEP_PAIRS) * log["epochs"]
        speed = round(log["pairs"] * log["epochs"] / log["runtime_s"], 3)
        step_losses = losses[losses["run"] == run]
        every = int(step_losses["step"].min())
        # The log keeps four decimals of means over `every` steps and drops the steps after the last of them.
        mean = float(step_losses["loss"].sum() * every / log["optimizer_steps"])
        close = math.isclose(mean, log["mean_loss"], abs_tol=5e-5)
        group = f"training log, {run}"
        rows += [
            _row(group, "pairs trained on", log["pairs"], pairs, f"pairs/{run}"),
            _row(group, "optimiser steps", log["optimizer_steps"], steps, "from the logged pairs, 16 a step"),
            _row(group, "samples a second", log["samples_per_second"], speed, "from the logged pairs and run time"),
            _row(group, "mean loss", log["mean_loss"], round(mean, 6), "from the logged losses", same=close),
        ]
    return rows


def set_statistics(files: dict[str, Path], which: PublishedSet) -> dict[str, tuple[float, float]]:
    """Return mean and population standard deviation of each column of the results table for one published set.

    Args:
        files: Manifest path -> published file.
        which: A set with a metric file.

    Returns:
        Column of the results table -> (mean, standard deviation); failures count with the file's worst-case values.
    """
    frame = read_set(files, which)
    columns = {"response_time": frame["response_time"]} | {name: frame[ours] for name, ours in METRICS.items()}
    columns["Failure Ratio"] = frame["parsed"].isna().astype(float)
    return {name: (float(np.mean(values)), float(np.std(values))) for name, values in columns.items()}


def _results_table(files: dict[str, Path], sets: dict[str, PublishedSet]) -> list[Row]:
    rows = []
    for record in published.results_table().to_dict("records"):
        label = str(record.pop("Model"))
        origin = RESULT_ROWS[label]
        statistics = set_statistics(files, sets[origin]) if origin else {}
        source = str(sets[origin].metrics) if origin else "no published file"
        for column, cell in record.items():
            quantity, ours = f"{label}: {column}", _cell(str(column), statistics)
            same = ours is not None and _numbers(str(cell)) == _numbers(ours)
            rows.append(_row("results table", quantity, cell, ours, source, same=same))
    return rows


def _cell(column: str, statistics: dict[str, tuple[float, float]]) -> str | None:
    """Print a mean and deviation as the results table does."""
    if not statistics:
        return None
    mean, deviation = statistics[column]
    # The published deviation of the failure ratio is that of one number, 0.
    return f"{mean:.3f} ± 0.00" if column == "Failure Ratio" else f"{mean:.2f} ± {deviation:.2f}"


def _numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.split("±")]


def _figure_2a(bars: dict[str, Any], files: dict[str, Path], sets: dict[str, PublishedSet]) -> list[Row]:
    rows = []
    columns: dict[str, tuple[str, Callable[[float], float]]] = {
        "response_time_s": ("response_time", lambda value: round(value, 2)),
        "failure_ratio": ("Failure Ratio", lambda value: round(value, 2)),
    }
    for bar, heights in bars.items():
        which = sets[FIGURE_2A[bar]]
        statistics = set_statistics(files, which)
        for quantity, height in heights.items():
            column, rounded = columns[quantity]
            rows.append(
                _row("figure 2a", f"{bar}: {quantity}", height, rounded(statistics[column][0]), str(which.metrics))
            )
    return rows
