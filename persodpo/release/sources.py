"""Read the published files out of a folder or an archive; archives are taken for hostile until proven otherwise."""

from __future__ import annotations

import gzip
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from persodpo.errors import PersodpoError

#: Most bytes an archive may hold, packed or unpacked; the published files are 20 MB.
LIMIT_BYTES = 1 << 31
#: What the standard library raises on archives that are cut short, damaged, encrypted or something else.
_MALFORMED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        path: Its path in the release.
        bytes: Its size.
        sha256: The hex sha256 of its bytes.
    """

    path: str
    bytes: int
    sha256: str


Members = Iterator[tuple[Published, IO[bytes]]]


def is_unsafe(name: str) -> bool:
    """Tell whether a file of this name could land outside the folder it is unpacked in, on any system."""
    return not name or bool(re.search(r"^/|^[A-Za-z]:|\\|\0", name)) or ".." in PurePosixPath(name).parts


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Blame the source, not the target, for what goes wrong while the source is read.

    Args:
        label: The source's name for messages.

    Raises:
        PersodpoError: The source is damaged or cannot be read.
    """
    try:
        yield
    except _MALFORMED as error:
        raise PersodpoError(
            f"{label} cannot be unpacked as a .tar.gz or .zip archive ({error}): it is cut short, damaged or something "
            "else; get it again or name another source."
        ) from error
    except OSError as error:
        raise PersodpoError(f"{label} cannot be read ({error}); mend that or name another source.") from error


def folder_members(folder: Path, label: str, needed: Sequence[Published], progress: bool) -> Members:
    """Open those of the ``needed`` files that lie in ``folder``.

    Args:
        folder: A folder laid out like the release.
        label: The source's name for messages.
        needed: The files to look for.
        progress: Show a progress bar.

    Yields:
        A published file and its open bytes, not yet compared with what was published.

    Raises:
        PersodpoError: A file cannot be read.
    """
    for file in tqdm(needed, desc="copying", unit="file", disable=not progress):
        with reading(label):
            if (folder / file.path).is_file():
                with (folder / file.path).open("rb") as reader:
                    yield file, reader


def archive_members(archive: Path, label: str, needed: Sequence[Published]) -> Members:
    """Open those of the ``needed`` files that are in ``archive``, after every name in it was found harmless.

    Args:
        archive: A .tar.gz or .zip file, whatever its name.
        label: The source's name for messages.
        needed: The files to look for.

    Yields:
        A published file and its open bytes, not yet compared with what was published.

    Raises:
        PersodpoError: It is no archive, is cut short, holds a link, a device or a name that leads out of its folder, or
            unpacks to more than `LIMIT_BYTES`.
    """
    with reading(label):
        with archive.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if not packed and not zipfile.is_zipfile(archive):
            raise ValueError("it begins like neither")
        yield from (_tar_members if packed else _zip_members)(archive, label, needed)


class _BoundedGzip(gzip.GzipFile):
    """Stops a small archive that unpacks without end, in its files or in its headers."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > LIMIT_BYTES:
            raise ValueError(f"it unpacks to more than {LIMIT_BYTES:,} bytes")
        return data


def _tar_members(archive: Path, label: str, needed: Sequence[Published]) -> Members:
    # Read twice: no file is written before the last name has been checked.
    with _BoundedGzip(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        names = [_checked(entry.name, entry.isreg() or entry.isdir(), label) for entry in tar]
    wanted = _locate(names, needed)
    with _BoundedGzip(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            file = wanted.pop(_plain(entry.name), None) if entry.isreg() else None
            reader = tar.extractfile(entry) if file else None
            if file and reader:
                yield file, reader


def _zip_members(archive: Path, label: str, needed: Sequence[Published]) -> Members:
    with zipfile.ZipFile(archive) as bundle:
        entries = bundle.infolist()
        kinds = [stat.S_IFMT(entry.external_attr >> 16) for entry in entries]
        names = [
            _checked(entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR), label)
            for entry, kind in zip(entries, kinds, strict=True)
        ]
        wanted = _locate(names, needed)
        for entry in entries:
            file = None if entry.is_dir() else wanted.pop(_plain(entry.filename), None)
            if file:
                with bundle.open(entry) as reader:
                    yield file, reader


def _plain(name: str) -> str:
    return str(PurePosixPath(name))


def _checked(name: str, ordinary: bool, label: str) -> str:
    if is_unsafe(name) or not ordinary:
        what = "lies outside the archive's folder" if is_unsafe(name) else "is a link or a device"
        raise PersodpoError(f"{label} is refused because its member {name!r} {what}; name another source.")
    return _plain(name)


def _locate(names: Sequence[str], needed: Sequence[Published]) -> dict[str, Published]:
    """Map member names to needed files, whether or not the archive has one folder on top, as GitHub's have."""
    published = {file.path: file for file in needed}
    tops: Counter[str] = Counter()
    for name in set(names):
        head, slash, rest = name.partition("/")
        tops.update(top for top, path in (("", name), (head + slash, rest)) if path in published)
    top = tops.most_common(1)[0][0] if tops else ""
    return {f"{top}{path}": file for path, file in published.items()}
