"""From a table of metric values to preference pairs: time and memory, from 10 thousand to 100 million responses.

Run by `make bench-pairs`. Every measurement is a process of its own; its time excludes the interpreter's start, its
memory is the process's peak. Up to 1 million responses the released notebook's way is measured beside ours: for each
prompt it scans all rows for those of the prompt. Where that would take over a minute it is timed on some prompts and
extrapolated (a scan costs the same for every prompt), which the table says.

The metric values are generated, one Parquet file a size, written model after model as generation writes them: 28 % of
responses failed (worst-case values), scores with the levels and ties of the published ones, seven models a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from persodpo.artifacts import PROJECT, versions
from persodpo.config import load_profile
from persodpo.pairs import index_pairs
from persodpo.scoring.quality import connect

RESULTS = PROJECT / "benchmarks" / "results"
MODELS = 7
REPEATS = 3
RELEASED_SECONDS = 60.0
#: Responses -> the bounds that must hold: seconds and GiB.
BOUNDS = {10_000_000: (10.0, 1.5), 100_000_000: (150.0, 4.0)}
#: DuckDB's memory limit for a size; the process holds a little more than that.
LIMIT_GIB = {10_000_000: 1.0, 100_000_000: 2.5}


def generate(responses: int, target: Path) -> None:
    """Write a table of metric values."""
    prompts = responses // MODELS
    unit = "(hash(i * 16 + {n}) % 1000003) / 1000003.0::DOUBLE AS u{n}"
    units = ", ".join(unit.format(n=n) for n in range(5))
    with duckdb.connect() as connection:
        connection.execute("SET threads = 2; SET memory_limit = '6GiB'")
        connection.execute(f"""
            COPY (
                SELECT format('dialogue-{{:09d}}', i % {prompts}) AS dialogue_id, 'model-' || i // {prompts} AS model,
                    CASE WHEN u0 < 0.28 THEN 0e0 ELSE 1e0 - 0.2e0 * u1 * u1 * u1 END AS coherence,
                    CASE WHEN u0 < 0.28 OR u2 < 0.03 THEN -1e0 WHEN u2 < 0.42 THEN 0e0 ELSE 1e0 END AS c_score,
                    CASE WHEN u0 < 0.28 OR u3 < 0.76 THEN 0e0 WHEN u3 < 0.88 THEN 1e0 ELSE 2e0 END AS ue_score,
                    CASE WHEN u0 < 0.28 THEN 0e0 ELSE 0.2e0 + 0.6e0 * u4 END AS persona_distance,
                    (18 + 70 * u1 * u4)::BIGINT AS words, u0 >= 0.28 AS one_object
                FROM (SELECT i, {units} FROM range({prompts * MODELS}) t(i))
            ) TO '{target}' (FORMAT parquet)""")


def run_ours(responses: int, source: Path) -> dict[str, float]:
    """Time `persodpo.pairs.index_pairs`."""
    profile = load_profile("release")
    engine = profile.engine.model_copy(update={"threads": 2, "memory_gib": LIMIT_GIB.get(responses, 1.0)})
    with tempfile.TemporaryDirectory(dir=source.parent) as spill:
        connection = connect(engine, spill)
        started = time.perf_counter()
        made = index_pairs(connection, source, Path(spill) / "pairs.parquet", profile.scoring, profile.pairs)
        return {"seconds": time.perf_counter() - started, "pairs": made.pairs}


def run_released(_: int, source: Path) -> dict[str, float]:
    """Time the released way: normalise with pandas, then scan all rows once a prompt."""
    frame = pd.read_parquet(source)
    weights = load_profile("release").scoring.weights
    started = time.perf_counter()
    length = int(frame["words"].mean())
    frame["compliance"] = np.maximum(0, 1 - ((frame["words"] - length) / length) ** 2).round(3)
    quality = 0.0
    for metric in ("coherence", "c_score", "ue_score", "persona_distance"):
        low, high = frame[metric].min(), frame[metric].max()
        quality = quality + getattr(weights, metric) * (frame[metric] - low) / (high - low)
    frame["quality"] = quality + weights.compliance * frame["compliance"]
    low, high = frame["quality"].quantile(0.4), frame["quality"].quantile(0.6)
    prompts = frame["dialogue_id"].unique()
    fixed = time.perf_counter() - started
    pairs, done, looped = [], 0, time.perf_counter()
    for prompt in prompts:
        rows = frame[frame["dialogue_id"] == prompt]
        for chosen in rows[rows["quality"] >= high].itertuples():
            for rejected in rows[rows["quality"] <= low].itertuples():
                pairs.append((prompt, chosen.Index, rejected.Index))
        done += 1
        if time.perf_counter() - looped > RELEASED_SECONDS and done < len(prompts):
            break
    loop = (time.perf_counter() - looped) * len(prompts) / done
    return {"seconds": fixed + loop, "pairs": len(pairs), "share": done / len(prompts)}


def measure(which: str, responses: int, source: Path) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", which, "--responses", str(responses), "--source", str(source)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def one(which: str, responses: int, source: Path) -> None:
    """Print one measurement as JSON."""
    measured = {"ours": run_ours, "released": run_released}[which](responses, source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(measured | {"gib": peak}))


def bench(sizes: list[int], folder: Path) -> list[dict[str, object]]:
    """Measure every size; medians of `REPEATS` processes, one at 100 million."""
    rows: list[dict[str, object]] = []
    for size in sizes:
        source = folder / f"metrics-{size}.parquet"
        generate(size, source)
        repeats = 1 if size >= 100_000_000 else REPEATS
        runs = [measure("ours", size, source) for _ in range(repeats)]
        row: dict[str, object] = {
            "responses": size, "pairs": int(runs[0]["pairs"]), "repeats": repeats,
            "seconds": statistics.median(run["seconds"] for run in runs), "gib": max(run["gib"] for run in runs),
        }  # fmt: skip
        if size <= 1_000_000:
            theirs = measure("released", size, source)
            whole = theirs["share"] == 1.0
            if whole and theirs["pairs"] != row["pairs"]:
                sys.exit(f"{size}: the released way gives {theirs['pairs']} pairs, ours {row['pairs']}.")
            row |= {
                "released_seconds": theirs["seconds"], "released_gib": theirs["gib"], "released_share": theirs["share"],
                "ratio": theirs["seconds"] / float(str(row["seconds"])),
            }  # fmt: skip
        rows.append(row)
        print(table_line(row), flush=True)
        source.unlink()
    return rows


def table_line(row: dict[str, object]) -> str:
    """Format one row of the table."""
    theirs, ratio = "not run", ""
    if "ratio" in row:
        share = float(str(row["released_share"]))
        note = "" if share == 1.0 else f" (extrapolated from {share:.1%} of prompts)"
        theirs, ratio = (
            f"{row['released_seconds']:,.1f} s{note}, {row['released_gib']:.2f} GiB",
            f"{row['ratio']:,.0f}x",
        )
    ours = f"{row['seconds']:.2f} s, {row['gib']:.2f} GiB"
    return f"| {row['responses']:,} | {row['pairs']:,} | {ours} | {theirs} | {ratio} |"


def main() -> None:
    """Run all sizes, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=["ours", "released"])
    parser.add_argument("--responses", type=int)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, *BOUNDS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.responses, arguments.source)
        return
    header = "| responses | pairs | ours | released way | ratio |\n| --- | --- | --- | --- | --- |"
    print(header)
    with tempfile.TemporaryDirectory(dir=PROJECT / "runs" if (PROJECT / "runs").is_dir() else None) as folder:
        rows = bench(arguments.sizes, Path(folder))
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 2, **versions()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "pairs.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    lines = "\n".join(table_line(row) for row in rows)
    (arguments.output / "pairs.md").write_text(f"{header}\n{lines}\n")
    for row in rows:
        seconds, gib = BOUNDS.get(int(str(row["responses"])), (float("inf"), float("inf")))
        if float(str(row["seconds"])) > seconds or float(str(row["gib"])) > gib:
            sys.exit(f"{row['responses']:,} responses missed the bound of {seconds:.0f} s and {gib} GiB.")


if __name__ == "__main__":
    main()
