"""The miniature from nothing: how long, how much memory, and what it finds.

Run by `make bench-mini`: `persodpo reproduce` in a folder of its own, then once more with nothing changed, then the arms
in a second world, for which nothing was chosen. Memory is the most that the process and all below it held at one time,
shared pages counted once (Linux's proportional set size), looked at once a second. That two runs find the same is shown by
a test (`tests/test_mini_run.py`).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from persodpo import stages
from persodpo.config import Profile, load_profile, with_overrides
from persodpo.evaluation.exports import number, p_text
from persodpo.evaluation.observations import EVERY, IMPUTED, SUCCESSES
from persodpo.runfolder import PROJECT, RunFolder, git_commit, read_json, versions, write_json

RESULTS = PROJECT / "benchmarks" / "results"
#: What a run from nothing and a second one may take, seconds, and the former's memory, GiB.
FIRST, SECOND, MEMORY = 480, 60, 3.0
#: Seed of the second world: other people, places and models.
OTHER_WORLD = 7
#: What ablations are compared in.
ABLATED = (("grounded", EVERY), ("repeats", EVERY), ("quality", IMPUTED), ("failure_ratio", EVERY))


def children(process: int) -> list[int]:
    """Return a process and all below it."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [below for child in task.read_text().split() for below in children(int(child))]
        except OSError:
            continue
    return found


def held(process: int) -> float:
    """Return the memory of a process and all below it, GiB."""
    total = 0
    for each in children(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 2**20


def reproduce(source: Path) -> tuple[float, float]:
    """Run all notebooks under a profile's file; return seconds and GiB."""
    environment = {name: value for name, value in os.environ.items() if name != "PERSODPO_RELEASE"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "persodpo.cli", "reproduce", "--profile", str(source)]
    process = subprocess.Popen(command, env=environment, cwd=PROJECT)
    peaks = [0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            peaks.append(held(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    over.set()
    watcher.join()
    if status:
        raise SystemExit(f"reproduce ended with status {status}")
    return time.perf_counter() - started, max(peaks)


def findings(profile: Profile) -> str:
    """Return the tables that the README shows: the judge first, the quality score in both readings beside it."""
    run = RunFolder(profile)
    estimates, comparisons = run.read("evaluation/estimates"), run.read("evaluation/comparisons")
    shown = (("grounded", EVERY), ("repeats", EVERY), ("rouge_l", IMPUTED), ("quality", IMPUTED), ("quality", SUCCESSES),
             ("failure_ratio", EVERY))  # fmt: skip
    table = estimates.set_index(["arm", "metric", "reading"])
    rows = []
    for arm in ("base", *profile.training.arms):
        cells = [table.loc[arm, metric, reading] for metric, reading in shown]
        texts = [interval(cell, "mean") if name != "rouge_l" else number(cell["mean"], 3)
                 for cell, (name, _) in zip(cells, shown, strict=True)]  # fmt: skip
        texts[4] += f" of {cells[4]['responses']}"
        rows.append([f"`{arm}`", str(cells[3]["responses"]), *texts])
    head = ["arm", "responses", "grounded", "repeats a sentence", "ROUGE-L", "quality, failures imputed",
            "quality, successes alone", "failure ratio"]  # fmt: skip
    tests = []
    for metric in ("grounded", "quality"):
        chosen = comparisons[(comparisons["metric"] == metric) & comparisons["reading"].isin([EVERY, IMPUTED])]
        for row in chosen.to_dict("records"):
            values = [p_text(row["p_holm"], "≤" if row["p_at_floor"] else ""), p_text(row["p_exact_holm"])]
            pair = f"`{row['arm']}` less `{row['baseline']}`"
            tests.append([metric, pair, interval(row, "difference"), *values, str(row["family"])])
    names = ["metric", "arms", "difference", "p (Holm)", "sign test (Holm)", "tests in the family"]
    return f"{pipes(head, rows)}\n{pipes(names, tests)}"


def judged(profile: Profile) -> dict[str, Any]:
    """Return each arm's share of answers that repeat a sentence, and the tests on grounded answers."""
    run = RunFolder(profile)
    estimates, comparisons = run.read("evaluation/estimates"), run.read("evaluation/comparisons")
    tests = comparisons[comparisons["metric"] == "grounded"]
    return {
        "repeats": estimates[estimates["metric"] == "repeats"].set_index("arm")["mean"].to_dict(),
        "grounded": tests[["arm", "baseline", "difference", "p_holm"]].to_dict("records"),
    }


def interval(row: Any, name: str) -> str:
    """Write a value with its interval."""
    return f"{number(row[name], 3)} [{number(row['low'], 3)}, {number(row['high'], 3)}]"


def pipes(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Run the miniature and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        profile = load_profile("mini", [f"paths.{name}={folder}/{name}" for name in ("runs", "figures", "release")])
        source = Path(folder) / "profile.yaml"
        source.write_text(profile.to_yaml(), encoding="utf-8")
        (first, memory), (second, _) = reproduce(source), reproduce(source)
        other = with_overrides(profile, ["name=second", f"seed={OTHER_WORLD}"])
        stages.make(other, "evaluate")
        noted: dict[str, Any] = {
            "first seconds": first, "second seconds": second, "peak GiB": memory, "notebooks": notebook_seconds(profile),
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": git_commit(),
            "versions": versions(),
        }  # fmt: skip
        write_json(RESULTS / "mini.json", noted)
        write_tables(profile, other)
        shutil.copy(RunFolder(profile).figures / "forest.png", PROJECT / "figures" / "mini" / "forest.png")
    for name, value, limit in (("first", first, FIRST), ("second", second, SECOND), ("GiB", memory, MEMORY)):
        print(f"{name}: {value:.1f}, at most {limit:g}: {'held' if value <= limit else 'MISSED'}")


def write_tables(profile: Profile, other: Profile) -> None:
    """Write what both worlds' runs found; the times of a run stay as they were noted."""
    (RESULTS / "mini.md").write_text(findings(profile), encoding="utf-8")
    (RESULTS / "mini-second.md").write_text(findings(other), encoding="utf-8")
    (RESULTS / "mini-ablations.md").write_text(ablations(profile), encoding="utf-8")
    worlds = {one.name: judged(one) for one in (profile, other)}
    write_json(RESULTS / "mini-worlds.json", {"commit": git_commit(), "versions": versions(), "worlds": worlds})


def notebook_seconds(profile: Profile) -> dict[str, float]:
    """Return the wall time of each notebook."""
    copies = sorted(RunFolder(profile).notebooks.glob("*.ipynb"))
    return {copy.stem: read_json(copy)["metadata"]["papermill"]["duration"] for copy in copies}


def ablations(profile: Profile) -> str:
    """Return how every ablation differs from the arm that they start from, one seed each."""
    run = RunFolder(profile)
    means = run.read("ablations/estimates").set_index(["arm", "metric", "reading"])["mean"]
    table = run.read("ablations/comparisons").set_index(["arm", "metric", "reading"])
    start = profile.evaluation.ablated
    rows = [[start, *(number(means.loc[start, name, reading], 3) for name, reading in ABLATED)]]
    for ablation in profile.evaluation.ablations:
        rows.append(
            [
                ablation.name,
                *(interval(table.loc[ablation.name, name, reading], "difference") for name, reading in ABLATED),
            ]
        )
    return pipes(["ablation", *(f"{name.replace('_', ' ')}, difference" for name, _ in ABLATED)], rows)


if __name__ == "__main__":
    main()
