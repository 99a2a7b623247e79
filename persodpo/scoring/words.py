"""Texts in, mean word vectors out: word2vec's and GloVe's files.

As released, words are what white space separates, lower-cased, with punctuation left on and NLTK's stop words left out.
``corrected`` strips punctuation from words (audit A10).
"""

from __future__ import annotations

import gzip
import re
import string
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from io import BufferedIOBase
from itertools import chain, islice
from pathlib import Path

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.files import digest_of, sha256
from persodpo.scoring.score import Way

#: NLTK's English stop words: ``stopwords/english`` of nltk.org/nltk_data as of February 2025.
STOP_WORDS = frozenset(Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8").split())
#: What `corrected` strips from both ends of a word: ASCII punctuation and the typographic marks that models write.
PUNCTUATION = string.punctuation + "‘’“”–—…"
#: Words and dimensions, in the first line of word2vec's text format.
_HEADER = re.compile(rb"(\d+) (\d+)\s*")


class WordMeans:
    """A text's vector is the mean of its words' vectors, stop words left out; unread are words without a vector."""

    def __init__(self, path: Path, way: Way = "corrected") -> None:
        """Name a word2vec or GloVe file, see `read_word_vectors`; it is read on first use."""
        self.path, self.way = path, way

    @cached_property
    def key(self) -> str:
        """Digest of the file, the way and the stop words."""
        return digest_of({"file": sha256(self.path), "way": self.way, "stop_words": sorted(STOP_WORDS)})

    @cached_property
    def _table(self) -> tuple[dict[str, int], np.ndarray]:
        return read_word_vectors(self.path)

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Average word vectors in float64, [texts, dimensions]; the share of its words that have none, [texts]."""
        rows, vectors = self._table
        means, unread = np.zeros((len(texts), vectors.shape[1])), np.zeros(len(texts))
        for number, text in enumerate(texts):
            words = text.lower().split()
            if self.way == "corrected":
                words = [stripped for word in words if (stripped := word.strip(PUNCTUATION))]
            words = [word for word in words if word not in STOP_WORDS]
            places = [rows[word] for word in words if word in rows]
            if places:
                means[number] = vectors[places].mean(axis=0, dtype=np.float64)
            unread[number] = 1 - len(places) / len(words) if words else 0.0
        return means, unread


def read_word_vectors(path: Path) -> tuple[dict[str, int], np.ndarray]:
    """Read word vectors: word2vec's binary format (``*.bin``) or text, as word2vec and GloVe write it, perhaps as ``*.gz``.

    A GloVe file that was cut off between two lines cannot be told from a shorter one.

    Returns:
        Word -> its row, and the vectors, float32, [words, dimensions]. A word may hold spaces.
    """
    if not path.is_file():
        raise PersodpoError(f"There is no file of word vectors at {path}; name a word2vec or GloVe file.")
    read = _binary_rows if path.name.removesuffix(".gz").endswith(".bin") else _text_rows
    rows: dict[str, int] = {}
    numbers = array("f")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for word, vector in read(file):
                if (text := word.decode("utf-8", "replace")) not in rows:
                    rows[text] = len(rows)
                    numbers.extend(vector)
        vectors = np.frombuffer(numbers, dtype=np.float32).reshape(len(rows), -1)
        if not vectors.size or not np.isfinite(vectors).all():
            raise ValueError("no numbers, or some that are not finite")
    except (EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
        raise PersodpoError(
            f"Word vectors {path} are cut off, damaged or in no format of word2vec or GloVe; fetch the file again."
        ) from error
    return rows, vectors


def _binary_rows(file: BufferedIOBase) -> Iterator[tuple[bytes, array[float]]]:
    count, size = (int(number) for number in file.readline(100).split())
    for _ in range(count):
        word = bytearray()
        while (letter := file.read(1)) != b" ":
            if not letter:
                raise EOFError
            word += letter
        vector = array("f", file.read(4 * size))
        if len(vector) != size:
            raise EOFError
        yield bytes(word).lstrip(b"\n"), vector
    if file.read(2).strip():
        raise ValueError("more vectors than the first line says")


def _text_rows(file: BufferedIOBase) -> Iterator[tuple[bytes, array[float]]]:
    first = list(islice(file, 1000))
    header = _HEADER.fullmatch(first[0]) if first else None
    lines = chain(first[1:] if header else first, file)
    size = int(header[2]) if header else min((len(line.split()) for line in first), default=1) - 1
    count = 0
    for line in lines:
        word, *numbers = line.rstrip().rsplit(b" ", size)
        if not line.endswith(b"\n") or len(numbers) != size:
            raise EOFError  # without its end, the last number may have lost digits, which no reader could notice
        yield word, array("f", map(float, numbers))
        count += 1
    if header and count != int(header[1]):
        raise EOFError
