"""Fetch the published files from the pinned commit on GitHub, or from a copy, and check each by its sha256.

pooch writes each file to a temporary name and renames it once its sha256 is right, so a fetch that fails leaves no half
file and the next one goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from persodpo.errors import PersodpoError
from persodpo.files import DATA, RELEASE_VARIABLE, disk_errors, make_folder, sha256
from persodpo.progress import bar

_MANIFEST = DATA / "release_manifest.json"
_REMEDY = f"or name a folder that holds a copy of the release with {RELEASE_VARIABLE}"


def fetch_release(target: Path, *, manifest: Path = _MANIFEST) -> dict[str, Path]:
    """Fetch the published files that ``target`` lacks or holds with other bytes.

    They come from the folder that the environment variable PERSODPO_RELEASE names, else from the pinned commit; other files
    in ``target`` stay. ``manifest`` lists the published files, with repository and commit.

    Returns:
        Where each published file lies, by its path in the release.

    Raises:
        PersodpoError: The network, the copy, the disk or a file's sha256 is at fault.
    """
    address, hashes = _read_manifest(manifest)
    missing = _missing(target, hashes)
    if missing:
        import pooch  # noqa: PLC0415 - only the first fetch needs it

        copy = os.environ.get(RELEASE_VARIABLE)
        urls = {path: str(Path(copy).expanduser() / path) if copy else address + quote(path) for path in missing}
        registry = {path: f"sha256:{hashes[path]}" for path in missing}
        files = pooch.create(target, base_url=address, registry=registry, urls=urls)
        pooch.get_logger().setLevel("WARNING")  # the bar below says enough
        for path in bar(missing, "published files", unit=" files"):
            make_folder((target / path).parent)
            with _errors_of(target / path, urls[path]):
                files.fetch(path, downloader=_copy if copy else pooch.HTTPDownloader(allow_redirects=False))
            (target / path).chmod(0o644)  # temporary files are for their owner alone
    return {path: target / path for path in hashes}


def release_files(target: Path, *, manifest: Path = _MANIFEST) -> dict[str, Path]:
    """Return where each published file of a folder lies, by its path in the release, if all are there; none is fetched."""
    _, hashes = _read_manifest(manifest)
    if missing := _missing(target, hashes):
        raise PersodpoError(
            f"{target / missing[0]} is missing or not as published ({len(missing)} of {len(hashes)} files are); "
            "get them with `persodpo fetch release`."
        )
    return {path: target / path for path in hashes}


def _read_manifest(manifest: Path) -> tuple[str, dict[str, str]]:
    """Return the address of the raw files at the pinned commit, and the sha256 of each file by its path."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    repository = content["repository"].replace("https://github.com/", "https://raw.githubusercontent.com/")
    return f"{repository}/{content['commit']}/", {file["path"]: file["sha256"] for file in content["files"]}


def _missing(target: Path, hashes: Mapping[str, str]) -> list[str]:
    return [path for path, digest in hashes.items() if not (target / path).is_file() or sha256(target / path) != digest]


def _copy(source: str, output: str, _: object) -> None:
    """Take the place of pooch's downloader where a copy is named."""
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise PersodpoError(
            f"{source} cannot be read ({error.strerror}); {RELEASE_VARIABLE} must name a folder that holds a whole copy."
        ) from error
    Path(output).write_bytes(content)


@contextmanager
def _errors_of(place: Path, source: str) -> Iterator[None]:
    try:
        with disk_errors(place):
            yield
    except ValueError as error:  # pooch raises it where the sha256 differs
        raise PersodpoError(
            f"{source} is not the published file: its sha256 differs; fetch it again, {_REMEDY}."
        ) from error
    except PermissionError as error:  # pooch leaves out its number, by which `disk_errors` would know it
        raise PersodpoError(f"{place} cannot be written; make its folder writable or choose another one.") from error
    except OSError as error:  # those of requests among them
        raise PersodpoError(
            f"{source} cannot be fetched; run `persodpo fetch release` once the network is up, {_REMEDY} ({error})."
        ) from error
