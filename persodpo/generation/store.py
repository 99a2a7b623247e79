"""Answers in, answers out: one SQLite file that is never asked to hold an answer twice and never loses one.

One row a key (`persodpo.generation.requests.request_key`), written as each answer arrives. The file is in WAL mode with
full synchronisation, so a row that was written stays written, whatever happens to the process or the machine. Several
processes may work on the same file: each claims the keys it is about to ask, and a claim ends with its process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from persodpo.errors import PersodpoError
from persodpo.generation.requests import Answer
from persodpo.runfolder import is_running
from persodpo.sqlite import Sentences, connect, identity, lay_out, transaction

APPLICATION = 0x50445052  # "PDPR", in the file's header, tells the store from any other SQLite file
VERSION = 1
CHUNK = 500
#: A claim older than this is void even if its process number still runs, for process numbers are used again.
CLAIM_SECONDS = 3600.0

_SCHEMA = f"""
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, template TEXT NOT NULL, prompt_bytes INTEGER NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('answered', 'failed')), completion TEXT, finish_reason TEXT, failure TEXT,
    error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL NOT NULL, latency REAL NOT NULL,
    attempts INTEGER NOT NULL, batch_size INTEGER, hardware TEXT, created TEXT NOT NULL
);
CREATE INDEX answers_model ON answers (model);
CREATE TABLE batches (
    tag TEXT PRIMARY KEY, model TEXT NOT NULL, address TEXT NOT NULL, batch_id TEXT, since REAL NOT NULL
);
CREATE TABLE batch_keys (tag TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (tag, key)) WITHOUT ROWID;
CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, process INTEGER NOT NULL, since REAL NOT NULL);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""
_SENTENCES = Sentences(
    locked=(
        "The answers in {path} are locked by another process; wait for it or end it, then run again, nothing is lost."
    ),
    damaged=(
        "The answers in {path} are damaged or the file is none of persodpo's; restore a copy, or save what can be read "
        "with `sqlite3 FILE .recover`, or move it away and run again, the file was not changed."
    ),
    full="The disk holding {path} is full; free some space and run again, answers that were stored are safe.",
    refusing=(
        "The disk holding {path} refuses to read or write; check it and its free space and run again, answers that were "
        "stored are safe."
    ),
    closed="{path} cannot be opened for writing; make the file and its folder writable or name another file.",
)
_ANSWER = [column.name for column in fields(Answer)]
_COLUMNS = ["key", "model", "template", "prompt_bytes", *_ANSWER, "created"]
#: An answer is kept for good; a failure gives way to the next attempt, but what it cost stays counted.
_WRITE = f"""
INSERT INTO answers ({", ".join(_COLUMNS)}) VALUES ({", ".join("?" * len(_COLUMNS))})
ON CONFLICT (key) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in (*_ANSWER, "created") if name not in ("cost", "attempts"))},
    cost = cost + excluded.cost, attempts = attempts + excluded.attempts
WHERE answers.outcome = 'failed'
"""

