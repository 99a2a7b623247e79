"""Dialogues in, the small scorers of machines without downloads out: made in a minute on the spot, and reused.

Three folders: ``coherence`` (a T5 that answers Yes or No), ``nli`` (a BERT with the classes of natural language inference)
and ``vectors`` (word2vec). The transformers learn from examples that `persodpo.scoring.small_examples` makes of the
dialogues, by the fine-tuning that real models get. Each has a record and a card with its accuracy on held-out dialogues.
They show the method at work; they do not judge answers as the published models do.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gensim.models import KeyedVectors, Word2Vec
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tqdm import tqdm

from persodpo.errors import PersodpoError, make_folder
from persodpo.folders import made_once
from persodpo.imports import code_of
from persodpo.runfolder import digest_of
from persodpo.scoring import small_examples, small_models
from persodpo.scoring.finetune_scorer import RECORD, finetune
from persodpo.scoring.inference import Loaded, one_thread
from persodpo.scoring.nli_data import Examples
from persodpo.scoring.scorer_card import FineTuning, Report, card
from persodpo.scoring.small_models import SmallModel

WEIGHTS, VECTORS = "model.safetensors", "vectors.bin"
MINIMUM_DIALOGUES = 10


@dataclass(frozen=True)
class SmallVectors:
    """Training of the small word vectors: dimensions, passes over the texts, and how often a word must stand in them."""

    size: int = 64
    epochs: int = 20
    minimum_count: int = 2


@dataclass(frozen=True)
class SmallScorers:
    """Sizes and training of the three.

    Attributes:
        coherence: The encoder-decoder model, which reads a reply under its own and under another dialogue.
        nli: The classifier, which reads persona sentences said again, denied, or said of something else.
        seed: Of weights, examples and their order.
        vectors: The word vectors.
        held_out: Share of the dialogues that accuracy is measured on.
    """

    coherence: SmallModel
    nli: SmallModel
    seed: int
    vectors: SmallVectors = SmallVectors()
    held_out: float = 0.1

    @classmethod
    def of(cls, examples: int, seed: int) -> SmallScorers:
        """Return those of a run: the classifier learns from ``examples``, coherence from two fifths of them."""
        return cls(SmallModel(96, examples * 2 // 5), SmallModel(64, examples), seed)


@dataclass(frozen=True)
class SmallFolders:
    """Where the small scorers lie.

    Attributes:
        coherence: Folder of the encoder-decoder model.
        nli: Folder of the classifier.
        vectors: File of word vectors, in word2vec's binary format.
    """

    coherence: Path
    nli: Path
    vectors: Path


def make_small_scorers(
    dialogues: pd.DataFrame, folder: Path, settings: SmallScorers, *, progress: bool = True
) -> SmallFolders:
    """Make the small scorers from dialogues, each unless ``folder`` holds it already.

    The same dialogues, and settings on the same machine give the same weights.

    Args:
        dialogues: A dialogues table; personas, context and reference are read.
        folder: Where the three folders go.
        settings: Sizes and training.
        progress: Show a progress bar, on a terminal.

    Returns:
        Their places.

    Raises:
        PersodpoError: There are too few dialogues or no persona sentence is understood, a folder holds something else, or
            the disk fails.
    """
    if len(dialogues) < MINIMUM_DIALOGUES:
        raise PersodpoError(
            f"The small scorers need at least {MINIMUM_DIALOGUES} dialogues to learn from, not {len(dialogues)}."
        )
    texts = digest_of({"texts": [[list(p), c, r] for p, c, r in _rows(dialogues)]})
    train, held_out = _split(dialogues, settings)
    makers: dict[str, tuple[Any, str, Callable[[Path], Mapping[str, Any]]]] = {
        "coherence": (settings.coherence, WEIGHTS, lambda path: _coherence(train, held_out, settings, path)),
        "nli": (settings.nli, WEIGHTS, lambda path: _nli(train, held_out, settings, path)),
        "vectors": (settings.vectors, VECTORS, lambda path: _vectors(train, held_out, settings, path)),
    }
    make_folder(folder)
    silent = not (progress and sys.stderr.isatty())
    for name in tqdm(makers, desc="small scorers", disable=silent, leave=False):
        section, needs, make = makers[name]
        basis = {
            "scorer": name, "settings": asdict(section), "held_out_share": settings.held_out,
            "seed": settings.seed, "texts": texts, "code": code_of(__name__, "persodpo.scoring"),
        }  # fmt: skip
        with one_thread():
            made_once(folder / name, RECORD, basis, make, what="a small scorer", needs=needs)
    return SmallFolders(folder / "coherence", folder / "nli", folder / "vectors" / VECTORS)


def _rows(dialogues: pd.DataFrame) -> list[tuple[Sequence[str], str, str]]:
    return list(zip(dialogues["personas"], dialogues["context"], dialogues["reference"].fillna(""), strict=True))


def _split(dialogues: pd.DataFrame, settings: SmallScorers) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Hold out whole dialogues, at least two: their examples take sentences from one another."""
    order = np.random.default_rng(settings.seed).permutation(len(dialogues))
    count = min(len(dialogues) - 2, max(2, round(settings.held_out * len(dialogues))))
    return dialogues.iloc[np.sort(order[count:])], dialogues.iloc[np.sort(order[:count])]


