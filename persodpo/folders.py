"""Folders that are made once and reused: models made on the spot, whole or not there at all.

A folder is filled in a scratch folder beside its place and renamed when it is complete, with a record of what it was made
from. What is made from the same basis again, and is still as it was written, is reused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persodpo.errors import PersodpoError, disk_errors
from persodpo.runfolder import as_json, is_running, read_json, sha256, versions, write_json


def made_once(
    folder: Path,
    record: str,
    basis: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
    *,
    what: str,
    needs: str,
) -> Path:
    """Make a folder, unless it was made from ``basis`` already.

    Args:
        folder: Its place. One made from something else is replaced.
        record: Name of the JSON file in it that says what it was made from.
        basis: All that the content depends on, JSON-like.
        make: Called with a scratch folder to fill; returns what there is to say about the content, for the record.
        what: What the folder holds, for messages.
        needs: The file without which it is not whole.

    Returns:
        ``folder``.

    Raises:
        PersodpoError: ``folder`` holds something else, or the disk fails; what was there stays as it was.
    """
    if is_current(folder, record, basis, needs):
        return folder
    refuse_others(folder, record, what)

    def fill(scratch: Path) -> None:
        found = make(scratch)
        files = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
        write_json(scratch / record, {**basis, **found, "files": files, "versions": versions()})

    return replaced(folder, fill)


def replaced(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` fill a scratch folder, then rename it to ``folder`` in place of what is there.

    Raises:
        PersodpoError: The disk fails; what was there stays as it was.
    """
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    with disk_errors(folder):
        _clear_scratch(folder)
        scratch.mkdir(parents=True)
        try:
            fill(scratch)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_current(folder: Path, record: str, basis: Mapping[str, Any], needs: str) -> bool:
    """Tell whether ``folder`` was made from ``basis`` and is still as it was written."""
    found = read_json(folder / record)
    files: dict[str, str] = found.get("files", {})
    same = needs in files and all(found.get(key) == value for key, value in as_json(basis).items())
    return same and all((folder / n).is_file() and sha256(folder / n) == digest for n, digest in files.items())


def refuse_others(folder: Path, record: str, what: str) -> None:
    """Refuse to replace a folder that holds something other than what is made here.

    Raises:
        PersodpoError: It is no folder, or has files but not the one named ``record``.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / record).is_file() or not any(folder.iterdir()))):
        raise PersodpoError(f"{folder} holds something other than {what}; name another folder or remove it.")


def _clear_scratch(folder: Path) -> None:
    """Remove what killed processes left beside ``folder``; that of running ones stays."""
    for left in folder.parent.glob(f".{folder.name}.*-*"):
        owner = left.name.rpartition("-")[2]
        if owner.isdigit() and (int(owner) == os.getpid() or not is_running(int(owner))):
            shutil.rmtree(left, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``, after moving aside what it replaces."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
