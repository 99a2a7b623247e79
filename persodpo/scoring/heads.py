"""Small classifiers on a frozen sentence encoder, fitted on the spot from a run's dialogues, and the scorers they make.

A head reads ``[u, v, |u - v|, u * v]`` of the vectors of two texts: coherence tells a reply under its own history from one
under another's, C score and UE score tell entailment, neutral and contradiction. They show the method at work offline and
in seconds; their held-out accuracy is a table of the run. To judge answers, name real checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persodpo.completions import sentences
from persodpo.errors import PersodpoError
from persodpo.folders import made_once
from persodpo.imports import code_of
from persodpo.runfolder import digest_of
from persodpo.scoring.encoder import Encoder, remembered
from persodpo.scoring.examples import WORDS, Examples, examples_of, recent
from persodpo.scoring.score import Item, Scored, distinct

HEADS = ("coherence", "c_score", "ue_score")
RECORD, WEIGHTS = "heads.json", "heads.safetensors"
#: Dialogues without which nothing is learned, and the share of them that is held out.
MINIMUM, HELD_OUT = 10, 0.15
#: Examples that are measured on, as a share of those learned from.
MEASURED = 1 / 3
#: Hidden units and passes over the examples.
UNITS, EPOCHS = 32, 40


class Head:
    """A fitted head: pairs of texts in, probabilities of its classes out; also a `persodpo.scoring.nli.Classifier`."""

    def __init__(self, encoder: Encoder, layers: Sequence[np.ndarray]) -> None:
        """Take the encoder and weights and biases of both layers."""
        self.encoder, self.layers = encoder, layers

    @classmethod
    def fit(cls, encoder: Encoder, examples: Examples, seed: int) -> Head:
        """Fit a head to labelled pairs of texts."""
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - slow to load
        from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

        model = MLPClassifier((UNITS,), alpha=1e-3, learning_rate_init=2e-3, max_iter=EPOCHS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is fixed on purpose
            model.fit(features(encoder, [pair for pair, _ in examples])[0], [label for _, label in examples])
        layers = zip(model.coefs_, model.intercepts_, strict=True)
        return cls(encoder, [np.ascontiguousarray(part) for layer in layers for part in layer])

    @classmethod
    def load(cls, name: str, encoder: Encoder, folder: Path) -> Head:
        """Load one of `HEADS` from the folder that `make_heads` returned."""
        from safetensors.numpy import load_file  # noqa: PLC0415

        weights = load_file(folder / WEIGHTS)
        return cls(encoder, [weights[f"{name}.{place}"] for place in range(4)])

    @cached_property
    def key(self) -> str:
        """Digest of encoder, weights and code."""
        weights = hashlib.sha256(b"".join(layer.tobytes() for layer in self.layers)).hexdigest()
        code = code_of(__name__, "persodpo.scoring")
        return digest_of({"encoder": self.encoder.key, "weights": weights, "code": code})

    def shares(self, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities, [pairs, classes], and the share of each pair that the encoder cut, [pairs]."""
        inputs, cut = features(self.encoder, pairs)
        first, first_bias, second, second_bias = self.layers
        logits = np.maximum(inputs @ first + first_bias, 0) @ second + second_bias
        if logits.shape[1] == 1:  # two classes: the logit of the second
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True)), cut

    def accuracy(self, examples: Examples) -> dict[str, float]:
        """Return the share of labelled pairs that is right, and that of the commonest label."""
        labels = [label for _, label in examples]
        answers = self.shares([pair for pair, _ in examples])[0].argmax(axis=1)
        return {"accuracy": float(np.mean(answers == labels)), "majority": max(Counter(labels).values()) / len(labels)}

    def values(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Classify pairs, the second text sentence by sentence; of its sentences the one that is least neutral decides.

        A single text is a pair whose second text is empty, which is why joined texts fail (audit A10).
        """
        parts = [[(given[0], part) for part in sentences("".join(given[1:])) or [""]] for given in inputs]
        shares, cut = self.shares([pair for pairs in parts for pair in pairs])
        groups = np.split(np.arange(len(shares)), np.cumsum([len(pairs) for pairs in parts])[:-1])
        best = [group[shares[group, 1].argmin()] for group in groups]
        return shares[best].argmax(axis=1) - 1.0, cut[best]


class CoherenceHead:
    """Coherence by a head: how surely a response belongs to the last turns of its dialogue, 0..1."""

    name = "coherence"

    def __init__(self, head: Head) -> None:
        """Take the fitted head."""
        self.head = head

    @property
    def key(self) -> str:
        """Key of the head."""
        return self.head.key

    def score(self, items: Sequence[Item]) -> Scored:
        """Score each item."""
        shares, cut = self.head.shares([(item.response, recent(item.context)) for item in items])
        return Scored(shares[:, 1], cut)


def features(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[u, v, |u - v|, u * v]`` of pairs of texts, [pairs, 4 x size], and the share of each pair cut, [pairs]."""
    texts, places = distinct([text for pair in pairs for text in pair])
    vectors, cut = encoder.embed(texts)
    left, right = places.reshape(-1, 2).T
    u, v = vectors[left], vectors[right]
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1), (cut[left] + cut[right]) / 2


