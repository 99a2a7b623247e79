"""Small classifiers on a frozen sentence encoder, fitted on the spot from a run's dialogues, and the scorers they make.

A head reads ``[u, v, |u - v|, u * v]`` of the vectors of two texts. What it learns from needs no annotation. Coherence: a
reply under its own dialogue history and under another's. Query: a question with its own answer and with another's. Persona:
what a persona sentence says is said again in other words or denied, bare or inside a reply, and set beside what others say.
The same texts stand in pairs of every label, so that no text alone gives the label away.

Heads show the method at work offline and in seconds; their held-out accuracy is a table of the run. To judge answers, name
real checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd

from persodpo.completions import sentences
from persodpo.dialogues import SPEAKERS
from persodpo.errors import PersodpoError
from persodpo.files import digest_of, made_once
from persodpo.imports import code_of
from persodpo.scoring.models import Encoder, remembered
from persodpo.scoring.score import Item, Scored, distinct
from persodpo.scoring.signals import last_user_turn, turns

HEADS = ("coherence", "c_score", "ue_score")
RECORD, WEIGHTS = "heads.json", "heads.safetensors"
#: Dialogues without which nothing is learned, and the share of them that is held out.
MINIMUM, HELD_OUT = 10, 0.15
#: Persona sentences and replies that are learned from, at most, and the share of these that is measured on.
CLAIMS, REPLIES, MEASURED = 300, 250, 1 / 3
#: Hidden units and passes over the examples.
UNITS, EPOCHS = 32, 40
CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
#: Labelled pairs of texts.
Examples = list[tuple[tuple[str, str], int]]
#: ``stances``: ways to relate to something, each with openings that say it, openings that deny it, and whether it holds of
#: one thing only; ``second_person``: how User2 speaks of what User1 says; ``frames``: sentences that say something of User1.
WORDS = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
STANCES = WORDS["stances"]
#: Openings, the longest first, each with its stance and whether it says or denies it.
_OPENINGS = sorted(
    (
        (f"{opening} ", number, way == "said")
        for number, stance in enumerate(STANCES)
        for way in ("said", "denied")
        for opening in stance[way]
    ),
    key=lambda entry: -len(entry[0]),
)
_FIRST_PERSON = re.compile(rf"\b({'|'.join(sorted(WORDS['second_person'], key=len, reverse=True))})\b", re.IGNORECASE)
#: Words of a sentence that answers something; "Yes." and "Good question." do not.
_ANSWER = 4
#: Pairs with what others say, for each claim: most persona sentences have nothing to do with a reply.
_UNRELATED = 4


class Head:
    """A fitted head: pairs of texts in, probabilities of its classes out; also a `persodpo.scoring.signals.Classifier`."""

    def __init__(self, encoder: Encoder, layers: Sequence[np.ndarray]) -> None:
        """Take the encoder and weights and biases of both layers."""
        self.encoder, self.layers = encoder, layers

    @classmethod
    def fit(cls, encoder: Encoder, examples: Examples, seed: int) -> Self:
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
    def load(cls, name: str, encoder: Encoder, folder: Path) -> Self:
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
        parts = [[(item[0], part) for part in sentences("".join(item[1:])) or [""]] for item in inputs]
        shares, cut = self.shares([pair for pairs in parts for pair in pairs])
        groups = np.split(np.arange(len(shares)), np.cumsum([len(pairs) for pairs in parts])[:-1])
        best = [group[shares[group, NEUTRAL].argmin()] for group in groups]
        return shares[best].argmax(axis=1) - 1.0, cut[best]


class CoherenceHead(Head):
    """Coherence by a head: how surely a response belongs to the last turns of its dialogue, 0..1."""

    name = "coherence"

    def score(self, items: Sequence[Item]) -> Scored:
        """Score each item."""
        shares, cut = self.shares([(item.response, recent(item.context)) for item in items])
        return Scored(shares[:, 1], cut)


def features(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[u, v, |u - v|, u * v]`` of pairs of texts, [pairs, 4 x size], and the share of each pair cut, [pairs]."""
    texts, places = distinct([text for pair in pairs for text in pair])
    vectors, cut = encoder.embed(texts)
    left, right = places.reshape(-1, 2).T
    u, v = vectors[left], vectors[right]
    return np.concatenate([u, v, np.abs(u - v), u * v], axis=1), (cut[left] + cut[right]) / 2


def make_heads(dialogues: pd.DataFrame, encoder: Encoder, folder: Path, seed: int) -> Path:
    """Fit the three heads on a run's dialogues, unless that was done before, in a folder that holds those of all runs.

    The same seed, texts and machine give the same heads.

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
                    "are no replies; name real checkpoints in scoring.models."
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


class Claim(NamedTuple):
    """A persona sentence that was understood: its stance, whether it says or denies it, and of what, in lower case."""

    sentence: str
    stance: int
    positive: bool
    thing: str

    def said(self, positive: bool, draw: Random) -> str:
        """Say or deny it in one of its stance's wordings; sometimes as the persona sentence has it."""
        if positive == self.positive and draw.random() < 0.25:
            return self.sentence
        return f"{draw.choice(STANCES[self.stance]['said' if positive else 'denied'])} {self.thing}"

    def is_unrelated(self, other: Claim) -> bool:
        """Tell whether another claim neither says nor denies it."""
        exclusive = STANCES[self.stance]["exclusive"] and self.stance == other.stance
        return self.thing != other.thing and not exclusive


