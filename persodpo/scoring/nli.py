"""C score and UE score: does a response follow from the persona, contradict it, or neither.

Both read a three-way classifier of natural language inference. The released method (audit A10) joined persona and
response into one text, although its classifiers had learned pairs, and gave UE score the gold answer where its
definition has the user's query. ``as_released`` does the same; ``corrected`` asks about true pairs, each persona sentence
by itself, and about the last turn of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from persodpo.dialogues import SPEAKERS
from persodpo.errors import PersodpoError
from persodpo.runfolder import digest_of
from persodpo.scoring.models import Checkpoint, Loaded, dtype_name, load, run, tokens
from persodpo.scoring.score import Item, Scored

#: How persona and response are asked about: as the authors' code does, or mended.
Way = Literal["as_released", "corrected"]
#: The classes in the order of their value: -1, 0 and 1.
CLASSES = ("contradiction", "neutral", "entailment")
#: Other names of the classes; positive and negative are those of Dialogue NLI (Welleck et al. 2019).
SPELLINGS = {
    "contradiction": "contradiction", "contradicts": "contradiction", "contradict": "contradiction",
    "contradictory": "contradiction", "negative": "contradiction",
    "neutral": "neutral", "unknown": "neutral",
    "entailment": "entailment", "entails": "entailment", "entail": "entailment", "positive": "entailment",
}  # fmt: skip


class Classifier(Protocol):
    """A three-way classifier of single texts or pairs."""

    @property
    def key(self) -> str:
        """Digest of all that shapes its classes."""
        ...

    def values(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the likeliest class of each input as -1, 0 or 1, and the share of the input that was cut, [inputs]."""
        ...


class NliModel:
    """A checkpoint with the classes of `CLASSES`, in any order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        labels: Sequence[str] | None = None,
        max_length: int = 210,
        batch_tokens: int = 8192,
    ) -> None:
        """Name the model; it is loaded when something is classified.

        Args:
            checkpoint: Any sequence classifier of transformers.
            labels: The class of each output, for checkpoints whose config names none.
            max_length: Longest input, tokens; 210 in the published method.
            batch_tokens: Tokens of a batch, padding included; it changes speed and memory, never scores.
        """
        self.checkpoint, self.labels = checkpoint, tuple(labels) if labels else None
        self.max_length, self.batch_tokens = max_length, batch_tokens

    @property
    def key(self) -> str:
        """Digest of checkpoint, labels, longest input and number type."""
        return digest_of({
            "model": self.checkpoint.key, "labels": self.labels, "max_length": self.max_length, "dtype": dtype_name(),
        })  # fmt: skip

    @cached_property
    def loaded(self) -> Loaded:
        """The model; a limit above the number of tokens that it takes is refused."""
        loaded = load(self.checkpoint, "AutoModelForSequenceClassification", "a fine-tuned sequence classifier")
        positions = getattr(loaded.model.config, "max_position_embeddings", self.max_length)
        room = min(int(loaded.tokenizer.model_max_length), int(positions))
        if room < self.max_length:
            raise PersodpoError(
                f"Model '{self.checkpoint.name}' takes {room} tokens, not {self.max_length}; lower "
                "scoring.compute.nli_tokens to that."
            )
        return loaded

    def values(self, inputs: Sequence[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Classify single texts or pairs, all of one kind; raises where the model or its labels do not fit."""
        if not inputs:
            return np.empty(0), np.empty(0)
        columns = label_order(self.loaded.model.config.id2label or {}, self.labels, self.checkpoint.name)
        rows, cut = tokens(self.loaded, inputs, self.max_length)
        logits = run(self.loaded, rows, self.batch_tokens, lambda batch: self.loaded.model(**batch).logits)
        return logits[:, columns].argmax(axis=1) - 1, cut


def label_order(
    id2label: Mapping[int, str] | Mapping[str, str], named: Sequence[str] | None, checkpoint: str
) -> list[int]:
    """Return which output of a classifier is each of `CLASSES`.

    Args:
        id2label: The config's names of the outputs.
        named: The setting that names them, for configs that say LABEL_0, LABEL_1, LABEL_2.
        checkpoint: For messages.

    Raises:
        PersodpoError: The names are not those of the three classes, or the setting contradicts the config.
    """
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
    name = ""

    def __init__(self, model: Classifier, way: Way = "corrected") -> None:
        """Take the classifier and the way it is asked."""
        self.model, self.way = model, way

    @property
    def key(self) -> str:
        """Digest of classifier and way."""
        return digest_of({"model": self.model.key, "way": self.way})


class CScorer(_NliScorer):
    """C score: 1 if the response follows from the persona, -1 if it contradicts it, else 0.

    ``as_released`` classifies one text: the persona sentences without a space between them, a space, the response.
    ``corrected`` classifies each persona sentence with the response: -1 if one sentence is contradicted, else 1 if one is
    entailed, else 0; 0 without a persona sentence.
    """

    name = "c_score"

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items, each distinct input of the classifier once; raises as the classifier does."""
        asked: list[list[tuple[str, ...]]] = [
            [(f"{''.join(item.personas)} {item.response}",)]
            if self.way == "as_released"
            else [(sentence, item.response) for sentence in _sentences(item)]
            for item in items
        ]
        answers, cut = _ask(self.model, asked)
        # Contradiction comes first.
        return Scored(
            np.array([float(min(group, default=0) if -1 in group else max(group, default=0)) for group in answers]), cut
        )


class UEScorer(_NliScorer):
    """UE score: 2 if the response follows from the persona and from the query, 1 if only from the persona, else 0.

    ``as_released`` classifies two texts: the persona sentences without a space between them, `` [SEP] ``, the response;
    and the gold answer in the query's place, `` [SEP] ``, the response. ``corrected`` classifies pairs: each persona
    sentence with the response, of which one must entail it, and the last turn of the user with the response.
    """

    name = "ue_score"

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items, each distinct input of the classifier once; raises as the classifier does."""
        released = self.way == "as_released"
        queries = [item.reference if released else last_user_turn(item.context) for item in items]
        asked: list[list[tuple[str, ...]]] = [
            [(f"{before} [SEP] {item.response}",) for before in (query, "".join(item.personas))]
            if released
            else [(before, item.response) for before in (query, *_sentences(item))]
            for query, item in zip(queries, items, strict=True)
        ]
        answers, cut = _ask(self.model, asked)
        # An empty query asks nothing, so nothing follows from it.
        follows = [group[0] == 1 and bool(query.strip()) for group, query in zip(answers, queries, strict=True)]
        fits = [bool((group[1:] == 1).any()) for group in answers]
        return Scored(np.array([2.0 if f and p else float(p) for f, p in zip(follows, fits, strict=True)]), cut)


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


def _ask(model: Classifier, asked: Sequence[Sequence[tuple[str, ...]]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Classify each distinct input once; return the classes of each group, and the mean share cut of its inputs."""
    place = {given: row for row, given in enumerate(dict.fromkeys(given for group in asked for given in group))}
    values, cut = model.values(list(place))
    groups = [np.array([place[given] for given in group], dtype=int) for group in asked]
    return [values[group] for group in groups], np.array([cut[g].mean() if len(g) else 0.0 for g in groups])
