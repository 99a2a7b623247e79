"""Dialogues in, labelled examples for the small scorers out: what can be told apart without annotation.

Coherence: a reply is asked about under its own dialogue history (Yes) and under another's (No), so that neither reply nor
history alone gives the answer away. Inference: what a persona sentence says is said again in other words, denied, or said
of something else, bare or inside a reply; the same words stand in examples of every label, so that neither negation nor
length nor one text alone gives the label away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from persodpo.dialogues import SPEAKERS
from persodpo.scoring.coherence import NO, YES
from persodpo.scoring.nli_data import Examples

CONTRADICTION, NEUTRAL, ENTAILMENT = "contradiction", "neutral", "entailment"


class Stance(NamedTuple):
    """A way to relate to something, by how it can be said.

    Attributes:
        said: Openings that say it, in the first person.
        denied: Openings that say the opposite.
        exclusive: Whether it holds of one thing only: who lives here does not live there.
    """

    said: tuple[str, ...]
    denied: tuple[str, ...]
    exclusive: bool = False


STANCES = (
    Stance(
        ("i like", "i love", "i really like"),
        ("i do not like", "i dont like", "i dislike", "i hate"),
    ),
    Stance(
        ("i am interested in", "im interested in", "i have an interest in", "i am fascinated by", "i am curious about"),
        ("i am not interested in", "im not interested in", "i have no interest in", "i do not care about"),
    ),
    Stance(
        ("i would like to", "i want to", "i wish to", "i hope to", "id like to", "i would love to", "i am planning to"),
        ("i do not want to", "i dont want to", "i do not wish to", "i would never want to", "i would hate to"),
    ),
    Stance(
        ("i have been to", "i have visited", "i visited", "i went to"),
        ("i have never been to", "i have never visited", "ive never been to", "i have not been to"),
    ),
    Stance(("i live in", "i am living in", "my home is in"), ("i do not live in", "i dont live in"), exclusive=True),
    Stance(("i am from", "i come from", "im from"), ("i am not from", "i do not come from"), exclusive=True),
    Stance(("i am a", "i am an", "im a", "i work as a"), ("i am not a", "im not a", "i do not work as a")),
    Stance(("i have a", "i have an", "i have got a"), ("i do not have a", "i dont have a", "i have no")),
)

#: How User2 speaks of what User1 says; the longest first, each between word bounds.
_SECOND_PERSON = {
    "i am": "you are", "im": "you are", "i have": "you have", "ive": "you have", "id": "you would", "i": "you",
    "my": "your", "me": "you", "myself": "yourself",
}  # fmt: skip
_FIRST = re.compile(r"\b(" + "|".join(sorted(_SECOND_PERSON, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Claim(NamedTuple):
    """A persona sentence that was understood.

    Attributes:
        dialogue: Number of its dialogue.
        sentence: As it stands.
        stance: Place in `STANCES`.
        positive: Whether it says or denies the stance.
        thing: What it is about, in lower case and without the final mark.
    """

    dialogue: int
    sentence: str
    stance: int
    positive: bool
    thing: str


def turns(context: str) -> list[str]:
    """Return the turns of a context, each with its speaker; a line without one goes on with the turn before it."""
    found: list[str] = []
    for line in context.split("\n"):
        if line.startswith(SPEAKERS) or not found:
            found.append(line)
        else:
            found[-1] += f"\n{line}"
    return found


def plain_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without the punctuation around them."""
    return [word for raw in text.lower().split() if (word := raw.strip(".,;:!?\"'()[]“”‘’–—…"))]


def coherence_examples(dialogues: pd.DataFrame, seed: int) -> Examples:
    """Ask about every reply of User2 under its own history and under that of another dialogue.

    Args:
        dialogues: Rows of a dialogues table, at least two.
        seed: Which other dialogue.

    Returns:
        Response and history; half of the answers are Yes, and each reply and each history has one of either.
    """
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    replies: list[list[tuple[str, str]]] = []
    for context, reference in zip(dialogues["context"], dialogues["reference"], strict=True):
        said = turns(context)
        own = [
            (turn.removeprefix(SPEAKERS[1]), "\n".join(said[:place]))
            for place, turn in enumerate(said)
            if place and turn.startswith(SPEAKERS[1])
        ]
        found = [*own, *([(reference, context)] if reference else [])]
        if found:
            replies.append(found)
    # Every dialogue lends its replies to the next in a random circle, so that none keeps its own.
    order = draw.sample(range(len(replies)), len(replies))
    inputs, labels = [], []
    for place, number in enumerate(order):
        lent = replies[order[place - 1]]
        for turn, (reply, history) in enumerate(replies[number]):
            inputs += [(reply, history), (lent[turn % len(lent)][0], history)]
            labels += [YES, NO]
    return Examples(tuple(inputs), tuple(labels))


