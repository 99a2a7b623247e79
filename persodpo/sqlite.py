"""SQLite files of this program: opened, laid out and written, their faults said in one sentence.

What is kept in such a file is no table of a run: it grows while others read it, and outlives a killed process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from persodpo.errors import PersodpoError
from persodpo.files import make_folder

#: Longest file that is checked when it is opened beside a log, which takes a tenth of a second.
CHECKED_BYTES = 2**26
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
        "{path} cannot be opened or written; make the file and its folder readable and writable or name another file."
    ),
}  # fmt: skip
#: How messages of errors start that SQLite or Python takes for a fault of the query: a table that is missing from a file is
#: damage, and so is text that is none.
_DAMAGE = ("no such", "Could not decode", "unsupported file format")


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        what: As sentences name it.
        remedy: What to do where it is damaged.
        application: Number in its header that tells it from any other SQLite file.
        version: Of its layout.
        schema: Statements that lay it out, separated by semicolons.
    """

    what: str
    remedy: str
    application: int
    version: int
    schema: str

    @contextmanager
    def faults(self, path: Path) -> Iterator[None]:
        """Turn errors that the user can mend into a sentence; what the file holds is in none of them."""
        try:
            yield
        except sqlite3.Error as error:
            name = "SQLITE_CORRUPT" if str(error).startswith(_DAMAGE) else getattr(error, "sqlite_errorname", "")
            sentence = next((text for starts, text in _SENTENCES.items() if name.startswith(starts)), None)
            if sentence is None:
                raise
            raise PersodpoError(sentence.format(path=path, **self._asdict())) from None
        except UnicodeDecodeError:  # a message of SQLite quotes what is damaged
            raise self.damaged(path) from None

    def damaged(self, path: Path) -> PersodpoError:
        """Return the error that says that a file is damaged."""
        return PersodpoError(_SENTENCES["SQLITE_NOTADB", "SQLITE_CORRUPT"].format(path=path, **self._asdict()))


def connect(
    path: Path, wait_seconds: float, content: Content, *, synchronous: str = "FULL", check_same_thread: bool = True
) -> sqlite3.Connection:
    """Open a file in WAL mode, or make one where there is none; its folder is created.

    Args:
        path: The file.
        wait_seconds: How long to wait for another process that is writing, or making the same file.
        content: What it holds.
        synchronous: SQLite's PRAGMA of this name: what a power cut may take.
        check_same_thread: As in `sqlite3.connect`.

    Returns:
        A connection in autocommit mode: transactions are begun and ended with `transaction`, never left open by a read.

    Raises:
        PersodpoError: As `Content.faults`, or the file is another program's or of another version.
    """
    make_folder(path.parent)
    # A log that was left by another file of this name writes over its pages.
    if path.exists() and Path(f"{path.resolve()}-wal").exists() and path.stat().st_size < CHECKED_BYTES:
        with closing(connect_to_read(path, content)) as look, content.faults(path):
            if look.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise content.damaged(path)
    with content.faults(path):
        connection = sqlite3.connect(
            path, timeout=wait_seconds, isolation_level=None, check_same_thread=check_same_thread
        )
        try:
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            with transaction(connection):  # another process may be laying out the same file
                _lay_out(connection, path, content)
            deadline = time.monotonic() + wait_seconds
            while not _uses_wal(connection, deadline):
                time.sleep(0.02)
        except BaseException:
            connection.close()
            raise
    return connection


def connect_to_read(path: Path, content: Content) -> sqlite3.Connection:
    """Open a file of another run, and write nothing in it or beside it; errors as of `connect`.

    It is to be closed soon: where nobody has the file open, it is read on the assumption that nobody opens it.
    """
    # SQLite makes a log beside a file that it reads, unless there is one, or the file is said to be immutable.
    way = "mode=ro" if Path(f"{path.resolve()}-wal").exists() else "mode=ro&immutable=1"
    with content.faults(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{way}", uri=True, isolation_level=None)
        try:
            _lay_out(connection, path, content)  # looks only, as the file is not empty
        except BaseException:
            connection.close()
            raise
    return connection


def _lay_out(connection: sqlite3.Connection, path: Path, content: Content) -> None:
    """Lay out an empty file, and refuse one that holds something else."""
    queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM main.sqlite_master")
    application, version, tables = (connection.execute(query).fetchone()[0] for query in queries)
    if not application and not tables:
        identity = f"PRAGMA application_id = {content.application}; PRAGMA user_version = {content.version}"
        for statement in filter(str.strip, f"{content.schema};{identity}".split(";")):
            connection.execute(statement)
    elif application != content.application or not tables:
        raise PersodpoError(
            f"{path} is an SQLite file of another program; name another file for the {content.what} or move it away."
        )
    elif version != content.version:
        raise PersodpoError(
            f"{path} was written by another version of persodpo (layout {version}, this one reads {content.version}); "
            "install that version or move the file away."
        )


def _uses_wal(connection: sqlite3.Connection, deadline: float) -> bool:
    """Switch to WAL mode, for which SQLite itself does not wait where another process opens the file at that moment."""
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or time.monotonic() > deadline:
            raise
        return False
    return True


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
