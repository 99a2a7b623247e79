"""Asking an API: throughput, faults, killed processes, one budget for several, memory.

Run by `make bench-generate`. The server (tests/faulty_server.py) runs in a process of its own. Measured are

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
import json
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
from measuring import RESULTS, answer, machine, pipes, save, start, tell

from persodpo.config import OpenAIModel, Prices
from persodpo.generation.ask import generate
from persodpo.generation.endpoint import OpenAIBackend
from persodpo.generation.requests import Message, Request, request_key
from persodpo.generation.store import Store
from persodpo.runfolder import PROJECT

SERVER = PROJECT / "tests" / "faulty_server.py"
LATENCY, CONCURRENCY, FAULTS, SEED = 0.2, 64, 0.3, 44
REPEATS, SEQUENTIAL, PROCESSES = 3, 60, 8
PRICES = Prices(input_per_million=0.15, output_per_million=0.6)
#: Bytes of a prompt in the memory part, as long as the published ones are on average.
PROMPT_BYTES = 2000
#: What must hold: shares and ratios from below, megabytes and losses from above.
AT_LEAST = {"share of the ideal": 0.9, "times the sequential loop": 50.0, "accounted for": 1.0}
AT_MOST = {"asked again": 0.0, "lost": 0.0, "peak MB": 300.0, "spent share of the budget": 1.0, "billed share": 1.0}
Figures = dict[str, float]


@contextmanager
def serving(log: Path, latency: float = LATENCY, faults: float = 0.0) -> Iterator[str]:
    """Start the server; gives its address."""
    with start(str(SERVER), log=log, latency=latency, faults=faults, seed=SEED) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def backend(url: str, model: str = "bench") -> OpenAIBackend:
    """Return the backend all parts use."""
    return OpenAIBackend(
        OpenAIModel(
            kind="openai", model=model, base_url=url, concurrency=CONCURRENCY, timeout_seconds=3.0, attempts=10,
            prices=PRICES,
        )
    )  # fmt: skip


def requests(count: int, size: int = 0) -> Iterator[Request]:
    """Yield prompts one by one, filled up to a size in bytes."""
    for number in range(count):
        text = f"dialogue {number:06d} ".ljust(size, "x")
        yield Request(f"{number:06d}", (Message(role="user", content=text),), 110, 0.0, None, "bench")


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    """Return what the server noted of one kind."""
    return [event for event in map(json.loads, log.read_text().splitlines()) if event["event"] == kind]


def throughput(folder: Path, prompts: int) -> Figures:
    """Time all prompts at full concurrency, and some one after another."""
    seconds = []
    with serving(folder / "throughput.jsonl") as url:
        with openai.OpenAI(base_url=url, api_key="none") as client:
            started = time.perf_counter()
            for one in requests(SEQUENTIAL):
                client.completions.create(model="bench", prompt=one.texts[0], max_tokens=110, temperature=0)
            sequential = (time.perf_counter() - started) / SEQUENTIAL * prompts
        for repeat in range(REPEATS):
            with Store(folder / f"throughput-{repeat}.sqlite") as store:
                summary = generate(requests(prompts), backend(url), store, progress=False)
            assert summary.answered == prompts, summary
            seconds.append(summary.seconds)
    median, ideal = statistics.median(seconds), prompts * LATENCY / CONCURRENCY
    return {
        "seconds": median, "slowest": max(seconds), "ideal seconds": ideal, "sequential seconds": sequential,
        "share of the ideal": ideal / median, "times the sequential loop": sequential / median,
    }  # fmt: skip


def with_faults(folder: Path, prompts: int) -> Figures:
    """Run against the faulty server and account for every prompt and request."""
    log, asked = folder / "faults.jsonl", list(requests(prompts))
    with serving(log, latency=0.02, faults=FAULTS) as url, Store(folder / "faults.sqlite") as store:
        summary = generate(asked, backend(url), store, progress=False)
        again = generate(asked, backend(url), store, progress=False)
        keys = {request_key(one, backend(url)): one.texts[0] for one in asked}
        attempts = {keys[key]: entry.answer.attempts for key, entry in store.entries(keys) if entry}
    received = Counter(event["prompt"] for event in events(log, "received"))
    return {
        "seconds": summary.seconds, "answered": summary.answered, "failed": summary.failed.total(),
        "requests": received.total(), "accounted for": len(attempts) / prompts,
        "asked again": again.asked + sum(abs(received[text] - count) for text, count in attempts.items()),
    }  # fmt: skip


def billed(log: Path) -> float:
    """Return what the server's answers cost, US dollars, those included that reached nobody; all are of one length."""
    prompts = [event["prompt"] for event in events(log, "delivered")]
    return sum(PRICES.cost(len(text.encode()) // 4 + 4, 10) for text in prompts)


def kills(folder: Path, prompts: int, count: int) -> Figures:
    """Kill a run at random moments until it has died often enough, then let it end."""
    log, path, drawn = folder / "kills.jsonl", folder / "kills.sqlite", random.Random(SEED)  # noqa: S311
    anywhere = backend("http://any/v1")
    keys = {request_key(one, anywhere): one.texts[0] for one in requests(prompts)}
    budget = anywhere.highest_cost(next(requests(1))) * (prompts / 4 + 130 * count)
    stored_at, lost, passed = dict[str, float](), 0, 0.0
    with serving(log) as url:
        for _ in range(count):
            with start(__file__, child=path, url=url, prompts=prompts, budget=budget, model="bench") as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(drawn.uniform(0.0, 0.9))
                process.kill()
                acknowledged = process.stdout.read().split()
            now = time.time()
            time.sleep(LATENCY)  # the server comes to the end of what it had in hand
            with Store(path) as store:
                stored_at = {keys[key]: now for key, entry in store.entries(keys) if entry} | stored_at
                lost += sum(entry is None for _, entry in store.entries(acknowledged))
                passed = max(passed, billed(log) / store.spent()) if store.spent() else passed
        with Store(path) as store:
            last = generate(requests(prompts), backend(url), store, budget_usd=budget, progress=False)
            spent = store.spent()
    late = [event for event in events(log, "received") if event["time"] > stored_at.get(event["prompt"], float("inf"))]
    return {
        "kills": count, "stored before the last run": len(stored_at), "asked in the last run": last.asked,
        "left by the budget": last.left, "lost": lost, "asked again": len(late), "billed share": passed,
        "spent share of the budget": spent / budget,
    }  # fmt: skip


def one_budget(folder: Path, prompts: int) -> Figures:
    """Let several processes ask under one budget, which half of their prompts use up."""
    log, path = folder / "budget.jsonl", folder / "budget.sqlite"
    budget = PROCESSES * prompts / 2 * PRICES.cost(8, 10)
    with serving(log) as url:
        common = {"child": path, "url": url, "prompts": prompts, "budget": budget}
        for process in [start(__file__, **common, model=f"model-{number}") for number in range(PROCESSES)]:
            process.communicate()
    with Store(path) as store:
        spent = store.spent()
    return {"processes": PROCESSES, "spent share of the budget": spent / budget, "billed share": billed(log) / spent}


def memory(folder: Path, prompts: int) -> Figures:
    """Measure the client's memory in a process of its own."""
    with serving(Path(os.devnull), latency=0.0) as url:
        measured = answer(start(__file__, memory=folder / "memory.sqlite", url=url, prompts=prompts))
    return {
        "prompts": prompts, "prompt MB": prompts * PROMPT_BYTES / 1e6, "seconds": measured["seconds"],
        "requests a second": prompts / measured["seconds"], "peak MB": measured["gib"] * 2**30 / 1e6,
    }  # fmt: skip


def memory_child(path: Path, url: str, prompts: int) -> None:
    """Ask all prompts, and tell how long it took."""
    with Store(path) as store:
        summary = generate(requests(prompts, PROMPT_BYTES), backend(url), store, progress=False)
    assert summary.answered == prompts, summary
    tell({"seconds": summary.seconds})


class TellingStore(Store):
    """A store that says which keys are on the disk, as soon as they are."""

    def write(self, entries: Any) -> None:
        """Write, then print the keys in one piece."""
        super().write(entries)
        os.write(1, "".join(f"{entry.key}\n" for entry in entries).encode())


def asking_child(path: Path, url: str, prompts: int, budget: float, model: str) -> None:
    """Ask under a budget, and say which keys are on the disk."""
    print("asking", flush=True)
    with TellingStore(path) as store:
        generate(requests(prompts), backend(url, model), store, budget_usd=budget, progress=False)


def bound(name: str) -> str:
    """Return what must hold of a figure."""
    least, most = AT_LEAST.get(name), AT_MOST.get(name)
    return f"at least {least:g}" if least is not None else "" if most is None else f"at most {most:g}"


def shown(name: str, value: float) -> str:
    """Return a figure as it stands in the table."""
    note = f" (extrapolated from {SEQUENTIAL} prompts)" if name == "sequential seconds" else ""
    return f"{value:,.0f}{note}" if float(value).is_integer() else f"{value:,.2f}{note}"


def main() -> None:
    """Measure all parts, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--many-prompts", type=int, default=100_000, help="prompts of the memory part")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    for hidden, kind in {"child": Path, "memory": Path, "url": str, "model": str, "budget": float}.items():
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        asking_child(asked.child, asked.url, asked.prompts, asked.budget, asked.model)
        return
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
    rows = [(part, name, shown(name, value), bound(name)) for part, name, value in figures]
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
