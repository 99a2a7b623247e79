"""The Batch API: submit, poll, collect; resumed after a kill at every moment, never submitted twice."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import asking
import httpx2
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
    good = ["good", "<<lines>>", "<<status>>", "<<twice>>"]
    asked = chats([*good, "<<error>>", "<<garbage>>", "<<deep>>", "<<missing>>", "<<reason>>"])
    via = backend(server.url)
    summary = generate(asked, via, store)
    assert (summary.answered, summary.failed) == (4, {"rejected": 1, "timeout": 3, "invalid_body": 1})
    found = answers(store, asked, via)
    assert found[1].completion == "one\u2028two\x85three"
    assert [found[number].completion for number in (0, 2, 3)] == [completion(good[number]) for number in (0, 2, 3)]
    # What a batch that is complete does not show may have been billed.
    assert [answer.cost > 0 for answer in found] == [*[True] * 4, False, *[True] * 4]
    assert "no such thing" in found[4].error
    assert generate(asked, via, store, retry_failed=True).asked == 5
    assert server.calls()["POST /batches"] == 2


@pytest.mark.parametrize("fault", ["no_output", "no_file", "half_file", "html_file", "html_state"])
def test_a_batch_that_is_shown_wrongly_is_kept_for_the_next_run(tmp_path: Path, store: Store, fault: str) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", fault) as server:
        stopped = generate(ASKED, backend(server.url), store)
        assert re.search("failed on a batch|does not find .*No such file.*run again", stopped.stopped)
        assert (stopped.left, store.spent() > 0) == (30, True)
        assert generate(ASKED, backend(server.url), store).skipped == 30
        assert all(answer.completion for answer in answers(store, ASKED, backend(server.url)))
        assert server.calls()["POST /batches"] == 1


@pytest.mark.parametrize("fault", ["no_output", "half_file"])
def test_a_batch_that_the_endpoint_knows_is_not_given_up(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(tmp_path / "calls.jsonl", "--looks", "2", "--batch-fault", fault) as server:
        kill_when(server, path, "GET /batches/")
        with Store(path) as store:
            stopped = generate(ASKED, backend(server.url), store, retry_failed=True)
            assert "its file of answers is not whole" in stopped.stopped
            assert generate(ASKED, backend(server.url), store).skipped == 30
            assert all(answer.completion for answer in answers(store, ASKED, backend(server.url)))
        assert server.calls()["POST /batches"] == 1


def test_a_model_with_a_batch_under_way_is_not_asked_otherwise(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "html_state") as server:
        generate(ASKED, backend(server.url), store)
        assert "set batch: true" in generate(ASKED, asking.backend(server.url), store).stopped
        assert not server.received()
        assert generate(ASKED, backend(server.url), store).skipped == 30
        assert generate(ASKED[:2], asking.backend(server.url), store).answered == 2


@pytest.mark.parametrize("fault", ["times", "failed", "words"])
def test_an_answer_is_kept_whatever_its_batch_says_of_itself(tmp_path: Path, store: Store, fault: str) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", fault) as server:
        assert generate(ASKED, backend(server.url), store).answered == 30


def test_a_batch_that_the_endpoint_has_forgotten_is_paid_for_once_it_is_given_up(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "gone") as server:
        assert generate(ASKED[:20], backend(server.url), store).left == 20
        spent = store.spent()
        assert "does not find a batch" in generate(ASKED, backend(server.url), store).stopped
        assert store.spent() == spent
        assert generate(ASKED[20:], backend(server.url), store, retry_failed=True).left == 10
        assert store.spent() > spent
        assert {answer.failure for answer in answers(store, ASKED[:20], backend(server.url))} == {"timeout"}
        assert server.calls()["POST /batches"] == 2


def test_a_batch_that_another_key_does_not_find_waits_for_its_own(tmp_path: Path, store: Store, monkeypatch) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "html_state") as server:
        via = backend(server.url, api_key_env="BATCH_KEY")
        for key, words in ((SECRET, "failed on a batch"), ("sk-another", "with the key in BATCH_KEY .*No such batch")):
            monkeypatch.setenv("BATCH_KEY", key)
            assert re.search(words, generate(ASKED, via, store).stopped)
        monkeypatch.setenv("BATCH_KEY", SECRET)
        assert generate(ASKED, via, store).skipped == 30
        assert all(answer.completion for answer in answers(store, ASKED, via))


def test_a_file_of_errors_that_is_gone_costs_no_answer(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "no_errors") as server:
        summary = generate(chats(["good", "<<error>>"]), backend(server.url), store)
        assert (summary.answered, summary.failed, summary.stopped) == (1, {"timeout": 1}, None)


def test_a_lost_batch_does_not_stop_a_model_whose_endpoint_lists_none(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "no_list") as server:
        assert generate(ASKED, backend(server.url), store).left == 30
        assert generate(ASKED, backend(server.url), store).answered == 30


def test_a_batch_of_a_time_without_prices_is_booked(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "html_state") as server:
        assert generate(ASKED[1:], backend(server.url, prices=None), store).left == 29
        summary = generate(ASKED, backend(server.url), store, budget_usd=1.0)
        assert (summary.skipped, summary.answered, summary.stopped) == (29, 1, None)
        assert store.spent() > 20 * summary.cost


def test_a_reply_that_comes_slowly_is_not_waited_for(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "drip") as server:
        stopped = generate(ASKED, backend(server.url, timeout_seconds=0.5, attempts=1), store).stopped
        assert "cannot be reached (no answer in time)" in stopped


@pytest.mark.parametrize("fault", ["unmade", "same"])
def test_money_of_a_batch_that_may_have_been_made_stays_set_aside(tmp_path: Path, store: Store, fault: str) -> None:
    """The list of batches goes on for ever, or is empty, and does not show it."""
    with serving(tmp_path / "calls.jsonl", "--batch-fault", fault) as server:
        for runs in (1, 2):
            assert generate(ASKED, backend(server.url), store).left == 30
            assert store.spent() == pytest.approx(runs * sum(backend(server.url).highest_cost(one) for one in ASKED))


def test_a_batch_is_collected_at_its_own_address_only(tmp_path: Path, store: Store) -> None:
    with serving(tmp_path / "calls.jsonl", "--batch-fault", "html_state") as server:
        generate(ASKED, backend(server.url), store)
        moved = generate(ASKED, backend(server.url.replace("127.0.0.1", "localhost")), store)
        assert f"another address ({server.url})" in moved.stopped
        assert generate(ASKED, backend(f"{server.url}/"), store).skipped == 30
        assert server.calls()["POST /batches"] == 1


def test_error_lines_are_classified(server: Server, store: Store) -> None:
    kinds = {
        "500": "server_error", "429": "rate_limited", "batch_expired": "timeout", "400": "rejected", "401": "rejected",
        "context_length_exceeded": "context_too_long",
    }  # fmt: skip
    asked, via = chats(f"a <<error={code}>>" for code in kinds), backend(server.url)
    generate(asked, via, store)
    found = answers(store, asked, via)
    assert [answer.failure for answer in found] == list(kinds.values())
    assert [answer.cost > 0 for answer in found] == [True, *[False] * 5]


def test_an_expired_batch_accounts_for_every_prompt(server: Server, store: Store) -> None:
    asked, via = chats(["good", "one <<expired>>"]), backend(server.url)
    assert generate(asked, via, store).failed == {"timeout": 1}
    assert "(expired)" in answers(store, asked, via)[1].error
    assert answers(store, asked, via)[1].cost == 0


def test_a_refused_batch_stops_the_model_and_is_forgotten(server: Server, store: Store) -> None:
    asked = chats(["good", "one <<refused>>"])
    summary = generate(asked, backend(server.url), store)
    assert "a prompt that is refused" in summary.stopped
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
        with serving(tmp_path / "named.jsonl", "--batch-fault", "named") as other:
            named = backend(other.url, model="named", api_key_env="BATCH_KEY")
            assert "names no id that can be kept" in generate(asked, named, store).stopped
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
        process.wait()
    for _ in range(3):  # later connections are served after what the dead one has sent
        httpx2.get(f"{server.url}/batches").raise_for_status()


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
        assert generate(ASKED, via, store).left == 30
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
