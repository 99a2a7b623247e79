"""C score and UE score: does a response follow from the persona, contradict it, or neither.

Both read a three-way classifier of natural language inference. The released method (audit A10) joined persona and
response into one text, although its classifiers had learned pairs, and gave UE score the gold answer where its
definition has the user's query. ``as_released`` does the same; ``corrected`` asks about true pairs, each persona sentence
by itself, and about the last turn of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np

from persodpo.dialogues import SPEAKERS
from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of
from persodpo.scoring.models import Checkpoint, Input, dtype_name
from persodpo.scoring.score import Item, Scored, distinct

#: How persona and response are asked about: as the authors' code does, or mended.
Way = Literal["as_released", "corrected"]
#: The classes in the order of their value -1, 0 and 1, and how checkpoints and data sets spell them; positive and negative
#: are those of Dialogue NLI (Welleck et al. 2019).
CLASSES = ("contradiction", "neutral", "entailment")
SPELLINGS = {
    spelling: name
    for name, spellings in (
        ("contradiction", ("contradiction", "contradicts", "contradict", "contradictory", "negative")),
        ("neutral", ("neutral", "unknown")),
        ("entailment", ("entailment", "entails", "entail", "positive")),
    )
    for spelling in spellings
}


class Classifier(Protocol):
    """A three-way classifier of single texts or pairs."""

    @property
    def key(self) -> str:
        """Digest of all that shapes its classes."""
        ...

    def values(self, inputs: Sequence[Input]) -> tuple[np.ndarray, np.ndarray]:
        """Return the likeliest class of each input as -1, 0 or 1, and the share of the input that was cut, [inputs]."""
        ...


class NliModel(Checkpoint):
    """A sequence classifier of transformers with the classes of `CLASSES`, in any order."""

    auto, kind = "AutoModelForSequenceClassification", "a fine-tuned sequence classifier"

    def __init__(
        self, source: str, *, labels: Sequence[str] | None = None, max_length: int = 210, batch_tokens: int = 8192
    ) -> None:
        """Name the model.

        Args:
            source: A folder or a name on the Hub.
            labels: The class of each output, for checkpoints whose config names none.
            max_length: Longest input, tokens; 210 in the published method.
            batch_tokens: Tokens of a batch, padding included; it changes speed and memory, never scores.
        """
        super().__init__(source, batch_tokens)
        self.labels, self.max_length = tuple(labels) if labels else None, max_length

    @property
    def key(self) -> str:
        """Digest of checkpoint, labels, longest input and number type."""
        limits = {"labels": self.labels, "max_length": self.max_length, "dtype": dtype_name()}
        return digest_of({"model": self.digest, **limits})

    def values(self, inputs: Sequence[Input]) -> tuple[np.ndarray, np.ndarray]:
        """Classify single texts or pairs, all of one kind; what is longer than the model takes is cut, too."""
        model, tokenizer = self.loaded
        room = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", self.max_length))
        columns = label_order(model.config.id2label or {}, self.labels, self.source)
        rows, cut = self.tokens(inputs, min(room, self.max_length))
        logits = self.run(rows, lambda batch: model(**batch).logits)
        return logits[:, columns].argmax(axis=1) - 1, cut


def label_order(id2label: Mapping[Any, str], named: Sequence[str] | None, checkpoint: str) -> list[int]:
    """Return which output of a classifier is each of `CLASSES`, by its config or, where that names none, by a setting."""
    outputs = [str(name) for _, name in sorted(id2label.items())]
    in_config = [SPELLINGS.get(name.strip().lower(), "") for name in outputs]
    clear = sorted(in_config) == sorted(CLASSES)
    if len(outputs) != len(CLASSES) or not (clear or named):
        raise PersodpoError(
            f"Model '{checkpoint}' calls its outputs {', '.join(outputs)}, not {', '.join(CLASSES)}; name a classifier of "
            "these three, or set labels to the class of each of its three outputs in their order."
        )
    if named and clear and in_config != list(named):
        raise PersodpoError(
            f"labels names {', '.join(named)}, but model '{checkpoint}' itself calls its outputs {', '.join(outputs)}; "
            "leave labels empty or name another model."
        )
    return [list(named or in_config).index(name) for name in CLASSES]


class _NliScorer:
    def __init__(self, model: Classifier, way: Way = "corrected") -> None:
        """Take the classifier and the way it is asked."""
        self.model, self.way = model, way

    @property
    def key(self) -> str:
        """Digest of classifier and way."""
        return digest_of({"model": self.model.key, "way": self.way})

    def _classes(self, asked: Sequence[Sequence[Input]]) -> tuple[list[list[float]], np.ndarray]:
        """Classify each distinct input once; return the classes of each group, and the mean share cut of its inputs."""
        inputs, places = distinct(list(chain.from_iterable(asked)))
        values, cut = self.model.values(inputs) if inputs else (np.empty(0), np.empty(0))
        groups = np.split(places, np.cumsum([len(group) for group in asked])[:-1])
        return [values[g].tolist() for g in groups], np.array([cut[g].mean() if len(g) else 0.0 for g in groups])


class CScorer(_NliScorer):
    """C score: 1 if the response follows from the persona, -1 if it contradicts it, else 0.

    ``as_released`` classifies one text: the persona sentences without a space between them, a space, the response.
    ``corrected`` classifies each persona sentence with the response: -1 if one sentence is contradicted, else 1 if one is
    entailed, else 0; 0 without a persona sentence.
    """

    name = "c_score"

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items, each distinct input of the classifier once."""
        if self.way == "as_released":
            asked: list[list[Input]] = [[(f"{''.join(item.personas)} {item.response}",)] for item in items]
        else:
            asked = [[(sentence, item.response) for sentence in _sentences(item)] for item in items]
        classes, cut = self._classes(asked)
        return Scored(np.array([-1.0 if -1 in group else max(group, default=0.0) for group in classes]), cut)


