"""The miniature from nothing: how long, how much memory, and what it finds.

Run by `make bench-mini`: `persodpo reproduce` in a folder of its own, then once more with nothing changed. ``--findings``
runs nothing: it writes down what the runs `mini` and `second` of this checkout found, the latter of a world for which
nothing was chosen. That two runs find the same is shown by a test (`tests/test_mini_run.py`). Each kind of processor has
kernels of its own, which round otherwise, so that the same seeds train other models; ``KERNELS=fixed`` makes them alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, machine, most_memory, pipes

from persodpo.config import Profile, load_profile, with_overrides
from persodpo.evaluation.observations import EVERY, IMPUTED, SUCCESSES
from persodpo.files import PROJECT, git_commit, read_json, sha256, write_json
from persodpo.metrics import number, p_text
from persodpo.runfolder import RunFolder
from persodpo.stages.policy import miniature_folder

#: What a run from nothing and a second one may take, seconds, and the former's memory, GiB.
LIMITS = {"first seconds": 300, "second seconds": 60, "peak GiB": 1.5}
#: Arms that all worlds are compared in, and the shares of each that are shown.
COMPARED = ("base", "simple", "perso", "corrected")
BASELINES = ("base", "simple", "perso_weighted")
JUDGED = ("grounded", "repeats", "failure_ratio")
#: Seed of the second world: other people, places and models.
OTHER_WORLD = 7
#: What the README's table shows, its heads, and what ablations are compared in.
SHOWN = {
    "grounded": ("grounded", EVERY), "repeats a sentence": ("repeats", EVERY), "ROUGE-L": ("rouge_l", IMPUTED),
    "quality, failures imputed": ("quality", IMPUTED), "quality, successes alone": ("quality", SUCCESSES),
    "failure ratio": ("failure_ratio", EVERY),
}  # fmt: skip
ABLATED = {"grounded": EVERY, "repeats": EVERY, "quality": IMPUTED, "failure_ratio": EVERY}


def reproduce(source: Path) -> tuple[float, float]:
    """Run all notebooks under a profile's file; return seconds and GiB."""
    environment = {name: value for name, value in os.environ.items() if name != "PERSODPO_RELEASE"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "persodpo.cli", "reproduce", "--profile", str(source)]
    process = subprocess.Popen(command, env=environment, cwd=PROJECT)
    memory = most_memory(process)
    if process.returncode:
        raise SystemExit(f"reproduce ended with status {process.returncode}")
    return time.perf_counter() - started, memory


def interval(row: Any, name: str) -> str:
    """Write a value with its interval."""
    return f"{number(row[name], 3)} [{number(row['low'], 3)}, {number(row['high'], 3)}]"


def findings(profile: Profile) -> str:
    """Return the tables that the README shows: the judge first, the quality score in both readings beside it."""
    run = RunFolder(profile)
    estimates, comparisons = run.read("evaluation/estimates"), run.read("evaluation/comparisons")
    table = estimates.set_index(["arm", "metric", "reading"])
    answers = run.read("evaluation/judged").merge(run.read("evaluation/responses"), on=["dialogue_id", "model"])
    answers = answers[answers["outcome"] == "ok"]
    readable = answers.groupby(answers["model"].str.partition("@")[0])[["grounded", "repeats"]].mean()
    rows = []
    for arm in ("base", *profile.training.arms):
        cells = {head: table.loc[(arm, *key)] for head, key in SHOWN.items()}
        texts = {head: interval(cell, "mean") for head, cell in cells.items()}
        texts["ROUGE-L"] = number(cells["ROUGE-L"]["mean"], 3)
        texts |= {f"{name}, of readable": f"{share:.3f}" for name, share in readable.loc[arm].items()}
        texts["quality, successes alone"] += f" of {cells['quality, successes alone']['responses']}"
        rows.append([f"`{arm}`", cells["quality, failures imputed"]["responses"], *texts.values()])
    tests = [
        [
            row["metric"], f"`{row['arm']}` minus `{row['baseline']}`", interval(row, "difference"),
            p_text(row["p_holm"], "≤" if row["p_at_floor"] else ""), p_text(row["p_exact_holm"]), row["family"],
        ]
        for metric in ("grounded", "quality")
        for row in comparisons[comparisons["metric"] == metric].to_dict("records") if row["reading"] != SUCCESSES
    ]  # fmt: skip
    names = ["metric", "arms", "difference", "p (Holm)", "sign test (Holm)", "tests in the family"]
    return f"{pipes(['arm', 'responses', *texts], rows)}\n\n{pipes(names, tests)}\n"


