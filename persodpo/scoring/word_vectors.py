"""A file of word vectors in, a matrix and its vocabulary out: word2vec (binary or text) and GloVe.

gensim reads the file. A large one, such as GoogleNews with 3.4 GiB, is read once and kept beside itself as a matrix that
the system maps into memory page by page, and a list of words; both are plain data that run no code.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persodpo.errors import PersodpoError, disk_errors
from persodpo.runfolder import read_json, sha256, write_json

#: Files from this size on are kept as a mapped matrix, bytes.
MAP_FROM = 2**28
_HEADER = re.compile(rb"\d+ \d+\s*")
_GZIP = ".gz"


@dataclass(frozen=True)
class WordVectors:
    """Word vectors.

    Attributes:
        vectors: A row a word, float32, [words, dimensions]; may be mapped from disk.
        rows: Word -> its row.
        sha256: Of the file they came from.
    """

    vectors: np.ndarray
    rows: Mapping[str, int]
    sha256: str


def load_word_vectors(path: Path, *, map_from: int = MAP_FROM) -> WordVectors:
    """Read word vectors.

    Args:
        path: ``*.bin`` is word2vec's binary format; anything else is text, word2vec's if its first line holds two whole
            numbers, GloVe's otherwise. Either may be compressed (``*.gz``).
        map_from: Size in bytes from which the vectors are mapped from a folder beside the file, ``<file>.mapped``, which
            is made on first use and takes as much disk again.

    Returns:
        The vectors.

    Raises:
        PersodpoError: The file is missing, cut off or damaged, holds a vector that is not finite, or the folder beside
            it cannot be written. A GloVe file that was cut off between two lines cannot be told from a shorter one.
    """
    if not path.is_file():
        raise PersodpoError(f"There is no file of word vectors at {path}; name a word2vec or GloVe file.")
    if path.stat().st_size < map_from:
        words, vectors = _read(path)
        return WordVectors(vectors, {word: row for row, word in enumerate(words)}, sha256(path))
    folder, digest = _mapped(path)
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    return WordVectors(vectors, {word: row for row, word in enumerate(words)}, digest)


def vectors_sha256(path: Path, *, map_from: int = MAP_FROM) -> str:
    """Return the sha256 of a file of word vectors without reading it where that can be avoided; as `load_word_vectors`."""
    return _mapped(path)[1] if path.stat().st_size >= map_from else sha256(path)


def _mapped(path: Path) -> tuple[Path, str]:
    """Return the folder that holds the mapped vectors of ``path``, made if need be, and the file's sha256."""
    folder = path.with_name(f"{path.name}.mapped")
    # The digest of gigabytes takes a while; a file of the same size and time is taken to be the same.
    stat = path.stat()
    seen = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
    record = read_json(folder / "record.json")
    if any(record.get(key) != value for key, value in seen.items()):
        record = _make_mapped(path, folder, seen)
    return folder, str(record["sha256"])


def _make_mapped(path: Path, folder: Path, seen: Mapping[str, int]) -> dict[str, object]:
    """Read the file once and leave matrix, words and record in ``folder``."""
    words, vectors = _read(path)
    record = {**seen, "sha256": sha256(path)}
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    with disk_errors(folder):
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            np.save(scratch / "vectors.npy", vectors)
            (scratch / "words.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
            write_json(scratch / "record.json", record)
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return record


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a file with gensim; errors as `load_word_vectors`."""
    from gensim.models import KeyedVectors  # noqa: PLC0415 - slow to load

    name = path.name.removesuffix(_GZIP)
    binary = name.endswith(".bin")
    try:
        with gzip.open(path) if path.suffix == _GZIP else path.open("rb") as file:
            header = bool(_HEADER.fullmatch(file.readline(1000)))
        if not binary and path.suffix != _GZIP and not _ends_with_newline(path):
            raise EOFError  # the last number may have lost digits, which no reader could notice
        found = KeyedVectors.load_word2vec_format(
            str(path), binary=binary, no_header=not header and not binary, unicode_errors="replace"
        )
    except (EOFError, OSError, ValueError, TypeError, AssertionError, MemoryError, zlib.error) as error:
        cut = isinstance(error, EOFError)
        raise PersodpoError(
            f"Word vectors {path} are {'cut off' if cut else 'damaged or in no format of word2vec or GloVe'}; fetch the "
            "file again."
        ) from error
    vectors = np.asarray(found.vectors, dtype=np.float32)
    if not len(vectors):
        raise PersodpoError(f"Word vectors {path} hold no word; fetch the file again.")
    for start in range(0, len(vectors), 65_536):
        if not np.isfinite(vectors[start : start + 65_536]).all():
            raise PersodpoError(f"Word vectors {path} hold numbers that are not finite; fetch the file again.")
    return list(found.index_to_key), vectors


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read(1) == b"\n"
