"""Persona distance: the cosine of what a response and its persona are about, a similarity despite its name.

Each side is a mean vector, of its words or, with a sentence-transformers model, of the whole text. As released, words are
what white space separates, lower-cased, with punctuation left on and NLTK's stop words left out; persona sentences are
joined with nothing between them, so that the last word of one and the first of the next are one word that no vocabulary
knows (audit A10). ``corrected`` puts a space between sentences and strips punctuation from words.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.sparse import csr_matrix

from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of
from persodpo.scoring.scorers import Item, Scored, Way
from persodpo.scoring.stop_words import STOP_WORDS
from persodpo.scoring.word_vectors import WordVectors, load_word_vectors, vectors_sha256

#: What `corrected` strips from both ends of a word: ASCII punctuation and the typographic marks that models write.
PUNCTUATION = string.punctuation + "‘’“”–—…"
#: Texts whose words are averaged at a time; it bounds memory.
CHUNK = 4096
_UNKNOWN, _STOP = -1, -2


class Embedded(NamedTuple):
    """Vectors of texts.

    Attributes:
        vectors: A row a text, zeros where there is nothing to go by, [texts, dimensions].
        truncated: Which texts were cut to the model's length, [texts].
        looked_up: Words looked up in each text, [texts].
        missing: Of these, not in the vocabulary, [texts].
    """

    vectors: np.ndarray
    truncated: np.ndarray
    looked_up: np.ndarray
    missing: np.ndarray


class Embedder(Protocol):
    """Turns texts into vectors."""

    def identity(self) -> Mapping[str, object]:
        """Return what shapes a vector besides the text."""
        ...

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return a vector a text, independent of the other texts."""
        ...


class WordMeans:
    """A text's vector is the mean of its words' vectors, stop words left out."""

    def __init__(self, path: Path, words: Way = "as_released") -> None:
        """Name a file of word vectors (`persodpo.scoring.word_vectors`) and how words are taken; it is read on first use."""
        self.path, self.words = path, words

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the vectors, so that a scorer sent to a worker reads them there."""
        return {"path": self.path, "words": self.words}

    @cached_property
    def table(self) -> WordVectors:
        """The word vectors."""
        return load_word_vectors(self.path)

    def identity(self) -> Mapping[str, object]:
        """Return the vectors' sha256 and how words are taken."""
        return {
            "kind": "word vectors", "sha256": self._sha256, "words": self.words,
            "stop_words": digest_of({"words": sorted(STOP_WORDS)}),
        }  # fmt: skip

    @cached_property
    def _sha256(self) -> str:
        return vectors_sha256(self.path)

    @cached_property
    def _codes(self) -> dict[str, int]:
        """Word -> its row, or that it is a stop word; one look-up a word is what most of the time goes into."""
        return {**self.table.rows, **dict.fromkeys(STOP_WORDS, _STOP)}

    def _words(self, text: str) -> list[str]:
        words = text.lower().split()
        if self.words == "corrected":
            words = [stripped for word in words if (stripped := word.strip(PUNCTUATION))]
        return words

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Average word vectors, in float64."""
        parts = [self._embed(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        return Embedded(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _embed(self, texts: Sequence[str]) -> Embedded:
        words = [self._words(text) for text in texts]
        coded = map(self._codes.get, chain.from_iterable(words), repeat(_UNKNOWN))
        owner = np.repeat(np.arange(len(texts)), [len(found) for found in words])
        codes = np.fromiter(coded, dtype=np.int64, count=len(owner))
        known = codes >= 0
        counts, missing = (np.bincount(owner[which], minlength=len(texts)) for which in (known, codes == _UNKNOWN))
        used, places = _numbered(codes[known], len(self.table.vectors))
        bounds = np.concatenate([[0], np.cumsum(counts)])
        # Words stand in a row's own order, so the sum of one text does not depend on its neighbours.
        counter = csr_matrix((np.ones(len(places)), places, bounds), shape=(len(texts), max(1, len(used))))
        vectors = self.table.vectors[used if len(used) else [0]].astype(np.float64)
        means = (counter @ vectors) / np.maximum(counts, 1)[:, None]
        return Embedded(means, np.zeros(len(texts), dtype=bool), counts + missing, missing)


def _numbered(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ``rows``, ascending, and the place of each row among them."""
    if size > 8 * len(rows):
        used, places = np.unique(rows, return_inverse=True)
        return used, places
    # A look-up table is faster than sorting where it is small.
    table = np.zeros(size, dtype=np.int64)
    table[rows] = 1
    used = np.flatnonzero(table)
    table[used] = np.arange(len(used))
    return used, table[rows]


