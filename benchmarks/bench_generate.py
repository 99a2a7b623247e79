"""Asking an API: throughput, faults, killed processes, memory.

Run by `make bench-generate`. The server (tests/faulty_server.py) runs in a process of its own and, unless said otherwise,
takes 200 ms for every answer. Measured are

- throughput: all prompts at concurrency 64 into a fresh store, medians of three runs, against the ideal (concurrency
  divided by latency) and against a sequential loop over the ``openai`` client, timed on some prompts and extrapolated
  (each prompt takes the same time, one after another);
- faults: 30 % of all requests meet one (429 with and without Retry-After, 500, 503, hung and cut connections, three kinds of
  invalid bodies); every prompt must end answered or accounted for, with exactly as many requests at the server as the store
  counts attempts, and a second run must ask nothing;
- kills: the run is killed (SIGKILL) at random moments and started again; what the client acknowledged must be in the store,
  nothing stored may be asked again, and what is exported in the end must be what an undisturbed run exports;
- memory: 100,000 prompts as long as the published ones, answered at once; the client's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import sqlite3
import statistics
import subprocess
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

from persodpo.config import OpenAIModel, Prices
from persodpo.generation.engine import generate
from persodpo.generation.openai_api import OpenAIBackend
from persodpo.generation.requests import Message, Request, request_key
from persodpo.generation.store import Entry, Store
from persodpo.runfolder import PROJECT, digest_of, git_commit, versions, write_json

RESULTS = PROJECT / "benchmarks" / "results"
SERVER = PROJECT / "tests" / "faulty_server.py"
LATENCY = 0.2
CONCURRENCY = 64
REPEATS = 3
SEQUENTIAL = 60
FAULTS = 0.3
SEED = 44
#: Bytes of a prompt in the memory part, as long as the published ones are on average.
PROMPT_BYTES = 2000
#: What must hold: shares and ratios from below, megabytes and losses from above.
AT_LEAST = {"share of the ideal": 0.8, "times the sequential loop": 45.0, "accounted for": 1.0, "same export": 1.0}
AT_MOST = {"asked again": 0.0, "lost": 0.0, "peak MB": 500.0}


@contextmanager
def serving(log: Path, latency: float = LATENCY, faults: float = 0.0) -> Iterator[str]:
    """Start the server; gives its address."""
    command = [
        sys.executable, str(SERVER), "--log", str(log), "--latency", str(latency), "--faults", str(faults),
        "--seed", str(SEED),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def backend(url: str) -> OpenAIBackend:
    """Return the backend all parts use."""
    return OpenAIBackend(
        OpenAIModel(
            kind="openai", model="bench", served_as=None, base_url=url, api_key_env=None, concurrency=CONCURRENCY,
            requests_per_minute=None, tokens_per_minute=None, timeout_seconds=3.0, attempts=10, longest_wait_seconds=2.0,
            token_limit="max_tokens",  # noqa: S106 - no password
            prices=Prices(input_per_million=0.15, output_per_million=0.6),
        )
    )  # fmt: skip


def request(number: int, size: int = 0) -> Request:
    """Return one prompt, filled up to a size in bytes."""
    text = f"dialogue {number:06d} ".ljust(size, "x")
    return Request(f"{number:06d}", (Message(role="user", content=text),), 110, 0.0, None, "bench")


def requests(count: int, size: int = 0) -> Iterator[Request]:
    """Yield prompts one by one."""
    return (request(number, size) for number in range(count))


def received(log: Path) -> Counter[str]:
    """Count the requests that reached the server, by prompt."""
    lines = map(json.loads, log.read_text().splitlines())
    return Counter(line["prompt"] for line in lines if line["event"] == "received")


def entries(store: Store, asked: OpenAIBackend, count: int) -> Iterator[tuple[str, Entry | None]]:
    """Yield each prompt's text and entry."""
    keys = (request_key(one, asked) for one in requests(count))
    for number, (_, found) in enumerate(store.entries(keys)):
        yield request(number).texts[0], found


