"""The store of answers: nothing lost, nothing paid for twice, one sentence for everything that can go wrong.

Faults are real: killed processes, locked and damaged files, a disk that is full.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import file_size_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from persodpo.errors import PersodpoError
from persodpo.generation.requests import Answer
from persodpo.generation.store import CHUNK, Entry, Store

SAID = Answer("answered", '{"response": "Hi."}', "stop", None, None, 12, 5, 0.25, 0.5, 1)
FAILED = Answer("failed", failure="timeout", error="no answer in time", cost=0.5, latency=2.0, attempts=3)


def entry(key: str, answer: Answer = SAID) -> Entry:
    return Entry(key, "some-model", "template", 48, answer)


def stored(store: Store, *keys: str) -> list[Answer | None]:
    return [found and found.answer for _, found in store.entries(keys)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "answers.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------- what it holds


def test_entries_come_back_in_the_order_asked_for(store: Store, path: Path) -> None:
    keys = [f"key-{number}" for number in range(2 * CHUNK + 7)]
    store.write([entry(key, FAILED if number % 3 else SAID) for number, key in enumerate(keys)])
    wanted = [*reversed(keys), "unknown", keys[0], keys[0]]
    with Store(path) as again:
        found = dict(again.entries(keys))
        assert [key for key, _ in again.entries(wanted)] == wanted
    assert [found[key].answer for key in keys] == [FAILED if n % 3 else SAID for n in range(len(keys))]
    assert {(e.model, e.template, e.prompt_bytes) for e in found.values()} == {("some-model", "template", 48)}
    assert all(e.created.endswith("+00:00") for e in found.values())
    assert stored(store, "unknown") == [None]


text = st.text(st.characters(exclude_categories=()), max_size=40)


@settings(max_examples=60)
@given(completion=text, error=text)
def test_any_text_is_kept_except_for_lone_surrogates(completion: str, error: str) -> None:
    with Store(Path(":memory:")) as store:
        store.write([entry("a", Answer("answered", completion, error=error))])
        found = stored(store, "a")[0]
    for kept, given_text in ((found.completion, completion), (found.error, error)):
        assert kept == given_text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


writes = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, "timeout", "rejected"])), max_size=12)


@settings(max_examples=60)
@given(writes=writes, together=st.booleans())
def test_answers_stay_and_failures_give_way_but_what_either_cost_is_counted(writes, together) -> None:
    expected: dict[str, Answer] = {}
    entries = []
    for number, (key, failure) in enumerate(writes):
        made = Answer("failed" if failure else "answered", f"text {number}", failure=failure, cost=0.25, attempts=2)
        entries.append(entry(key, made))
        before = expected.get(key)
        if before is None:
            expected[key] = made
        else:
            kept = made if before.failure else before
            expected[key] = replace(kept, cost=before.cost + 0.25, attempts=before.attempts + 2)
    with Store(Path(":memory:")) as store:
        for batch in [entries] if together else [[one] for one in entries]:
            store.write(batch)
        assert stored(store, *"abc") == [expected.get(key) for key in "abc"]
        assert store.spent() == sum(answer.cost for answer in expected.values())
        assert list(store.missing("abcd")) == [key for key in "abcd" if key not in expected]
        failed = {key for key, answer in expected.items() if answer.failure}
        assert list(store.missing("abcd", retry_failed=True)) == [
            key for key in "abcd" if key not in expected or key in failed
        ]


def test_experience_is_of_one_model_and_template(store: Store) -> None:
    assert store.experience("some-model", "template", 4) is None
    store.write(
        [
            entry("a"),
            entry("b", Answer("answered", "x", prompt_tokens=24, completion_tokens=15, latency=1.5)),
            entry("c", FAILED),
            entry("d", Answer("answered", "no usage")),
            Entry("e", "other-model", "template", 48, SAID),
            Entry("f", "some-model", "another", 48, SAID),
        ]
    )
    known = store.experience("some-model", "template", 4)
    assert known == (2, 36 / 96, 10.0, 1.0 / 4)
    together = Answer("answered", "x", prompt_tokens=24, completion_tokens=15, latency=1.5, batch_size=3)
    store.write([Entry("g", "local-model", "template", 48, together)])
    assert store.experience("local-model", "template", 256).seconds == 0.5


def test_reading_does_not_hold_what_it_has_read(store: Store) -> None:
    keys = [f"{number:05d}" for number in range(8000)]
    for start in range(0, len(keys), 1000):
        store.write([entry(key, Answer("answered", f"{key} " * 400)) for key in keys[start : start + 1000]])
    tracemalloc.start()
    size = sum(len(found.answer.completion) for _, found in store.entries(iter(keys)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 8000 * 2400
    assert peak < 6e6


# ------------------------------------------------------------------------------------------- money set aside, locks


def test_money_is_set_aside_as_far_as_it_goes(store: Store, path: Path) -> None:
    store.write([entry("old")])  # 0.25
    assert store.reserve([("a", 0.25), ("b", 0.25), ("c", 0.5)], budget=0.875) == 2
    with Store(path) as other:
        assert other.spent() == 0.75
        assert other.reserve([("d", 0.25)], budget=0.875) == 0
        assert other.reserve([("d", 0.125)], budget=0.875) == 1
        assert other.reserve([("e", 9.0)]) == 1  # no budget, but whoever has one counts it
        other.release(["e", "unknown"])
    store.release(["a"])
    assert store.spent() == 0.625
    store.write([entry("b")])
    assert store.spent() == 0.625  # 0.25 was set aside and 0.25 was spent
    assert store.reserve([("free", 0.0), ("not free", 0.1)], budget=0.1) == 1
    for _ in range(2):  # another attempt adds to what is set aside
        store.reserve([("again", 0.25)])
    assert store.spent() == 1.125
    assert store.reserve([("free", 0.0)]) == 1


def test_what_a_dead_run_set_aside_counts_until_its_key_is_answered_and_then_in_its_cost(path: Path) -> None:
    with Store(path) as dead:
        dead.reserve([("a", 0.5), ("b", 0.25)])
    with Store(path) as store:
        assert store.spent() == 0.75
        store.reserve([("a", 0.5)])
        assert store.spent() == 1.25
        store.release(["a"])
        assert store.spent() == 0.75
        store.write([entry("a", Answer("answered", "x", cost=0.125))])
        assert stored(store, "a")[0].cost == 0.625
        assert store.spent() == 0.875


def test_a_batch_bears_what_was_set_aside_for_it(store: Store, path: Path) -> None:
    store.reserve([("a", 0.25)])
    store.hand_over({"a": 0.25, "free": 0.0}, store.run, "batch x y ")
    store.release(["a", "free"])
    with Store(path) as other:
        assert other.reservations("batch x") == {"batch x y ": {"a": 0.25, "free": 0.0}}
        assert other.reservations("batch z") == {}
        other.write([entry("a", Answer("answered", "x", cost=0.125))], "batch x y ")
        assert other.spent() == 0.125  # what the batch has set aside was for this answer


def test_answers_of_another_store_are_taken_over_and_cost_nothing(store: Store, tmp_path: Path) -> None:
    with Store(tmp_path / "other.sqlite") as other:
        other.write([entry("a"), entry("failed", FAILED), entry("not asked for"), entry("here", FAILED)])
        (created,) = [found.created for _, found in other.entries(["a"])]
        other.write([entry("failed here")])
    store.write([entry("here"), entry("failed here", FAILED)])
    store.adopt(["a", "failed", "here", "unknown", "failed here"], tmp_path / "other.sqlite")
    free = replace(SAID, cost=0.0)
    assert stored(store, "a", "failed", "not asked for", "here") == [free, None, None, SAID]
    assert stored(store, "failed here") == [replace(SAID, cost=FAILED.cost, attempts=FAILED.attempts + 1)]
    assert [found.created for _, found in store.entries(["a"])] == [created]
    assert store.spent() == SAID.cost + FAILED.cost


@contextmanager
def unprivileged() -> Iterator[None]:
    """Let permissions of files count for root, too."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("in_use", [False, True])
