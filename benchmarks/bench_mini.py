"""The miniature from nothing: how long, how much memory, and what it finds.

Run by `make bench-mini`: `persodpo reproduce` in a folder of its own, then once more with nothing changed. Memory is the
most that the process and all below it held at one time, shared pages counted once (Linux's proportional set size), looked
at once a second. That two runs find the same is shown by a test (`tests/test_mini_run.py`).
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

from persodpo.config import Profile, load_profile
from persodpo.evaluation.cells import number, p_text
from persodpo.evaluation.observations import IMPUTED
from persodpo.runfolder import PROJECT, RunFolder, git_commit, read_json, versions, write_json

RESULTS = PROJECT / "benchmarks" / "results"
#: What a run from nothing and a second one may take, seconds, and the former's memory, GiB.
FIRST, SECOND, MEMORY = 480, 60, 3.0


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
    """Return the two tables that the README shows."""
    run = RunFolder(profile)
    estimates, comparisons = run.read("evaluation/estimates"), run.read("evaluation/comparisons")
    lines = [
        "| arm | quality | failure ratio | coherence | C score | UE score | persona distance |",
        "| --- " * 7 + "|",
    ]
    for arm in ("base", *profile.training.arms):
        rows = estimates[(estimates["arm"] == arm) & (estimates["reading"] != "successes alone")].set_index("metric")
        cells = [
            f"{number(row['mean'], 3)} [{number(row['low'], 3)}, {number(row['high'], 3)}]"
            for row in (rows.loc[name] for name in ("quality", "failure_ratio"))
        ]
        plain = ("coherence", "c_score", "ue_score", "persona_distance")
        cells += [number(rows.loc[name, "mean"], 3) for name in plain]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    lines += ["", "| quality | difference | p | p (Holm) | sign test | sign test (Holm) |", "| --- " * 6 + "|"]
    chosen = comparisons[(comparisons["metric"] == "quality") & (comparisons["reading"] == IMPUTED)]
    for row in chosen.to_dict("records"):
        interval = f"{number(row['difference'], 3)} [{number(row['low'], 3)}, {number(row['high'], 3)}]"
        tests = [p_text(row[name]) for name in ("p_value", "p_holm", "p_exact", "p_exact_holm")]
        lines.append(f"| `{row['arm']}` less `{row['baseline']}` | {interval} | {' | '.join(tests)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the miniature and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        profile = load_profile("mini", [f"paths.{name}={folder}/{name}" for name in ("runs", "figures", "release")])
        source = Path(folder) / "profile.yaml"
        source.write_text(profile.to_yaml(), encoding="utf-8")
        (first, memory), (second, _) = reproduce(source), reproduce(source)
        noted: dict[str, Any] = {
            "first seconds": first, "second seconds": second, "peak GiB": memory, "notebooks": notebook_seconds(profile),
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": git_commit(),
            "versions": versions(),
        }  # fmt: skip
        (RESULTS / "mini.md").write_text(findings(profile), encoding="utf-8")
        (RESULTS / "mini-ablations.md").write_text(ablations(profile), encoding="utf-8")
        write_json(RESULTS / "mini.json", noted)
        shutil.copy(RunFolder(profile).figures / "forest.png", PROJECT / "figures" / "mini" / "forest.png")
    for name, value, limit in (("first", first, FIRST), ("second", second, SECOND), ("GiB", memory, MEMORY)):
        print(f"{name}: {value:.1f}, at most {limit:g}: {'held' if value <= limit else 'MISSED'}")


def notebook_seconds(profile: Profile) -> dict[str, float]:
    """Return the wall time of each notebook."""
    copies = sorted(RunFolder(profile).notebooks.glob("*.ipynb"))
    return {copy.stem: read_json(copy)["metadata"]["papermill"]["duration"] for copy in copies}


def ablations(profile: Profile) -> str:
    """Return quality and failure ratio of every ablation, one seed each."""
    run = RunFolder(profile)
    table = run.read("ablations/estimates")
    table = table[table["metric"].isin(["quality", "failure_ratio"]) & (table["reading"] != "successes alone")]
    means = table.pivot_table(index="arm", columns="metric", values="mean")
    names = [profile.evaluation.ablated, *(ablation.name for ablation in profile.evaluation.ablations)]
    lines = ["| ablation | quality | failure ratio |", "| --- | --- | --- |"]
    for name, row in means.loc[names].iterrows():
        lines.append(f"| {name} | {number(row['quality'], 3)} | {number(row['failure_ratio'], 3)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
