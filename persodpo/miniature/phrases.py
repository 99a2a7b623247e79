"""The words of the miniature world, from ``phrases.yaml``, which says what each is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
#: A persona sentence, and the clause of an answer that takes it up.
Pair = tuple[str, str]

SYLLABLES: list[list[str]] = _WORDS["syllables"]
FIRST_NAMES, LAST_NAMES = _WORDS["first_names"], _WORDS["last_names"]
LANDS, MATERIALS, DAYS = _WORDS["lands"], _WORDS["materials"], _WORDS["days"]
KINDS: dict[str, tuple[list[str], list[str]]] = _WORDS["kinds"]
INTERESTS: dict[str, list[Pair]] = _WORDS["interests"]
PLACE_TRAITS: dict[str, list[Pair]] = _WORDS["place_traits"]
DISTRACTORS: list[str] = _WORDS["distractors"]
THINGS, SAID_OF_THINGS = _WORDS["things"], _WORDS["said_of_things"]
OWNED, SAID_OF_OWNED = _WORDS["owned"], _WORDS["said_of_owned"]
JOBS, SAID_OF_JOBS = _WORDS["jobs"], _WORDS["said_of_jobs"]
QUESTIONS: dict[str, tuple[list[str], list[str]]] = _WORDS["questions"]
MORE: list[str] = _WORDS["more"]
OPENINGS: list[str] = _WORDS["openings"]