def understand(personas: Iterable[Sequence[str]]) -> list[Claim]:
    """Return the persona sentences that open as `STANCES` do, with what they say.

    Args:
        personas: The persona sentences of each dialogue.

    Returns:
        One claim a sentence that was understood.
    """
    openings = [
        (f"{opening} ", stance, positive)
        for stance, (said, denied, _) in enumerate(STANCES)
        for positive, group in ((True, said), (False, denied))
        for opening in group
    ]
    openings.sort(key=lambda found: -len(found[0]))
    claims = []
    for dialogue, sentences in enumerate(personas):
        for sentence in sentences:
            plain = sentence.strip().replace("'", "").replace("’", "").rstrip(".!").lower()
            for opening, stance, positive in openings:
                if plain.startswith(opening) and len(plain) > len(opening):
                    claims.append(Claim(dialogue, sentence, stance, positive, plain[len(opening) :].strip()))
                    break
    return claims


def inference_examples(dialogues: pd.DataFrame, seed: int) -> Examples:
    """Say again, deny and replace what persona sentences say.

    Args:
        dialogues: Rows of a dialogues table, at least two of them with personas that are understood.
        seed: Of every choice.

    Returns:
        A persona sentence and a hypothesis, as many of each label.
    """
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    claims = understand(dialogues["personas"])
    facts = [
        sentence
        for context in dialogues["context"]
        for turn in turns(context)
        if turn.startswith(SPEAKERS[1])
        for sentence in _SENTENCE_END.split(turn.removeprefix(SPEAKERS[1]))
        if not re.search(r"\byou", sentence, re.IGNORECASE)
    ]
    inputs, labels = [], []
    for claim in claims:
        others = [other for other in draw.choices(claims, k=8) if other.thing != claim.thing]
        if not others:
            continue
        if draw.random() < 0.4:
            # Few personas deny anything: without these, denial alone would mean contradiction.
            denied = claim._replace(positive=not claim.positive)
            claim = denied._replace(sentence=_say(claim, claim.thing, denied.positive, draw))  # noqa: PLW2901
        for label, said in (
            (ENTAILMENT, _say(claim, claim.thing, claim.positive, draw)),
            (CONTRADICTION, _contradict(claim, others, draw)),
            (NEUTRAL, _unrelated(claim, others, draw)),
        ):
            inputs.append((claim.sentence, _inside(said, facts, draw)))
            labels.append(label)
    return Examples(tuple(inputs), tuple(labels))


def _say(claim: Claim, thing: str, positive: bool, draw: random.Random) -> str:
    """Say or deny a claim's stance of a thing, in one of its wordings; sometimes the persona sentence itself."""
    if positive == claim.positive and thing == claim.thing and draw.random() < 0.25:
        return claim.sentence
    stance = STANCES[claim.stance]
    return f"{draw.choice(stance.said if positive else stance.denied)} {thing}"


def _contradict(claim: Claim, others: Sequence[Claim], draw: random.Random) -> str:
    """Deny a claim; where it can hold of one thing only, sometimes claim it of another."""
    same = [other for other in others if other.stance == claim.stance]
    if STANCES[claim.stance].exclusive and claim.positive and same and draw.random() < 0.5:
        return _say(claim, same[0].thing, True, draw)
    return _say(claim, claim.thing, not claim.positive, draw)


def _unrelated(claim: Claim, others: Sequence[Claim], draw: random.Random) -> str:
    """Say something of another thing, as often denying it as the other labels do; or nothing of User1 at all."""
    if draw.random() < 0.15:
        return ""
    other = draw.choice(others)
    stance = other if STANCES[claim.stance].exclusive or draw.random() < 0.5 else claim
    return _say(stance, other.thing, draw.random() < 0.5, draw)


def _inside(said: str, facts: Sequence[str], draw: random.Random) -> str:
    """Leave a sentence bare, or put it in the second person and between facts, as a reply does."""
    if said and draw.random() < 0.4:
        return said if said.endswith(".") else f"{said}."
    told = _FIRST.sub(lambda match: _SECOND_PERSON[match[0].lower()], said).rstrip(".")
    before, after = ([draw.choice(facts)] if facts and draw.random() < 0.6 else [] for _ in range(2))
    if told:
        told = draw.choice(
            ("{}.", "As {}, it is for you.", "Since {}, you should know it.", "It is one which {}.")
        ).format(told)
    return " ".join([*before, *([told] if told else []), *after])
