"""Asking an API: throughput, faults, killed processes, one budget for several, memory.

Run by `make bench-generate`. The server (tests/faulty_server.py) and what is killed (tests/asking.py) are processes of their
own. Measured are

- throughput: all prompts at concurrency 64, 200 ms an answer, into a fresh store, medians of three runs, against the ideal
  (concurrency divided by latency) and against a sequential loop over the ``openai`` client, timed on some prompts and
  extrapolated (each prompt takes the same time, one after another);
- faults: 30 % of all requests meet one (429 with and without Retry-After, 500, 503, hung and cut connections, three kinds of
  invalid bodies); every prompt must end answered or accounted for, and a second run must ask nothing;
- kills: a run with a budget is killed (SIGKILL) at random moments and started again; what it acknowledged must be in the
  store, nothing stored may be asked again, and neither the store's sum nor what the server billed may pass the budget;
- budget: eight processes, each with a model of its own, share a store and a budget;
- memory: 100,000 prompts as long as the published ones, answered at once; the client's peak.
"""

from __future__ import annotations

import argparse
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import openai
from measuring import RESULTS, answer, machine, pipes, save, start, tell

from persodpo.files import PROJECT
from persodpo.generation.ask import generate
from persodpo.generation.requests import Request, request_key
from persodpo.generation.store import Store

sys.path.append(str(PROJECT / "tests"))
import asking

LATENCY, CONCURRENCY, FAULTS = 0.2, 64, 0.3
REPEATS, SEQUENTIAL, PROCESSES = 3, 60, 8
#: Bytes of a prompt in the memory part, as long as the published ones are on average.
PROMPT_BYTES = 2000
SETTINGS = {"concurrency": CONCURRENCY, "timeout_seconds": 3.0, "attempts": 10}
#: What must hold: shares and ratios from below, megabytes and losses from above.
AT_LEAST = {"share of the ideal": 0.9, "times the sequential loop": 50.0, "accounted for": 1.0}
AT_MOST = {"asked again": 0.0, "lost": 0.0, "peak MB": 300.0, "spent share of the budget": 1.0, "billed share": 1.0}
Figures = dict[str, float]


def requests(count: int, size: int = 0) -> Iterator[Request]:
    """Yield prompts one by one, those of tests/asking.py, filled up to a size in bytes."""
    return (asking.chat(f"prompt {number}".ljust(size)) for number in range(count))


def throughput(folder: Path, prompts: int) -> Figures:
    """Time all prompts at full concurrency, and some one after another."""
    seconds = []
    with asking.serving(folder / "throughput.jsonl", "--latency", str(LATENCY)) as server:
        with openai.OpenAI(base_url=server.url, api_key="none") as client:
            started = time.perf_counter()
            for one in requests(SEQUENTIAL):
                client.completions.create(model="bench", prompt=one.texts[-1], max_tokens=110, temperature=0)
            sequential = (time.perf_counter() - started) / SEQUENTIAL * prompts
        for repeat in range(REPEATS):
            with Store(folder / f"throughput-{repeat}.sqlite") as store:
                via = asking.backend(server.url, **SETTINGS)
                summary = generate(requests(prompts), via, store, progress=False)
            assert summary.answered == prompts, summary
            seconds.append(summary.seconds)
    median, ideal = statistics.median(seconds), prompts * LATENCY / CONCURRENCY
    return {
        "seconds": median, "slowest": max(seconds), "ideal seconds": ideal, "sequential seconds": sequential,
        "share of the ideal": ideal / median, "times the sequential loop": sequential / median,
    }  # fmt: skip


def with_faults(folder: Path, prompts: int) -> Figures:
    """Run against the faulty server and account for every prompt and request."""
    asked = list(requests(prompts))
    options = ("--latency", "0.02", "--faults", str(FAULTS))
    with asking.serving(folder / "faults.jsonl", *options) as server, Store(folder / "faults.sqlite") as store:
        via = asking.backend(server.url, **SETTINGS)
        summary, again = (generate(asked, via, store, progress=False) for _ in range(2))
        found = zip(asked, asking.answers(store, asked, via), strict=True)
        attempts = {one.dialogue_id: answer.attempts for one, answer in found if answer}
        received = Counter(event["prompt"] for event in server.received())
    return {
        "seconds": summary.seconds, "answered": summary.answered, "failed": summary.failed.total(),
        "requests": received.total(), "accounted for": len(attempts) / prompts,
        "asked again": again.asked + sum(abs(received[text] - count) for text, count in attempts.items()),
    }  # fmt: skip


