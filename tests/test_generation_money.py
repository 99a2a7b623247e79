"""Money: never above the budget, however many processes ask, whatever kills them, in whatever way requests end."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Server, answers, backend, chat, chats, child, serving
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persodpo.generation.ask import generate
from persodpo.generation.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log.jsonl") as started:
        yield started


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "log.jsonl", "--latency", "0.05", "--faults", "0.1") as started:
        yield started


def test_several_processes_keep_one_budget(faulty: Server, tmp_path: Path) -> None:
    path, budget = tmp_path / "answers.sqlite", 0.004
    children = [child(faulty, path, 400, model=f"model-{number}", budget=budget) for number in range(4)]
    said = [process.communicate(timeout=120)[0] for process in children]
    assert all("is used up" in one for one in said), said
    with Store(path) as store:
        assert 0.5 * budget < store.spent() <= budget
        assert faulty.billed() <= store.spent() + 1e-9


def test_killed_runs_keep_the_budget_too(faulty: Server, tmp_path: Path) -> None:
    path, budget, source = tmp_path / "answers.sqlite", 0.01, random.Random(5)
    for _ in range(5):
        with child(faulty, path, 400, budget=budget) as process:
            process.stdout.readline()
            time.sleep(source.uniform(0.05, 0.5))
            process.kill()
        time.sleep(0.1)  # the server comes to the end of what it had in hand
        with Store(path) as store:
            assert faulty.billed() <= store.spent() + 1e-9
            assert store.spent() <= budget
    with Store(path) as store:
        found = generate(chats(f"prompt {n}" for n in range(400)), backend(faulty.url), store, budget_usd=budget)
        assert "is used up" in found.stopped
        assert faulty.billed() <= store.spent() + 1e-9
        assert store.spent() <= budget


@settings(max_examples=6)
@given(budget=st.floats(0, 0.004), concurrency=st.integers(1, 40))
@example(budget=0.0005, concurrency=40)
def test_a_budget_is_never_passed_and_says_what_is_left(server: Server, budget: float, concurrency: int) -> None:
    texts = [f"budget {number}" + " <<fault=cut times=1>>" * (number % 5 == 0) for number in range(40)]
    asked = backend(server.url, concurrency=concurrency)
    with Store(Path(":memory:")) as store:
        found = generate(chats(texts), asked, store, budget_usd=budget)
        spent = store.spent()
        assert spent <= budget
        assert found.cost == pytest.approx(spent)
        assert found.asked + found.left == 40
        assert bool(found.stopped) == bool(found.left)
        if found.left:
            assert re.search(r"used up: \$.* spent or set aside .* raise generation.budget_usd", found.stopped)
            # No room for the next request at its highest price, so at most that much is unspent.
            assert budget - spent < 3e-4
            assert generate(chats(texts), asked, store, budget_usd=budget).asked == 0
        again = generate(chats(texts), asked, store, budget_usd=None)
        assert again.asked == found.left
        assert again.answered + found.answered == 40 - sum(found.failed.values())


def test_what_a_cut_attempt_may_have_cost_is_kept_when_the_budget_is_reached(server: Server, store: Store) -> None:
    """Room for one attempt and a half: the first is cut, the second may not be made."""
    other, cut = backend(server.url, attempts=1, model="other"), chats(["same <<fault=cut times=9>>"])
    generate(cut, other, store)
    highest = answers(store, cut, other)[0].cost
    spent = store.spent()
    found = generate([chat("half <<fault=cut times=1>>")], backend(server.url), store, budget_usd=spent + 1.5 * highest)
    assert (found.failed, found.left, found.stopped) == ({"connection_cut": 1}, 0, None)
    assert store.spent() == pytest.approx(spent + highest)


def test_an_answer_without_usage_counts_at_its_highest_price(server: Server, store: Store) -> None:
    asked = chats(f"unmetered <<fault={kind}_usage>>" for kind in ("no", "huge", "zero"))
    generate(asked, backend(server.url), store)
    for found in answers(store, asked, backend(server.url)):
        assert (found.outcome, found.prompt_tokens, found.completion_tokens) == ("answered", None, None)
        assert found.cost > 2 * 30 / 1e6


def test_usage_above_what_was_set_aside_is_booked_and_stops_the_model(server: Server, store: Store) -> None:
    asked = chats(["before", "counted <<fault=usage>>", "after"])
    found = generate(asked, backend(server.url, concurrency=1), store, budget_usd=0.01)
    assert (found.answered, found.left) == (2, 1)
    assert re.search(r"more use .*100,000 \+ 5 tokens, \$0\.1000 where \$0\.00", found.stopped)
    assert store.spent() == pytest.approx(found.cost)
    assert found.cost > 0.1
    assert generate(asked, backend(server.url, model="other"), store, budget_usd=0.01).left == 3


@pytest.mark.parametrize("where", ["total_usage", "thought", "thought_total"])
def test_what_a_model_thinks_is_counted_where_its_tokens_leave_it_out(server: Server, store: Store, where: str) -> None:
    asked = [chat(f"thought over <<fault={where}>>")]
    generate(asked, backend(server.url), store)
    (found,) = answers(store, asked, backend(server.url))
    assert found.prompt_tokens + found.completion_tokens == 10_000


def test_a_budget_needs_prices(server: Server, store: Store) -> None:
    found = generate([chat("unpriced")], backend(server.url, prices=None), store, budget_usd=1.0)
    assert "Model small has no prices" in found.stopped
    assert found.cost is None
    assert "cost unknown" in str(found)
    assert generate([chat("unpriced")], backend(server.url, prices=None), store).answered == 1
    assert store.spent() == 0


def test_what_an_interrupted_run_set_aside_stays_counted_in_the_same_store(server: Server, store: Store) -> None:
    """As in a notebook whose cell is run again: the request under way may have been billed."""
    asked = chats(["again"])
    via = backend(server.url)
    with store.asking(["small"]):
        store.reserve([("x", 0.5)])
    with store.asking(["small"]):
        store.reserve([("x", 0.5)])
        store.release(["x"])
    assert store.spent() == 0.5
    assert generate(asked, via, store, budget_usd=0.5).left == 1
