"""The Batch API: submit, poll, collect; resumed after a kill at every moment, never submitted twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import PRICES, Server, answers, chats, serving
from faulty_server import completion

from persodpo.config import OpenAIModel
from persodpo.generation.ask import generate
from persodpo.generation.batch import BatchBackend
from persodpo.generation.store import Store

TESTS = Path(__file__).parent
SECRET = "sk-canary-batches-0123456789"  # noqa: S105 - made up
ASKED = chats(f"dialogue {number:02d}" for number in range(30))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "calls.jsonl") as started:
        yield started


def backend(url: str, **changes: Any) -> BatchBackend:
    settings = {
        "kind": "openai", "model": "small", "base_url": url, "batch": True, "concurrency": 1000, "poll_seconds": 0.05,
        "timeout_seconds": 5.0, "prices": PRICES, **changes,
    }  # fmt: skip
    return BatchBackend(OpenAIModel(**settings))


def test_one_batch_answers_all(server: Server, store: Store) -> None:
    via = backend(server.url)
    summary = generate(ASKED, via, store)
    assert summary.answered == 30
    found = answers(store, ASKED, via)
    assert [answer.completion for answer in found] == [completion(one.texts[-1]) for one in ASKED]
    assert {(answer.batch_size, answer.latency, answer.hardware) for answer in found} == {(30, 60.0, "batch API")}
    for answer in found:
        assert answer.cost == PRICES.cost(answer.prompt_tokens, answer.completion_tokens) > 0
    assert summary.cost == pytest.approx(store.spent())
    assert generate(ASKED, via, store).skipped == 30
    assert server.calls()["POST /batches"] == 1


def test_each_line_of_a_result_is_read_by_itself_and_failures_are_retried(server: Server, store: Store) -> None:
    """An answer with line separators, lines that nobody can decode, an error and a prompt without a line."""
    odd = ["<<lines>>", "<<error>>", "<<garbage>>", "<<deep>>", "<<missing>>"]
    asked, via = chats(["good", *odd]), backend(server.url)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed) == (2, {"rejected": 1, "timeout": 3})
    found = answers(store, asked, via)
    assert [answer.completion for answer in found[:2]] == [completion("good"), "one\u2028two\x85three"]
    assert [answer.cost > 0 for answer in found] == [True, True, *[False] * 4]
    assert "no such thing" in found[2].error
    assert generate(asked, via, store, retry_failed=True).asked == 4
    assert server.calls()["POST /batches"] == 2


def test_error_lines_are_classified(server: Server, store: Store) -> None:
    kinds = {
        "500": "server_error", "429": "rate_limited", "batch_expired": "timeout", "400": "rejected", "401": "rejected",
        "context_length_exceeded": "context_too_long",
    }  # fmt: skip
    asked, via = chats(f"a <<error={code}>>" for code in kinds), backend(server.url)
    generate(asked, via, store)
    assert [answer.failure for answer in answers(store, asked, via)] == list(kinds.values())
    assert store.spent() == 0.0


def test_an_expired_batch_accounts_for_every_prompt(server: Server, store: Store) -> None:
    asked, via = chats(["good", "one <<expired>>"]), backend(server.url)
    assert generate(asked, via, store).failed == {"timeout": 1}
    assert "the batch ended (expired)" in answers(store, asked, via)[1].error


def test_a_refused_batch_stops_the_model_and_is_forgotten(server: Server, store: Store) -> None:
    asked = chats(["good", "one <<refused>>"])
    summary = generate(asked, backend(server.url), store)
    assert "refused a batch of model small (a prompt that is refused)" in summary.stopped
    assert (summary.left, store.spent()) == (2, 0.0)
    assert generate(asked[:1], backend(server.url), store).answered == 1


def test_an_endpoint_without_batches(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "none") as server:
        summary = generate(ASKED, backend(server.url), store)
    assert "has no Batch API for model small" in summary.stopped
    assert "set batch: false" in summary.stopped
    assert (summary.left, store.spent()) == (30, 0.0)


def test_a_budget_makes_smaller_batches_and_is_never_passed(server: Server, store: Store) -> None:
    summary = generate(ASKED, backend(server.url), store, budget_usd=0.0006)
    assert 0 < summary.answered == 30 - summary.left < 30
    assert store.spent() <= 0.0006
    assert "budget" in summary.stopped
    assert server.calls()["POST /batches"] > 1


def test_use_above_what_was_set_aside_is_booked_and_stops_the_model(server: Server, store: Store) -> None:
    asked = chats(["one <<use>>", "two"])
    summary = generate(asked, backend(server.url, concurrency=1), store)
    assert "reports more use than model small was allowed" in summary.stopped
    assert (summary.answered, summary.left, store.spent() > 0.1) == (1, 1, True)


def test_the_key_appears_nowhere(server: Server, tmp_path: Path, monkeypatch) -> None:
    """An answer that holds it is withheld, and paid for."""
    monkeypatch.setenv("BATCH_KEY", SECRET)
    asked, via = chats(["x", "a <<error>>", "a <<echo>>"]), backend(server.url, api_key_env="BATCH_KEY")
    with Store(tmp_path / "answers.sqlite") as store:
        generate(asked, via, store)
        withheld = answers(store, asked, via)[2]
    assert (withheld.failure, withheld.error) == (
        "invalid_body", "the answer holds the API key, so it is not stored",
    )  # fmt: skip
    assert withheld.cost > 0
    assert {event["key"] for event in server.events()} == {f"Bearer {SECRET}"}
    for path in tmp_path.glob("answers.sqlite*"):
        assert SECRET.encode() not in path.read_bytes()


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_generation_batch import ASKED, backend
from persodpo.generation.ask import generate
from persodpo.generation.store import Store
with Store(Path(sys.argv[3])) as store:
    generate(ASKED, backend(sys.argv[2]), store)
"""