def judged(profile: Profile) -> dict[str, Any]:
    """Return each arm's shares by the judge, and the tests of them."""
    run = RunFolder(profile)
    estimates, comparisons = run.read("evaluation/estimates"), run.read("evaluation/comparisons")
    shares = estimates[estimates["metric"].isin(JUDGED)].pivot(index="arm", columns="metric", values="mean")
    tests = comparisons[comparisons["metric"] == "grounded"]
    return {
        "arms": shares[list(JUDGED)].to_dict("index"),
        "tests": tests[["arm", "baseline", "difference", "p_holm"]].to_dict("records"),
    }


def ablations(profile: Profile) -> str:
    """Return how every ablation differs from the arm that they start from, one seed each."""
    run, start = RunFolder(profile), profile.evaluation.ablated
    means, table = (
        run.read(f"ablations/{name}").set_index(["arm", "metric", "reading"]) for name in ("estimates", "comparisons")
    )
    rows = [[f"{start} (level)", *(number(means.loc[(start, *key), "mean"], 3) for key in ABLATED.items())]]
    for one in profile.evaluation.ablations:
        rows.append([one.name, *(interval(table.loc[(one.name, *key)], "difference") for key in ABLATED.items())])
    return pipes(["ablation", *(f"{name.replace('_', ' ')}, difference" for name in ABLATED)], rows) + "\n"


def write_findings() -> None:
    """Write what the runs `mini` and `second` of this checkout found, with fixed kernels as the tables of the documents."""
    profile = load_profile("mini")
    other = with_overrides(profile, ["name=second", f"seed={OTHER_WORLD}"])
    fixed = os.environ.get("KERNELS") == "fixed"  # make hands it down
    if fixed:
        texts = {"mini": findings(profile), "mini-second": findings(other), "mini-ablations": ablations(profile)}
        for name, text in texts.items():
            (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    worlds = read_json(RESULTS / "mini-worlds.json").get("worlds", {})
    weights = sha256(miniature_folder(RunFolder(profile)) / "base" / "model.safetensors")
    kernels = "fixed kernels" if fixed else f"base model {weights[:8]}"
    for one in (profile, other):
        worlds[f"{one.name}, {kernels}"] = judged(one) | {"commit": git_commit()}
    kept = {"base with fixed kernels": weights} if fixed else {}
    write_json(RESULTS / "mini-worlds.json", kept | {"worlds": worlds})
    rows = []
    for name, world in worlds.items():
        tests = {row["baseline"]: row for row in world["tests"] if row["arm"] == "corrected"}
        arms = [world["arms"][arm] for arm in COMPARED]
        cells = [f"{arm['grounded']:.2f}, {arm['repeats']:.2f}, {arm['failure_ratio']:.2f}" for arm in arms]
        rows.append([name, *cells, *(p_text(tests[other]["p_holm"]) for other in BASELINES)])
    head = ["world, kernels", *(f"`{arm}`" for arm in COMPARED), *(f"p against `{other}`" for other in BASELINES)]
    (RESULTS / "mini-worlds.md").write_text(pipes(head, rows) + "\n", encoding="utf-8")


def main() -> None:
    """Run the miniature and write the results."""
    if "--findings" in sys.argv:
        write_findings()
        return
    with tempfile.TemporaryDirectory() as folder:
        profile = load_profile("mini", [f"home={folder}"])
        source = Path(folder) / "profile.yaml"
        source.write_text(profile.to_yaml(), encoding="utf-8")
        first, memory = reproduce(source)
        copies = sorted(RunFolder(profile).notebooks.glob("*.ipynb"))
        notebooks = {copy.stem: read_json(copy)["metadata"]["papermill"]["duration"] for copy in copies}
        second, _ = reproduce(source)
        measured = {"first seconds": first, "second seconds": second, "peak GiB": memory}
        write_json(RESULTS / "mini.json", measured | {"notebooks": notebooks, **machine()})
    for name, limit in LIMITS.items():
        print(f"{name}: {measured[name]:.1f}, at most {limit:g}: {'held' if measured[name] <= limit else 'MISSED'}")


if __name__ == "__main__":
    main()
