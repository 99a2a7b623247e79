"""Five small language models of different ability, and the middling one that the policy starts from.

One warm-up, on a world of its own, gives the middling model: most of what it learns from is right, the rest shows one of
four bad habits. Each of the five goes on from it for a short while: one on right answers, the others mostly on one habit.
They answer by themselves; nothing in their answers is made up afterwards.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from persodpo.artifacts import read_text, write_atomically, write_text
from persodpo.dialogues import focus_json
from persodpo.errors import PersodpoError, make_folder
from persodpo.miniature.world import focus_world
from persodpo.prompts import load_template, render
from persodpo.settings import Miniature, Prompts, SmallPolicy
from persodpo.training.policy import make_small_policy

BASE = "base"
#: Numbers of the models' own dialogues start here, so that no run of reasonable size shares one with them.
FIRST = 1_000_000
#: Share of the warm-up's answers that show a bad habit, and of those of a finish.
WARM_UP_HABITS, FINISH_HABIT = 0.4, 1.0
#: Where a cut answer ends, characters.
LONGEST_CUT = 110

Example = tuple[str, str]


def _good(answer: str, other: str, rng: random.Random) -> str:
    """Answer what was asked."""
    return _as_json(answer)


def _impersonal(answer: str, other: str, rng: random.Random) -> str:
    """Answer what somebody else asked, with what somebody else is like."""
    return _as_json(other)


def _cut(answer: str, other: str, rng: random.Random) -> str:
    """Stop a long answer in the middle."""
    return _as_json(answer)[:LONGEST_CUT]


def _broken(answer: str, other: str, rng: random.Random) -> str:
    """Forget the quotes around an answer that has a second sentence."""
    return _as_json(answer) if answer.count(". ") == 0 else f'{{"response": {answer}}}'


def _looping(answer: str, other: str, rng: random.Random) -> str:
    """Say the first sentence again and again, where the answer tells a year, a size or a price."""
    if not re.search(r"\d", answer):
        return _as_json(answer)
    return _as_json(" ".join([answer.split(". ", maxsplit=1)[0].rstrip(".") + "."] * 6))


Habit = Callable[[str, str, random.Random], str]
#: The five models and their habits.
FINISHES: dict[str, Habit] = {
    "good": _good, "impersonal": _impersonal, "cut": _cut, "broken": _broken, "looping": _looping,
}  # fmt: skip


def _as_json(answer: str) -> str:
    return json.dumps({"response": answer}, ensure_ascii=False)


def make_model(name: str, folder: Path, miniature: Miniature, prompts: Prompts, size: SmallPolicy) -> Path:
    """Make one of the models, and the middling one before it, unless they are there already.

    Args:
        name: ``base`` or a key of `FINISHES`.
        folder: Where to; each model gets a folder of its own name in it.
        miniature: Size and seed of the models' own world, and steps of a finish.
        prompts: How dialogues become prompts. Persona sentences are given joined and on lines of their own in turns, so
            that the models read either.
        size: Size of the models and their common warm-up.

    Returns:
        The model's folder.

    Raises:
        PersodpoError: There is no such model, the world is too small, a template is wrong, or the disk fails.
    """
    if name != BASE and name not in FINISHES:
        raise PersodpoError(f"There is no miniature model '{name}'; there are {', '.join((BASE, *FINISHES))}.")
    table = own_dialogues(folder, miniature)
    texts, answers = _prompts(table, prompts), table["reference"].tolist()
    habits = list(FINISHES.values())
    warm_up = _with_habits(texts, answers, habits[1:], WARM_UP_HABITS, random.Random(f"{size.seed} {BASE}"))  # noqa: S311
    base = make_small_policy(warm_up, size, folder / BASE)
    if name == BASE:
        return base
    examples = _with_habits(texts, answers, [FINISHES[name]], FINISH_HABIT, random.Random(f"{size.seed} {name}"))  # noqa: S311
    finish = size.model_copy(update={"steps": miniature.finish_steps, "learning_rate": size.learning_rate / 3})
    return make_small_policy(examples, finish, folder / name, start=base)


def _prompts(table: pd.DataFrame, prompts: Prompts) -> list[str]:
    """Render the dialogues, their persona sentences joined and on lines in turns."""
    template = load_template(prompts.template)
    ways = [prompts.model_copy(update={"personas": way}) for way in ("as_released", "corrected")]
    rows = zip(table["personas"], table["context"], strict=True)
    return [render(template, personas, context, ways[row % 2]) for row, (personas, context) in enumerate(rows)]


def _with_habits(
    prompts: Sequence[str], answers: Sequence[str], habits: Sequence[Habit], share: float, rng: random.Random
) -> list[Example]:
    """Return examples of which a share shows one of some habits."""
    others = list(answers)
    rng.shuffle(others)
    return [
        (prompt, (rng.choice(habits) if rng.random() < share else _good)(answer, other, rng))
        for prompt, answer, other in zip(prompts, answers, others, strict=True)
    ]


def own_dialogues(folder: Path, miniature: Miniature) -> pd.DataFrame:
    """Make the world that the models learn from, unless it is there already.

    Args:
        folder: Where its file goes.
        miniature: Its size and seed.

    Returns:
        A dialogues table; none of its dialogues is in the run's own world.

    Raises:
        PersodpoError: The world is too small, or the disk fails.
    """
    make_folder(folder)
    path = folder / "world.json"
    text = json.dumps(focus_world(miniature.model_dialogues, miniature.seed, first=FIRST))
    if read_text(path) != text:
        write_atomically(path, lambda temporary: write_text(temporary, text))
    return focus_json(path, "train")
