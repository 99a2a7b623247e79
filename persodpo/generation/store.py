"""Answers in, answers out: one SQLite file that is never asked to hold an answer twice and never loses one.

One row per key (`persodpo.generation.requests.request_key`), written as each answer arrives. The file is in WAL mode with
full synchronisation, so a row that was written stays written, whatever happens to the process or the machine. Money is set
aside in the same file before a request leaves, so that a killed process leaves behind what it may have spent. One process
asks a model at a time, held by a lock file that the system gives free when its process ends.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import threading
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout

from persodpo.errors import PersodpoError
from persodpo.files import without_surrogates
from persodpo.generation.requests import Answer
from persodpo.sqlite import Content, connect, connect_to_read, transaction

CHUNK = 500

_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, template TEXT NOT NULL, prompt_bytes INTEGER NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('answered', 'failed')), completion TEXT, finish_reason TEXT, failure TEXT,
    error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL NOT NULL, latency REAL NOT NULL,
    attempts INTEGER NOT NULL, batch_size INTEGER, hardware TEXT, created TEXT NOT NULL
);
CREATE INDEX answers_model ON answers (model);
CREATE INDEX answers_cost ON answers (cost) WHERE cost > 0;
CREATE TABLE reservations (key TEXT, run TEXT, cost REAL NOT NULL, PRIMARY KEY (key, run)) WITHOUT ROWID;
"""
_CONTENT = Content(
    "answers",
    "delete FILE-wal and FILE-shm and restore a copy, or save what can be read with `sqlite3 FILE .recover`, or move it "
    "away and run again, the file was not changed",
    application=0x50445052,  # "PDPR"
    version=2,
    schema=_SCHEMA,
)
_ANSWER = [column.name for column in fields(Answer)]
_COLUMNS = ["key", "model", "template", "prompt_bytes", *_ANSWER, "created"]
#: What each column may hold; a damaged page may hold something else.
_TYPES = (str, str, str, int, *[str | None] * 5, *[int | None] * 2, float, float, int, int | None, str | None, str)
_SUMMED = ("cost", "attempts")
#: An answer is kept for good; a failure gives way to the next attempt. What either has cost stays counted.
_WRITE = f"""
INSERT INTO answers ({", ".join(_COLUMNS)}) VALUES ({", ".join("?" * len(_COLUMNS))})
ON CONFLICT (key) DO UPDATE SET
    {", ".join(f"{name} = {name} + excluded.{name}" for name in _SUMMED)},
    {", ".join(f"{n} = iif(outcome = 'failed', excluded.{n}, {n})" for n in (*_ANSWER, "created") if n not in _SUMMED)}
"""
#: What others, runs that died, have set aside for a key: it may have been billed, so its answer bears it.
_LOST = """
UPDATE answers SET cost = cost + (SELECT total(cost) FROM reservations WHERE key = ?1 AND run <> ?2) WHERE key = ?1
"""
_SET_ASIDE = "INSERT INTO reservations VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET cost = cost + excluded.cost"
_SPENT = "SELECT (SELECT total(cost) FROM answers WHERE cost > 0) + (SELECT total(cost) FROM reservations)"


class Entry(NamedTuple):
    """One row of the store: what was asked of whom, and what became of it, attempts and cost summed over all runs."""

    key: str
    model: str
    template: str  # hash of the prompt's template
    prompt_bytes: int
    answer: Answer
    created: str = ""  # ISO 8601 in UTC; filled in by `Store.write` where it is empty


class Experience(NamedTuple):
    """What the stored answers of a model, of which the server counted the tokens, teach about the next ones."""

    answers: int
    tokens_per_byte: float  # of prompts
    completion_tokens: float  # mean of an answer
    seconds: float  # mean wall time of an answer beside those that are answered together with it


