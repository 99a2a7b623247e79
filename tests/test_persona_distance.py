"""Persona distance: hand-computed cosines, the released way word by word, files that are cut off, mapped vectors."""

from __future__ import annotations

import gzip
import json
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persodpo.errors import PersodpoError
from persodpo.scoring.persona_distance import PersonaDistance, SentenceVectors, WordMeans, persona_distance
from persodpo.scoring.scorers import Item
from persodpo.scoring.stop_words import STOP_WORDS
from persodpo.scoring.word_vectors import load_word_vectors, vectors_sha256

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


def cosine(scorer: PersonaDistance, personas: tuple[str, ...], response: str) -> float:
    return float(scorer.score([scorer.texts(Item(personas, "", "", response))]).values[0])


def test_the_stop_words_are_nltks():
    assert len(STOP_WORDS) == 198
    assert {"i", "the", "not", "wouldn't", "they'd", "ma"} <= STOP_WORDS
    assert not {"museum", "cannot", "like", ""} & STOP_WORDS
    assert all(word == word.lower() and word.isascii() for word in STOP_WORDS)


def test_hand_computed_cosines(vectors):
    scorer = persona_distance(str(vectors))
    assert cosine(scorer, ("I love art",), "LOVE the Art") == pytest.approx(1.0)
    # mean of art and museum is (2, 2); history is (0, 1)
    assert cosine(scorer, ("art museum",), "history") == pytest.approx(np.sqrt(0.5))
    assert cosine(scorer, ("art",), "the café") == pytest.approx(-1.0)
    assert cosine(scorer, ("art art history",), "art") == pytest.approx(2 / np.sqrt(5))


def test_nothing_in_the_vocabulary_is_zero(vectors):
    scorer = persona_distance(str(vectors))
    assert [cosine(scorer, ("art",), text) for text in ("", "the of", "Zebra!", " ")] == [0.0] * 4
    assert cosine(scorer, (), "art") == 0.0


def test_as_released_keeps_punctuation_and_joins_sentences_and_corrected_does_not(vectors):
    released, corrected = (persona_distance(str(vectors), words) for words in ("as_released", "corrected"))
    personas = ("I love art.", "Museum fan.")
    assert released.texts(Item(personas, "", "", "x"))[0] == "I love art.Museum fan."
    # As released only "love" is known: (1, 1) against museum. (0, -1); mended love, art, museum against museum.
    assert cosine(released, personas, "museum.") == pytest.approx(-np.sqrt(0.5))
    mean = np.array([5.0, 5.0]) / 3
    assert cosine(corrected, personas, "“Museum.”") == pytest.approx(mean @ [0.6, 0.8] / np.linalg.norm(mean))
    assert released.identity() != corrected.identity()


def test_the_share_of_unknown_words_is_reported(vectors):
    scorer = persona_distance(str(vectors))
    scored = scorer.score([("art zebra", "the lion history"), ("art zebra", "unknown")])
    assert scored.notes == {"out_of_vocabulary": pytest.approx(4 / 7)}
    assert scored.truncated == 0
    assert scorer.score([("the", "of")]).notes == {}
    assert scorer.score([]).values.shape == (0,)


def released_way(table: dict[str, np.ndarray], persona: str, response: str) -> float:
    """One pair at a time, as the method is written down."""
    means = []
    for text in (persona, response):
        found = [table[word] for word in text.lower().split() if word not in STOP_WORDS and word in table]
        if not found:
            return 0.0
        means.append(np.mean(found, axis=0))
    if not all(np.linalg.norm(mean) for mean in means):
        return 0.0
    return float(means[0] @ means[1] / np.prod([np.linalg.norm(mean) for mean in means]))


TEXT = st.lists(st.sampled_from([*VECTORS, "zebra", "I", "Museum", "history,"]), max_size=12).map(" ".join)


