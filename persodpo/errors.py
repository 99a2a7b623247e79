"""The one exception that users meet: a sentence that names the input and the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PersodpoError(Exception):
    """Something the user can mend; its message is one sentence that says what and how."""


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk under ``target`` into one sentence.

    Args:
        target: The file or folder being written; named in the message.

    Raises:
        PersodpoError: The disk is full, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        # DuckDB and pyarrow wrap the system's error; both keep its number or its words.
        text = str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            raise PersodpoError(
                f"The disk holding {target} is full; free some space and run again, what was there is untouched."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PersodpoError(
                f"{target} cannot be written ({error.strerror}); make it writable or choose another folder."
            ) from error
        raise
