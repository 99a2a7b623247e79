"""The Batch API: submit, poll, collect; resumed after a kill at every moment, never submitted twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asking import PRICES, chats
from faulty_server import completion

from persodpo.config import OpenAIModel
from persodpo.generation.ask import generate
from persodpo.generation.batch import BatchBackend, open_batches
from persodpo.generation.requests import Answer, Request, request_key
from persodpo.generation.store import Store

TESTS = Path(__file__).parent
SECRET = "sk-canary-batches-0123456789"  # noqa: S105 - made up


class Served:
    """A running server."""

    def __init__(self, url: str, log: Path) -> None:
        """Keep its address and the log of its calls."""
        self.url, self.log = url, log

    def calls(self) -> Counter[str]:
        return Counter(json.loads(line)["call"] for line in self.log.read_text().splitlines())


@contextmanager
def serving(folder: Path, **options: str) -> Iterator[Served]:
    log = folder / "calls.jsonl"
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(TESTS / "batch_server.py"), "--log", str(log), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Served(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log)
        finally:
            process.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as started:
        yield started


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "answers.sqlite") as opened:
        yield opened


def backend(url: str, json_keys: tuple[str, ...] = (), **changes: Any) -> BatchBackend:
    settings = {
        "kind": "openai", "model": "small", "base_url": url, "batch": True, "concurrency": 1000, "poll_seconds": 0.05,
        "timeout_seconds": 5.0, "prices": PRICES,
    }  # fmt: skip
    return BatchBackend(OpenAIModel(**{**settings, **changes}), json_keys)


def answers(store: Store, asked: list[Request], via: BatchBackend) -> list[Answer | None]:
    return [entry and entry.answer for _, entry in store.entries([request_key(one, via) for one in asked])]


def test_one_batch_answers_all(server: Served, store: Store) -> None:
    asked = chats(f"dialogue {number}" for number in range(200))
    via = backend(server.url)
    summary = generate(asked, via, store)
    assert summary.answered == 200
    found = answers(store, asked, via)
    assert [answer.completion for answer in found] == [completion(one.texts[-1]) for one in asked]
    assert {(answer.batch_size, answer.latency, answer.hardware) for answer in found} == {(200, 60.0, "batch API")}
    for answer in found:
        assert answer.cost == PRICES.cost(answer.prompt_tokens, answer.completion_tokens) > 0
    assert summary.cost == pytest.approx(store.spent())
    assert server.calls()["POST /batches"] == 1
    assert generate(asked, via, store).skipped == 200
    assert server.calls()["POST /batches"] == 1


def test_odd_lines_fail_alone_and_are_retried_on_request(server: Served, store: Store) -> None:
    asked = chats(["good", "a <<error>>", "a <<garbage>>", "a <<missing>>"])
    via = backend(server.url)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed) == (1, {"rejected": 1, "timeout": 2})
    assert [answer.cost > 0 for answer in answers(store, asked, via)] == [True, False, False, False]
    assert "no such thing" in answers(store, asked, via)[1].error
    assert generate(asked, via, store, retry_failed=True).asked == 3
    assert server.calls()["POST /batches"] == 2


def test_each_line_of_a_result_is_read_by_itself(server: Served, store: Store) -> None:
    """An answer with line separators, and one line that nobody can decode, beside a good one."""
    asked, via = chats(["good", "one <<lines>>", "a <<deep>>"]), backend(server.url)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed) == (2, {"timeout": 1})
    assert [answer.completion for answer in answers(store, asked, via)[:2]] == [
        completion("good"),
        "one\u2028two\x85three",
    ]


def test_error_lines_are_classified(server: Served, store: Store) -> None:
    kinds = {
        "500": "server_error", "429": "rate_limited", "batch_expired": "timeout", "400": "rejected", "401": "rejected",
        "context_length_exceeded": "context_too_long",
    }  # fmt: skip
    asked, via = chats(f"a <<error={code}>>" for code in kinds), backend(server.url)
    generate(asked, via, store)
    assert [answer.failure for answer in answers(store, asked, via)] == list(kinds.values())
    assert store.spent() == 0.0


def test_an_expired_batch_accounts_for_every_prompt(server: Served, store: Store) -> None:
    asked = chats(["good", "one <<expired>>"])
    summary = generate(asked, backend(server.url), store)
    assert (summary.answered, summary.failed) == (1, {"timeout": 1})
    assert "the batch ended (expired)" in answers(store, asked, backend(server.url))[1].error


def test_a_refused_batch_stops_the_model_and_is_forgotten(server: Served, store: Store) -> None:
    asked = chats(["good", "one <<refused>>"])
    summary = generate(asked, backend(server.url), store)
    assert "refused a batch of model small (a prompt that is refused)" in summary.stopped
    assert (summary.left, store.spent()) == (2, 0.0)
    assert generate(asked[:1], backend(server.url), store).answered == 1


def test_an_endpoint_without_batches(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path, fault="none at all") as server:
        summary = generate(chats(["x"]), backend(server.url), store)
    assert "has no Batch API for model small" in summary.stopped
    assert "set batch: false" in summary.stopped


@pytest.mark.slow
def test_a_budget_makes_smaller_batches_and_is_never_passed(server: Served, store: Store) -> None:
    asked = chats(f"dialogue {number:02d}" for number in range(40))
    summary = generate(asked, backend(server.url), store, budget_usd=0.001)
    assert 0 < summary.answered < 40
    assert summary.left == 40 - summary.answered
    assert store.spent() <= 0.001
    assert "budget" in summary.stopped
    assert server.calls()["POST /batches"] > 1


def test_the_key_appears_nowhere(server: Served, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BATCH_KEY", SECRET)
    with Store(tmp_path / "answers.sqlite") as store:
        generate(chats(["x", "a <<error>>"]), backend(server.url, api_key_env="BATCH_KEY"), store)
    assert {json.loads(line)["key"] for line in server.log.read_text().splitlines()} == {f"Bearer {SECRET}"}
    for path in tmp_path.glob("answers.sqlite*"):
        assert SECRET.encode() not in path.read_bytes()


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_generation_batch import backend, chats
from persodpo.generation.ask import generate
from persodpo.generation.store import Store
with Store(Path(sys.argv[3])) as store:
    generate(chats(f"dialogue {n}" for n in range(30)), backend(sys.argv[2]), store)
"""