class UEScorer(_NliScorer):
    """UE score: 2 if the response follows from the persona and from the query, 1 if only from the persona, else 0.

    ``as_released`` classifies two texts: the persona sentences without a space between them, `` [SEP] ``, the response;
    and the gold answer in the query's place, `` [SEP] ``, the response. ``corrected`` classifies pairs: each persona
    sentence with the response, of which one must entail it, and the last turn of the user with the response.
    """

    name = "ue_score"

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items, each distinct input of the classifier once."""
        if self.way == "as_released":
            queries = [item.reference for item in items]
            asked: list[list[Input]] = [
                [(f"{before} [SEP] {item.response}",) for before in (item.reference, "".join(item.personas))]
                for item in items
            ]
        else:
            queries = [last_user_turn(item.context) for item in items]
            asked = [
                [(before, item.response) for before in (query, *_sentences(item))]
                for query, item in zip(queries, items, strict=True)
            ]
        classes, cut = self._classes(asked)
        fits = np.array([1.0 in of_persona for _, *of_persona in classes])
        # An empty query asks nothing, so nothing follows from it.
        follows = np.array(
            [group[0] == 1 and bool(query.strip()) for group, query in zip(classes, queries, strict=True)]
        )
        return Scored(np.where(fits, 1.0 + follows, 0.0), cut)


def turns(context: str) -> list[str]:
    """Return the turns of a context, each with its speaker; a line without one goes on with the turn before it."""
    parts: list[str] = []
    for line in context.split("\n"):
        if line.startswith(SPEAKERS) or not parts:
            parts.append(line)
        else:
            parts[-1] += f"\n{line}"
    return parts


def last_user_turn(context: str) -> str:
    """Return the last turn of User1 in a context, without its speaker; empty if there is none."""
    asked = [turn for turn in turns(context) if turn.startswith(SPEAKERS[0])]
    return asked[-1].removeprefix(SPEAKERS[0]) if asked else ""


def _sentences(item: Item) -> list[str]:
    return [sentence for sentence in item.personas if sentence.strip()]
