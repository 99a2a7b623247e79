"""Folders that are made once and reused: models made on the spot, whole or not there at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persodpo.errors import PersodpoError, disk_errors
from persodpo.runfolder import as_json, files_are_unchanged, read_json, scratch_in, sha256, versions, write_json


def made_once(
    folder: Path,
    record: str,
    basis: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
    *,
    what: str,
    needs: str,
) -> Path:
    """Make a folder, whole or not at all, unless it was made from ``basis`` and is still as it was written.

    Args:
        folder: Its place. One made from something else is replaced, one that holds something else refused.
        record: Name of the JSON file in it that says what it was made from.
        basis: All that the content depends on, JSON-like.
        make: Called with a scratch folder to fill; returns what there is to say about the content, for the record.
        what: What the folder holds, for messages.
        needs: The file without which it is not whole.
    """
    known = read_json(folder / record)
    same = as_json(basis).items() <= known.items() and needs in known.get("files", {})
    if same and files_are_unchanged(folder, known):
        return folder
    refuse_others(folder, record, what)

    def fill(scratch: Path) -> None:
        said = make(scratch)
        files = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
        write_json(scratch / record, {**basis, **said, "files": files, "versions": versions()})

    return replace_folder(folder, fill)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` fill a scratch folder, then rename it to ``folder`` in place of what is there."""
    with disk_errors(folder), scratch_in(folder.parent) as scratch:
        (scratch / "new").mkdir()
        fill(scratch / "new")
        if folder.exists():
            folder.rename(scratch / "old")
        (scratch / "new").rename(folder)
    return folder


def refuse_others(folder: Path, record: str, what: str) -> None:
    """Refuse to replace what is no folder, or has files but not the one named ``record``."""
    if folder.exists() and not (folder.is_dir() and ((folder / record).is_file() or not any(folder.iterdir()))):
        raise PersodpoError(f"{folder} holds something other than {what}; name another folder or remove it.")