class Store:
    """The answers of all models, in one file; a PersodpoError says that it is locked or damaged, or the disk is full."""

    def __init__(self, path: Path, wait_seconds: float = 30.0, *, only_read: bool = False) -> None:
        """Open a store, or make one where there is none; ``wait_seconds`` is for another process that is writing.

        One that is ``only_read`` is there already, is left as it is, and may lie where nothing can be written.
        """
        self.path = path
        self.run = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._connection = (
            connect_to_read(path, _CONTENT) if only_read
            else connect(path, wait_seconds, _CONTENT, check_same_thread=False)
        )  # fmt: skip
        self._place = _place(path)

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        with self._lock:
            self._connection.close()

    def copy(self, to: Store) -> None:
        """Make another store, in memory, the same as this one."""
        with _CONTENT.faults(self.path), self._lock:
            self._connection.backup(to._connection)

    @contextmanager
    def asking(self, models: Iterable[str]) -> Iterator[None]:
        """Keep other processes from asking these models, waiting for one that does; it is said on a terminal.

        What is set aside from now on is another run's: what an interrupted one has set aside stays counted.
        """
        self.run, path = uuid.uuid4().hex, self.path.resolve()  # a link may give the file another name
        with ExitStack() as stack:
            # All take them in one order, so no two wait for each other.
            for model in sorted(set(models)) if str(self.path) != ":memory:" else ():
                name = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                lock = FileLock(path.with_name(f".{path.name}.{name}.lock"), thread_local=False)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    if sys.stderr.isatty():
                        print(f"{model} is being asked by another process; this one waits for it.", file=sys.stderr)
                    lock.acquire()
                except OSError as error:
                    raise PersodpoError(
                        f"{lock.lock_file} cannot be made ({error.strerror}); move away what lies there, or make its folder "
                        "writable."
                    ) from error
                stack.callback(lock.release)
            yield

    def reserve(self, prices: Sequence[tuple[str, float]], budget: float | None = None) -> int:
        """Set money aside for requests that are about to be sent, in one transaction with the sum it is checked against.

        Args:
            prices: Keys, and the most that each request can cost in US dollars; for another attempt it is added.
            budget: What all answers and reservations may cost together, US dollars; None for no limit.

        Returns:
            For how many of them, from the first on, there was room.
        """
        if budget is None and not any(usd for _, usd in prices):
            return len(prices)
        with self._exclusive() as connection:
            total, granted = (0.0 if budget is None else connection.execute(_SPENT).fetchone()[0]), 0
            for _, usd in prices:
                total += usd
                if usd and budget is not None and total > budget:
                    break
                granted += 1
            connection.executemany(_SET_ASIDE, [(key, self.run, usd) for key, usd in prices[:granted] if usd])
        return granted

    def release(self, keys: Collection[str], run: str | None = None) -> None:
        """Give back what was set aside for requests that were not sent after all, by this run or another."""
        if keys:
            with self._exclusive() as connection:
                pairs = [(key, run or self.run) for key in keys]
                connection.executemany("DELETE FROM reservations WHERE key = ? AND run = ?", pairs)

    def hand_over(self, prices: Mapping[str, float], run: str, heir: str) -> None:
        """Let another run bear what a run has set aside: a batch, which outlives this process, by a name of its own."""
        with self._exclusive() as connection:
            own = dict(connection.execute("SELECT key, cost FROM reservations WHERE run = ?", [run]))
            connection.executemany("DELETE FROM reservations WHERE key = ? AND run = ?", [(key, run) for key in prices])
            # Where the endpoint names files by their content, the heir may bear an earlier batch of that name.
            rows = [(key, heir, max(usd, own.get(key, 0.0))) for key, usd in prices.items()]
            connection.executemany(_SET_ASIDE, rows)

    def reservations(self, start: str) -> dict[str, dict[str, float]]:
        """Return what runs whose names start so have set aside: for each its keys and US dollars."""
        runs: dict[str, dict[str, float]] = {}
        query = "SELECT run, key, cost FROM reservations WHERE substr(run, 1, ?) = ?"
        for run, key, usd in self._read(query, len(start), start):
            runs.setdefault(run, {})[key] = usd
        return runs

    def write(self, entries: Sequence[Entry], run: str | None = None) -> None:
        """Write entries in one transaction and end their reservations; when this returns, they are on the disk.

        An answer that is stored already stays as it is, a failure is replaced; ``run`` is whose reservations are part of
        their cost, None for this one's.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [tuple(map(_storable, (*one[:4], *astuple(one.answer), one.created or now))) for one in entries]
        with self._exclusive() as connection:
            connection.executemany(_WRITE, rows)
            connection.executemany(_LOST, [(one.key, run or self.run) for one in entries])
            connection.executemany("DELETE FROM reservations WHERE key = ?", [(one.key,) for one in entries])

    def adopt(self, keys: Iterable[str], path: Path) -> None:
        """Take over answers from another store; they cost nothing here, for that store has paid for them.

        That store is only read, and a warning says where it cannot be.
        """
        remaining = self.missing(keys, retry_failed=True)
        while chunk := list(islice(remaining, CHUNK)):
            try:
                with Store(path, only_read=True) as other:  # anew for each chunk, as somebody may begin to write
                    entries = [
                        entry for _, entry in other.entries(chunk) if entry and entry.answer.outcome == "answered"
                    ]
            except PersodpoError as error:
                warnings.warn(
                    f"Answers of another run are not taken over and may be paid for again: {error}", stacklevel=2
                )
                return
            self.write([entry._replace(answer=replace(entry.answer, cost=0.0)) for entry in entries])

    def entries(self, keys: Iterable[str]) -> Iterator[tuple[str, Entry | None]]:
        """Yield each key with its entry, None where there is none; a few hundred are read at a time, in flat memory."""
        remaining = iter(keys)
        while chunk := list(islice(remaining, CHUNK)):
            rows = self._read(f"SELECT {', '.join(_COLUMNS)} FROM answers WHERE key IN ({_marks(chunk)})", *chunk)
            if not all(all(map(isinstance, row, _TYPES)) for row in rows):
                raise _CONTENT.damaged(self.path)
            by_key = {row[0]: Entry(row[0], row[1], row[2], row[3], Answer(*row[4:-1]), row[-1]) for row in rows}
            yield from ((key, by_key.get(key)) for key in chunk)

    def missing(self, keys: Iterable[str], retry_failed: bool = False) -> Iterator[str]:
        """Yield those of ``keys`` that are not stored, or have failed if these are to be tried again."""
        remaining = iter(keys)
        answered = "AND outcome = 'answered'" if retry_failed else ""
        while chunk := list(islice(remaining, CHUNK)):
            query = f"SELECT key FROM answers WHERE key IN ({_marks(chunk)}) {answered}"
            stored_keys = {key for (key,) in self._read(query, *chunk)}
            yield from (key for key in chunk if key not in stored_keys)

    def spent(self) -> float:
        """Return what all calls cost, US dollars; those without an answer yet count at their highest price."""
        return float(self._read(_SPENT)[0][0])

    def experience(self, model: str, template: str, concurrency: int) -> Experience | None:
        """Return what the stored answers of a model to one template (its hash) teach; None if there are none.

        ``concurrency`` is how many are under way at a time, where the server alone knows how many it answers together.
        """
        query = """
            SELECT count(*), total(prompt_tokens) / total(prompt_bytes), avg(completion_tokens),
                avg(latency / coalesce(batch_size, ?))
            FROM answers WHERE model = ? AND template = ? AND outcome = 'answered'
                AND prompt_tokens IS NOT NULL AND completion_tokens IS NOT NULL
        """
        (row,) = self._read(query, concurrency, model, template)
        return Experience(*row) if row[0] else None

    @contextmanager
    def _exclusive(self) -> Iterator[sqlite3.Connection]:
        """Give the connection within one write transaction, unless what it would write would be gone."""
        if _place(self.path) != self._place:
            raise PersodpoError(
                f"{self.path} was moved, deleted or replaced while it was in use; put it back, with the files beside it, "
                "and run again."
            )
        with _CONTENT.faults(self.path), self._lock, transaction(self._connection):
            yield self._connection

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with _CONTENT.faults(self.path), self._lock:
            return self._connection.execute(query, values).fetchall()


def _place(path: Path) -> tuple[int, int] | None:
    """Return what the system calls a file, whatever its name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _storable(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold."""
    return without_surrogates(value) if isinstance(value, str) and not value.isascii() else value
