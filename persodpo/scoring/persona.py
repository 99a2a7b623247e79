"""Persona distance: the cosine of what a response and its persona are about, a similarity despite its name.

Each side is a mean vector of its words, or the vector that a sentence encoder gives the whole text. As released, words are
what white space separates, lower-cased, with punctuation left on and NLTK's stop words left out; persona sentences are
joined with nothing between them, so that the last word of one and the first of the next are one word that no vocabulary
knows (audit A10). ``corrected`` puts a space between sentences and strips punctuation from words.
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
from persodpo.runfolder import digest_of, sha256
from persodpo.scoring.encoder import Encoder
from persodpo.scoring.nli import Way
from persodpo.scoring.score import Item, Scored, distinct

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
        """Average word vectors in float64, [texts, dimensions]."""
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


class PersonaDistance:
    """Cosine of persona and response, -1..1; 0 where either has nothing to go by."""

    name = "persona_distance"

    def __init__(self, embedder: WordMeans | Encoder, way: Way = "corrected") -> None:
        """Take what turns texts into vectors, and how persona sentences are joined."""
        self.embedder, self.way = embedder, way

    @property
    def key(self) -> str:
        """Digest of embedder and way."""
        return digest_of({"embedder": self.embedder.key, "way": self.way})

    def score(self, items: Sequence[Item]) -> Scored:
        """Embed each distinct text once, and compare."""
        between = "" if self.way == "as_released" else " "
        texts, places = distinct([text for item in items for text in (between.join(item.personas), item.response)])
        vectors, unread = self.embedder.embed(texts)
        norms = np.linalg.norm(vectors, axis=1)
        unit = vectors / np.where(norms > 0, norms, 1.0)[:, None]
        left, right = places.reshape(-1, 2).T
        values = np.array([unit[p] @ unit[r] for p, r in zip(left, right, strict=True)], dtype=np.float64)
        return Scored(np.clip(values, -1.0, 1.0), (unread[left] + unread[right]) / 2)


def read_word_vectors(path: Path) -> tuple[dict[str, int], np.ndarray]:
    """Read word vectors: word2vec's binary format (``*.bin``) or text, as word2vec and GloVe write it, perhaps as ``*.gz``.

    Returns:
        Word -> its row, and the vectors, float32, [words, dimensions]. A word may hold spaces.

    Raises:
        PersodpoError: The file is missing, cut off or damaged, or holds a vector that is not finite. A GloVe file that was
            cut off between two lines cannot be told from a shorter one.
    """
    if not path.is_file():
        raise PersodpoError(f"There is no file of word vectors at {path}; name a word2vec or GloVe file.")
    read = _binary_rows if path.name.removesuffix(".gz").endswith(".bin") else _text_rows
    rows: dict[str, int] = {}
    numbers, size = array("f"), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for word, vector in read(file):
                if not vector or (size and len(vector) != size):
                    raise ValueError("no vector, or one of another length")
                size = len(vector)
                if rows.setdefault(word.decode("utf-8", "replace"), len(rows)) == len(numbers) // size:
                    numbers.extend(vector)
        if not size:
            raise ValueError("no word")
        vectors = np.frombuffer(numbers, dtype=np.float32).reshape(-1, size)
        if not np.isfinite(vectors).all():
            raise ValueError("numbers that are not finite")
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
        if not line.endswith(b"\n"):
            raise EOFError  # the last number may have lost digits, which no reader could notice
        word, *numbers = line.rstrip().rsplit(b" ", size)
        yield word, array("f", map(float, numbers))
        count += 1
    if header and count != int(header[1]):
        raise EOFError