class SentenceVectors:
    """A text's vector is that of a sentence-transformers model."""

    def __init__(self, model: str, words: Way = "as_released", batch_size: int = 64) -> None:
        """Name a folder or a model on the Hugging Face Hub; it is loaded on first use."""
        self.model_name, self.words, self.batch_size = model, words, batch_size

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, so that a scorer sent to a worker loads it there."""
        return {"model_name": self.model_name, "words": self.words, "batch_size": self.batch_size}

    @cached_property
    def model(self) -> Any:
        """The model.

        Raises:
            PersodpoError: The package is missing, or the model cannot be loaded.
        """
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - optional, and slow to load
        except ImportError as error:
            raise PersodpoError(
                f"'{self.model_name}' is no file of word vectors; to load it as a sentence-transformers model, "
                "pip install sentence-transformers, or name a word2vec or GloVe file."
            ) from error
        from safetensors import SafetensorError  # noqa: PLC0415

        try:
            return SentenceTransformer(
                self.model_name, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            ).eval()
        except (OSError, ValueError, SafetensorError) as error:
            raise PersodpoError(
                f"'{self.model_name}' is neither a file of word vectors nor a sentence-transformers model in safetensors "
                f"that can be loaded ({type(error).__name__}); name a word2vec or GloVe file, a folder, or a model on the "
                "Hugging Face Hub while the network is up."
            ) from error

    def identity(self) -> Mapping[str, object]:
        """Return the digest of the model's weights, name by name."""
        import hashlib  # noqa: PLC0415

        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return {"kind": "sentence-transformers", "sha256": digest.hexdigest(), "words": self.words}

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Encode texts in batches of like length; an empty text gets zeros."""
        limit = self.model.max_seq_length or np.inf
        lengths = (
            [len(ids) for ids in self.model.tokenizer(list(texts), truncation=False)["input_ids"]] if texts else []
        )
        vectors = np.asarray(
            self.model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False), dtype=np.float64
        )
        vectors[[not text.strip() for text in texts]] = 0.0
        nothing = np.zeros(len(texts), dtype=np.int64)
        return Embedded(vectors, np.array(lengths) > limit, nothing, nothing)


class PersonaDistance:
    """Cosine of persona and response, -1 to 1; 0 where either has nothing to go by."""

    name = "persona_distance"
    #: Texts that the engine hands over together: cheap ones, of which many share a persona.
    batch_texts = 4096

    def __init__(self, embedder: WordMeans | SentenceVectors) -> None:
        """Take the vectors of `WordMeans` or `SentenceVectors`."""
        self.embedder = embedder

    def identity(self) -> Mapping[str, object]:
        """Return what shapes a score besides the texts."""
        return self.embedder.identity()

    def texts(self, item: Item) -> tuple[str, ...]:
        """Return the joined persona and the response."""
        between = "" if self.embedder.words == "as_released" else " "
        return between.join(item.personas), item.response

    def score(self, texts: Sequence[tuple[str, ...]]) -> Scored:
        """Score pairs of persona and response; each distinct text is embedded once.

        Notes of the result: ``out_of_vocabulary``, the share of words looked up that the vocabulary lacks.
        """
        if not texts:
            return Scored(np.empty(0), 0, {})
        distinct = {text: row for row, text in enumerate(dict.fromkeys(text for pair in texts for text in pair))}
        embedded = self.embedder.embed(list(distinct))
        places = np.array([[distinct[text] for text in pair] for pair in texts])
        norms = np.linalg.norm(embedded.vectors, axis=1)
        unit = embedded.vectors / np.where(norms > 0, norms, 1.0)[:, None]
        values = np.empty(len(texts))
        for start in range(0, len(texts), CHUNK):
            persona, response = places[start : start + CHUNK].T
            values[start : start + CHUNK] = np.einsum("ij,ij->i", unit[persona], unit[response])
        truncated = int(embedded.truncated[places].any(axis=1).sum())
        asked, lacking = embedded.looked_up[places].sum(), embedded.missing[places].sum()
        notes = {"out_of_vocabulary": float(lacking / asked)} if asked else {}
        return Scored(np.clip(values, -1.0, 1.0), truncated, notes)


def persona_distance(model: str, words: Way = "as_released") -> PersonaDistance:
    """Return the scorer for a model.

    Args:
        model: A file of word vectors; anything else is a sentence-transformers model, a folder or a name on the Hub.
        words: ``as_released`` or ``corrected``, see the module's docstring.
    """
    path = Path(model)
    return PersonaDistance(WordMeans(path, words) if path.is_file() else SentenceVectors(model, words))
