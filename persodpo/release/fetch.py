"""Fetch the published files: from a folder, an archive, or the pinned commit on GitHub, each checked by its sha256.

Everything is gathered and checked in a hidden folder beside the target and only then renamed into place, so a fetch
that fails or is killed leaves the target with the files it had.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from persodpo.errors import PersodpoError, disk_errors
from persodpo.release import sources
from persodpo.release.download import download
from persodpo.release.sources import Members, Published, archive_members, folder_members, is_unsafe, reading
from persodpo.runfolder import DATA, RELEASE_VARIABLE, sha256

_MANIFEST = DATA / "release_manifest.json"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class FetchReport:
    """What a fetch did.

    Attributes:
        target: The folder that now holds every published file.
        files: Files in the release.
        downloaded: Files that were missing or different and were brought in; 0 if all were there.
        bytes: Size of the files brought in.
    """

    target: Path
    files: int
    downloaded: int
    bytes: int

    def __str__(self) -> str:
        """Return one line for logs and notebooks."""
        if not self.downloaded:
            return f"release: all {self.files} files are in {self.target}, nothing downloaded"
        size = f"{self.bytes / 1e6:,.1f} MB"
        return f"release: {self.downloaded} of {self.files} files ({size}) fetched into {self.target}, all verified"


def fetch_release(
    target: Path, source: str | None = None, progress: bool = True, *, manifest: Path = _MANIFEST
) -> FetchReport:
    """Make sure that ``target`` holds every published file, byte for byte; files that are right are left alone.

    Args:
        target: The folder to fill; other files in it stay.
        source: A folder laid out like the release, a .tar.gz or .zip file, or the https:// address of one. None takes
            the environment variable PERSODPO_RELEASE, else the pinned commit on GitHub.
        progress: Show a progress bar.
        manifest: The list of published files.

    Returns:
        What was brought in.

    Raises:
        PersodpoError: The source, the network, the disk or a file's hash is at fault; ``target`` is as it was.
    """
    address, published = _read_manifest(manifest)
    with _writing(target):
        place = target.resolve()
        if place.exists() and not place.is_dir():
            raise PersodpoError(f"{target} is a file, the release needs a folder; move it away or name another folder.")
        # A mount point is another disk than its parent, and a rename does not cross disks.
        staging = (place if place.is_mount() else place.parent) / f".{place.name}.fetch"
        needed = _needed(place, published)
        if needed:
            needed = _bring_in(place, staging, published, _choose(source, address), progress)
        elif staging.exists():
            with suppress(PersodpoError, OSError), _claimed(staging):
                pass  # a killed run left it; claiming it clears it away
    return FetchReport(target, len(published), len(needed), sum(file.bytes for file in needed))


def release_files(target: Path, *, manifest: Path = _MANIFEST) -> dict[str, Path]:
    """Return where each published file lies, by its path in the release.

    Args:
        target: The folder that `fetch_release` filled.
        manifest: The list of published files.

    Raises:
        PersodpoError: A file is missing or has another size than the published one.
    """
    _, published = _read_manifest(manifest)
    places = {file.path: target / file.path for file in published}
    lost = [f.path for f in published if not (places[f.path].is_file() and places[f.path].stat().st_size == f.bytes)]
    if lost:
        raise PersodpoError(
            f"{target} lacks {_list(lost)} of the release, or holds it with another size; "
            "get the published files with `persodpo fetch release`."
        )
    return places


def _list(paths: Sequence[str]) -> str:
    return f"'{paths[0]}'" + (f" and {len(paths) - 1} other files" if len(paths) > 1 else "")


def _read_manifest(path: Path) -> tuple[str, list[Published]]:
    """Return the address of the pinned archive and the published files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        address = f"{content['repository']}/archive/{content['commit']}.tar.gz"
        files = [Published(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in content["files"]]
        if not files or any(is_unsafe(file.path) for file in files):
            raise ValueError("it lists no file, or one outside its folder")
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise PersodpoError(f"The manifest {path} cannot be read ({why}); restore it from the repository.") from error
    return address, files


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        with disk_errors(target):
            yield
    except OSError as error:
        raise PersodpoError(
            f"{target} cannot be filled ({error}); mend that or choose another folder, what was there is untouched."
        ) from error


def _needed(target: Path, published: Sequence[Published]) -> list[Published]:
    def right(file: Published) -> bool:
        place = target / file.path
        return place.is_file() and place.stat().st_size == file.bytes and sha256(place) == file.sha256

    return [file for file in published if not right(file)]


def _make_folder(folder: Path, undo: ExitStack) -> None:
    def remove(made: Path) -> None:
        with suppress(OSError):  # someone else may have put a file there meanwhile
            made.rmdir()

    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir()
        undo.callback(remove, missing)


def _choose(source: str | None, address: str) -> tuple[str, str]:
    """Return the source to use, and its name for messages."""
    variable = os.environ.get(RELEASE_VARIABLE)
    if source is None and variable:
        return variable, f"{variable} (from {RELEASE_VARIABLE})"
    chosen = address if source is None else source
    return chosen, chosen


def _bring_in(
    target: Path, staging: Path, published: Sequence[Published], source: tuple[str, str], progress: bool
) -> list[Published]:
    """Gather, check and place what ``target`` lacks; return those files."""
    with ExitStack() as undo:
        _make_folder(staging.parent, undo)
        with _claimed(staging):
            # Another fetch may have ended between the first look and the claim.
            needed = _needed(target, published)
            if needed:
                members = _open_source(source, needed, staging, progress)
                _gather(members, needed, staging / "files", label=source[1])
                _put_in_place(staging, target, needed)
        undo.pop_all()
    return needed


@contextmanager
def _claimed(staging: Path) -> Iterator[None]:
    """Own ``staging``, empty at first and removed at the end; the system drops the claim of a killed run."""
    staging.mkdir(exist_ok=True)
    handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _lock(handle) or not os.path.samestat(os.fstat(handle), staging.stat()):
            raise PersodpoError(f"Another fetch is at work in {staging}; wait until it ends and run again.")
        try:
            for left in staging.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network disks cannot lock folders; there two fetches at once are the user's to avoid.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _open_source(source: tuple[str, str], needed: Sequence[Published], staging: Path, progress: bool) -> Members:
    chosen, label = source
    if "://" in chosen:
        download(chosen, staging / "archive", sources.LIMIT_BYTES, progress)
        return archive_members(staging / "archive", label, needed)
    path = Path(chosen).expanduser()
    with reading(label):
        if path.is_dir():
            return folder_members(path, label, needed, progress)
        if path.is_file():
            return archive_members(path, label, needed)
    raise PersodpoError(
        f"The source {label} does not exist; name a folder, a .tar.gz or .zip file or an https:// address."
    )


def _gather(members: Members, needed: Sequence[Published], folder: Path, label: str) -> None:
    missing = {file.path: file for file in needed}
    for file, reader in members:
        _copy_verified(file, reader, folder / file.path, label)
        missing.pop(file.path, None)
    if missing:
        raise PersodpoError(f"{label} lacks {_list(list(missing))}; name a complete copy of the release.")


def _copy_verified(file: Published, reader: IO[bytes], path: Path, label: str) -> None:
    digest, left = hashlib.sha256(), file.bytes + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as copy:
        while True:
            with reading(label):
                chunk = reader.read(min(_CHUNK, left))
            if not chunk:
                break
            left -= len(chunk)
            digest.update(chunk)
            copy.write(chunk)
    found = f"sha256 {digest.hexdigest()}" if left else f"more than {file.bytes:,} bytes"
    if found != f"sha256 {file.sha256}":
        raise PersodpoError(
            f"'{file.path}' from {label} is not the published file (found {found}, expected {file.bytes:,} bytes with "
            f"sha256 {file.sha256}); name another source."
        )


def _put_in_place(staging: Path, target: Path, needed: Sequence[Published]) -> None:
    """Rename the gathered files into ``target``; if one cannot be, put back those it replaced."""
    if not target.exists():
        (staging / "files").replace(target)
        return
    with ExitStack() as undo:
        for number, file in enumerate(needed):
            place, earlier = target / file.path, staging / f"earlier-{number}"
            _make_folder(place.parent, undo)
            if place.exists() or place.is_symlink():
                # A copy, not a rename: a run killed here must not leave a gap.
                shutil.copy2(place, earlier, follow_symlinks=False)
                undo.callback(earlier.replace, place)
            else:
                undo.callback(place.unlink, missing_ok=True)
            (staging / "files" / file.path).replace(place)
        undo.pop_all()