#: Owners that are open in this process, so that a claim of its own number left by an earlier process is told apart.
_OPEN: set[str] = set()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the store.

    Attributes:
        key: What was asked of whom.
        model: Name of the model.
        template: Hash of the prompt's template.
        prompt_bytes: Size of the prompt in UTF-8.
        answer: What became of it; attempts and cost are summed over all runs.
        created: When it was written, ISO 8601 in UTC; filled in by `Store.write`.
    """

    key: str
    model: str
    template: str
    prompt_bytes: int
    answer: Answer
    created: str = ""


class Claim(NamedTuple):
    """What became of keys that were about to be asked.

    Attributes:
        granted: Not in the store and now claimed by this one.
        stored: In the store already.
        busy: Being asked by another process.
    """

    granted: set[str]
    stored: set[str]
    busy: set[str]


class Experience(NamedTuple):
    """What the stored answers of a model teach about the next ones.

    Attributes:
        answers: Answers with token counts.
        tokens_per_byte: Prompt tokens for each byte of prompt text.
        completion_tokens: Mean tokens of an answer.
        seconds: Mean seconds of wall time an answer takes beside those that are answered together with it.
    """

    answers: int
    tokens_per_byte: float
    completion_tokens: float
    seconds: float


class Store:
    """The answers of all models, in one file."""

    def __init__(self, path: Path, wait_seconds: float = 30.0) -> None:
        """Open a store, or make one where there is none.

        Args:
            path: The file.
            wait_seconds: How long to wait for another process that is writing.

        Raises:
            PersodpoError: The file is locked, damaged, of another program or of a newer version, or cannot be made.
        """
        self.path = path
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._connection = connect(path, wait_seconds, self._prepare, sentences=_SENTENCES, check_same_thread=False)
        _OPEN.add(self._owner)

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give up this store's claims and close the file; closing twice does no harm."""
        if self._owner not in _OPEN:
            return
        _OPEN.discard(self._owner)
        with self._lock:
            # Claims that cannot be removed here, say on a full disk, end with the process all the same.
            with suppress(sqlite3.Error):
                self._connection.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
            self._connection.close()

    def claim(self, keys: Sequence[str], retry_failed: bool = False) -> Claim:
        """Sort out which keys are to be asked, and keep other processes from asking them.

        Args:
            keys: Keys about to be asked.
            retry_failed: Ask again what has failed.

        Returns:
            Which keys may be asked, which are stored (or being asked by this store's own run), which are busy.

        Raises:
            PersodpoError: The file is locked or damaged, or the disk is full.
        """
        with _SENTENCES.of(self.path), self._lock:
            stored = self._stored(keys, retry_failed)
            wanted = [key for key in keys if key not in stored]
            if not wanted:
                return Claim(set(), stored, set())
            with transaction(self._connection):
                # Another process may have written between the look above and the lock.
                stored |= self._stored(wanted, retry_failed)
                claims = self._select("SELECT key, owner, process, since FROM claims WHERE key IN", wanted)
                stored |= {key for key, owner, *_ in claims if owner == self._owner}
                busy = {key for key, *claim in claims if key not in stored and _is_alive(*claim)}
                granted = set(wanted) - stored - busy
                mine = [(key, self._owner, os.getpid(), time.time()) for key in granted]
                self._connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", mine)
            return Claim(granted, stored, busy)

    def release(self, keys: Collection[str]) -> None:
        """Give up claims on keys that were not asked after all; errors as `claim`."""
        if keys:
            with _SENTENCES.of(self.path), self._lock, transaction(self._connection):
                self._forget_claims(keys)

    def write(self, entries: Sequence[Entry]) -> None:
        """Write entries in one transaction and end their claims; when this returns, they are on the disk.

        Args:
            entries: What came in. An answer that is stored already stays as it is; a failure is replaced.

        Raises:
            PersodpoError: As `claim`; nothing of ``entries`` is written then.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [
            tuple(
                map(
                    _storable, (entry.key, entry.model, entry.template, entry.prompt_bytes, *astuple(entry.answer), now)
                )
            )
            for entry in entries
        ]
        with _SENTENCES.of(self.path), self._lock, transaction(self._connection):
            self._connection.executemany(_WRITE, rows)
            self._forget_claims(entry.key for entry in entries)

    def entries(self, keys: Iterable[str]) -> Iterator[tuple[str, Entry | None]]:
        """Read entries, a few hundred at a time, so that memory does not grow with their number.

        Args:
            keys: Keys in the order wanted.

        Yields:
            Each key with its entry, None where there is none.

        Raises:
            PersodpoError: As `claim`.
        """
        remaining = iter(keys)
        columns = ", ".join(_COLUMNS)
        while chunk := list(islice(remaining, CHUNK)):
            with _SENTENCES.of(self.path), self._lock:
                rows = self._select(f"SELECT {columns} FROM answers WHERE key IN", chunk)
            found = {row[0]: Entry(row[0], row[1], row[2], row[3], Answer(*row[4:-1]), row[-1]) for row in rows}
            yield from ((key, found.get(key)) for key in chunk)

    def missing(self, keys: Iterable[str], retry_failed: bool = False) -> Iterator[str]:
        """Yield those of ``keys`` that are not stored, or have failed if these are to be tried again."""
        remaining = iter(keys)
        while chunk := list(islice(remaining, CHUNK)):
            with _SENTENCES.of(self.path), self._lock:
                stored = self._stored(chunk, retry_failed)
            yield from (key for key in chunk if key not in stored)

    def spent(self) -> float:
        """Return what all stored calls cost, US dollars."""
        with _SENTENCES.of(self.path), self._lock:
            return float(self._connection.execute("SELECT total(cost) FROM answers").fetchone()[0])

    def experience(self, model: str, template: str, concurrency: int) -> Experience | None:
        """Return what the stored answers of a model to one template teach; None if there are none.

        Args:
            model: The model's name.
            template: Hash of the template.
            concurrency: Requests under way at a time, for answers whose server alone knows how many it answers together.
        """
        query = """
            SELECT count(*), total(prompt_tokens) / total(prompt_bytes), avg(completion_tokens),
                avg(latency / coalesce(batch_size, ?))
            FROM answers WHERE model = ? AND template = ? AND outcome = 'answered'
                AND prompt_tokens IS NOT NULL AND completion_tokens IS NOT NULL
        """
        with _SENTENCES.of(self.path), self._lock:
            row = self._connection.execute(query, (concurrency, model, template)).fetchone()
        return Experience(*row) if row[0] else None

    @contextmanager
    def exclusive(self) -> Iterator[sqlite3.Connection]:
        """Give the connection within one write transaction, for tables beside the answers; errors as `claim`."""
        with _SENTENCES.of(self.path), self._lock, transaction(self._connection):
            yield self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check that the file is a store of this version, and make it one if it is empty."""
        connection.execute("PRAGMA synchronous = FULL")
        found = identity(connection)
        if found.empty:
            with transaction(connection):
                # Another process may have made the store while this one waited.
                found = lay_out(connection, _SCHEMA)
        if found.application != APPLICATION or not found.tables:
            raise PersodpoError(f"{self.path} is an SQLite file of another program; name another file for the answers.")
        if found.version != VERSION:
            raise PersodpoError(
                f"{self.path} was written by another version of persodpo (layout {found.version}, this one reads "
                f"{VERSION}); install that version or name another file."
            )
        connection.execute("PRAGMA journal_mode = WAL")

    def _stored(self, keys: Sequence[str], retry_failed: bool) -> set[str]:
        answered = "AND outcome = 'answered'" if retry_failed else ""
        return {row[0] for row in self._select("SELECT key FROM answers WHERE key IN", keys, answered)}

    def _select(self, start: str, keys: Sequence[str], end: str = "") -> list[tuple[Any, ...]]:
        """Run a query that asks for some keys."""
        marks = ", ".join("?" * len(keys))
        return self._connection.execute(f"{start} ({marks}) {end}", tuple(keys)).fetchall()

    def _forget_claims(self, keys: Iterable[str]) -> None:
        pairs = [(key, self._owner) for key in keys]
        self._connection.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", pairs)


def _is_alive(owner: str, process: int, since: float) -> bool:
    """Tell whether a claim still holds."""
    if time.time() - since > CLAIM_SECONDS:
        return False
    return owner in _OPEN if process == os.getpid() else is_running(process)


def _storable(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value