@settings(max_examples=60)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_equals_the_released_way_in_any_order_and_batch(tmp_path_factory, pairs, seed):
    path = tmp_path_factory.getbasetemp() / "property.txt"
    path.write_bytes(text_bytes())
    scorer, table = persona_distance(str(path)), {word: np.array(v) for word, v in VECTORS.items()}
    expected = [released_way(table, *pair) for pair in pairs]
    assert scorer.score(pairs).values == pytest.approx(expected, abs=1e-9)
    order = np.random.default_rng(seed).permutation(len(pairs))
    assert (scorer.score([pairs[n] for n in order]).values == scorer.score(pairs).values[order]).all()
    assert [scorer.score([pair]).values[0] for pair in pairs] == scorer.score(pairs).values.tolist()


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_vectors(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    found = load_word_vectors(path)
    assert {word: found.vectors[row].tolist() for word, row in found.rows.items()} == VECTORS


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):
    """At every byte; a headerless file cut between two lines is a shorter file, and says so in the documentation."""
    whole, path = FILES[name], tmp_path / name
    undetectable = {n + 1 for n, byte in enumerate(whole) if byte == 10} if name == "glove.txt" else set()
    # The newline after the last binary vector carries nothing.
    last = len(whole) - (1 if name == "vectors.bin" else 0)
    for cut in range(last):
        if cut in undetectable:
            continue
        path.write_bytes(whole[:cut])
        with pytest.raises(
            PersodpoError, match=r"Word vectors .* (are cut off|are damaged|hold no word).*; fetch the file"
        ):
            load_word_vectors(path)


def test_files_that_are_no_vectors(tmp_path):
    for name, content in {
        "a.txt": b"hello world\n",
        "b.bin": b"\x00\x01",
        "c.txt": b"art 1.0 nan\n",
        "d.gz": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PersodpoError, match="fetch the file again"):
            load_word_vectors(tmp_path / name)
    with pytest.raises(PersodpoError, match="There is no file of word vectors at"):
        load_word_vectors(tmp_path / "absent.bin")


def test_large_files_are_mapped_and_read_once(tmp_path, monkeypatch):
    path = tmp_path / "vectors.bin"
    path.write_bytes(binary_bytes())
    first = load_word_vectors(path, map_from=1)
    assert isinstance(first.vectors, np.memmap)
    assert first.sha256 == vectors_sha256(path, map_from=1) == load_word_vectors(path).sha256
    folder = tmp_path / "vectors.bin.mapped"
    assert sorted(file.name for file in folder.iterdir()) == ["record.json", "vectors.npy", "words.json"]
    monkeypatch.setitem(sys.modules, "gensim.models", None)  # a second reading would need it
    again = load_word_vectors(path, map_from=1)
    assert again.rows == first.rows
    assert (again.vectors == first.vectors).all()


def test_a_changed_file_is_mapped_anew(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text_bytes())
    before = load_word_vectors(path, map_from=1)
    path.write_bytes(b"2 2\nzebra 1.0 2.0\nlion 0.5 0.5\n")
    after = load_word_vectors(path, map_from=1)
    assert set(after.rows) == {"zebra", "lion"}
    assert after.sha256 != before.sha256
    assert json.loads((tmp_path / "vectors.txt.mapped" / "words.json").read_text()) == ["zebra", "lion"]
    assert not list(tmp_path.glob(".*partial*"))


def test_a_missing_package_or_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    scorer = persona_distance(str(tmp_path / "no-such-file.bin"))
    with pytest.raises(PersodpoError, match="pip install sentence-transformers, or name a word2vec or GloVe file"):
        scorer.score([("a", "b")])


def test_sentence_transformers_models_work_too(tmp_path, one_thread):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from scorer_models import counting_bert
    from transformers import AutoTokenizer, BertModel

    counting_bert(tmp_path / "bert", max_length=16)
    BertModel.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "sentences")
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "sentences")
    scorer = persona_distance(str(tmp_path / "sentences"))
    assert isinstance(scorer.embedder, SentenceVectors)
    scored = scorer.score([("agree agree", "agree agree"), ("agree", ""), ("agree", "deny"), ("x", "x " * 40)])
    assert scored.values[0] == pytest.approx(1.0)
    assert scored.values[1] == 0.0
    assert scored.values[2] < 0.999
    assert scored.truncated == 1
    other = persona_distance(str(tmp_path / "sentences"), "corrected")
    assert scorer.identity()["sha256"] == other.identity()["sha256"]
    assert scorer.identity() != other.identity()
    with pytest.raises(PersodpoError, match="neither a file of word vectors nor a sentence-transformers model"):
        persona_distance(str(tmp_path / "bert" / "config")).score([("a", "b")])


def test_a_scorer_travels_without_its_vectors(vectors):
    means = WordMeans(vectors)
    assert means.table.rows["art"] == 0
    assert means.__getstate__() == {"path": vectors, "words": "as_released"}
