"""Scoring: against the released loops, growth with the number of texts, and a full cache.

Run by `make bench-score`; it needs the published files. The scorers are those on the frozen encoder, on a CPU.

- Against the released loops: coherence in windows of 8 that advance by 1 (audit A1; some windows are timed and the rest
  extrapolated, for every window costs the same), and persona distance one pair at a time. Scores must agree to 1e-5: for
  coherence with the response that audit A1 says the row belongs to. The models are loaded before the clock starts.
- Growth: distinct texts, made of published responses, all four scorers, in a process of its own each: time and peak memory.
- A full cache: all 10,500 responses and four scorers, none of which is asked anything. What scores at first is a count of
  letters, for a full cache does not ask what it was filled by.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persodpo import stages
from persodpo.config import load_profile
from persodpo.files import PROJECT, git_commit, versions, write_json
from persodpo.method import METRICS
from persodpo.release.checks import scored_response
from persodpo.runfolder import RunFolder
from persodpo.scoring.models import remembered
from persodpo.scoring.score import Item, ScoreCache, Scored, Scorer, computed_metrics, readable, score_items
from persodpo.stages.score import run_scorers

RESULTS = PROJECT / "benchmarks" / "results"
RESPONSES, WINDOW, WINDOWS, REPEATS = 400, 8, 12, 3
SIZES = (500, 1_000, 4_000)
TOLERANCE, AT_LEAST, FULL_CACHE_SECONDS, GROWTH = 1e-5, 3.0, 2.0, 1.3


class Letters:
    """A scorer that costs nothing."""

    key = "letters"

    def __init__(self, name: str) -> None:
        """Name the metric it stands in for."""
        self.name = name

    def score(self, items: Sequence[Item]) -> Scored:
        """Count letters."""
        return Scored(np.array([float(len(item.response)) for item in items]), np.zeros(len(items)))


def timed_engine(scorer: Scorer, items: Sequence[Item]) -> tuple[float, np.ndarray]:
    """Score items into a fresh cache; returns seconds and values."""
    with tempfile.TemporaryDirectory() as folder, ScoreCache(Path(folder) / "scores.sqlite") as cache:
        started = time.perf_counter()
        values, _ = score_items(scorer, items, cache)
        return time.perf_counter() - started, values


def against_released(run: RunFolder, items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Time both ways and compare their scores."""
    scorers = {scorer.name: scorer for scorer in run_scorers(run)}
    coherence, distance = scorers["coherence"], scorers["persona_distance"]
    for scorer in (coherence, distance):
        scorer.score(items[:1])
    ours, values = timed_engine(coherence, items)
    started = time.perf_counter()
    windows = [coherence.score(items[start : start + WINDOW]).values for start in range(WINDOWS)]
    kept = np.concatenate(windows)[: len(items)]
    theirs = (time.perf_counter() - started) * len(items) / WINDOWS
    apart = float(np.abs(kept - values[scored_response(len(kept))]).max())
    assert np.abs(kept[:WINDOW] - values[:WINDOW]).max() <= TOLERANCE
    found = {"coherence": {"released_seconds": theirs, "seconds": ours, "ratio": theirs / ours, "apart": apart}}
    ours, values = timed_engine(distance, items)
    started = time.perf_counter()
    one_by_one = np.array([distance.score([item]).values[0] for item in items])
    theirs = time.perf_counter() - started
    apart = float(np.abs(values - one_by_one).max())
    found["persona_distance"] = {"released_seconds": theirs, "seconds": ours, "ratio": theirs / ours, "apart": apart}
    return found


def growing(items: Sequence[Item], count: int) -> Iterator[Item]:
    """Yield items with distinct responses: words of a published one in another order, and a number."""
    order = np.random.default_rng(0)
    for number in range(count):
        item = items[number % len(items)]
        words = item.response.split()
        text = " ".join([words[place] for place in order.permutation(len(words))] + [str(number)])
        yield item._replace(response=text)


