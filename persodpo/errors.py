"""The one exception that users meet: a sentence that names the input and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PersodpoError(Exception):
    """Something the user can mend; its message is one sentence that says what and how."""


class NothingToShowError(PersodpoError):
    """A figure's table is there, and nothing in it can be drawn."""


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; where that cannot be, a sentence says why."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PersodpoError(
            f"Folder {folder} cannot be created ({error.strerror}); make room for it or choose another folder."
        ) from error


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk under ``target``, a file or folder that is being written, into one sentence."""
    try:
        yield
    except PersodpoError:
        raise
    except Exception as error:
        # Polars and pyarrow report the system's errors under types of their own, but keep its words.
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise PersodpoError(
                f"The disk holding {target} is full; free some space and run again, what was there is untouched."
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PersodpoError(
                f"{target} cannot be written ({os.strerror(number)}); make it writable or choose another folder."
            ) from error
        raise