def _texts(dialogues: pd.DataFrame) -> list[str]:
    """Return every distinct persona sentence, context and reference once."""
    return list(dict.fromkeys(text for p, c, r in _rows(dialogues) for text in (*p, c, r) if text))


def _coherence(train: pd.DataFrame, held_out: pd.DataFrame, settings: SmallScorers, folder: Path) -> dict[str, Any]:
    texts, size = _texts(train), settings.coherence
    tokenizer = small_models.coherence_tokenizer(texts, size.vocabulary)
    model = small_models.new_coherence_model(tokenizer, texts, size, settings.seed)
    examples = [small_examples.coherence_examples(part, settings.seed) for part in (train, held_out)]
    if not all(len(part) for part in examples):
        raise PersodpoError(
            "No dialogue has a reply that the small scorer could learn from; add references or name a real model."
        )
    return _learn(Loaded(model, tokenizer), examples, size, settings.seed, folder)


def _nli(train: pd.DataFrame, held_out: pd.DataFrame, settings: SmallScorers, folder: Path) -> dict[str, Any]:
    size = settings.nli
    examples = [small_examples.inference_examples(part, settings.seed) for part in (train, held_out)]
    if not all(len(part) for part in examples):
        raise PersodpoError(
            "No persona sentence says what the small classifier can learn from, such as 'I like ...' or 'I live in ...'; "
            "name real classifiers for C score and UE score."
        )
    texts = [*_texts(train), *(hypothesis for _, hypothesis in examples[0].inputs)]
    tokenizer = small_models.pair_tokenizer(texts, size.vocabulary, small_models.NLI_ROOM)
    model = small_models.new_pair_classifier(tokenizer, size, settings.seed)
    return _learn(Loaded(model, tokenizer), examples, size, settings.seed, folder)


def _learn(loaded: Loaded, examples: Sequence[Examples], size: SmallModel, seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune on as many of the examples as the settings say; save model and card, return the record."""
    train, held_out = (_some(part, count, seed) for part, count in zip(examples, (size.examples, None), strict=True))
    tuning = FineTuning(
        epochs=1.0, learning_rate=size.learning_rate, batch_size=size.batch_size, max_length=size.max_length, seed=seed,
        evaluations=2,
    )  # fmt: skip
    report = finetune(loaded, train, held_out, folder, tuning)
    (folder / "README.md").write_text(_card(report, tuning), encoding="utf-8")
    return {**asdict(report), "parameters": loaded.model.num_parameters(), "vocabulary": len(loaded.tokenizer)}


def _card(report: Report, tuning: FineTuning) -> str:
    return card(report, tuning, "a small transformer that compares words", {"examples made of the run's dialogues": ""})


def _some(examples: Examples, count: int | None, seed: int) -> Examples:
    """Draw ``count`` examples, all of them if there are fewer."""
    if count is None or count >= len(examples):
        return examples
    places = random.Random(seed).sample(range(len(examples)), count)  # noqa: S311 - repeatable, not secret
    return Examples(tuple(examples.inputs[n] for n in places), tuple(examples.labels[n] for n in places))


def _vectors(train: pd.DataFrame, held_out: pd.DataFrame, settings: SmallScorers, folder: Path) -> dict[str, Any]:
    """Train word2vec on the run's texts; one worker, so that the same texts give the same vectors."""
    started, size = time.perf_counter(), settings.vectors
    sentences = [words for text in _texts(train) if (words := small_examples.plain_words(text))]
    model = Word2Vec(
        sentences, vector_size=size.size, window=8, min_count=size.minimum_count, epochs=size.epochs, workers=1,
        seed=settings.seed,
    )  # fmt: skip
    vectors: KeyedVectors = model.wv
    vectors.save_word2vec_format(str(folder / VECTORS), binary=True)
    accuracy, missing = _nearer_to_own(vectors, held_out)
    found = {
        "accuracy": accuracy, "majority": 0.5, "held_out": len(held_out), "out_of_vocabulary": missing,
        "words": len(vectors), "examples": len(sentences), "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    (folder / "README.md").write_text(
        f"# Word vectors of persodpo\n\n{found['words']:,} words from {found['examples']:,} texts of a run, word2vec of "
        f"size {size.size}. In **{accuracy:.4f}** of {len(held_out):,} held-out dialogues the context is nearer to its own "
        f"personas than to those of another dialogue (chance 0.5); {missing:.1%} of their words are unknown.\n",
        encoding="utf-8",
    )
    return found


def _nearer_to_own(vectors: KeyedVectors, dialogues: pd.DataFrame) -> tuple[float, float]:
    """Compare each context with its own personas and with those of the dialogue before.

    Returns:
        Share of contexts nearer to their own, and share of words that have no vector.
    """
    looked_up, known = 0, 0

    def direction(text: str) -> np.ndarray:
        nonlocal looked_up, known
        words = [word for word in small_examples.plain_words(text) if word not in ENGLISH_STOP_WORDS]
        found = [word for word in words if word in vectors]
        looked_up, known = looked_up + len(words), known + len(found)
        total = np.mean([vectors[word] for word in found], axis=0) if found else np.zeros(vectors.vector_size)
        return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12))

    sides = [(direction(" ".join(personas)), direction(context)) for personas, context, _ in _rows(dialogues)]
    nearer = [own @ context > sides[n - 1][0] @ context for n, (own, context) in enumerate(sides)]
    return float(np.mean(nearer)), 1.0 - known / max(looked_up, 1)
