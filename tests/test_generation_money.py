"""Money: never above the budget, however many processes ask, whatever kills them, in whatever way requests end."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import PRICES, Server, backend, chats, serving
from faulty_server import body_of

from persodpo.generation.ask import generate
from persodpo.generation.store import Store

TESTS = Path(__file__).parent
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from asking import backend, chats
from persodpo.generation.ask import generate
from persodpo.generation.store import Store
_, _, url, path, model, budget = sys.argv
with Store(Path(path)) as store:
    print("open", flush=True)
    asked = backend(url, model=model, concurrency=16, attempts=4, timeout_seconds=1.0)
    print(generate(chats(f"prompt {n}" for n in range(400)), asked, store, budget_usd=float(budget)))
"""


def child(server: Server, path: Path, model: str, budget: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, TESTS, server.url, path, model, str(budget)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def billed(server: Server) -> float:
    """What the server's answers cost, those included that reached nobody."""
    prompts = [event["prompt"] for event in server.events() if event["event"] == "delivered"]
    counted = [body_of({"model": "", "messages": ()}, prompt)["usage"] for prompt in prompts]
    return sum(PRICES.cost(one["prompt_tokens"], one["completion_tokens"]) for one in counted)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "log.jsonl", "--latency", "0.05", "--faults", "0.1") as started:
        yield started


def test_several_processes_keep_one_budget(server: Server, tmp_path: Path) -> None:
    path, budget = tmp_path / "answers.sqlite", 0.004
    children = [child(server, path, f"model-{number}", budget) for number in range(4)]
    said = [process.communicate(timeout=120)[0] for process in children]
    assert all("is used up" in one for one in said), said
    with Store(path) as store:
        assert 0.5 * budget < store.spent() <= budget
        assert billed(server) <= store.spent() + 1e-9


def test_killed_runs_keep_the_budget_too(server: Server, tmp_path: Path) -> None:
    path, budget, source = tmp_path / "answers.sqlite", 0.01, random.Random(5)
    for _ in range(5):
        with child(server, path, "small", budget) as process:
            process.stdout.readline()
            time.sleep(source.uniform(0.05, 0.5))
            process.kill()
        time.sleep(0.1)  # the server comes to the end of what it had in hand
        with Store(path) as store:
            assert billed(server) <= store.spent() + 1e-9
            assert store.spent() <= budget
    with Store(path) as store:
        found = generate(chats(f"prompt {n}" for n in range(400)), backend(server.url), store, budget_usd=budget)
        assert "is used up" in found.stopped
        assert billed(server) <= store.spent() + 1e-9
        assert store.spent() <= budget