def kill_when(server: Served, path: Path, call: str, seconds: float = 0.0) -> None:
    """Start a run and kill it some time after the server has had a call."""
    with subprocess.Popen([sys.executable, "-c", RUN, str(TESTS), server.url, str(path)]) as process:
        for _ in range(600):
            if server.log.exists() and any(name.startswith(call) for name in server.calls()):
                break
            time.sleep(0.05)
        time.sleep(seconds)
        process.kill()
    time.sleep(0.3)  # the server comes to the end of what it had in hand; what it has not heard of yet nobody can find


@pytest.mark.parametrize(
    ("options", "call", "seconds"),
    [
        ({}, "POST /files", 0.0),  # before it was submitted, or just after
        ({"fault": "create"}, "POST /batches", 0.3),  # submitted, but its name never learnt
    ],
)
def test_a_killed_run_submits_nothing_twice(tmp_path: Path, options: dict[str, str], call: str, seconds: float) -> None:
    path = tmp_path / "answers.sqlite"
    asked = chats(f"dialogue {n}" for n in range(30))
    with serving(tmp_path, **options) as server:
        kill_when(server, path, call, seconds)
        with Store(path) as store:
            summary = generate(asked, backend(server.url), store)
            assert summary.answered + summary.skipped == 30
            assert all(answer.completion for answer in answers(store, asked, backend(server.url)))
            assert store.spent() == pytest.approx(
                sum(answer.cost for answer in answers(store, asked, backend(server.url)))
            )
        assert server.calls()["POST /batches"] == 1


def test_a_batch_that_is_paid_for_is_collected_under_a_budget_that_it_uses_up(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.sqlite", chats(f"dialogue {n}" for n in range(30))
    with serving(tmp_path, looks="3") as server:
        kill_when(server, path, "GET /batches/")
        with Store(path) as store:
            aside = store.spent()
            summary = generate(asked, backend(server.url), store, budget_usd=aside)
            assert summary.answered + summary.skipped == 30
            assert store.spent() < aside
        assert server.calls()["POST /batches"] == 1


def test_a_batch_under_way_is_waited_for_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    asked = chats(f"dialogue {n}" for n in range(30))
    with serving(tmp_path, looks="1000000") as server:
        for _ in range(2):
            kill_when(server, path, "GET /batches/", seconds=1.0)
        assert server.calls()["POST /batches"] == 1
        with Store(path) as store:
            (batch,) = open_batches(store, "small", server.url)
            assert batch.keys == {request_key(one, backend(server.url)) for one in asked}
            assert batch.name == "batch-0"
