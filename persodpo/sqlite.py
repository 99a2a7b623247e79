"""SQLite files of one program: opened, laid out and written in the open, their faults said in one sentence.

What is kept in such a file is no table of a run: it grows while others read it, and outlives a killed process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from persodpo.errors import PersodpoError, make_folder

#: Kind of a fault, as `Sentences` names it -> how SQLite's names of such errors start.
_KINDS = {
    "locked": ("SQLITE_BUSY", "SQLITE_LOCKED"),
    "damaged": ("SQLITE_NOTADB", "SQLITE_CORRUPT"),
    "full": ("SQLITE_FULL",),
    "refusing": ("SQLITE_IOERR",),
    "closed": ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"),
}


@dataclass(frozen=True)
class Sentences:
    """What to say of each kind of fault; ``{path}`` stands for the file.

    Attributes:
        locked: Another process holds the file.
        damaged: It is no SQLite file, or one that lacks a page or a table.
        full: The disk is full.
        refusing: The disk neither reads nor writes.
        closed: The file cannot be opened for writing.
    """

    locked: str
    damaged: str
    full: str
    refusing: str
    closed: str

    @contextmanager
    def of(self, path: Path) -> Iterator[None]:
        """Turn errors that the user can mend into these sentences.

        Args:
            path: The file.

        Raises:
            PersodpoError: The file is locked, damaged, foreign or not to be opened, or the disk fails.
        """
        try:
            yield
        except sqlite3.Error as error:
            # A table that is missing from a file is damage too, though SQLite takes it for a mistake in the query.
            lacks = str(error).startswith("no such")
            name = "SQLITE_CORRUPT" if lacks else getattr(error, "sqlite_errorname", "")
            kind = next((kind for kind, starts in _KINDS.items() if name.startswith(starts)), None)
            if kind is None:
                raise
            raise PersodpoError(asdict(self)[kind].format(path=path)) from error


class Identity(NamedTuple):
    """What a file says of itself.

    Attributes:
        application: Number of the program it belongs to; 0 if it names none.
        version: Version of its layout.
        tables: Tables and indexes it has.
    """

    application: int
    version: int
    tables: int

    @property
    def empty(self) -> bool:
        """Whether nobody has laid out the file yet."""
        return not (self.application or self.tables)


def connect(
    path: Path,
    wait_seconds: float,
    prepare: Callable[[sqlite3.Connection], None],
    *,
    sentences: Sentences,
    check_same_thread: bool = True,
) -> sqlite3.Connection:
    """Open a file, or make one where there is none.

    Args:
        path: The file; its folder is created.
        wait_seconds: How long to wait for another process that is writing.
        prepare: Checks and lays out what was opened; the file is closed again if it raises.
        sentences: What to say of faults.
        check_same_thread: As in `sqlite3.connect`.

    Returns:
        A connection in autocommit mode: transactions are begun and ended with `transaction`, never left open by a read.

    Raises:
        PersodpoError: As `Sentences.of` or ``prepare``, or the folder cannot be made.
    """
    make_folder(path.parent)
    with sentences.of(path):
        connection = sqlite3.connect(
            path, timeout=wait_seconds, isolation_level=None, check_same_thread=check_same_thread
        )
        try:
            prepare(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def identity(connection: sqlite3.Connection) -> Identity:
    """Return what the file says of itself, all of it at one moment: another process may be laying it out."""
    queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM main.sqlite_master")
    connection.execute("SAVEPOINT identity")
    try:
        return Identity(*(connection.execute(query).fetchone()[0] for query in queries))
    finally:
        connection.execute("RELEASE identity")


def lay_out(connection: sqlite3.Connection, schema: str) -> Identity:
    """Run the statements of ``schema`` in an empty file, within a transaction of the caller's.

    Args:
        connection: Within `transaction`, for another process may be laying out the same file.
        schema: Statements, separated by semicolons.

    Returns:
        What the file says of itself now.
    """
    if identity(connection).empty:
        for statement in filter(str.strip, schema.split(";")):
            connection.execute(statement)
    return identity(connection)


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
