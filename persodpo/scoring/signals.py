"""The four scorers: coherence, C score and UE score by fine-tuned models, persona distance by vectors of texts.

``as_released`` asks C score, UE score and persona distance as the authors' code does (audit A10): it joins texts where the
classifiers had learned pairs, gives UE score the gold answer where its definition has the user's query, and leaves no space
between persona sentences. ``corrected`` asks about true pairs, each persona sentence by itself, and the user's last turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from persodpo.dialogues import SPEAKERS
from persodpo.errors import PersodpoError
from persodpo.files import digest_of
from persodpo.scoring.models import Checkpoint, Encoder, Input, dtype_name
from persodpo.scoring.score import Item, Scored, Way, distinct
from persodpo.scoring.words import WordMeans

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

QUESTION = "Is this a coherent response given the dialogue history?"
#: The classes in the order of their value -1, 0 and 1, and how checkpoints and data sets spell them; positive and negative
#: are those of Dialogue NLI (Welleck et al. 2019).
CLASSES = ("contradiction", "neutral", "entailment")
SPELLINGS = {
    **dict.fromkeys(("contradiction", "contradicts", "contradict", "contradictory", "negative"), "contradiction"),
    **dict.fromkeys(("neutral", "unknown"), "neutral"),
    **dict.fromkeys(("entailment", "entails", "entail", "positive"), "entailment"),
}


class CoherenceScorer(Checkpoint):
    """UniEval's dialogue coherence: P(Yes) / (P(Yes) + P(No)) of the first token that an encoder-decoder model answers.

    An input longer than ``max_length`` tokens loses its oldest turns (the released code cut the latest ones). Only where
    question, response and the end of the history alone are too long does the end go too.
    """

    name = "coherence"
    auto, kind = "AutoModelForSeq2SeqLM", "an encoder-decoder model such as T5"
    max_length = 1024

    @property
    def key(self) -> str:
        """Digest of checkpoint, longest input and number type."""
        return digest_of({"model": self.digest, "max_length": self.max_length, "dtype": dtype_name()})

    def score(self, items: Sequence[Item]) -> Scored:
        """Score each distinct pair of response and history once."""
        model, tokenizer = self.loaded
        pairs, places = distinct([(item.response, item.context) for item in items])
        answers = yes_no_tokens(tokenizer, self.source)
        rows, cut = encode(pairs, tokenizer, self.max_length)

        def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            first = batch["input_ids"].new_full((len(batch["input_ids"]), 1), model.config.decoder_start_token_id)
            logits: torch.Tensor = model(**batch, decoder_input_ids=first, use_cache=False).logits
            return logits[:, 0, answers]

        logits = self.run(rows, forward)
        # A softmax over two logits is their share of any larger softmax.
        shares = 1.0 / (1.0 + np.exp(logits[:, 1] - logits[:, 0]))
        return Scored(shares[places], cut[places])


def encode(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """Return model inputs of responses and histories, and the share of its tokens that each lost, 0..1, [pairs]."""
    inputs = [write_input(response, history) for response, history in pairs]
    encoded = tokenizer([text for text, _ in inputs], return_offsets_mapping=True, verbose=False)
    rows, cut = [], []
    for (_, history), all_ids, offsets in zip(inputs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids, excess = list(all_ids), len(all_ids) - max_length
        cut.append(max(0, excess) / len(all_ids))
        if excess > 0:
            # A token may take in the space before it; the mark of the end has no place at all.
            inside = [n for n, (start, end) in enumerate(offsets) if start < history.stop and end > history.start]
            dropped = set(inside[:excess])
            ids = [token for n, token in enumerate(ids) if n not in dropped]
        rows.append({"input_ids": ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]})
    return rows, np.array(cut)


def write_input(response: str, history: str) -> tuple[str, range]:
    """Return the input of ``MingZhong/unieval-dialog`` and the places of the history's characters in it.

    Question, order and marks are those it was trained on (UniEval, Zhong et al. 2022: ``add_question``, task dialogue).
    """
    text = f"question: {QUESTION} </s> response: {response} </s> dialogue history: "
    return f"{text}{history}\n\n", range(len(text), len(text) + len(history))


def yes_no_tokens(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> list[int]:
    """Return the tokens that answer Yes and No; refused where these are not single, known and different tokens."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Yes", "No"))
    if len(yes) != 1 or len(no) != 1 or yes == no or tokenizer.unk_token_id in (yes[0], no[0]):
        raise PersodpoError(
            f"The tokenizer of '{checkpoint}' has no single, different tokens for Yes and No, so its first decoded token "
            "answers no question; name a checkpoint such as MingZhong/unieval-dialog."
        )
    return [yes[0], no[0]]


class Classifier(Protocol):
    """A three-way classifier of single texts or pairs."""

    @property
    def key(self) -> str:
        """Digest of all that shapes its classes."""

    def values(self, inputs: Sequence[Input]) -> tuple[np.ndarray, np.ndarray]:
        """Return the likeliest class of each input as -1, 0 or 1, and the share of the input that was cut, [inputs]."""


