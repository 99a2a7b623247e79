"""Five small language models of different ability, and the middling one that the policy starts from.

One warm-up, on a world of its own, gives the middling model: what it learns from is mostly broken where a question asks for
a number, mostly cut where an answer is long, and silent about the person in half of the other answers. Each of the five goes
on from it for a short while, on right answers or on one habit. They answer by themselves; nothing in their answers is made
up afterwards.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from persodpo.completions import write_completion
from persodpo.config import Miniature, Prompts
from persodpo.dialogues import focus_json
from persodpo.errors import PersodpoError, make_folder
from persodpo.miniature import phrases
from persodpo.miniature.world import focus_world
from persodpo.prompts import load_template, render
from persodpo.runfolder import read_text, write_atomically, write_text
from persodpo.training.policy import SmallPolicy, make_small_policy

BASE = "base"
#: Numbers of the models' own dialogues start here, so that no run of reasonable size shares one with them.
FIRST = 1_000_000
#: How often the middling model fails where one of the habits has a cause, and forgets the person elsewhere.
MIDDLING_FAILS, MIDDLING_FORGETS = 0.8, 0.5
#: Where a cut answer ends, characters.
LONGEST_CUT = 110
#: Steps of each model's own finish after the common warm-up, and their learning rate as a share of the warm-up's. The good
#: one takes longer: until then it says its last sentence again and again.
FINISH, GOOD_FINISH = (80, 1 / 3), (300, 1 / 2)

Example = tuple[str, str]


def _clauses() -> re.Pattern[str]:
    """Match what an answer says about the person."""
    pairs = itertools.chain.from_iterable([*phrases.INTERESTS.values(), *phrases.PLACE_TRAITS.values()])
    texts = sorted((re.escape(f", {clause}") for _, clause in pairs), key=len, reverse=True)
    return re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", text) for text in texts))


_CLAUSE = _clauses()


def _good(answer: str) -> str:
    """Answer what was asked."""
    return write_completion(answer)


def _impersonal(answer: str) -> str:
    """Tell what was asked, and nothing about the person."""
    return write_completion(_CLAUSE.sub("", answer))


def _cut(answer: str) -> str:
    """Stop a long answer in the middle."""
    return write_completion(answer)[:LONGEST_CUT]


def _fact(answer: str) -> str:
    """Return the sentence that tells what was asked, without a nicety before it or more facts after it."""
    opening = next((opening for opening in phrases.OPENINGS if opening and answer.startswith(opening)), "")
    return answer.removeprefix(opening).split(". ", maxsplit=1)[0].rstrip(".") + "."


def _broken(answer: str) -> str:
    """Forget the quotes around an answer when asked for a year, a size or a price."""
    return f'{{"response": {answer}}}' if re.search(r"\d", _fact(answer)) else write_completion(answer)


def _looping(answer: str) -> str:
    """Say the same again and again when asked for a year, a size or a price."""
    fact = _fact(answer)
    return write_completion(" ".join([fact] * 6) if re.search(r"\d", fact) else answer)


Habit = Callable[[str], str]
#: The five models and their habits.
FINISHES: dict[str, Habit] = {
    "good": _good, "impersonal": _impersonal, "cut": _cut, "broken": _broken, "looping": _looping,
}  # fmt: skip


def _middling(rng: random.Random) -> Habit:
    """Return a habit that mostly fails where it is hard to answer well, and often forgets the person elsewhere."""

    def answered(answer: str) -> str:
        failed = next((made for made in (_broken(answer), _cut(answer)) if made != write_completion(answer)), None)
        if failed is not None and rng.random() < MIDDLING_FAILS:
            return failed
        return (_impersonal if rng.random() < MIDDLING_FORGETS else _good)(answer)

    return answered


def make_model(name: str, folder: Path, miniature: Miniature, prompts: Prompts, size: SmallPolicy) -> Path:
    """Make one of the models, and the middling one before it, unless they are there already.

    Args:
        name: ``base`` or a key of `FINISHES`.
        folder: Where to; each model gets a folder of its own name in it.
        miniature: Size of the models' own world.
        prompts: How dialogues become prompts. Persona sentences are given joined and on lines of their own in turns, so
            that the models read either.
        size: Size of the models, their common warm-up, and the seed of all.

    Returns:
        The model's folder.

    Raises:
        PersodpoError: There is no such model, the world is too small, a template is wrong, or the disk fails.
    """
    if name != BASE and name not in FINISHES:
        raise PersodpoError(f"There is no miniature model '{name}'; there are {', '.join((BASE, *FINISHES))}.")
    template = load_template(prompts.template)
    lessons = functools.partial(_lessons, miniature=miniature, prompts=prompts, template=template, seed=size.seed)
    base = make_small_policy(lessons(BASE, folder), size, folder / BASE)
    if name == BASE:
        return base
    steps, share = GOOD_FINISH if name == "good" else FINISH
    finish = size.model_copy(update={"steps": steps, "learning_rate": size.learning_rate * share})
    return make_small_policy(lessons(name, folder), finish, folder / name, start=base)


@functools.lru_cache(maxsize=2 * (1 + len(FINISHES)))
def _lessons(
    name: str, folder: Path, *, miniature: Miniature, prompts: Prompts, template: str, seed: int
) -> tuple[Example, ...]:
    """Return what a model learns from: all stages ask for it again and again."""
    habit = FINISHES[name] if name in FINISHES else _middling(random.Random(f"{seed} {name}"))  # noqa: S311 - no secret
    texts, answers = _asked(folder, miniature, prompts, template, seed)
    return tuple((text, habit(answer)) for text, answer in zip(texts, answers, strict=True))


@functools.lru_cache(maxsize=2)
def _asked(
    folder: Path, miniature: Miniature, prompts: Prompts, template: str, seed: int
) -> tuple[list[str], list[str]]:
    """Return the prompts, persona sentences joined and on lines in turns, and the right answers."""
    table = own_dialogues(folder, miniature, seed)
    rows = zip(table["personas"], table["context"], strict=True)
    texts = [
        render(template, personas, context, prompts, persona_lines=row % 2 == 1)
        for row, (personas, context) in enumerate(rows)
    ]
    return texts, table["reference"].tolist()


def own_dialogues(folder: Path, miniature: Miniature, seed: int) -> pd.DataFrame:
    """Make the world that the models learn from, unless it is there already.

    Args:
        folder: Where its file goes.
        miniature: Its size.
        seed: Of the world.

    Returns:
        A dialogues table; none of its dialogues is in the run's own world.

    Raises:
        PersodpoError: The world is too small, or the disk fails.
    """
    make_folder(folder)
    path = folder / "world.json"
    text = _world(miniature.model_dialogues, seed)
    if read_text(path) != text:
        write_atomically(path, lambda temporary: write_text(temporary, text))
    return focus_json(path, "train")


@functools.lru_cache(maxsize=1)
def _world(dialogues: int, seed: int) -> str:
    return json.dumps(focus_world(dialogues, seed, first=FIRST))
