"""Persona distance: hand-computed cosines, the released way word by word, files that are cut off or hold odd words."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from persodpo.errors import PersodpoError
from persodpo.scoring.score import Item, Way
from persodpo.scoring.signals import PersonaDistance
from persodpo.scoring.words import STOP_WORDS, WordMeans, read_word_vectors

VECTORS = {
    "art": [1.0, 0.0], "history": [0.0, 1.0], "museum": [3.0, 4.0], "the": [5.0, 5.0], "café": [-1.0, 0.0],
    "museum.": [0.0, -1.0], "love": [1.0, 1.0],
}  # fmt: skip


def text_bytes(header: bool = True) -> bytes:
    lines = [f"{len(VECTORS)} 2"] if header else []
    lines += [f"{word} {' '.join(map(str, vector))}" for word, vector in VECTORS.items()]
    return ("\n".join(lines) + "\n").encode()


def binary_bytes() -> bytes:
    words = b"".join(word.encode() + b" " + struct.pack("<2f", *vector) + b"\n" for word, vector in VECTORS.items())
    return f"{len(VECTORS)} 2\n".encode() + words


FILES = {
    "vectors.txt": text_bytes(), "glove.txt": text_bytes(header=False), "vectors.bin": binary_bytes(),
    "vectors.txt.gz": gzip.compress(text_bytes()), "vectors.bin.gz": gzip.compress(binary_bytes()),
}  # fmt: skip


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text_bytes())
    return path


def distance(path: Path, way: Way = "as_released") -> PersonaDistance:
    return PersonaDistance(WordMeans(path, way), way)


def cosine(scorer: PersonaDistance, personas: tuple[str, ...], response: str) -> float:
    return float(scorer.score([Item(personas, "", "", response)]).values[0])


def test_the_stop_words_are_nltks():
    assert len(STOP_WORDS) == 198
    assert {"i", "the", "not", "wouldn't", "they'd", "ma"} <= STOP_WORDS
    assert not {"museum", "cannot", "like", ""} & STOP_WORDS
    assert all(word == word.lower() and word.isascii() for word in STOP_WORDS)


def test_hand_computed_cosines(vectors):
    scorer = distance(vectors)
    assert cosine(scorer, ("I love art",), "LOVE the Art") == pytest.approx(1.0)
    # mean of art and museum is (2, 2); history is (0, 1)
    assert cosine(scorer, ("art museum",), "history") == pytest.approx(np.sqrt(0.5))
    assert cosine(scorer, ("art",), "the café") == pytest.approx(-1.0)
    assert cosine(scorer, ("art art history",), "art") == pytest.approx(2 / np.sqrt(5))
    # nothing that is in the vocabulary
    assert [cosine(scorer, ("art",), text) for text in ("", "the of", "Zebra!", " ")] == [0.0] * 4
    assert cosine(scorer, (), "art") == 0.0


def test_as_released_keeps_punctuation_and_joins_sentences_and_corrected_does_not(vectors):
    released, corrected = (distance(vectors, way) for way in ("as_released", "corrected"))
    personas = ("I love art.", "Museum fan.")
    # As released only "love" is known: (1, 1) against museum. (0, -1); mended love, art, museum against museum.
    assert cosine(released, personas, "museum.") == pytest.approx(-np.sqrt(0.5))
    mean = np.array([5.0, 5.0]) / 3
    assert cosine(corrected, personas, "“Museum.”") == pytest.approx(mean @ [0.6, 0.8] / np.linalg.norm(mean))
    assert released.key != corrected.key


def test_the_share_of_unknown_words_is_reported(vectors):
    pairs = [("art zebra", "the lion history"), ("art zebra", "unknown"), ("the", "of")]
    scored = distance(vectors).score([Item((persona,), "", "", response) for persona, response in pairs])
    assert scored.unread.tolist() == [0.5, 0.75, 0.0]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_vectors(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    rows, table = read_word_vectors(path)
    assert {word: table[row].tolist() for word, row in rows.items()} == VECTORS


@pytest.mark.parametrize("header", [True, False])
def test_a_word_may_hold_spaces(tmp_path, header):
    """As lines of the published GloVe file of 840 billion tokens do; the vector is the last numbers of the line."""
    path = tmp_path / "glove.txt"
    lines = [". . . 0.125 0.25 0.375 0.5", "at name@domain.com 1 2 3 4", "the 0.5 0.25 1 2", "of 1 1 1 1"]
    path.write_text("\n".join(["4 4", *lines] if header else lines) + "\n")
    rows, table = read_word_vectors(path)
    assert list(rows) == [". . .", "at name@domain.com", "the", "of"]
    assert table[0].tolist() == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):
    """At every byte; a headerless file cut between two lines is a shorter file, and says so in the documentation."""
    whole, path = FILES[name], tmp_path / name
    undetectable = {n + 1 for n, byte in enumerate(whole) if byte == 10} if name == "glove.txt" else set()
    # The newline after the last binary vector carries nothing.
    for cut in set(range(len(whole) - (name == "vectors.bin"))) - undetectable:
        path.write_bytes(whole[:cut])
        with pytest.raises(PersodpoError, match=r"Word vectors .* are cut off, damaged or .*; fetch the file"):
            read_word_vectors(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"hello world\n"),
        ("b.bin", b"\0\1"),
        ("c.txt", b"art 1.0 nan\n"),
        ("d.gz", b"no"),
        ("e.txt", b"0 2\n"),
    ],
)
def test_files_that_are_no_vectors(tmp_path, name, content):
    with pytest.raises(PersodpoError, match="There is no file of word vectors at"):
        read_word_vectors(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PersodpoError, match="fetch the file again"):
        read_word_vectors(tmp_path / name)
