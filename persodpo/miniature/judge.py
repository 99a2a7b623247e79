"""What the generated world itself says of an answer: the judge of the miniature, of which no scorer and no pair knows.

A world made of templates has a truth that can be read off: what was asked, who asks, and which values the prompt holds. An
answer is *grounded* if it

- answers what was asked, with the value that the prompt holds where it holds one;
- takes up a trait of this person that fits the place;
- says nothing else of the person and gives nothing two values, neither against the prompt nor within the answer;
- says each thing once, and adds at most `MOST_ADDED` sentences, as many as references do.

References are grounded. The parts were chosen on references and on the answers of the five models, before any trained
policy was judged. The judge enters neither the quality score nor the pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import pandas as pd

from persodpo.completions import sentences
from persodpo.dialogues import SPEAKERS
from persodpo.miniature.world import PHRASES

#: Sentences that an answer may add to what was asked.
MOST_ADDED = 3
_KINDS = "|".join(PHRASES.kinds)
#: What stands in the fields of a template.
_FIELDS = {
    "clause": "(?:, (?P<clause>[^.:]+?))?", "year": r"\d+", "size": r"\d+", "price": r"\d+", "town": r"\w+",
    "name": rf"the (?:{_KINDS}) of \w+|\w+ (?:{_KINDS})",
    "land": r"\w+", "builder": r"\w+ \w+", "day": r"\w+?", "kind": _KINDS,
    "material": "|".join(PHRASES.materials),
    "sight": "|".join(sight for _, sights in PHRASES.kinds.values() for sight in sights),
}  # fmt: skip
_FIELDS["sight2"] = _FIELDS["sight"]


class Statement(NamedTuple):
    """What a sentence says: the topic it answers (empty for none), the fields and values it gives, what of the person."""

    topic: str
    given: frozenset[tuple[str, str]]
    clause: str | None


class Judgement(NamedTuple):
    """The parts of the judgement, and how many sentences stand beside the answer."""

    answers_question: bool
    fits_person: bool
    contradicts_nothing: bool
    says_once: bool
    added: int


PARTS = Judgement._fields[:-1]


def judge(dialogues: pd.DataFrame, responses: pd.DataFrame) -> pd.DataFrame:
    """Judge responses to dialogues of the generated world; a failure is nothing of what it should be.

    Returns:
        One row a response, in their order: dialogue_id, model, the flags `PARTS`, their conjunction ``grounded``, and added,
        the number of sentences beside the answer.
    """
    prompts = dialogues.set_index("dialogue_id")[["personas", "context"]].T.to_dict("list")
    failed = Judgement(False, False, False, False, 0)
    rows: list[tuple[object, ...]] = []
    for dialogue_id, model, outcome, text in responses[["dialogue_id", "model", "outcome", "response"]].to_numpy():
        personas, context = prompts[dialogue_id]
        verdict = judge_answer(personas, context, text) if outcome == "ok" else failed
        rows.append((dialogue_id, model, *verdict[:-1], all(verdict[:-1]), verdict.added))
    return pd.DataFrame(rows, columns=["dialogue_id", "model", *PARTS, "grounded", "added"])


def judge_answer(personas: Sequence[str], context: str, answer: str) -> Judgement:
    """Judge one answer to a person's sentences and the turns so far, a question of this world last."""
    turns = context.split("\n")
    topic = _topic(turns[-1].removeprefix(SPEAKERS[0]))
    kind = next((word for word in re.findall(r"\w+", context.lower()) if word in PHRASES.kinds), None)
    facts = {("kind", kind)} if kind else set()
    for turn in turns:
        facts |= {pair for text in sentences(turn.removeprefix(SPEAKERS[1])) for pair in _read(text).given}
    spoken = sentences(answer)
    spoken = spoken[1:] if spoken and f"{spoken[0]} " in PHRASES.openings else spoken
    statements = [_read(text) for text in spoken]
    answers = [statement for statement in statements if statement.topic == topic and _agrees(statement, topic, facts)]
    clauses = [statement.clause for statement in statements if statement.clause]
    true, fitting = _clauses(personas, topic, kind)
    claims = {pair for pair in facts.union(*(statement.given for statement in statements)) if pair[0] != "sight"}
    once = Counter(value for statement in statements for value in statement.given if value[0] not in {"kind", "land"})
    return Judgement(
        answers_question=bool(answers),
        fits_person=any(clause in fitting for clause in clauses),
        contradicts_nothing=all(clause in true for clause in clauses) and len(dict(claims)) == len(claims),
        says_once=len(set(spoken)) == len(spoken) <= MOST_ADDED + 1 and max(once.values(), default=0) <= 1,
        added=len(spoken) - bool(answers),
    )


def _agrees(statement: Statement, topic: str, facts: set[tuple[str, str]]) -> bool:
    """Tell whether an answer gives the value that the prompt holds, if it holds one; a place has several sights."""
    name_asked = PHRASES.asked[topic]
    values = {value for name, value in facts if name == name_asked}
    return name_asked == "sight" or not values or any((name_asked, value) in statement.given for value in values)


@cache
def _templates() -> list[tuple[str, re.Pattern[str]]]:
    """Return a pattern for each sentence of the world, with the topic that it answers."""
    answering = {field: topic for topic, field in PHRASES.asked.items()} | {"sight2": "see", "day": ""}
    texts = [(topic, text) for topic, (_, answers) in PHRASES.questions.items() for text in answers]
    texts += [(answering[re.findall(r"\{(\w+)\}", text)[0]], text) for text in PHRASES.more]
    return [(topic, re.compile(_pattern(text), re.IGNORECASE)) for topic, text in texts]


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template)
    for place in range(1, len(parts), 2):
        name = parts[place]
        parts[place] = _FIELDS[name] if name == "clause" else f"(?P<{name}>{_FIELDS[name]})"
    parts[::2] = map(re.escape, parts[::2])
    return "".join(parts)


@lru_cache(maxsize=10_000)
def _read(sentence: str) -> Statement:
    """Read a sentence; one that is none of the world's says nothing."""
    for topic, pattern in _templates():
        if match := pattern.fullmatch(sentence):
            fields = match.groupdict()
            clause = fields.pop("clause", None)
            values = {(name.rstrip("2"), value.lower()) for name, value in fields.items()}
            if land := re.search("|".join(PHRASES.lands), clause or ""):  # it may say where the place is
                values.add(("land", land.group().lower()))
            return Statement(topic, frozenset(values), clause)
    return Statement("", frozenset(), None)


@cache
def _topic(question: str) -> str:
    """Return the topic of a question; what is no question of this world is a ValueError."""
    for topic, (questions, _) in PHRASES.questions.items():
        if any(re.fullmatch(_pattern(text), question) for text in questions):
            return str(topic)
    raise ValueError(f"'{question}' is no question of the generated world.")


def _clauses(personas: Sequence[str], topic: str, kind: str | None) -> tuple[set[str], set[str]]:
    """Return what an answer may say of this person, and what of it fits the place and the question."""
    true, fitting = set(), set()
    for subject, traits in {**PHRASES.interests, **PHRASES.place_traits}.items():
        of_place = subject in PHRASES.place_traits or kind is None or subject in PHRASES.kinds[kind][0]
        fits = of_place and PHRASES.at_home.get(subject, topic) == topic
        for sentence, clause in traits:
            matches = (re.fullmatch(_pattern(sentence), persona) for persona in personas)
            texts = {clause.format(**match.groupdict()) for match in matches if match}
            true |= texts
            fitting |= texts if fits else set()
    return true, fitting