def throughput(folder: Path, prompts: int) -> dict[str, float]:
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
                found = generate(requests(prompts), backend(url), store, progress=False)
            assert found.answered == prompts
            seconds.append(found.seconds)
    median, ideal = statistics.median(seconds), prompts * LATENCY / CONCURRENCY
    return {
        "seconds": median, "slowest": max(seconds), "ideal seconds": ideal, "sequential seconds": sequential,
        "share of the ideal": ideal / median, "times the sequential loop": sequential / median,
    }  # fmt: skip


def with_faults(folder: Path, prompts: int) -> dict[str, float]:
    """Run against the faulty server and account for every prompt and request."""
    log = folder / "faults.jsonl"
    with serving(log, latency=0.02, faults=FAULTS) as url, Store(folder / "faults.sqlite") as store:
        found = generate(requests(prompts), backend(url), store, progress=False)
        again = generate(requests(prompts), backend(url), store, progress=False)
        at_server = received(log)
        attempts = {text: entry.answer.attempts for text, entry in entries(store, backend(url), prompts) if entry}
    return {
        "seconds": found.seconds, "answered": found.answered, "failed": sum(found.failed.values()),
        "requests": at_server.total(), "accounted for": len(attempts) / prompts,
        "asked again": again.asked + sum(abs(at_server[text] - count) for text, count in attempts.items()),
    }  # fmt: skip


def kills(folder: Path, prompts: int, count: int) -> dict[str, float]:
    """Kill a run at random moments until it has died often enough, then let it end."""
    log, path, drawn = folder / "kills.jsonl", folder / "kills.sqlite", random.Random(SEED)  # noqa: S311
    stored_at: dict[str, float] = {}
    lost = 0
    with serving(log) as url:
        for _ in range(count):
            acknowledged = killed_run(path, url, prompts, drawn.uniform(0.0, 0.9))
            now = time.time()
            with Store(path) as store:
                stored = {text for text, found in entries(store, backend(url), prompts) if found}
                lost += sum(1 for key, found in store.entries(acknowledged) if found is None)
            stored_at |= {text: stored_at.get(text, now) for text in stored}
        before = len(stored_at)
        with Store(path) as store, Store(folder / "undisturbed.sqlite") as undisturbed:
            last = generate(requests(prompts), backend(url), store, progress=False)
            repeated = received(log)
            lines = map(json.loads, log.read_text().splitlines())
            late = sum(
                1 for line in lines
                if line["event"] == "received" and line["time"] > stored_at.get(line["prompt"], float("inf"))
            )  # fmt: skip
            generate(requests(prompts), backend(url), undisturbed, progress=False)
            same = export(store, backend(url), prompts) == export(undisturbed, backend(url), prompts)
    return {
        "kills": count, "stored before the last run": before, "asked in the last run": last.asked,
        "in flight when killed, asked twice": repeated.total() - len(repeated), "lost": lost, "asked again": late,
        "same export": float(same and last.answered + before == prompts),
    }  # fmt: skip


