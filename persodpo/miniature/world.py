"""A generated world of persona-grounded dialogues, in FoCus's own JSON.

A place has facts; a person has five traits, of which some have to do with the place and some with nothing; the two talk
about the place, and the reference answers the last question with a fact and a trait that belongs to it. Everything follows
from the seed. The first dialogues of a larger world are not those of a smaller one; the same seed and size always give the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from persodpo.dialogues import FOCUS_SENTENCES
from persodpo.errors import PersodpoError
from persodpo.files import write_atomically, write_text

#: The words of the world; ``phrases.yaml`` says what each is for.
PHRASES = SimpleNamespace(**yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8")))
#: Fewer dialogues than this teach no model anything.
SMALLEST = 20


class Trait(NamedTuple):
    """A persona sentence, how an answer takes it up (None for a trait that no place answers), and what it is about."""

    sentence: str
    clause: str | None
    subject: str


def focus_world(dialogues: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Generate so many dialogues, numbered from ``first``, so that two splits share no id.

    Returns:
        Content of a FoCus file, ready for `json.dumps`: ``data``, a list of dialogues with ``dialogID``, ``persona`` (five
        sentences), ``knowledge`` (the facts in sentences) and ``utterance`` (``dialogueN`` holds all turns up to the Nth
        answer, ``persona_groundingN`` which persona sentences that answer uses).
    """
    if dialogues < SMALLEST:
        raise PersodpoError(f"A world of {dialogues} dialogues is too small to learn from; ask for {SMALLEST} or more.")
    numbers = range(first, first + dialogues)
    return {"data": [_dialogue(number, Random(f"{seed} {number}")) for number in numbers]}  # noqa: S311


def write_world(folder: Path, train: int, valid: int, seed: int) -> tuple[Path, Path]:
    """Write ``train.json`` and ``valid.json``, of other people and places, and return both files."""
    paths = folder / "train.json", folder / "valid.json"
    for path, content in zip(paths, (focus_world(train, seed), focus_world(valid, seed, first=train)), strict=True):
        text = json.dumps(content, indent=0, ensure_ascii=False) + "\n"
        write_atomically(path, partial(write_text, text=text))
    return paths


def _dialogue(number: int, rng: Random) -> dict[str, Any]:
    kind = rng.choice(list(PHRASES.kinds))
    facts = _facts(kind, rng)
    traits = _traits(kind, facts, rng)
    topics, turns, utterance = list(PHRASES.questions), [], []
    for place in range(1, 1 + rng.choice((1, 2, 2, 3, 3, 4))):
        topic = rng.choice(["name", "where"] if place == 1 else topics)
        topics.remove(topic)
        question, answer, used = _exchange(topic, kind, facts, traits, rng)
        turns += [question, answer]
        # As in FoCus, each entry repeats the turns so far under the names of all exchanges up to its own.
        utterances = {f"dialogue{n}": turns[: 2 * n] for n in range(1, place + 1)}
        utterance.append({f"persona_grounding{place}": [trait is used for trait in traits], **utterances})
    return {
        "dialogID": f"mini-{number:06d}",
        "persona": [trait.sentence for trait in traits],
        "knowledge": [sentence.format_map(facts) for sentence in PHRASES.more],
        "utterance": utterance,
    }


def _facts(kind: str, rng: Random) -> dict[str, str]:
    """Draw a place."""
    town = "".join(rng.choice(syllables) for syllables in PHRASES.syllables).capitalize()
    sights = rng.sample(PHRASES.kinds[kind][1], 2)
    builder = f"{rng.choice(PHRASES.first_names)} {rng.choice(PHRASES.last_names)}"
    name = rng.choice(
        (f"{town} {kind.capitalize()}", f"the {kind} of {town}", f"{builder.split()[1]} {kind.capitalize()}")
    )
    return {
        "kind": kind, "name": name, "town": town, "land": rng.choice(PHRASES.lands), "builder": builder,
        "year": str(rng.randint(1100, 1990)), "size": str(rng.randint(4, 90) * 10), "price": str(rng.randint(2, 30)),
        "material": rng.choice(PHRASES.materials), "sight": sights[0], "sight2": sights[1], "day": rng.choice(PHRASES.days),
    }  # fmt: skip


def _traits(kind: str, facts: Mapping[str, str], rng: Random) -> list[Trait]:
    """Draw five traits: one or two that the place answers, one about lands or kinds of places, and distractors."""
    subjects = PHRASES.kinds[kind][0]
    fitting = rng.sample(subjects, rng.choice((1, 1, 2)))
    others = rng.sample([subject for subject in PHRASES.interests if subject not in subjects], rng.choice((0, 1)))
    traits = []
    for subject in fitting + others:
        sentence, clause = rng.choice(PHRASES.interests[subject])
        traits.append(Trait(sentence, clause if subject in fitting else None, subject))
    for subject in rng.sample(list(PHRASES.place_traits), rng.choice((0, 1, 1))):
        sentence, clause = rng.choice(PHRASES.place_traits[subject])
        traits.append(Trait(sentence.format_map(facts), clause.format_map(facts), subject))
    missing = FOCUS_SENTENCES - len(traits)
    traits += [Trait(sentence, None, "none") for sentence in _distractors(missing, rng)]
    rng.shuffle(traits)
    return traits


def _distractors(count: int, rng: Random) -> list[str]:
    """Draw sentences that no place answers, each about something else."""
    fixed = rng.sample(PHRASES.distractors, rng.randint(0, 1))
    things = rng.sample(PHRASES.things, count)
    sentences = [rng.choice(PHRASES.said_of_things).format(thing=thing) for thing in things]
    if rng.random() < 0.5:
        sentences.insert(0, rng.choice(PHRASES.said_of_owned).format(thing=rng.choice(PHRASES.owned)))
    if rng.random() < 0.3:
        sentences.insert(0, rng.choice(PHRASES.said_of_jobs).format(thing=rng.choice(PHRASES.jobs)))
    return [*fixed, *sentences][:count]


def _exchange(
    topic: str, kind: str, facts: Mapping[str, str], traits: Sequence[Trait], rng: Random
) -> tuple[str, str, Trait | None]:
    """Return a question, its answer, and the trait that the answer takes up: what it is about decides where it fits."""
    questions, answers = PHRASES.questions[topic]
    at_home = [trait for trait in traits if trait.clause and PHRASES.at_home.get(trait.subject) == topic]
    of_kind = [trait for trait in traits if trait.clause and trait.subject in PHRASES.kinds[kind][0]]
    trait = rng.choice(at_home or of_kind) if at_home or of_kind else None
    answer = rng.choice(answers).format_map({**facts, "clause": f", {trait.clause}" if trait else ""})
    more = [sentence for sentence in PHRASES.more if f"{{{PHRASES.asked[topic]}}}" not in sentence]
    more = rng.sample(more, rng.choice((0, 0, 1, 1, 2, 3)))
    text = " ".join([answer, *(sentence.format_map(facts) for sentence in more)])
    text = rng.choice(PHRASES.openings) + text[0].upper() + text[1:]
    return rng.choice(questions).format_map(facts), text, trait
