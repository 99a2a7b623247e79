"""Files and folders: written whole or not at all, known by their sha256; and where the project lies."""

from __future__ import annotations

import codecs
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from persodpo.errors import PersodpoError

PROJECT = Path(__file__).resolve().parents[1]
DATA = PROJECT / "data"
RELEASE_VARIABLE = "PERSODPO_RELEASE"
codecs.lookup("utf-16-le")  # here, as its file cannot be read once a run has no more files to open


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


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """Give a folder for half-made things in ``folder``, which is made if need be; what killed processes left there goes."""
    make_folder(folder)
    for left in folder.glob(".partial-*"):
        owner = left.name.split("-")[1]
        if not (owner.isdigit() and is_running(int(owner))):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f".partial-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file of the same name, then rename it to ``path``; its folder is created."""
    with disk_errors(path), scratch_in(path.parent) as scratch:
        write(scratch / path.name)
        (scratch / path.name).replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file's text, atomically, unless it is what the file holds."""
    if read_text(path) != text:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str | None:
    """Return a file's text, None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file is missing or unreadable."""
    try:
        content = json.loads(read_text(path) or "")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``value`` as it reads back from a JSON file (tuples become lists)."""
    return dict(json.loads(json.dumps(value)))


def place_of(name: str | Path) -> str:
    """Return the path of what lies below the project's root under a name; any other name as it is."""
    with suppress(OSError):  # a name that no file can have
        if (PROJECT / name).exists():
            return str(PROJECT / name)
    return str(name)


def name_and_revision(model: str) -> tuple[str, str | None]:
    """Split ``name@revision`` of a model on the Hub; a folder, and a name without one, have no revision.

    Raises:
        PersodpoError: It is the name of a folder that is not there, beside one whose name is its beginning.
    """
    name, _, revision = model.partition("@")
    if not (name and revision) or Path(model).exists():
        return model, None
    if Path(name).exists() or name.startswith(("/", ".")):
        raise PersodpoError(
            f"Folder {model} is not there; what follows the @ is a revision of a model on the Hub alone."
        )
    return name, revision


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the hex sha256 of JSON-like content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_are_unchanged(folder: Path, record: Mapping[str, Any]) -> bool:
    """Tell whether the files in a folder that a record lists under ``files`` are still as they were written."""
    files: dict[str, str] = record.get("files", {})
    there = all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items())
    return bool(files) and there


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
    earlier = read_json(folder / record)
    same = as_json(basis).items() <= earlier.items() and needs in earlier.get("files", {})
    if same and files_are_unchanged(folder, earlier):
        return folder
    refuse_others(folder, record, what)

    def fill(scratch: Path) -> None:
        details = make(scratch)
        files = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
        write_json(scratch / record, {**basis, **details, "files": files, "versions": versions()})

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


def is_running(process: int) -> bool:
    """Tell whether a process of this machine still runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, PermissionError)
    return True


def without_surrogates(text: str) -> str:
    r"""Join surrogate pairs and replace lone ones (JSON's ``\ud800``), which no file can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape results."""
    packages = ["persodpo", "polars", "pyarrow", "pandas", "numpy", "scikit-learn", "torch", "transformers", "trl"]
    numbers = {"python": sys.version.split()[0]}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            numbers[package] = importlib.metadata.version(package)
    return numbers


def git_commit() -> str | None:
    """Return the project's commit, with ``-dirty`` if the working tree differs; None outside a git checkout."""
    try:
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
