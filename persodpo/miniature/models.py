"""What five small language models of different ability learn from, and the middling one that the policy starts from.

One warm-up, on a world of its own, gives the middling model: what it learns from is mostly broken where a question asks for
a number, mostly cut where an answer is long, and silent about the person in half of the other answers. Each of the five goes
on from it for a short while, on right answers or on one habit. They answer by themselves; nothing in their answers is made
up afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from random import Random

import pandas as pd

from persodpo.completions import write_completion
from persodpo.config import Prompts
from persodpo.dialogues import focus_json
from persodpo.errors import PersodpoError
from persodpo.files import make_folder, read_text, write_atomically, write_text
from persodpo.miniature.world import PHRASES, focus_world
from persodpo.prompts import load_template, render

BASE = "base"
#: Number of the first of the models' own dialogues, so that no run of reasonable size shares one with them; their count.
FIRST, DIALOGUES = 1_000_000, 1_500
#: How often the middling model fails where one of the habits has a cause, and forgets the person elsewhere.
MIDDLING_FAILS, MIDDLING_FORGETS = 0.8, 0.5
#: Where a cut answer ends, characters.
LONGEST_CUT = 110

_PAIRS = [pair for pairs in [*PHRASES.interests.values(), *PHRASES.place_traits.values()] for pair in pairs]
_TEXTS = sorted((re.escape(f", {clause}") for _, clause in _PAIRS), key=len, reverse=True)
#: What an answer says about the person.
_CLAUSE = re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", text) for text in _TEXTS))


def _impersonal(answer: str) -> str:
    """Tell what was asked, and nothing about the person."""
    return write_completion(_CLAUSE.sub("", answer))


def _cut(answer: str) -> str:
    """Stop a long answer in the middle."""
    return write_completion(answer)[:LONGEST_CUT]


def _fact(answer: str) -> str:
    """Return the sentence that tells what was asked, without a nicety before it or more facts after it."""
    opening = next((opening for opening in PHRASES.openings if opening and answer.startswith(opening)), "")
    return answer.removeprefix(opening).split(". ", maxsplit=1)[0].rstrip(".") + "."


def _broken(answer: str) -> str:
    """Forget the quotes around an answer when asked for a year, a size or a price."""
    return f'{{"response": {answer}}}' if re.search(r"\d", _fact(answer)) else write_completion(answer)


def _looping(answer: str) -> str:
    """Say the same again and again when asked for a year, a size or a price."""
    fact = _fact(answer)
    return write_completion(" ".join([fact] * 6) if re.search(r"\d", fact) else answer)


#: The five models: how each completes a prompt with a right answer, after a finish of so many steps at this share of the
#: warm-up's learning rate. The good one takes longer: until then it says its last sentence again and again.
FINISHES: dict[str, Callable[[str], str]] = {
    "good": write_completion, "impersonal": _impersonal, "cut": _cut, "broken": _broken, "looping": _looping,
}  # fmt: skip
STEPS = {name: (300, 1 / 2) if name == "good" else (80, 1 / 3) for name in FINISHES}


def _middling(answer: str, rng: Random) -> str:
    """Mostly fail where it is hard to answer well, and often forget the person elsewhere."""
    failed = next((text for text in (_broken(answer), _cut(answer)) if text != write_completion(answer)), None)
    if failed is not None and rng.random() < MIDDLING_FAILS:
        return failed
    return _impersonal(answer) if rng.random() < MIDDLING_FORGETS else write_completion(answer)


def lessons(name: str, folder: Path, prompts: Prompts, seed: int) -> list[tuple[str, str]]:
    """Return prompts and completions that a model, ``base`` or one of `FINISHES`, learns from.

    Persona sentences are joined and on lines in turns, so that models read either. The folder is that of the models and
    of their world's file.
    """
    if name != BASE and name not in FINISHES:
        raise PersodpoError(f"There is no miniature model '{name}'; there are {', '.join((BASE, *FINISHES))}.")
    table, template = own_dialogues(folder, seed), load_template(prompts.template)
    complete = FINISHES.get(name) or partial(_middling, rng=Random(f"{seed} {name}"))  # noqa: S311 - no secret
    rows = enumerate(zip(table["personas"], table["context"], table["reference"], strict=True))
    return [
        (render(template, personas, context, prompts, persona_lines=row % 2 == 1), complete(answer))
        for row, (personas, context, answer) in rows
    ]


@lru_cache(maxsize=2)
def own_dialogues(folder: Path, seed: int) -> pd.DataFrame:
    """Return the dialogues that the models learn from, none of which is in a run's own world; their file is written."""
    make_folder(folder)
    path = folder / "world.json"
    text = json.dumps(focus_world(DIALOGUES, seed, first=FIRST))
    if read_text(path) != text:
        write_atomically(path, partial(write_text, text=text))
    return focus_json(path, "train")