def kills(folder: Path, prompts: int, count: int) -> Figures:
    """Kill a run at random moments until it has died often enough, then let it end."""
    path, drawn = folder / "kills.sqlite", random.Random(44)  # noqa: S311
    anywhere = asking.backend("http://any/v1")
    keys = {request_key(one, anywhere): one.dialogue_id for one in requests(prompts)}
    budget = anywhere.highest_cost(next(requests(1))) * (prompts / 4 + 130 * count)
    stored_at, lost, passed = dict[str, float](), 0, 0.0
    with asking.serving(folder / "kills.jsonl", "--latency", str(LATENCY)) as server:
        for _ in range(count):
            with asking.child(server, path, prompts, budget=budget, **SETTINGS) as process:
                process.stdout.readline()
                time.sleep(drawn.uniform(0.0, 0.9))
                process.kill()
                acknowledged = process.stdout.read().split()
            now = time.time()
            time.sleep(LATENCY)  # the server comes to the end of what it had in hand
            with Store(path) as store:
                stored_at = {keys[key]: now for key, entry in store.entries(keys) if entry} | stored_at
                lost += sum(entry is None for _, entry in store.entries(acknowledged))
                passed = max(passed, server.billed() / store.spent()) if store.spent() else passed
        with Store(path) as store:
            via = asking.backend(server.url, **SETTINGS)
            last = generate(requests(prompts), via, store, budget_usd=budget, progress=False)
            spent = store.spent()
        late = sum(event["time"] > stored_at.get(event["prompt"], float("inf")) for event in server.received())
    return {
        "kills": count, "stored before the last run": len(stored_at), "asked in the last run": last.asked,
        "left by the budget": last.left, "lost": lost, "asked again": late, "billed share": passed,
        "spent share of the budget": spent / budget,
    }  # fmt: skip


def one_budget(folder: Path, prompts: int) -> Figures:
    """Let several processes ask under one budget, which half of their prompts use up."""
    path, budget = folder / "budget.sqlite", PROCESSES * prompts / 2 * asking.PRICES.cost(8, 10)
    with asking.serving(folder / "budget.jsonl", "--latency", str(LATENCY)) as server:
        models = [f"model-{number}" for number in range(PROCESSES)]
        for process in [
            asking.child(server, path, prompts, budget=budget, model=model, **SETTINGS) for model in models
        ]:
            process.communicate()
        with Store(path) as store:
            spent = store.spent()
        return {
            "processes": PROCESSES, "spent share of the budget": spent / budget, "billed share": server.billed() / spent,
        }  # fmt: skip


def memory(folder: Path, prompts: int) -> Figures:
    """Measure the client's memory in a process of its own."""
    with asking.serving(Path(os.devnull)) as server:
        measured = answer(start(__file__, memory=folder / "memory.sqlite", url=server.url, prompts=prompts))
    return {
        "prompts": prompts, "prompt MB": prompts * PROMPT_BYTES / 1e6, "seconds": measured["seconds"],
        "requests a second": prompts / measured["seconds"], "peak MB": measured["gib"] * 2**30 / 1e6,
    }  # fmt: skip


def memory_child(path: Path, url: str, prompts: int) -> None:
    """Ask all prompts, and tell how long it took."""
    with Store(path) as store:
        summary = generate(requests(prompts, PROMPT_BYTES), asking.backend(url, **SETTINGS), store, progress=False)
    assert summary.answered == prompts, summary
    tell({"seconds": summary.seconds})


def bound(name: str) -> str:
    """Return what must hold of a figure."""
    least, most = AT_LEAST.get(name), AT_MOST.get(name)
    return f"at least {least:g}" if least is not None else "" if most is None else f"at most {most:g}"


def main() -> None:
    """Measure all parts, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--many-prompts", type=int, default=100_000, help="prompts of the memory part")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        memory_child(asked.memory, asked.url, asked.prompts)
        return
    with tempfile.TemporaryDirectory(dir=PROJECT / "runs" if (PROJECT / "runs").is_dir() else None) as made:
        folder = Path(made)
        measured = {
            "throughput": throughput(folder, asked.prompts), "faults": with_faults(folder, asked.prompts),
            "kills": kills(folder, asked.prompts, asked.kills), "budget": one_budget(folder, asked.prompts // 10),
            "memory": memory(folder, asked.many_prompts),
        }  # fmt: skip
    figures = [(part, name, value) for part, values in measured.items() for name, value in values.items()]
    shown = [f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}" for _, _, value in figures]
    rows = [(part, name, value, bound(name)) for (part, name, _), value in zip(figures, shown, strict=True)]
    packages = {name: version(name) for name in ("openai", "uvicorn")} | {"sqlite": sqlite3.sqlite_version}
    sizes = {
        "prompts": asked.prompts, "many_prompts": asked.many_prompts, "prompt_bytes": PROMPT_BYTES, "latency": LATENCY,
        "concurrency": CONCURRENCY, "faults": FAULTS, "sequential_prompts": SEQUENTIAL, "throughput_repeats": REPEATS,
    }  # fmt: skip
    content = {"machine": machine(**packages), "sizes": sizes, "measured": measured}
    save("generate", content, pipes(["part", "figure", "value", "bound"], rows), asked.output)
    if misses := [
        f"{part}: {name} {value:.3g}, {bound(name)}" for part, name, value in figures
        if value < AT_LEAST.get(name, value) or value > AT_MOST.get(name, value)
    ]:  # fmt: skip
        sys.exit("; ".join(misses))


if __name__ == "__main__":
    main()