def test_another_store_is_taken_over_where_nothing_can_be_written(in_use: bool) -> None:
    keys = [f"{number}" for number in range(CHUNK + 7)]
    with TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        path = Path(folder) / "a run? 50%" / "answers.sqlite"
        with Store(path) as other:
            other.write([entry(key) for key in keys])
        writing = sqlite3.connect(path, isolation_level=None)
        if in_use:
            writing.execute("BEGIN IMMEDIATE")
        before = sorted(path.parent.iterdir())
        path.chmod(0o444)
        path.parent.chmod(0o555)
        with unprivileged(), warnings.catch_warnings(action="error"), Store(Path(":memory:")) as store:
            store.adopt(keys, path)
            found = stored(store, *keys)
        assert sorted(path.parent.iterdir()) == before
        path.parent.chmod(0o755)
        writing.close()
    assert found == [replace(SAID, cost=0.0)] * len(keys)


def test_a_lock_file_that_cannot_be_made_is_one_sentence(store: Store, path: Path) -> None:
    with store.asking(["a"]):
        (lock,) = path.parent.glob(".*.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(PersodpoError, match="cannot be made"), store.asking(["a"]):
        pass


def test_a_store_that_is_deleted_in_use_takes_nothing_more(store: Store, path: Path) -> None:
    path.unlink()
    with pytest.raises(PersodpoError, match="moved, deleted or replaced"):
        store.write([entry("a")])
    with pytest.raises(PersodpoError, match="moved, deleted or replaced"):
        store.reserve([("a", 1.0)])


LOCK = """
import sys, time
from pathlib import Path
from persodpo.generation.store import Store
with Store(Path(sys.argv[1])) as store, store.asking(["b", "a"]):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_one_process_asks_a_model_at_a_time_and_a_dead_one_holds_nothing(store: Store, path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LOCK, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "mine\n"
        with store.asking(["c", "with/slash"]):
            pass
        started = time.monotonic()
        threading.Timer(0.3, child.kill).start()
        with store.asking(["a"]):
            assert time.monotonic() - started >= 0.3


def test_many_open_a_new_store_at_once(path: Path) -> None:
    for folder in range(5):
        new = path.with_name(f"{folder}.sqlite")

        def open_and_write(number: int, new: Path = new) -> None:
            with Store(new) as store:
                store.write([entry(str(number))])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_and_write, range(16)))
        with Store(new) as store:
            assert list(store.missing(map(str, range(16)))) == []


# ---------------------------------------------------------------------------------------------- files at fault


def use(path: Path, wait_seconds: float) -> None:
    with Store(path, wait_seconds) as store:
        store.reserve([("a", 1.0)], budget=10.0)
        store.write([entry("a")])
        list(store.entries(["a"]))


def refusal(path: Path) -> str:
    """Use a store that cannot be used; return the one sentence."""
    with pytest.raises(PersodpoError) as caught:
        use(path, wait_seconds=0.1)
    message = str(caught.value)
    assert str(path) in message or str(path.parent) in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_lock_is_waited_for_and_named_where_it_stays(store: Store, path: Path) -> None:
    store.write([entry("kept")])
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    assert "locked by another process" in refusal(path)
    timer = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
    timer.start()
    store.write([entry("a")])
    timer.join()
    other.close()
    assert stored(store, "kept", "a") == [SAID, SAID]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE answers SET completion = CAST(x'c3287365637265742074657874' AS TEXT)",
        "UPDATE answers SET completion = x'00ff'",
        "UPDATE answers SET latency = 'secret text'",
    ],
)
def test_damage_inside_a_row_is_one_sentence_that_shows_none_of_it(path: Path, damage: str) -> None:
    with Store(path) as store:
        store.write([entry("a", Answer("answered", "secret text"))])
    with sqlite3.connect(path) as raw:
        raw.execute(damage)
    raw.close()
    with Store(path) as store, pytest.raises(PersodpoError, match="are damaged or the file is none") as caught:
        list(store.entries(["a"]))
    assert "secret text" not in "".join(traceback.format_exception(caught.value))


NEWER = "another version of persodpo (layout 7, this one reads 2); install that version"
OTHER = "an SQLite file of another program; name another file"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (None, "damaged or the file is none of persodpo's"),
        (4096, "restore a copy"),
        ("DROP TABLE reservations", "damaged"),
        ("PRAGMA user_version = 7", NEWER),
        ("PRAGMA application_id = 7", OTHER),
    ],
)
def test_a_file_that_is_no_store_is_named_and_left_as_it_is(path: Path, damage: str | int | None, says: str) -> None:
    with Store(path) as store:
        store.write([entry(f"{number:04d}", Answer("answered", "x" * 500)) for number in range(200)])
    content = path.read_bytes()
    if isinstance(damage, str):
        with sqlite3.connect(path) as raw:
            raw.execute(damage)
        raw.close()
    elif damage is None:
        path.write_bytes(b"dialogue_id,completion\n" * 100)
    else:
        path.write_bytes(content[:damage] + b"\xff" * (len(content) - damage))
    before = path.read_bytes()
    assert says in refusal(path)
    with Store(Path(":memory:")) as store, warnings.catch_warnings(record=True, action="always") as told:
        store.adopt(map(str, range(2 * CHUNK)), path)
    readable = damage == "DROP TABLE reservations"  # the answers are there
    assert ["may be paid for again" in str(one.message) and says in str(one.message) for one in told] == [True] * (
        not readable
    )
    assert path.read_bytes() == before


def test_a_copy_that_is_restored_beside_the_log_of_a_killed_run_is_damaged(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        store.write([entry("a")])
        content = path.read_bytes()
    with Store(path) as store:
        for number in range(300):
            store.write([entry(f"{number}", Answer("answered", "x" * 1500))])
        log = path.with_name(f"{path.name}-wal")
        left = log.read_bytes()
    path.write_bytes(content)
    log.write_bytes(left)
    assert "delete FILE-wal and FILE-shm and restore a copy" in refusal(path)
    assert (path.read_bytes(), log.read_bytes()) == (content, left)


@pytest.mark.parametrize(("place", "put"), [(b"TABLE answers (", b"\xff"), (None, b"\0\0\0\x09")])
def test_a_damaged_layout_is_one_sentence(path: Path, place: bytes | None, put: bytes) -> None:
    """SQLite quotes what it cannot read, and has its own words for a layout of a number that it does not know."""
    with Store(path) as store:
        store.write([entry("a")])
    content = path.read_bytes()
    start = content.index(place) if place else 44
    path.write_bytes(content[:start] + put + content[start + len(put) :])
    assert "are damaged" in refusal(path)


def test_a_folder_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)
    assert "cannot be opened or written; make the file and its folder readable and writable" in refusal(path)
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("a file")
    assert "cannot be created" in refusal(path)


def test_a_disk_that_refuses(store: Store) -> None:
    store.write([entry("kept")])
    with file_size_limit(100_000), pytest.raises(PersodpoError, match=r"refuses to read or write"):
        store.write([entry(f"{number}", Answer("answered", "x" * 10_000)) for number in range(100)])
    store.write([entry("after")])
    assert stored(store, "kept", "after") == [SAID, SAID]