def kill_when(server: Server, path: Path, call: str, seconds: float = 0.0) -> None:
    """Start a run and kill it some time after the server has had a call."""
    with subprocess.Popen([sys.executable, "-c", RUN, str(TESTS), server.url, str(path)]) as process:
        for _ in range(600):
            if any(name.startswith(call) for name in server.calls()):
                break
            time.sleep(0.05)
        time.sleep(seconds)
        process.kill()
    time.sleep(0.3)  # the server comes to the end of what it had in hand; what it has not heard of yet nobody can find


@pytest.mark.parametrize(
    ("fault", "call", "seconds"),
    [
        ("", "POST /files", 0.0),  # before it was submitted, or just after
        ("create", "POST /batches", 0.3),  # submitted, but its name never learnt
    ],
)
def test_a_killed_run_submits_nothing_twice(tmp_path: Path, fault: str, call: str, seconds: float) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(tmp_path / "calls.jsonl", "--batch-fault", fault) as server:
        kill_when(server, path, call, seconds)
        with Store(path) as store:
            summary = generate(ASKED, backend(server.url), store)
            assert summary.answered + summary.skipped == 30
            found = answers(store, ASKED, backend(server.url))
            assert all(answer.completion for answer in found)
            assert store.spent() == pytest.approx(sum(answer.cost for answer in found))
        assert server.calls()["POST /batches"] == 1


def test_a_batch_whose_making_is_never_confirmed_is_not_made_twice(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "create") as server:
        via = backend(server.url, timeout_seconds=0.5)
        assert "cannot be reached" in generate(ASKED, via, store).stopped
        assert generate(ASKED, via, store).skipped == 30
        assert server.calls()["POST /batches"] == 1


@pytest.mark.parametrize("changes", [{}, {"concurrency": 7}])
def test_a_batch_that_is_paid_for_is_collected_whole_under_a_budget_that_it_uses_up(tmp_path: Path, changes) -> None:
    """Even where the next run asks for some of its prompts only, or in other batches."""
    path = tmp_path / "answers.sqlite"
    with serving(tmp_path / "calls.jsonl", "--looks", "3") as server:
        kill_when(server, path, "GET /batches/")
        with Store(path) as store:
            aside = store.spent()
            assert generate(ASKED[:5], backend(server.url, **changes), store, budget_usd=aside).skipped == 5
            assert generate(ASKED, backend(server.url), store, budget_usd=aside).skipped == 30
            assert 0 < store.spent() < aside
        assert server.calls()["POST /batches"] == 1


def test_a_batch_under_way_is_waited_for_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(tmp_path / "calls.jsonl", "--looks", "1000000") as server:
        for _ in range(2):
            kill_when(server, path, "GET /batches/", seconds=1.0)
        assert server.calls()["POST /batches"] == 1
        with Store(path) as store:
            (held,) = store.reservations("batch small ")
            assert held.endswith(" batch-0")