def growth_child(run: RunFolder, items: Sequence[Item], count: int) -> None:
    """Print time and peak memory of one size as JSON."""
    scorers, made = run_scorers(run), list(growing(items, count))
    scorers[0].score(made[:1])
    with tempfile.TemporaryDirectory() as folder, ScoreCache(Path(folder) / "scores.sqlite") as cache, remembered():
        started = time.perf_counter()
        tallies = [score_items(scorer, made, cache)[1] for scorer in scorers]
        seconds = time.perf_counter() - started
    assert all(tally.scored == count for tally in tallies)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"texts": count, "seconds": seconds, "peak_mb": int(peak[1]) * 1024 / 1e6 if peak else 0.0}))


def growth(profile: str) -> list[dict[str, Any]]:
    """Measure every size in a process of its own."""
    rows = []
    for size in SIZES:
        command = [sys.executable, __file__, "--child", str(size), "--profile", profile]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def full_cache(run: RunFolder) -> dict[str, float]:
    """Score the whole table again and again; from the second time on everything is in the cache."""
    responses, dialogues, seconds = run.read("responses"), run.read("dialogues"), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            with ScoreCache(Path(folder) / "scores.sqlite") as cache:
                scorers = [Letters(name) for name in METRICS]
                _, _, tallies = computed_metrics(responses, dialogues, scorers, cache)
            seconds.append(time.perf_counter() - started)
    assert all(tally.scored == 0 for tally in tallies)
    return {"responses": len(responses), "seconds": statistics.median(seconds[1:])}


def tables(measured: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"| on {measured['responses']:,} responses | released loop | ours | ratio | scores apart |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name.replace('_', ' ')} | {row['released_seconds']:,.1f} s | {row['seconds']:,.2f} s | {row['ratio']:,.1f}x | "
        f"{row['apart']:.0e} |"
        for name, row in measured["released"].items()
    ]
    lines += ["", "| distinct texts, four scorers | time | a thousand | peak memory |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['texts']:,} | {row['seconds']:,.1f} s | {1000 * row['seconds'] / row['texts']:,.1f} s | "
        f"{row['peak_mb']:,.0f} MB |"
        for row in measured["growth"]
    ]
    cached = measured["full_cache"]
    return "\n".join(
        [*lines, "", f"All {cached['responses']:,} responses from a full cache: {cached['seconds']:.2f} s."]
    )


def missed(measured: dict[str, Any]) -> list[str]:
    """Name the bounds that do not hold."""
    found = [f"{name}: {row}" for name, row in measured["released"].items() if row["apart"] > TOLERANCE]
    if measured["released"]["coherence"]["ratio"] < AT_LEAST:
        found.append(f"coherence: {measured['released']['coherence']['ratio']:.1f}x, at least {AT_LEAST:g}x")
    first, last = (measured["growth"][place]["seconds"] / measured["growth"][place]["texts"] for place in (0, -1))
    if last > GROWTH * first:
        found.append(f"growth: {last / first:.2f} times the time a text")
    if measured["full_cache"]["seconds"] > FULL_CACHE_SECONDS:
        found.append(f"full cache: {measured['full_cache']['seconds']:.2f} s, at most {FULL_CACHE_SECONDS:g} s")
    return found


def main() -> None:
    """Measure all parts, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", default="release")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    run = RunFolder(load_profile(asked.profile))
    if not asked.child:
        stages.make(run.profile, "generate")
    items = readable(run.read("responses"), run.read("dialogues"))[1]
    if asked.child:
        growth_child(run, items, asked.child)
        return
    run_scorers(run)  # fits the heads before any clock starts
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        **versions(), "commit": git_commit(),
    }  # fmt: skip
    measured = {
        "responses": RESPONSES, "released": against_released(run, items[:RESPONSES]), "growth": growth(asked.profile),
        "full_cache": full_cache(run),
    }  # fmt: skip
    write_json(asked.output / "score.json", {"machine": machine, "measured": measured})
    (asked.output / "score.md").write_text(tables(measured) + "\n")
    print(tables(measured))
    if misses := missed(measured):
        sys.exit("; ".join(misses))


if __name__ == "__main__":
    main()