class NliModel(Checkpoint):
    """A sequence classifier of transformers with the classes of `CLASSES`, in any order."""

    auto, kind = "AutoModelForSequenceClassification", "a fine-tuned sequence classifier"

    def __init__(self, source: str, *, max_length: int = 210, batch_tokens: int | None = None) -> None:
        """Name the model and its longest input in tokens; the batch as of `Checkpoint`."""
        super().__init__(source, batch_tokens)
        self.max_length = max_length

    @property
    def key(self) -> str:
        """Digest of checkpoint, longest input and number type."""
        return digest_of({"model": self.digest, "max_length": self.max_length, "dtype": dtype_name()})

    def values(self, inputs: Sequence[Input]) -> tuple[np.ndarray, np.ndarray]:
        """Classify single texts or pairs, all of one kind; what is longer than the model takes is cut, too."""
        model, tokenizer = self.loaded
        room = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", self.max_length))
        columns = label_order(model.config.id2label or {}, self.source)
        rows, cut = self.tokens(inputs, min(room, self.max_length))
        logits = self.run(rows, lambda batch: model(**batch).logits)
        return logits[:, columns].argmax(axis=1) - 1, cut


def label_order(id2label: Mapping[Any, str], checkpoint: str) -> list[int]:
    """Return which output of a classifier is each of `CLASSES`, by its config."""
    outputs = [str(name) for _, name in sorted(id2label.items())]
    order = [SPELLINGS.get(name.strip().lower(), "") for name in outputs]
    if sorted(order) != sorted(CLASSES):
        raise PersodpoError(
            f"Model '{checkpoint}' calls its outputs {', '.join(outputs)}, not {', '.join(CLASSES)}; name a classifier of "
            "these three, or a folder whose config.json says in id2label which output is which."
        )
    return [order.index(name) for name in CLASSES]


class NliScorer(ABC):
    """What C score and UE score share: which inputs of the classifier an item is, and what their classes make of it."""

    name: str

    def __init__(self, model: Classifier, way: Way = "corrected") -> None:
        """Take the classifier and the way it is asked."""
        self.model, self.way = model, way

    @property
    def key(self) -> str:
        """Digest of classifier and way."""
        return digest_of({"model": self.model.key, "way": self.way})

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items, each distinct input of the classifier once."""
        inputs_of_items = [self.inputs(item) for item in items]
        inputs, places = distinct(list(chain.from_iterable(inputs_of_items)))
        values, cut = self.model.values(inputs) if inputs else (np.empty(0), np.empty(0))
        groups = np.split(places, np.cumsum([len(group) for group in inputs_of_items], dtype=int))[:-1]
        scores = [self.value(item, values[group].tolist()) for item, group in zip(items, groups, strict=True)]
        return Scored(np.array(scores), np.array([cut[group].mean() if len(group) else 0.0 for group in groups]))

    @abstractmethod
    def inputs(self, item: Item) -> list[Input]:
        """Return what the classifier is asked about an item."""

    @abstractmethod
    def value(self, item: Item, classes: Sequence[float]) -> float:
        """Return an item's score by the classes of its inputs."""


class CScorer(NliScorer):
    """C score: 1 if the response follows from the persona, -1 if it contradicts it, else 0.

    ``as_released`` classifies one text, ``corrected`` each persona sentence with the response: -1 if one sentence is
    contradicted, else 1 if one is entailed, else 0; 0 without a persona sentence.
    """

    name = "c_score"

    def inputs(self, item: Item) -> list[Input]:
        """Return the joined persona and the response as one text, or pairs."""
        if self.way == "as_released":
            return [(f"{''.join(item.personas)} {item.response}",)]
        return [(sentence, item.response) for sentence in item.personas if sentence.strip()]

    def value(self, item: Item, classes: Sequence[float]) -> float:
        """Let a contradiction come first."""
        return -1.0 if -1 in classes else max(classes, default=0.0)


class UEScorer(NliScorer):
    """UE score: 2 if the response follows from the persona and from the query, 1 if only from the persona, else 0.

    ``as_released`` classifies two joined texts, one with the gold answer in the query's place; ``corrected`` pairs: the last
    turn of the user with the response, and each persona sentence, of which one must entail it.
    """

    name = "ue_score"

    def _query(self, item: Item) -> str:
        return item.reference if self.way == "as_released" else last_user_turn(item.context)

    def inputs(self, item: Item) -> list[Input]:
        """Return query and response, then persona and response, as joined texts or as pairs."""
        query = self._query(item)
        if self.way == "as_released":
            return [(f"{before} [SEP] {item.response}",) for before in (query, "".join(item.personas))]
        return [(before, item.response) for before in (query, *filter(str.strip, item.personas))]

    def value(self, item: Item, classes: Sequence[float]) -> float:
        """Count the persona first; from an empty query, which asks nothing, nothing follows."""
        follows, *fits = classes
        return 1.0 + (follows == 1 and bool(self._query(item).strip())) if 1 in fits else 0.0


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
    user_turns = [turn for turn in turns(context) if turn.startswith(SPEAKERS[0])]
    return user_turns[-1].removeprefix(SPEAKERS[0]) if user_turns else ""


class PersonaDistance:
    """Cosine of persona and response, -1..1, a similarity despite its name; 0 where either has nothing to go by."""

    name = "persona_distance"

    def __init__(self, embedder: Encoder | WordMeans, way: Way = "corrected") -> None:
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
