"""Published numbers in, each beside ours with a verdict out.

``reproduced``: our number, computed from the published files, is the published one at its printed precision (a mean loss:
at the four decimals of the log it is computed from). Rows of a training log test the log against itself.
``differs``: the files lead to another number. ``not derivable``: nothing that was published leads to it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persodpo.release import published
from persodpo.release.published import METRICS, SETS, read_set, true_name
from persodpo.tables import schema_of

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
_SETS = {which.label: which for which in SETS}

#: What a row of the table is made of: quantity, the published number, ours (None: nothing leads to it), where ours is from,
#: and, where equality does not tell, whether the two are the same.
Row = tuple[str, Any, Any, str] | tuple[str, Any, Any, str, bool]


def parity_table(files: dict[str, Path], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Set every published number beside ours, in the columns of table ``audit/parity``.

    Args:
        files: Manifest path -> published file.
        tables: dialogues, responses, scores, thresholds, pairs/simple and pairs/perso, made ``as_released``.
    """
    counts = published.counts()
    groups = {
        "preparation": _preparation(counts["preparation"], tables["dialogues"]),
        "responses": _responses(counts["responses"], tables["responses"]),
        "quality": _quality(counts["quality"], tables),
        "pairs": _pairs(counts["pairs"], tables),
    }
    for run in ("simple", "perso"):
        groups[f"training log, {run}"] = _training(run, counts["training"][run], len(tables[f"pairs/{run}"]))
    groups |= {"results table": _results_table(files), "figure 2a": _figure_2a(counts["figure_2a"], files)}
    rows = []
    for group, entries in groups.items():
        for quantity, theirs, ours, source, *same in entries:
            verdict = REPRODUCED if all(same or [theirs == ours]) else DIFFERS
            text, verdict = ("-", NOT_DERIVABLE) if ours is None else (str(ours), verdict)
            rows.append((group, quantity, str(theirs), text, verdict, source))
    return pd.DataFrame(rows, columns=schema_of("audit/parity").names)


def _preparation(counts: dict[str, Any], dialogues: pd.DataFrame) -> list[Row]:
    train = dialogues[dialogues["split"] == "train"]
    longest = max(len(reference.split()) for reference in train["reference"])
    limit, source = counts["max_response_words"], "dialogues"
    return [
        ("train dialogues before the filter", counts["train_dialogues_before_filter"], None, "FoCus JSON"),
        ("longest reference before the filter", counts["max_response_words_before_filter"], None, "FoCus JSON"),
        ("word limit of train references", f"<= {limit}", f"longest {longest}", source, longest <= limit),
        ("train dialogues", counts["train_sample"], len(train), source),
        ("valid dialogues", counts["valid_dialogues"], int((dialogues["split"] == "valid").sum()), source),
    ]


def _responses(counts: dict[str, Any], responses: pd.DataFrame) -> list[Row]:
    parsed = responses["outcome"] == "ok"
    recovered = ~parsed & responses["response"].notna()
    source, by_model = "responses", responses[parsed].groupby("model").size()
    return [
        ("models", counts["models"], responses["model"].nunique(), source),
        ("responses", counts["total"], len(responses), source),
        ("unusable", counts["unusable"], int((~parsed & ~recovered).sum()), source),
        ("parsed", counts["parsed"], int(parsed.sum()), source),
        ("recovered failures", counts["recovered_failures"], int(recovered.sum()), source),
        *(
            (f"parsed, {true_name(label)}", count, int(by_model[true_name(label)]), source)
            for label, count in counts["parsed_per_model"].items()
        ),
    ]


def _quality(counts: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Row]:
    value = tables["thresholds"].set_index("name")["value"]
    quality = tables["scores"]["quality"].dropna()
    low, high = float(value["low"]), float(value["high"])
    return [
        ("mean words, truncated", counts["mean_words_truncated"], int(value["target_words"]), "scores"),
        ("low threshold", repr(counts["thresholds"][0]), repr(low), "scores"),
        ("high threshold", repr(counts["thresholds"][1]), repr(high), "scores"),
        ("responses at or above high", counts["at_or_above_high"], int((quality >= high).sum()), "scores"),
        ("responses at or below low", counts["at_or_below_low"], int((quality <= low).sum()), "scores"),
    ]


