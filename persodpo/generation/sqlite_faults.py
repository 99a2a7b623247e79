"""SQLite's errors in, one sentence out that names the file and the remedy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persodpo.errors import PersodpoError

#: What to say, by how SQLite's name of an error starts.
_SENTENCES = {
    ("SQLITE_BUSY", "SQLITE_LOCKED"): (
        "The answers in {path} are locked by another process; wait for it or end it, then run again, nothing is lost."
    ),
    ("SQLITE_NOTADB", "SQLITE_CORRUPT"): (
        "The answers in {path} are damaged or the file is none of persodpo's; restore a copy, or save what can be read "
        "with `sqlite3 FILE .recover`, or move it away and run again, the file was not changed."
    ),
    ("SQLITE_FULL",): (
        "The disk holding {path} is full; free some space and run again, answers that were stored are safe."
    ),
    ("SQLITE_IOERR",): (
        "The disk holding {path} refuses to read or write; check it and its free space and run again, answers that were "
        "stored are safe."
    ),
    ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"): (
        "{path} cannot be opened for writing; make the file and its folder writable or name another file."
    ),
}


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn errors that the user can mend into sentences.

    Args:
        path: The store's file.

    Raises:
        PersodpoError: The file is locked, damaged, foreign or not to be opened, or the disk fails.
    """
    try:
        yield
    except sqlite3.Error as error:
        # A table that is missing from a store is damage too, though SQLite takes it for a mistake in the query.
        lacks = str(error).startswith("no such")
        name = "SQLITE_CORRUPT" if lacks else getattr(error, "sqlite_errorname", "")
        sentence = next((text for starts, text in _SENTENCES.items() if name.startswith(starts)), None)
        if sentence is None:
            raise
        raise PersodpoError(sentence.format(path=path)) from error