def killed_run(path: Path, url: str, prompts: int, seconds: float) -> list[str]:
    """Start a run, kill it some seconds after it began to ask; return the keys it acknowledged."""
    command = [sys.executable, __file__, "--child", str(path), "--url", url, "--prompts", str(prompts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        return process.stdout.read().split()


class TellingStore(Store):
    """A store that says which keys are on the disk, as soon as they are."""

    def write(self, entries: Any) -> None:
        """Write, then print the keys in one piece."""
        super().write(entries)
        os.write(1, "".join(f"{entry.key}\n" for entry in entries).encode())


def export(store: Store, asked: OpenAIBackend, prompts: int) -> str:
    """Return a digest of all that a responses table takes from the store."""
    rows = [
        [text, found and [found.model, found.answer.outcome, found.answer.completion, found.answer.finish_reason]]
        for text, found in entries(store, asked, prompts)
    ]
    return digest_of({"rows": rows})


def memory(folder: Path, prompts: int) -> dict[str, float]:
    """Measure the client's memory in a process of its own."""
    with serving(Path(os.devnull), latency=0.0) as url:
        command = [sys.executable, __file__, "--memory", str(folder / "memory.sqlite"), "--url", url]
        done = subprocess.run([*command, "--prompts", str(prompts)], check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def memory_child(path: Path, url: str, prompts: int) -> None:
    """Ask all prompts, noting the memory after a tenth of them; print the figures as JSON."""
    noted: dict[str, float] = {"prompts": prompts, "prompt MB": prompts * PROMPT_BYTES / 1e6}

    def noting() -> Iterator[Request]:
        for number, one in enumerate(requests(prompts, PROMPT_BYTES)):
            if number == prompts // 10:
                noted["MB after a tenth"] = resident()
            yield one

    with Store(path) as store:
        found = generate(noting(), backend(url), store, progress=False)
    assert found.answered == prompts, str(found)
    noted |= {"MB at the end": resident(), "seconds": found.seconds, "requests a second": prompts / found.seconds}
    noted["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # the kernel counts KiB
    print(json.dumps(noted))


def resident() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def missed(measured: dict[str, dict[str, float]]) -> list[str]:
    """Name the bounds that do not hold."""
    figures = [(part, name, value) for part, values in measured.items() for name, value in values.items()]
    low = [f"{part}: {name} {value:.3g}, at least {AT_LEAST[name]:g}" for part, name, value in figures
           if name in AT_LEAST and value < AT_LEAST[name]]  # fmt: skip
    return low + [f"{part}: {name} {value:.3g}, at most {AT_MOST[name]:g}" for part, name, value in figures
                  if name in AT_MOST and value > AT_MOST[name]]  # fmt: skip


def table(measured: dict[str, dict[str, float]]) -> str:
    """Return the figures as a table."""
    lines = ["| part | figure | value | bound |", "| --- | --- | --- | --- |"]
    for part, values in measured.items():
        for name, value in values.items():
            bound = f"at least {AT_LEAST[name]:g}" if name in AT_LEAST else ""
            bound = f"at most {AT_MOST[name]:g}" if name in AT_MOST else bound
            note = f" (extrapolated from {SEQUENTIAL} prompts)" if name == "sequential seconds" else ""
            shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
            lines.append(f"| {part} | {name} | {shown}{note} | {bound} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all parts, write the results, and fail where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--many-prompts", type=int, default=100_000, help="prompts of the memory part")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print("asking", flush=True)
        with TellingStore(asked.child) as store:
            generate(requests(asked.prompts), backend(asked.url), store, progress=False)
        return
    if asked.memory:
        memory_child(asked.memory, asked.url, asked.prompts)
        return
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=PROJECT / "runs" if (PROJECT / "runs").is_dir() else None) as made:
        folder = Path(made)
        measured["throughput"] = throughput(folder, asked.prompts)
        measured["faults"] = with_faults(folder, asked.prompts)
        measured["kills"] = kills(folder, asked.prompts, asked.kills)
        measured["memory"] = memory(folder, asked.many_prompts)
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions(),
        **{name: version(name) for name in ("openai", "uvicorn")}, "sqlite": sqlite3.sqlite_version, "commit": git_commit(),
    }  # fmt: skip
    sizes = {
        "prompts": asked.prompts, "many_prompts": asked.many_prompts, "prompt_bytes": PROMPT_BYTES, "latency": LATENCY,
        "concurrency": CONCURRENCY, "faults": FAULTS, "sequential_prompts": SEQUENTIAL,
        "repeats": {"throughput": REPEATS, "others": 1},
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    write_json(asked.output / "generate.json", {"machine": machine, "sizes": sizes, "measured": measured})
    (asked.output / "generate.md").write_text(table(measured) + "\n")
    print(table(measured))
    if misses := missed(measured):
        sys.exit("; ".join(misses))


if __name__ == "__main__":
    main()
