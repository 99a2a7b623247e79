"""SQLite files of this program: opened, laid out and written, their faults said in one sentence.

What is kept in such a file is no table of a run: it grows while others read it, and outlives a killed process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from persodpo.errors import PersodpoError, make_folder

#: How SQLite's names of an error start -> what to say of it.
_SENTENCES = {
    ("SQLITE_BUSY", "SQLITE_LOCKED"): (
        "The {what} in {path} are locked by another process; wait for it or end it, then run again."
    ),
    ("SQLITE_NOTADB", "SQLITE_CORRUPT"): "The {what} in {path} are damaged or the file is none of persodpo's; {remedy}.",
    ("SQLITE_FULL",): "The disk holding {path} is full; free some space and run again, {what} that were stored are safe.",
    ("SQLITE_IOERR",): (
        "The disk holding {path} refuses to read or write; check it and its free space and run again, {what} that were "
        "stored are safe."
    ),
    ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"): (
        "{path} cannot be opened for writing; make the file and its folder writable or name another file."
    ),
}  # fmt: skip
#: How messages of errors start that SQLite or Python takes for a fault of the query: a table that is missing from a file is
#: damage, and so is text that is none.
_DAMAGE = ("no such", "Could not decode")


class Content(NamedTuple):
    """What a file holds, as sentences name it, and what to do where it is damaged."""

    what: str
    remedy: str

    @contextmanager
    def faults(self, path: Path) -> Iterator[None]:
        """Turn errors that the user can mend into a sentence; what the file holds is in none of them."""
        try:
            yield
        except sqlite3.Error as error:
            name = "SQLITE_CORRUPT" if str(error).startswith(_DAMAGE) else getattr(error, "sqlite_errorname", "")
            sentence = next((said for starts, said in _SENTENCES.items() if name.startswith(starts)), None)
            if sentence is None:
                raise
            raise PersodpoError(sentence.format(path=path, **self._asdict())) from None

    def damaged(self, path: Path) -> PersodpoError:
        """Return the error that says that a file is damaged."""
        return PersodpoError(_SENTENCES["SQLITE_NOTADB", "SQLITE_CORRUPT"].format(path=path, **self._asdict()))


class Identity(NamedTuple):
    """What a file says of itself: its program, the version of its layout, how many tables and indexes it has."""

    application: int
    version: int
    tables: int


def connect(
    path: Path,
    wait_seconds: float,
    prepare: Callable[[sqlite3.Connection], None],
    *,
    content: Content,
    check_same_thread: bool = True,
) -> sqlite3.Connection:
    """Open a file in WAL mode, or make it and its folder where there is none.

    Args:
        path: The file.
        wait_seconds: How long to wait for another process that is writing, or making the same file.
        prepare: Checks and lays out what was opened; the file is closed again if it raises.
        content: What it holds.
        check_same_thread: As in `sqlite3.connect`.

    Returns:
        A connection in autocommit mode: transactions are begun and ended with `transaction`, never left open by a read.
    """
    make_folder(path.parent)
    with content.faults(path):
        connection = sqlite3.connect(
            path, timeout=wait_seconds, isolation_level=None, check_same_thread=check_same_thread
        )
        try:
            prepare(connection)
            deadline = time.monotonic() + wait_seconds
            while not _uses_wal(connection, deadline):
                time.sleep(0.02)
        except BaseException:
            connection.close()
            raise
    return connection


def _uses_wal(connection: sqlite3.Connection, deadline: float) -> bool:
    """Switch to WAL mode, for which SQLite itself does not wait where another process opens the file at that moment."""
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or time.monotonic() > deadline:
            raise
        return False
    return True


def lay_out(connection: sqlite3.Connection, schema: str) -> Identity:
    """Run the statements of ``schema`` if the file is empty, and return what it says of itself then.

    This is done within `transaction`, for another process may be laying out the same file.
    """

    def identity() -> Identity:
        queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM main.sqlite_master")
        return Identity(*(connection.execute(query).fetchone()[0] for query in queries))

    found = identity()
    if found.application or found.tables:
        return found
    for statement in filter(str.strip, schema.split(";")):
        connection.execute(statement)
    return identity()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write all or nothing, with other writers kept out from the start."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