def make_heads(dialogues: pd.DataFrame, encoder: Encoder, folder: Path, seed: int) -> Path:
    """Fit the three heads on a run's dialogues, unless that was done before.

    Args:
        dialogues: A dialogues table; personas, context and reference are read.
        encoder: What the heads stand on.
        folder: Where the heads of all runs lie.
        seed: Of examples, split and weights. The same seed, texts and machine give the same heads.

    Returns:
        The heads' own folder: weights (safetensors) and a record with each head's held-out accuracy.
    """
    if len(dialogues) < MINIMUM:
        raise PersodpoError(f"Heads need at least {MINIMUM} dialogues to learn from, not {len(dialogues)}.")
    rows = [[list(personas), *texts] for personas, *texts in dialogues[["personas", "context", "reference"]].to_numpy()]
    texts = digest_of({"rows": rows, "words": WORDS})
    basis = {"encoder": encoder.key, "seed": seed, "code": code_of(__name__, "persodpo.scoring"), "texts": texts}
    return made_once(
        folder / digest_of(basis)[:16],
        RECORD,
        basis,
        lambda scratch: _fit_all(dialogues, encoder, scratch, seed),
        what="fitted heads",
        needs=WEIGHTS,
    )


def _fit_all(dialogues: pd.DataFrame, encoder: Encoder, scratch: Path, seed: int) -> dict[str, Any]:
    from safetensors.numpy import save_file  # noqa: PLC0415

    order = np.random.default_rng(seed).permutation(len(dialogues))
    count = max(2, round(HELD_OUT * len(dialogues)))  # whole dialogues: their examples share sentences
    train = examples_of(dialogues.iloc[np.sort(order[count:])], seed)
    held_out = examples_of(dialogues.iloc[np.sort(order[:count])], seed, MEASURED)
    weights: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    with remembered():
        for name in HEADS:
            if len({label for _, label in train[name]}) < (2 if name == "coherence" else 3) or not held_out[name]:
                raise PersodpoError(
                    "No persona sentence says what heads can learn from, such as 'I like ...' or 'I live in ...', or there "
                    "are no replies; name real checkpoints in scoring.compute.models."
                )
            head = Head.fit(encoder, train[name], seed)
            weights |= {f"{name}.{place}": array for place, array in enumerate(head.layers)}
            counts = {"examples": len(train[name]), "held_out": len(held_out[name])}
            record[name] = head.accuracy(held_out[name]) | counts
    save_file(weights, scratch / WEIGHTS)
    return record


def head_report(folder: Path) -> pd.DataFrame:
    """Return what each head does on held-out examples, columns scorer, quantity and value."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    rows = [(name, f"head_{quantity}", float(value)) for name in HEADS for quantity, value in record[name].items()]
    return pd.DataFrame(rows, columns=["scorer", "quantity", "value"])
