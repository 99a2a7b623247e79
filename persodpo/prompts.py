"""Dialogues table in, prompt text out: one template file, filled in one pass.

A template is a text file with the fields ``{personas}``, ``{context}`` and ``{max_words}``; doubled braces stand for
single ones. Text that is filled in is never searched for fields again, and no field can stay unfilled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from persodpo.completions import KEY
from persodpo.config import Prompts
from persodpo.errors import PersodpoError
from persodpo.files import place_of

TEMPLATES = Path(__file__).parent / "templates"
FIELDS = frozenset({"personas", "context", "max_words"})
SYSTEM = "system"
REASONING = "reasoning"
#: The budget that fits a word limit: tokens a word, and tokens of the braces, the key and the quotes around an answer.
#: Completions cut off at 110 tokens hold 80 words in the median, and 60 or more in 99 of 100 (published responses).
TOKENS_PER_WORD = 2.0
TOKENS_AROUND = 16

_TOKEN = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def load_template(name: str) -> str:
    """Return a template's text: of a file in ``persodpo/templates``, named without its suffix, or of a path.

    Raises:
        PersodpoError: There is no such file, its fields are not exactly `FIELDS`, or it never names the key that is read.
    """
    shipped = TEMPLATES / f"{name}.txt"
    path = shipped if shipped in TEMPLATES.iterdir() else Path(place_of(name))
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise PersodpoError(f"Template {path} is not UTF-8; save it as plain text in UTF-8.") from error
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.txt") if p.stem != SYSTEM))
        raise PersodpoError(f"Template '{name}' is neither a shipped one ({names}) nor a file.") from error
    fields_used = {match[1] for match in _TOKEN.finditer(text) if match[1]}
    for wrong, say in ((FIELDS - fields_used, "lacks"), (fields_used - FIELDS, "has the unknown")):
        if wrong:
            fields = ", ".join(f"{{{field}}}" for field in sorted(wrong))
            raise PersodpoError(f"Template {path} {say} field {fields}; it needs exactly {', '.join(sorted(FIELDS))}.")
    if f'"{KEY}"' not in text:
        raise PersodpoError(f'Template {path} never asks for the key "{KEY}", from which answers are read; name it.')
    return text


def load_system(settings: Prompts) -> str:
    """Return the system message of chats, which knows of no dialogue but of the word limit."""
    text = (TEMPLATES / f"{SYSTEM}.txt").read_text(encoding="utf-8").rstrip()
    return _fill(text, {"max_words": str(settings.max_words)})


def render(
    template: str, personas: Sequence[str], context: str, settings: Prompts, *, persona_lines: bool = False
) -> str:
    """Fill a template for one dialogue.

    Args:
        template: Text from `load_template`.
        personas: The persona sentences.
        context: The turns, one a line, each led by its speaker.
        settings: The word limit.
        persona_lines: One sentence a line (correction A10a); else they are joined without a space, as released.
    """
    joined = "\n".join(f"- {sentence}" for sentence in personas) if persona_lines else "".join(personas)
    return _fill(template, {"personas": joined, "context": context, "max_words": str(settings.max_words)})


def answer_keys(template: str) -> tuple[str, ...]:
    """Return the keys of the JSON object that a template asks for, in their order."""
    return (REASONING, KEY) if f'"{REASONING}"' in template else (KEY,)


def template_digest(template: str, system: str | None = None) -> str:
    """Return the hex sha256 of the wording that prompts are made with."""
    return hashlib.sha256(json.dumps([template, system]).encode()).hexdigest()


def token_budget(template: str, max_words: int, *, fits_words: bool = False) -> int:
    """Return how many tokens a completion may have: as many as words, as released, which cuts long answers off.

    With ``fits_words`` (correction A5) they are as many as that many words and the JSON around them take. A template that
    asks for reasoning gets as much room again.
    """
    keys = len(answer_keys(template))
    if not fits_words:
        return max_words * keys
    return keys * (math.ceil(max_words * TOKENS_PER_WORD) + TOKENS_AROUND)


def _fill(template: str, values: dict[str, str]) -> str:
    """Put values in place of fields in one pass."""
    return _TOKEN.sub(lambda match: values[match[1]] if match[1] else match[0][0], template)