def understand(personas: Iterable[str]) -> list[Claim]:
    """Return the persona sentences that open as one of the stances does, with what they say."""
    claims = []
    for sentence in personas:
        plain = sentence.strip().replace("'", "").replace("’", "").rstrip(".!").lower()
        for opening, stance, positive in _OPENINGS:
            if plain.startswith(opening) and len(plain) > len(opening):
                claims.append(Claim(sentence, stance, positive, plain[len(opening) :].strip()))
                break
    return claims


def recent(context: str) -> str:
    """Return what a reply is held against: the last turn and the one before it."""
    return "\n".join(turns(context)[-2:])


def examples_of(dialogues: pd.DataFrame, seed: int, share: float = 1.0) -> dict[str, Examples]:
    """Return the labelled pairs of each head, by its name, from a share of `CLAIMS` and `REPLIES`."""
    rows = own_or_lent(dialogues, seed, round(share * REPLIES))
    coherence: Examples = [((reply, recent(history)), own) for reply, history, own in rows]
    coherence += [(("", recent(history)), 0) for _, history, _ in rows[:: max(1, len(rows) // 20)]]
    queries: Examples = []
    for reply, history, own in rows:
        answer = next((part for part in sentences(reply) if len(part.split()) >= _ANSWER), reply)
        queries.append(((last_user_turn(history), answer), ENTAILMENT if own else NEUTRAL))
    personas = persona_examples(dialogues, seed, round(share * CLAIMS))
    return {"coherence": coherence, "c_score": personas, "ue_score": [*personas, *queries]}


def replies(dialogues: pd.DataFrame) -> list[list[tuple[str, str]]]:
    """Return each dialogue's replies of User2, the reference among them, with the turns before: reply and history."""
    dialogues_replies = []
    for context, reference in zip(dialogues["context"], dialogues["reference"], strict=True):
        spoken = turns(context)
        own = [
            (turn.removeprefix(SPEAKERS[1]), "\n".join(spoken[:place]))
            for place, turn in enumerate(spoken)
            if place and turn.startswith(SPEAKERS[1])
        ]
        dialogues_replies.append([*own, (reference.removeprefix(SPEAKERS[1]), context)] if reference else own)
    return [own for own in dialogues_replies if own]


def own_or_lent(dialogues: pd.DataFrame, seed: int, count: int) -> list[tuple[str, str, int]]:
    """Return a reply of at most ``count`` dialogues each, its own history, and 1; and the same with another's and 0."""
    draw = Random(seed)  # noqa: S311 - repeatable, not secret
    one_each = [draw.choice(own) for own in replies(dialogues)]
    order = draw.sample(one_each, min(count, len(one_each)))
    return [
        row
        for place, (reply, history) in enumerate(order)
        for row in ((reply, history, 1), (order[place - 1][0], history, 0))
    ]


def persona_examples(dialogues: pd.DataFrame, seed: int, count: int) -> Examples:
    """Say again and deny what at most ``count`` persona sentences say, and set each beside what others say."""
    draw = Random(seed)  # noqa: S311 - repeatable, not secret
    claims = understand(dict.fromkeys(sentence for personas in dialogues["personas"] for sentence in personas))
    claims = draw.sample(claims, min(count, len(claims)))
    parts = [part for own in replies(dialogues) for reply, _ in own for part in sentences(reply) or [""]]
    facts = [part for part in parts if not re.search(r"\byou", part, re.IGNORECASE)]
    for place, claim in enumerate(claims):
        if draw.random() < 0.4:  # few personas deny anything, and denial alone must not mean contradiction
            opposite = not claim.positive
            claims[place] = claim._replace(positive=opposite, sentence=claim.said(opposite, draw))
    statements = [
        (claim, label, _inside(claim.said(positive, draw), facts, draw))
        for claim in claims
        for label, positive in ((ENTAILMENT, claim.positive), (CONTRADICTION, not claim.positive))
    ]
    examples: Examples = [((claim.sentence, text), label) for claim, label, text in statements]
    for claim in claims:
        others = [text for other, _, text in draw.choices(statements, k=2 * _UNRELATED) if claim.is_unrelated(other)]
        others = [*others[:_UNRELATED], draw.choice(facts) if facts else ""]
        examples += [((claim.sentence, text), NEUTRAL) for text in others]
    return examples


def _inside(sentence: str, facts: Sequence[str], draw: Random) -> str:
    """Leave a sentence bare, or put it in the second person and beside a fact, as a reply does."""
    if draw.random() < 0.4:
        return sentence if sentence.endswith(".") else f"{sentence}."
    second_person = _FIRST_PERSON.sub(lambda match: WORDS["second_person"][match[0].lower()], sentence).rstrip(".")
    if facts and draw.random() < 0.7:
        return f"{draw.choice(facts).rstrip('.!?')}, {draw.choice(('as', 'since'))} {second_person}."
    return str(draw.choice(WORDS["frames"]).format(second_person))
