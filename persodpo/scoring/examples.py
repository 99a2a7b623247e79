"""Dialogues in, labelled pairs of texts for the heads out: what can be told apart without annotation.

Coherence: a reply under its own dialogue history and under another's. Query: a question with its own answer and with
another's. Persona: what a persona sentence says is said again in other words or denied, bare or inside a reply, and set
beside what others say. The same texts stand in pairs of every label, so that no text alone gives the label away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import pandas as pd

from persodpo.completions import sentences
from persodpo.dialogues import SPEAKERS
from persodpo.scoring.nli import last_user_turn, turns

CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
#: Persona sentences and replies that are learned from, at most.
CLAIMS, REPLIES = 300, 250
#: Labelled pairs of texts.
Examples = list[tuple[tuple[str, str], int]]


class Stance(NamedTuple):
    """A way to relate to something: openings that say it, openings that deny it, and whether it holds of one thing only."""

    said: list[str]
    denied: list[str]
    exclusive: bool


#: ``stances``; ``second_person``: how User2 speaks of what User1 says; ``frames``: sentences that say something of User1.
WORDS = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
STANCES = [Stance(**row) for row in WORDS["stances"]]
#: Openings, the longest first, each with its stance and whether it says or denies it.
_OPENINGS = sorted(
    (
        (f"{opening} ", number, positive)
        for number, stance in enumerate(STANCES)
        for positive, group in ((True, stance.said), (False, stance.denied))
        for opening in group
    ),
    key=lambda entry: -len(entry[0]),
)
_FIRST_PERSON = re.compile(rf"\b({'|'.join(sorted(WORDS['second_person'], key=len, reverse=True))})\b", re.IGNORECASE)
#: Words of a sentence that answers something; "Yes." and "Good question." do not.
_ANSWER = 4
#: Pairs with what others say, for each claim: most persona sentences have nothing to do with a reply.
_UNRELATED = 4


class Claim(NamedTuple):
    """A persona sentence that was understood: its stance, whether it says or denies it, and of what, in lower case."""

    sentence: str
    stance: int
    positive: bool
    thing: str


def understand(personas: Iterable[str]) -> list[Claim]:
    """Return the persona sentences that open as `STANCES` do, with what they say."""
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
    found = []
    for context, reference in zip(dialogues["context"], dialogues["reference"], strict=True):
        said = turns(context)
        own = [
            (turn.removeprefix(SPEAKERS[1]), "\n".join(said[:place]))
            for place, turn in enumerate(said)
            if place and turn.startswith(SPEAKERS[1])
        ]
        found.append([*own, (reference.removeprefix(SPEAKERS[1]), context)] if reference else own)
    return [own for own in found if own]


def own_or_lent(dialogues: pd.DataFrame, seed: int, count: int) -> list[tuple[str, str, int]]:
    """Return a reply of at most ``count`` dialogues each, its own history, and 1; and the same with another's and 0."""
    draw = Random(seed)  # noqa: S311 - repeatable, not secret
    kept = [draw.choice(own) for own in replies(dialogues)]
    order = draw.sample(kept, min(count, len(kept)))
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
    claims = [_denied(claim, draw) if draw.random() < 0.4 else claim for claim in claims]
    said = [
        (claim, label, _inside(_say(claim, positive, draw), facts, draw))
        for claim in claims
        for label, positive in ((ENTAILMENT, claim.positive), (CONTRADICTION, not claim.positive))
    ]
    examples: Examples = [((claim.sentence, text), label) for claim, label, text in said]
    for claim in claims:
        others = [text for other, _, text in draw.choices(said, k=2 * _UNRELATED) if _unrelated(claim, other)]
        others = [*others[:_UNRELATED], draw.choice(facts) if facts else ""]
        examples += [((claim.sentence, text), NEUTRAL) for text in others]
    return examples


def _denied(claim: Claim, draw: Random) -> Claim:
    """Turn a claim into its opposite: few personas deny anything, and denial alone must not mean contradiction."""
    positive = not claim.positive
    return claim._replace(positive=positive, sentence=_say(claim, positive, draw))


def _say(claim: Claim, positive: bool, draw: Random) -> str:
    """Say or deny a claim's stance of its thing, in one of its wordings; sometimes as the persona sentence has it."""
    if positive == claim.positive and draw.random() < 0.25:
        return claim.sentence
    stance = STANCES[claim.stance]
    return f"{draw.choice(stance.said if positive else stance.denied)} {claim.thing}"


def _unrelated(claim: Claim, other: Claim) -> bool:
    exclusive = STANCES[claim.stance].exclusive and claim.stance == other.stance
    return claim.thing != other.thing and not exclusive


def _inside(said: str, facts: Sequence[str], draw: Random) -> str:
    """Leave a sentence bare, or put it in the second person and beside a fact, as a reply does."""
    if draw.random() < 0.4:
        return said if said.endswith(".") else f"{said}."
    told = _FIRST_PERSON.sub(lambda match: WORDS["second_person"][match[0].lower()], said).rstrip(".")
    if facts and draw.random() < 0.7:
        return f"{draw.choice(facts).rstrip('.!?')}, {draw.choice(('as', 'since'))} {told}."
    return str(draw.choice(WORDS["frames"]).format(told))
