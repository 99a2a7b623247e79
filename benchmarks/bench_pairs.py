"""From a table of metric values to preference pairs: time and memory, from 10 thousand to 100 million responses.

Run by `make bench-pairs`. Every measurement is a process of its own; its time excludes the interpreter's start, its
memory is the process's peak. Up to 1 million responses the released notebook's way is measured beside ours: for each
prompt it scans all rows for those of the prompt. Where that would take over a minute it is timed on some prompts and
extrapolated (a scan costs the same for every prompt), which the table says.

The metric values are generated, one Parquet file a size, written model after model as generation writes them: 28 % of
responses failed (worst-case values), scores with the levels and ties of the published ones, seven models a prompt.
Dialogues are numbers, pairs are row numbers: no text is read or written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import RESULTS, answer, machine, pipes, save, start, tell

from persodpo.config import load_profile
from persodpo.files import PROJECT
from persodpo.method import METRICS, measure_scale, perso_pairs, rate, thresholds

MODELS, REPEATS, RELEASED_SECONDS = 7, 3, 60.0
#: Responses -> the bounds that must hold: seconds and GiB.
BOUNDS = {10_000_000: (5.0, 1.0), 100_000_000: (90.0, 5.0)}
#: Rows of a group of the generated file.
GROUP = 1_000_000


def generate(responses: int, target: Path) -> None:
    """Write a table of metric values, a group of rows at a time."""
    prompts, random = responses // MODELS, np.random.default_rng(0)
    writer: pq.ParquetWriter | None = None
    for first in range(0, prompts * MODELS, GROUP):
        rows = np.arange(first, min(first + GROUP, prompts * MODELS))
        failed, drawn = random.random(len(rows)) < 0.28, random.random((4, len(rows)))
        levels = {
            "coherence": 1 - 0.2 * drawn[0] ** 3, "c_score": np.digitize(drawn[1], [0.03, 0.42]) - 1.0,
            "ue_score": np.digitize(drawn[2], [0.76, 0.88]) * 1.0, "persona_distance": 0.2 + 0.6 * drawn[3],
        }  # fmt: skip
        worst = {"c_score": -1.0}
        table = pa.table({
            "dialogue_id": (rows % prompts).astype(np.uint32),
            **{name: np.where(failed, worst.get(name, 0.0), values) for name, values in levels.items()},
            "words": (18 + 70 * drawn[0] * drawn[3]).astype(np.int64), "one_object": ~failed,
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def ours(source: Path) -> dict[str, float]:
    """Time `persodpo.method` on the file, as a query that streams it."""
    weights = load_profile("release").scoring.weights.model_dump()
    target = source.with_name("pairs.parquet")
    started = time.perf_counter()
    rows = pl.scan_parquet(source)
    rated = rate(rows.with_row_index("row"), measure_scale(rows), weights).select("dialogue_id", "row", "quality")
    pairs = perso_pairs(rated, *thresholds(rated, 0.4, 0.6))
    pairs.select("dialogue_id", "row_chosen", "row_rejected").sink_parquet(target)
    return {"seconds": time.perf_counter() - started, "pairs": pq.ParquetFile(target).metadata.num_rows}


def released(source: Path) -> dict[str, float]:
    """Time the released way: normalise with pandas, then scan all rows once a prompt."""
    frame = pd.read_parquet(source)
    weights = load_profile("release").scoring.weights
    started = time.perf_counter()
    length = int(frame["words"].mean())
    frame["compliance"] = np.maximum(0, 1 - ((frame["words"] - length) / length) ** 2).round(3)
    quality = 0.0
    for metric in METRICS:
        low, high = frame[metric].min(), frame[metric].max()
        quality = quality + getattr(weights, metric) * (frame[metric] - low) / (high - low)
    frame["quality"] = quality + weights.compliance * frame["compliance"]
    low, high = frame["quality"].quantile(0.4), frame["quality"].quantile(0.6)
    prompts = frame["dialogue_id"].unique()
    pairs, done, looped = [], 0, time.perf_counter()
    for prompt in prompts:
        rows = frame[frame["dialogue_id"] == prompt]
        for chosen in rows[rows["quality"] >= high].itertuples():
            for rejected in rows[rows["quality"] <= low].itertuples():
                pairs.append((prompt, chosen.Index, rejected.Index))
        done += 1
        if time.perf_counter() - looped > RELEASED_SECONDS:
            break
    share, loop = done / len(prompts), time.perf_counter() - looped
    return {"seconds": looped - started + loop / share, "pairs": len(pairs), "share": share}


def bench(size: int, source: Path) -> dict[str, Any]:
    """Measure one size; medians of `REPEATS` processes, one at 100 million."""
    generate(size, source)
    repeats = 1 if size >= 100_000_000 else REPEATS
    runs = [answer(start(__file__, one="ours", source=source)) for _ in range(repeats)]
    row: dict[str, Any] = {
        "responses": size, "pairs": runs[0]["pairs"], "repeats": repeats,
        "seconds": statistics.median(run["seconds"] for run in runs), "gib": max(run["gib"] for run in runs),
    }  # fmt: skip
    if size <= 1_000_000:
        theirs = answer(start(__file__, one="released", source=source))
        if theirs["share"] == 1.0 and theirs["pairs"] != row["pairs"]:
            sys.exit(f"{size}: the released way gives {theirs['pairs']} pairs, ours {row['pairs']}.")
        row |= {f"released_{name}": theirs[name] for name in ("seconds", "gib", "share")}
        row["ratio"] = theirs["seconds"] / row["seconds"]
    source.unlink()
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return the table's cells of a size."""
    ours = [f"{row['responses']:,}", f"{row['pairs']:,}", f"{row['seconds']:.2f} s, {row['gib']:.2f} GiB"]
    if "ratio" not in row:
        return [*ours, "not run", ""]
    share = row["released_share"]
    note = "" if share == 1.0 else f" (extrapolated from {share:.1%} of prompts)"
    theirs = f"{row['released_seconds']:,.1f} s{note}, {row['released_gib']:.2f} GiB"
    return [*ours, theirs, f"{row['ratio']:,.0f}x"]


def main() -> None:
    """Run all sizes, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=["ours", "released"], help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, *BOUNDS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.one:
        tell({"ours": ours, "released": released}[asked.one](asked.source))
        return
    with tempfile.TemporaryDirectory(dir=PROJECT / "runs" if (PROJECT / "runs").is_dir() else None) as folder:
        rows = [bench(size, Path(folder) / "metrics.parquet") for size in asked.sizes]
    table = pipes(["responses", "pairs", "ours", "released way", "ratio"], map(cells, rows))
    save("pairs", {"machine": machine(threads=pl.thread_pool_size()), "rows": rows}, table, asked.output)
    for row in rows:
        seconds, gib = BOUNDS.get(row["responses"], (float("inf"), float("inf")))
        if row["seconds"] > seconds or row["gib"] > gib:
            sys.exit(f"{row['responses']:,} responses missed the bound of {seconds:.0f} s and {gib} GiB.")


if __name__ == "__main__":
    main()
