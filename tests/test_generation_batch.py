"""The Batch API: submit, poll, collect; resumed after a kill at every moment, never submitted twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import asking
import pytest
from asking import PRICES, Server, answers, chats, child, serving
from faulty_server import completion

from persodpo.generation.ask import generate
from persodpo.generation.store import Store

SECRET = "sk-canary-batches-0123456789"  # noqa: S105 - made up
ASKED = chats(f"prompt {number}" for number in range(30))
SETTINGS = {"batch": True, "concurrency": 1000}
backend = partial(asking.backend, **SETTINGS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "calls.jsonl") as started:
        yield started


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
    asked = chats(["good", "<<lines>>", "<<error>>", "<<garbage>>", "<<deep>>", "<<missing>>", "<<status>>"])
    via = backend(server.url)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed) == (2, {"rejected": 2, "timeout": 3})
    found = answers(store, asked, via)
    assert [answer.completion for answer in found[:2]] == [completion("good"), "one\u2028two\x85three"]
    # An unreadable line may be any prompt's that has none, and be billed.
    assert [answer.cost > 0 for answer in found] == [True, True, False, True, True, True, False]
    assert "no such thing" in found[2].error
    assert generate(asked, via, store, retry_failed=True).asked == 5
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
    assert "(expired)" in answers(store, asked, via)[1].error
    assert answers(store, asked, via)[1].cost == 0


def test_a_refused_batch_stops_the_model_and_is_forgotten(server: Server, store: Store) -> None:
    asked = chats(["good", "one <<refused>>"])
    summary = generate(asked, backend(server.url), store)
    assert "refused a batch (a prompt that is refused)" in summary.stopped
    assert (summary.left, store.spent()) == (2, 0.0)
    assert generate(asked[:1], backend(server.url), store).answered == 1


def test_an_endpoint_without_batches(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "none") as server:
        summary = generate(ASKED, backend(server.url), store)
    assert "has no Batch API" in summary.stopped
    assert (summary.left, store.spent()) == (30, 0.0)


def test_a_budget_makes_smaller_batches_and_is_never_passed(server: Server, store: Store) -> None:
    summary = generate(ASKED, backend(server.url), store, budget_usd=0.0006)
    assert 0 < summary.answered == 30 - summary.left < 30
    assert store.spent() <= 0.0006
    assert "budget" in summary.stopped
    assert server.calls()["POST /batches"] > 1


def test_use_above_what_was_set_aside_is_booked_and_stops_the_model(server: Server, store: Store) -> None:
    summary = generate(chats(["one <<use>>", "two"]), backend(server.url, concurrency=1), store)
    assert "more use than was allowed" in summary.stopped
    assert (summary.answered, summary.left, store.spent() > 0.1) == (1, 1, True)


def test_the_key_appears_nowhere(server: Server, tmp_path: Path, monkeypatch) -> None:
    """An answer that holds it is withheld, and paid for."""
    monkeypatch.setenv("BATCH_KEY", SECRET)
    asked, via = chats(["x", "a <<error>>", "a <<echo>>"]), backend(server.url, api_key_env="BATCH_KEY")
    with Store(tmp_path / "answers.sqlite") as store:
        generate(asked, via, store)
        withheld = answers(store, asked, via)[2]
    assert withheld.failure == "invalid_body"
    assert withheld.cost > 0
    assert {event["key"] for event in server.events("call")} == {f"Bearer {SECRET}"}
    for path in tmp_path.glob("answers.sqlite*"):
        assert SECRET.encode() not in path.read_bytes()


def kill_when(server: Server, path: Path, call: str, seconds: float = 0.0) -> None:
    """Start a run and kill it some time after the server has had a call."""
    with child(server, path, 30, **SETTINGS) as process:
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


def test_a_batch_under_way_is_waited_for_and_collected_whole_under_a_budget_that_it_uses_up(tmp_path: Path) -> None:
    """Even where the next runs ask for some of its prompts only, in other batches."""
    path = tmp_path / "answers.sqlite"
    with serving(tmp_path / "calls.jsonl", "--looks", "3") as server:
        kill_when(server, path, "GET /batches/")
        with Store(path) as store:
            aside = store.spent()
            other = backend(server.url, concurrency=7)
            assert generate(ASKED[:5], other, store, budget_usd=aside).skipped == 5
            assert generate(ASKED, backend(server.url), store, budget_usd=aside).skipped == 30
            assert 0 < store.spent() < aside
        assert server.calls()["POST /batches"] == 1