def _pairs(counts: dict[str, Any], tables: dict[str, pd.DataFrame]) -> list[Row]:
    perso, source = tables["pairs/perso"], "pairs/perso"
    sides = [perso[["dialogue_id", f"{side}_model"]].set_axis(["d", "m"], axis=1) for side in ("chosen", "rejected")]
    distinct = len(pd.concat(sides).drop_duplicates())
    return [
        ("simple pairs", counts["simple"], len(tables["pairs/simple"]), "pairs/simple"),
        ("perso pairs", counts["perso"], len(perso), source),
        ("prompts of perso pairs", counts["perso_prompts"], perso["dialogue_id"].nunique(), source),
        ("distinct sequences of perso pairs", counts["perso_distinct_sequences"], distinct, source),
    ]


def _training(run: str, log: dict[str, Any], pairs: int) -> list[Row]:
    losses = published.training_losses()
    losses = losses[losses["run"] == run]
    steps = math.ceil(log["pairs"] / STEP_PAIRS) * log["epochs"]
    speed = round(log["pairs"] * log["epochs"] / log["runtime_s"], 3)
    every = int(losses["step"].min())
    # The log keeps four decimals of means over `every` steps and drops the steps after the last of them.
    mean = float(losses["loss"].sum() * every / log["optimizer_steps"])
    close = math.isclose(mean, log["mean_loss"], abs_tol=5e-5)
    return [
        ("pairs trained on", log["pairs"], pairs, f"pairs/{run}"),
        ("optimiser steps", log["optimizer_steps"], steps, "from the logged pairs, 16 a step"),
        ("samples a second", log["samples_per_second"], speed, "from the logged pairs and run time"),
        ("mean loss", log["mean_loss"], round(mean, 6), "from the logged losses", close),
    ]


def set_statistics(files: dict[str, Path], label: str) -> dict[str, tuple[float, float]]:
    """Return mean and population standard deviation of each column of the results table for a set, failures included."""
    frame = read_set(files, _SETS[label])
    columns = {"response_time": frame["response_time"]} | {name: frame[ours] for name, ours in METRICS.items()}
    columns["Failure Ratio"] = frame["parsed"].isna().astype(float)
    return {name: (float(np.mean(values)), float(np.std(values))) for name, values in columns.items()}


def _results_table(files: dict[str, Path]) -> list[Row]:
    rows: list[Row] = []
    for record in published.results_table().to_dict("records"):
        label = str(record.pop("Model"))
        origin = RESULT_ROWS[label]
        statistics = set_statistics(files, origin) if origin else {}
        source = str(_SETS[origin].metrics) if origin else "no published file"
        for column, cell in record.items():
            ours = _cell(str(column), *statistics[str(column)]) if origin else None
            rows.append(
                (f"{label}: {column}", cell, ours, source, ours is not None and _numbers(cell) == _numbers(ours))
            )
    return rows


def _cell(column: str, mean: float, deviation: float) -> str:
    """Print a mean and deviation as the results table does; that of the failure ratio is of one number, 0."""
    return f"{mean:.3f} ± 0.00" if column == "Failure Ratio" else f"{mean:.2f} ± {deviation:.2f}"


def _numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.split("±")]


def _figure_2a(bars: dict[str, Any], files: dict[str, Path]) -> list[Row]:
    columns = {"response_time_s": "response_time", "failure_ratio": "Failure Ratio"}
    rows: list[Row] = []
    for bar, heights in bars.items():
        statistics, source = set_statistics(files, FIGURE_2A[bar]), str(_SETS[FIGURE_2A[bar]].metrics)
        for quantity, height in heights.items():
            rows.append((f"{bar}: {quantity}", height, round(statistics[columns[quantity]][0], 2), source))
    return rows
