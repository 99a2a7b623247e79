"""From requests to stored answers, over a real server that misbehaves on demand (`tests/faulty_server.py`).

Everything goes through the public doors: `generate`, `generate_all`, `forecast` and the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import os
import pty
import random
import re
import signal
import socket
import string
import subprocess
import sys
import termios
import threading
import time
import traceback
from base64 import b64encode, urlsafe_b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from asking import Server, answers, backend, chat, chats, child, serving
from conftest import file_size_limit
from faulty_server import completion
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from persodpo.errors import PersodpoError
from persodpo.generation.ask import generate, generate_all
from persodpo.generation.client import Mask, request_body
from persodpo.generation.endpoint import FAILURES_IN_A_ROW, OpenAIBackend, Pace
from persodpo.generation.requests import Answer, Job, Request, request_key
from persodpo.generation.store import CHUNK, Store
from persodpo.generation.summary import Summary, forecast

TESTS = Path(__file__).parent
CANARY = "sk-canary/7f+3Q=="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log.jsonl") as started:
        yield started


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    """A server that takes 100 ms for everything."""
    with serving(tmp_path / "log.jsonl", "--latency", "0.1") as started:
        yield started


def ask_one(text: str, asked: OpenAIBackend, store: Store) -> Answer:
    generate([chat(text)], asked, store)
    (found,) = answers(store, [chat(text)], asked)
    assert found is not None
    return found


# -------------------------------------------------------------------------------------------- asking and not again


def test_answers_are_stored_and_never_asked_again(server: Server, store: Store) -> None:
    texts = [f"hello {number}" for number in range(200)]
    first = generate(chats([*texts, *texts]), backend(server.url), store)
    assert (first.asked, first.answered, first.failed, first.skipped, first.stopped) == (200, 200, {}, 200, None)
    for text, found in zip(texts, answers(store, chats(texts), backend(server.url)), strict=True):
        assert (found.outcome, found.completion, found.finish_reason) == ("answered", completion(text), "stop")
        assert (found.attempts, found.failure, found.error) == (1, None, None)
        assert found.cost == pytest.approx((found.prompt_tokens + 2 * found.completion_tokens) / 1e6)
        assert 0 < found.latency < 5
    assert first.cost == pytest.approx(store.spent())
    again = generate(iter(chats([*texts, "one more"])), backend(server.url), store)
    assert (again.asked, again.answered, again.skipped) == (1, 1, 200)
    # Address and pace shape no answer.
    moved = backend("http://127.0.0.1:9/v1", concurrency=1, timeout_seconds=1.0, attempts=1, prices=None)
    assert generate(chats(texts), moved, store).skipped == 200
    assert Counter(event["prompt"] for event in server.received(*texts)) == dict.fromkeys(texts, 1)


def test_two_jobs_of_one_model_ask_nothing_twice(slow: Server, store: Store) -> None:
    texts = [f"twice {number}" for number in range(20)]
    found = generate_all([Job(chats(texts), backend(slow.url)) for _ in range(2)], store)
    assert sorted(summary.asked for summary in found) == [0, 20]
    assert len(slow.received()) == 20


def test_what_shapes_an_answer_is_sent_and_asked_anew(server: Server, store: Store) -> None:
    request, text = chat("shaped"), "shaped"
    ways = [
        (backend(server.url), request),
        (backend(server.url), replace(request, temperature=0.5)),
        (backend(server.url), replace(request, temperature=None)),
        (backend(server.url), replace(request, seed=3)),
        (backend(server.url), replace(request, max_new_tokens=31)),
        (backend(server.url), replace(request, template="another")),
        (backend(server.url), replace(request, prompt=text)),
        (backend(server.url, served_as="small-v2"), request),
        (backend(server.url, model="other"), request),
        (backend(server.url, json_keys=("reasoning", "response")), request),
    ]
    for asked, changed in ways:
        assert generate([changed], asked, store).answered == 1
        assert generate([changed], asked, store).skipped == 1
    received = server.received(text)
    schema = {
        "type": "object", "properties": {"reasoning": {"type": "string"}, "response": {"type": "string"}},
        "required": ["reasoning", "response"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    plain = {"model": "small", "temperature": 0.0, "max_tokens": 30}
    assert [event["fields"] for event in received] == [
        plain, {**plain, "temperature": 0.5}, {"model": "small", "max_tokens": 30}, {**plain, "seed": 3},
        {**plain, "max_tokens": 31}, plain, plain, {**plain, "model": "small-v2"}, {**plain, "model": "other"},
        {**plain, "response_format": form},
    ]  # fmt: skip
    _, body = request_body(backend("https://api.openai.com/v1").settings, (), request)
    assert (body["max_completion_tokens"], "max_tokens" in body) == (30, False)
    assert [event["path"].rpartition("/v1/")[2] for event in received[5:8]] == [
        "chat/completions", "completions", "chat/completions",
    ]  # fmt: skip


def test_concurrency_is_used_and_bounded(slow: Server, store: Store) -> None:
    started = time.perf_counter()
    generate(chats(f"many {number}" for number in range(48)), backend(slow.url, concurrency=12), store)
    assert time.perf_counter() - started < 2.4  # one after another: 4.8 s
    events = sorted([*slow.events("received"), *slow.events("delivered")], key=lambda event: event["time"])
    under_way = most = 0
    for event in events:
        under_way += 1 if event["event"] == "received" else -1
        most = max(most, under_way)
    assert most == 12


def test_requests_are_taken_as_they_are_needed(slow: Server, store: Store) -> None:
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            taken += 1
            if taken > 250:
                raise PersodpoError("The dialogues end here.")
            yield chat(f"endless {taken}")

    seen: list[int] = []
    timer = threading.Timer(0.4, lambda: seen.append(taken))
    timer.start()
    found = generate(endless(), backend(slow.url, concurrency=16), store)
    assert seen[0] <= 192
    assert found.stopped == "The dialogues end here."
    assert found.answered + found.left == 250


# ------------------------------------------------------------------------------------------------ passing faults

PASSING = {
    "status_408": "timeout", "status_409": "server_error", "status_429": "rate_limited", "status_500": "server_error",
    "status_503": "server_error", "hang": "timeout", "cut": "connection_cut", "invalid": "invalid_body",
    "status_504": "server_error", "html": "invalid_body", "deep": "invalid_body", "broken_off": "invalid_body",
    "odd_reason": "invalid_body",
}  # fmt: skip
UNBILLED = {"status_409", "status_429", "status_503"}  # after the others a model may have answered, unseen


def test_passing_faults_are_tried_again(server: Server, store: Store) -> None:
    asked = backend(server.url, timeout_seconds=1.0, concurrency=13)
    texts = {fault: f"passing <<fault={fault} times=2>>" for fault in PASSING}
    assert generate(chats(texts.values()), asked, store).answered == len(PASSING)
    for (fault, text), found in zip(texts.items(), answers(store, chats(texts.values()), asked), strict=True):
        assert (found.completion, found.attempts, fault) == (completion(text), 3, fault)
        known = (found.prompt_tokens + 2 * found.completion_tokens) / 1e6
        assert (found.cost == pytest.approx(known)) == (fault in UNBILLED), fault


def test_lasting_faults_are_accounted_for_and_retried_on_request(server: Server, store: Store) -> None:
    asked = backend(server.url, timeout_seconds=0.6, concurrency=13, attempts=2)
    texts = chats(f"lasting <<fault={fault} times=2>>" for fault in PASSING)
    found = generate(texts, asked, store)
    assert (found.answered, found.failed) == (0, Counter(PASSING.values()))
    for failure, answer in zip(PASSING.values(), answers(store, texts, asked), strict=True):
        assert (answer.failure, answer.attempts, answer.completion) == (failure, 2, None)
        assert answer.error
    spent = store.spent()
    assert found.cost == pytest.approx(spent)
    assert generate(texts, asked, store).skipped == len(PASSING)
    again = generate(texts, asked, store, retry_failed=True)
    assert again.answered == len(PASSING)
    assert store.spent() == pytest.approx(spent + again.cost)
    assert generate(texts, asked, store, retry_failed=True).skipped == len(PASSING)


@pytest.mark.parametrize(
    "after",
    [
        "Mon,_01_Jan_2024_00:00:00_+99999999999999999999",
        "nan",
        "-1",
        "9" * 400,
        "soon",
        "Thu,_01_Jan_1970_00:00:00_GMT",
    ],
)
def test_an_odd_retry_after_is_ignored(server: Server, store: Store, after: str) -> None:
    text = f"odd wait <<fault=status_503 times=1 after={after}>>"
    assert ask_one(text, backend(server.url), store).attempts == 2
    first, second = server.received(text)
    assert second["time"] - first["time"] < 0.5


def test_retry_after_is_waited_for_unless_it_is_too_long(server: Server, store: Store) -> None:
    text = "first <<fault=status_429 times=1 after=1>>"
    assert ask_one(text, backend(server.url), store).attempts == 2
    first, second = server.received(text)
    assert second["time"] - first["time"] >= 1.0
    found = generate([chat("long <<fault=status_429 after=3600>>")], backend(server.url), store)
    assert found.left == 1
    assert "asks for a long wait (3,600 s)" in found.stopped


# --------------------------------------------------------------------------------------------- outcomes of a call


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("refusal", ("answered", "I will not say that.", "refusal", None)),
        ("filter", ("answered", "", "content_filter", None)),
        ("order", ("answered", completion("odd <<fault=order>>"), "stop", None)),
        ("length", ("answered", completion("odd <<fault=length>>"), "length", None)),
        ("surrogate", ("answered", "half \ufffd and \x00", "stop", None)),
        ("parts", ("answered", "one two", "stop", None)),
        ("reasoning", ("answered", completion("odd <<fault=reasoning>>"), "stop", None)),
        ("empty_choices", ("failed", None, None, "no_choice")),
        ("context", ("failed", None, None, "context_too_long")),
        ("created", ("answered", completion("odd <<fault=created>>"), "stop", None)),
        ("odd_header", ("answered", completion("odd <<fault=odd_header>>"), "stop", None)),
        *((fault, ("failed", None, None, "rejected")) for fault in ("status_400", "status_422")),
        *((fault, ("failed", None, None, "invalid_body")) for fault in (
            "odd_parts", "odd_type", "null_part", "wrong_shape", "nested", "list", "null_message", "number", "bomb",
            "endless",
        )),
    ],
)  # fmt: skip
def test_odd_answers_are_outcomes_and_asked_once(server: Server, store: Store, fault: str, expected: tuple) -> None:
    text = f"odd <<fault={fault}>>"
    found = ask_one(text, backend(server.url), store)
    assert (found.outcome, found.completion, found.finish_reason, found.failure) == expected
    assert bool(found.error) == (expected[0] == "failed")
    assert generate([chat(text)], backend(server.url), store).skipped == 1
    assert len(server.received(text)) == 1


def test_an_error_that_comes_as_an_answer_is_tried_again(server: Server, store: Store) -> None:
    found = ask_one("says 200 <<fault=error_body times=1>>", backend(server.url), store)
    assert (found.outcome, found.attempts) == ("answered", 2)
    found = ask_one("says 200 <<fault=error_body>>", backend(server.url, attempts=2), store)
    assert (found.failure, found.error, found.cost) == ("rate_limited", "429: Slow down.", 0)


def test_a_prompt_that_no_server_can_be_sent_fails_alone(server: Server, store: Store) -> None:
    found = generate(chats(["half \ud83d", "whole"]), backend(server.url), store)
    assert (found.answered, found.failed, found.stopped) == (1, {"rejected": 1}, None)


def test_redirects_are_not_followed(server: Server, store: Store) -> None:
    found = generate([chat("led away <<fault=redirect>>")], backend(server.url), store)
    assert "307 to /v1/elsewhere" in found.stopped
    assert [event["path"] for event in server.received("led away <<fault=redirect>>")] == ["/v1/chat/completions"]
    assert (found.left, store.spent()) == (1, 0.0)


# ----------------------------------------------------------------------------------------------- stopping a model

STOPS = {
    "status_401": r"refuses the key in THE_KEY \(401: .*\); set api_key_env",
    "status_403": r"denies the key in THE_KEY this model \(403: .*\); ask for access",
    "status_404": r"does not know 'bad-v1' \(404: .*\); correct served_as, or base_url",
    "status_402": r"has no credit left for the key in THE_KEY \(402: .*\); top up",
    "quota": r"has no credit left for the key in THE_KEY \(429: No credit\.\); top up",
}


@pytest.mark.parametrize("fault", STOPS)
def test_a_lasting_fault_stops_its_model_and_no_other(
    server: Server, store: Store, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", CANARY)
    bad = backend(server.url, model="bad", served_as="bad-v1", api_key_env="THE_KEY", concurrency=2)
    texts = [f"{fault} {number} <<fault={fault}>>" for number in range(90)]
    good = [f"{fault} good {number}" for number in range(90)]
    stopped, fine = generate_all([Job(chats(texts), bad), Job(chats(good), backend(server.url))], store)
    assert re.search(f"{server.url}.* model bad.* {STOPS[fault]}", stopped.stopped)
    assert (stopped.asked, stopped.left) == (0, 90)
    assert str(stopped).endswith(f"90 left to do: {stopped.stopped}")
    assert len(server.received(*texts)) <= 2
    assert (fine.answered, fine.stopped) == (90, None)
    assert list(store.missing(request_key(chat(text), bad) for text in texts[:2]))


def test_a_single_prompt_may_be_denied(server: Server, store: Store) -> None:
    asked = backend(server.url, concurrency=1)
    found = generate(chats(["welcome", "unwelcome <<fault=status_403>>", "welcome again"]), asked, store)
    assert (found.answered, found.failed, found.stopped) == (2, {"rejected": 1}, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_server_that_cannot_be_reached(store: Store, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://{host}:{free.getsockname()[1]}/v1"
    started = time.perf_counter()
    found = generate(chats(f"hello {number}" for number in range(100)), backend(url, attempts=50), store)
    assert time.perf_counter() - started < 5
    assert re.search(rf"{url}.* cannot be reached \(.+\)", found.stopped)
    assert (found.asked, found.left) == (0, 100)


def test_a_server_that_goes_away(tmp_path: Path, store: Store) -> None:
    texts = [f"going {number}" for number in range(400)]
    with serving(tmp_path / "log.jsonl", "--latency", "0.02") as leaving:
        asked = backend(leaving.url, concurrency=4, attempts=3)

        def leave() -> None:
            while len(leaving.events("delivered")) < 20:
                time.sleep(0.05)
            leaving.process.kill()

        threading.Thread(target=leave, daemon=True).start()
        found = generate(chats(texts), asked, store)
    assert "cannot be reached" in found.stopped
    assert found.answered > 4
    assert found.answered + sum(found.failed.values()) + found.left == 400
    assert sum(found.failed.values()) <= 4


def test_failures_in_a_row_stop_the_model(server: Server, store: Store) -> None:
    texts = [f"row {number} <<fault=status_400>>" for number in range(100)]
    found = generate(chats(texts), backend(server.url, concurrency=1), store)
    assert found.failed == {"rejected": FAILURES_IN_A_ROW}
    assert found.left == 100 - FAILURES_IN_A_ROW
    assert re.search(r"20 prompts in a row \(rejected, 400: ", found.stopped)
    long = [f"long {number} <<fault=context>>" for number in range(40)]
    assert generate(chats(long), backend(server.url), store).failed == {"context_too_long": 40}


def test_an_error_of_one_backend_is_raised_after_the_others_are_done(slow: Server, store: Store) -> None:
    class Broken(OpenAIBackend):
        async def run(self, work):
            raise ZeroDivisionError

    broken = Broken(backend(slow.url, model="broken").settings)
    texts = [f"beside {number}" for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        generate_all([Job(chats(texts), broken), Job(chats(texts), backend(slow.url))], store)
    assert generate(chats(texts), backend(slow.url), store).skipped == 20


# ------------------------------------------------------------------------------------------------------ the API key


@pytest.mark.parametrize("value", [None, "  \n", f"{CANARY}\x07"])
def test_a_key_that_is_none_is_named(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, value) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv("LAB_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("LAB_KEY", value)
    found = generate([chat("keyless")], backend(server.url, api_key_env="LAB_KEY"), store)
    assert "LAB_KEY" in found.stopped
    assert CANARY not in found.stopped
    assert found.left == 1


def test_a_server_of_this_machine_is_asked_past_any_proxy(server: Server, store: Store, monkeypatch) -> None:
    for variable in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert generate([chat("near")], backend(server.url), store).answered == 1
    monkeypatch.setenv("ALL_PROXY", "strange://host")
    assert "ALL_PROXY" in generate([chat("far")], backend("http://far.invalid/v1"), store).stopped
    monkeypatch.setenv("ALL_PROXY", "http://host:port")
    assert "ALL_PROXY" in generate([chat("far")], backend("http://far.invalid/v1"), store).stopped
    monkeypatch.delenv("ALL_PROXY")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    assert "SSL_CERT_FILE" in generate([chat("far")], backend("https://far.invalid/v1"), store).stopped


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_what_a_proxy_says_shows_no_password_of_it(server: Server, store: Store, monkeypatch, scheme: str) -> None:
    login = f"{scheme}me:{CANARY.replace('/', '%2F')}@"
    monkeypatch.setenv("HTTP_PROXY", server.url.replace("http://", login).removesuffix("/v1"))
    found = ask_one("far <<fault=status_400>>", backend("http://far.invalid/v1"), store)
    assert found.error == "400: words that hold a key or password"
    assert "Basic" in server.received("far <<fault=status_400>>")[0]["key"]


def test_an_address_that_swallows_all_is_unreachable_and_costs_nothing(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as held:
        for _ in range(3):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        found = generate([chat("x")], backend(url, timeout_seconds=1.0), store)
    assert "cannot be reached" in found.stopped
    assert (found.left, store.spent()) == (1, 0.0)


def test_the_key_is_sent_to_its_own_endpoint_only(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever variables of the environment the client reads by itself."""
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(variable, CANARY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: {CANARY}\nX-Key: {CANARY}\nHost: {CANARY}\né: x")
    monkeypatch.setenv("LAB_KEY", " lab-key \n")
    generate([chat("with a key")], backend(server.url, api_key_env="LAB_KEY"), store)
    generate([chat("without a key")], backend(server.url), store)
    assert server.received("with a key")[0]["key"] == "Bearer lab-key"
    assert server.received("without a key")[0]["key"] == "Bearer none"
    assert CANARY not in json.dumps(server.received("with a key", "without a key"))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://[::1/v1",
        "http://host:abc/v1",
        "http://host:99999/v1",
        "http://999.1.1.1/v1",
        "http://[::::]/v1",
        "http://host/\x7f",
        "http://☃.invalid/v1",
        f"http://user:{CANARY}@host/v1",
        f"https://host/v1?key={CANARY}",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret(url: str) -> None:
    with pytest.raises(ValidationError, match=r"base_url of model small must read like") as caught:
        backend(url)
    with pytest.raises(ValidationError, match="1000000"):
        backend("http://host/v1", prices={"input_per_million": 1e308, "output_per_million": 1})
    assert CANARY not in str(caught.value)


def test_the_key_appears_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The server says the key, also where texts are cut; everything is logged that can be."""
    monkeypatch.setenv("THE_KEY", CANARY)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    caplog.set_level(logging.DEBUG)
    asked = backend(server.url, api_key_env="THE_KEY", attempts=2, concurrency=1)
    faults = [
        "status_500",
        "status_400",
        "status_429",
        "cut",
        "invalid",
        "echo",
        "key_in_shape",
        "key_in_reason",
        "status_401",
    ]
    texts = chats(f"key <<fault={fault}>>" for fault in faults)
    with Store(tmp_path / "answers.sqlite") as store:
        found = generate(texts, asked, store)
        assert (found.answered, sum(found.failed.values())) == (0, 8)
        rows = [repr(answer) for answer in answers(store, texts, asked)]
    assert "error='500: words that hold a key or password'" in rows[0]
    assert "401: words that hold a key or password" in found.stopped
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    said = [*rows, repr(found), str(found), repr(asked), repr(asked.settings), caplog.text, *capfd.readouterr()]
    assert server.received("key <<fault=cut>>")[0]["key"] == f"Bearer {CANARY}"
    for form in (CANARY, CANARY[:8], "canary"):
        assert form.encode() not in written
        assert not [text for text in said if text and form in text]


def test_the_key_is_in_no_traceback(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with the values of all local variables, as some tools print them."""
    monkeypatch.setenv("THE_KEY", CANARY)

    class Failing(Store):
        def write(self, entries):
            raise PersodpoError("The disk is full.")

    with Failing(tmp_path / "answers.sqlite") as store, pytest.raises(PersodpoError) as caught:
        generate([chat("traced <<fault=status_500>>")], backend(server.url, api_key_env="THE_KEY"), store)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "canary" not in "".join(shown.format())


def test_an_answer_is_stored_as_it_came(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of an answer may be a key somewhere; text of models is never rewritten."""
    monkeypatch.setenv("THE_KEY", "anything")
    found = ask_one("as it came <<fault=echo>>", backend(server.url, api_key_env="THE_KEY"), store)
    assert found.completion == "Your key is Bearer anything."


secrets = st.text(string.ascii_letters + string.digits + "-_/+=.", min_size=9, max_size=60)
ESCAPES = ["%{:02X}", "%{:02x}", "\\u{:04x}", "&#{};", "&#x{:x};"]
FORMS = [
    str, repr, json.dumps, lambda text: json.dumps(json.dumps(text)), html.escape, lambda text: text * 2, str.upper,
    "\n".join, lambda text: text.encode().hex(), lambda text: text[1:9],
    *(lambda text, before=before: b64encode(f"{before}{text}\n".encode()).decode() for before in ("", "Bearer ", "user:")),
    lambda text: urlsafe_b64encode(text.encode()).decode(),
    *(lambda text, escape=escape: "".join(escape.format(ord(char)) for char in text) for escape in ESCAPES),
]  # fmt: skip


@given(secret=secrets, before=st.text(max_size=200), after=st.text(max_size=40))
def test_no_form_of_a_secret_passes_the_mask(secret: str, before: str, after: str) -> None:
    mask = Mask(secret)
    assert Mask("EMPTY").line("The glass is EMPTY.") == "The glass is EMPTY."
    for number, form in enumerate(FORMS):
        assert mask.line(f"400: {before[:40]} {form(secret)}") == "400: words that hold a key or password", number
        assert secret[:8] not in mask.line(f"{before} {'x' * 280} {form(secret)} {after}"), number
    plain = Mask(None).line(f"{before}\x1b[31m")
    assert len(plain) <= 300
    assert plain.isprintable()


# ---------------------------------------------------------------------------------------------- limits, forecasts


@settings(max_examples=100)
@given(
    limit=st.integers(1, 1000), tokens=st.lists(st.integers(0, 5000), min_size=1, max_size=60),
    gaps=st.lists(st.floats(0, 30), min_size=60, max_size=60), tokens_limit=st.integers(100, 100_000),
)  # fmt: skip
def test_no_minute_holds_more_than_the_limits(limit, tokens, gaps, tokens_limit) -> None:
    pace, now, slots = Pace(limit, tokens_limit), 0.0, []
    for size, gap in zip(tokens, gaps, strict=False):
        now += gap
        slots.append((pace.slot(size, now), size))
        assert slots[-1][0] >= now
    for start, _ in slots:
        minute = [(at, size) for at, size in slots if start <= at < start + 60 - 1e-6]
        assert len(minute) <= limit
        assert sum(size for _, size in minute[:-1]) <= tokens_limit + 1e-6


@pytest.mark.parametrize("limits", [{"requests_per_minute": 1200}, {"tokens_per_minute": 44_400}])
def test_requests_keep_to_the_pace(server: Server, store: Store, limits: dict[str, int]) -> None:
    texts = [f"paced {sorted(limits)[0][:8]} {number:02d}" for number in range(20)]
    generate(chats(texts), backend(server.url, concurrency=20, **limits), store)
    times = [event["time"] for event in server.received(*texts)]
    assert times[-1] - times[0] > 19 * 0.05 * 0.9


def test_requests_are_not_sent_together_after_a_standstill() -> None:
    async def send() -> list[float]:
        pace, sent = Pace(600, None), list[float]()

        async def one() -> None:
            await pace.wait(1)
            sent.append(time.monotonic())

        asking = asyncio.gather(*(one() for _ in range(8)))
        await asyncio.sleep(0.15)
        time.sleep(0.6)
        await asking
        return sent

    sent = asyncio.run(send())
    assert sent[7] - sent[2] > 0.4


def test_a_forecast_before_and_after_a_sample(server: Server, store: Store) -> None:
    texts = [f"forecast {number:03d}" for number in range(100)]
    asked = backend(server.url, concurrency=10)
    blind = forecast(chats(texts), asked, store)
    assert (blind.requests, blind.to_ask, blind.sample, blind.completion_tokens) == (100, 100, 0, 3000)
    assert blind.cost == pytest.approx((blind.prompt_tokens + 2 * 3000) / 1e6)
    assert blind.highest_cost == pytest.approx(sum(asked.highest_cost(chat(text)) for text in texts))
    assert blind.seconds is None
    assert forecast(chats(["same"] * 2 * CHUNK), asked, store).to_ask == 1
    generate(chats(texts[:40]), asked, store)
    known = forecast(chats(texts), asked, store)
    assert (known.requests, known.to_ask, known.sample) == (100, 60, 40)
    assert len(server.received(*texts)) == 40
    rest = generate(chats(texts), asked, store)
    assert known.prompt_tokens == pytest.approx(rest.prompt_tokens, rel=0.02)
    assert known.completion_tokens == pytest.approx(rest.completion_tokens, rel=0.02)
    assert known.cost == pytest.approx(rest.cost, rel=0.02)
    assert known.highest_cost > known.cost
    assert known.seconds > 0
    paced = forecast(chats(texts), backend(server.url, model="other", requests_per_minute=60, prices=None), store)
    assert (paced.to_ask, paced.seconds, paced.cost, paced.highest_cost) == (100, 100.0, None, None)
    assert "cost unknown" in str(paced)
    tokens = forecast(chats(texts), backend(server.url, model="other", tokens_per_minute=1000), store)
    assert tokens.seconds == pytest.approx(60 * (tokens.prompt_tokens + 3000) / 1000)


# ------------------------------------------------------------------------------------- interruptions and processes


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_ask_nothing_again(slow: Server, tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.sqlite", chats(f"prompt {number}" for number in range(300))
    via = backend(slow.url)
    key_of = {one.dialogue_id: request_key(one, via) for one in asked}
    source, stored_at = random.Random(3), {}
    for _ in range(3):
        with child(slow, path, 300) as process:
            lines = "".join(process.stdout.readline() for _ in range(20))
            time.sleep(source.uniform(0, 0.3))
            process.kill()
            acknowledged = set((lines + process.stdout.read()).split()) - {"open"}
        killed = time.time()
        with Store(path) as store:
            stored = {key for key, found in store.entries(key_of.values()) if found}
        assert acknowledged <= stored
        stored_at |= {key: stored_at.get(key, killed) for key in stored}
    assert 50 < len(stored_at) < 300
    with child(slow, path, 300) as process:
        assert f"asked {300 - len(stored_at)} left 0" in process.stdout.read()
    for event in slow.received():
        assert event["time"] < stored_at.get(key_of[event["prompt"]], float("inf"))
    lost = Counter(event["prompt"] for event in slow.received())
    assert sum(count - 1 for count in lost.values()) <= 3 * 16
    with Store(path) as store:
        assert [found.completion for found in answers(store, asked, via)] == [
            completion(one.dialogue_id) for one in asked
        ]


def test_a_process_waits_for_another_that_asks_its_model(slow: Server, tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with child(slow, path, 200) as one, child(slow, path, 200) as two:
        said = [process.stdout.read().splitlines()[-1] for process in (one, two)]
    assert sorted(said) == ["asked 0 left 0 None", "asked 200 left 0 None"]
    assert len(slow.received()) == 200


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Take interrupts as on a terminal, also where the tests run in the background and inherit that they be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(server: Server, answers: int) -> threading.Thread:
    """Send this program Ctrl-C once the server has delivered so many answers."""

    def watch() -> None:
        while len(server.events("delivered")) < answers:
            time.sleep(0.02)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_interrupt_of_a_notebook_ends_the_asking(slow: Server, store: Store) -> None:
    """A kernel runs cells inside a loop of its own, whose thread is the only one that an interrupt reaches."""

    async def cell() -> Summary:
        return generate(chats(f"cell {number}" for number in range(100)), backend(slow.url), store)

    loop = asyncio.new_event_loop()
    interrupt_after(slow, 16)
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    # What was under way at the interrupt may still arrive.
    time.sleep(0.5)
    asked = len(slow.received())
    time.sleep(0.5)
    assert len(slow.received()) == asked < 100
    assert loop.run_until_complete(cell()).skipped >= 8
    again = Counter(event["prompt"] for event in slow.received())
    assert len(again) == 100
    assert sum(count - 1 for count in again.values()) <= 8
    assert slow.billed() <= store.spent() + 1e-9
    loop.close()


def test_what_was_not_sent_before_an_interrupt_costs_nothing(server: Server, store: Store) -> None:
    interrupt_after(server, len(server.events("delivered")) + 1)
    with pytest.raises(KeyboardInterrupt):
        generate(chats(f"unsent {number}" for number in range(8)), backend(server.url, requests_per_minute=1), store)
    assert len([event for event in server.received() if "unsent" in event["prompt"]]) == 1
    assert store.spent() == sum(answer.cost for answer in answers(store, chats(["unsent 0"]), backend(server.url)))


def test_answers_that_wait_for_the_disk_survive_an_interrupt(slow: Server, tmp_path: Path) -> None:
    texts = [f"waiting {number}" for number in range(8)]

    class Slow(Store):
        def write(self, entries):
            """Be still writing when the interrupt comes, with the other answers waiting."""
            watch.join()
            time.sleep(0.1)
            super().write(entries)

    with Slow(tmp_path / "answers.sqlite") as store:
        watch = interrupt_after(slow, 8)
        with pytest.raises(KeyboardInterrupt):
            generate(chats(texts), backend(slow.url), store)
        assert sorted(event["prompt"] for event in slow.events("delivered")) == texts
        assert all(answers(store, chats(texts), backend(slow.url)))


class Failing(Store):
    """Cannot be written at first."""

    fails = 1

    def write(self, entries, run=None):
        self.fails -= 1
        if self.fails >= 0:
            time.sleep(0.02)
            raise PersodpoError("The answers are locked.")
        super().write(entries, run)


def test_answers_in_hand_outlive_a_write_that_fails_and_nobody_waits_for_its_money(
    slow: Server, tmp_path: Path
) -> None:
    """Two models, and money for one request: the second waits for it."""
    one, two = backend(slow.url, model="one", concurrency=1), backend(slow.url, model="two", concurrency=1)
    asked, budget = [chat("hello")], one.highest_cost(chat("hello"))
    with Failing(tmp_path / "answers.sqlite") as store:
        with pytest.raises(PersodpoError, match="locked"):
            generate_all([Job(asked, one), Job(asked, two)], store, budget_usd=budget)
        assert answers(store, asked, one)[0].completion == completion("hello")


def test_answers_in_hand_outlive_a_write_that_fails_after_its_worker_is_gone(slow: Server, tmp_path: Path) -> None:
    asked, via = chats(f"gone {number}" for number in range(8)), backend(slow.url)
    with Failing(tmp_path / "answers.sqlite") as store:
        store.fails = 2
        with pytest.raises(PersodpoError, match="locked"):
            generate(asked, via, store)
        delivered = [event["prompt"] for event in slow.events("delivered")]
        assert len(delivered) > 1
        assert all(answers(store, chats(delivered), via))


def test_a_disk_that_fails_in_the_middle_loses_nothing(server: Server, store: Store) -> None:
    texts = [f"disk {number}" for number in range(300)]
    with file_size_limit(150_000), pytest.raises(PersodpoError, match="refuses to read or write"):
        generate(chats(texts), backend(server.url), store)
    found = generate(chats(texts), backend(server.url), store)
    assert found.skipped > 10
    assert found.skipped + found.answered == 300


BAR = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from asking import backend, chats
from persodpo.generation.ask import generate_all
from persodpo.generation.requests import Job
from persodpo.generation.store import Store
with Store(Path(sys.argv[3])) as store:
    asked = chats(["a <<fault=status_400>>", *map(str, range(9))])
    jobs = [Job(asked, backend(sys.argv[2], model=m), 10) for m in "xy"]
    generate_all(jobs, store)
    generate_all(jobs, store, progress=False)
"""


def test_a_bar_a_model_counts_outcomes_on_a_terminal_only(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BAR, TESTS, server.url]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    subprocess.run([*command, tmp_path / "a.sqlite"], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how the end of a terminal reads
        os.close(ours)
    for model in "xy":
        assert re.search(rf"{model}: 100%.*10/10 .*(api_error=1, ok=9|ok=9, api_error=1), stored=0", shown.decode())
    quiet = subprocess.run([*command, tmp_path / "b.sqlite"], capture_output=True, check=True)
    assert (quiet.stdout, quiet.stderr) == (b"", b"")
