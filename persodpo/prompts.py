"""Dialogues table in, prompt text out: one template file, filled in one pass.

A template is a text file with the fields ``{personas}``, ``{context}`` and ``{max_words}``; doubled braces stand for
single ones. Text that is filled in is never searched for fields again, and no field can stay unfilled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from persodpo.errors import PersodpoError
from persodpo.settings import Prompts

TEMPLATES = Path(__file__).parent / "templates"
FIELDS = frozenset({"personas", "context", "max_words"})

_TOKEN = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def load_template(name: str) -> str:
    """Read a template and check its fields.

    Args:
        name: The name of a file in ``persodpo/templates`` without its suffix, or a path.

    Returns:
        The template's text, without white space at its end.

    Raises:
        PersodpoError: There is no such file, or its fields are not exactly `FIELDS`.
    """
    shipped = TEMPLATES / f"{name}.txt"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.txt")))
        raise PersodpoError(f"Template '{name}' is neither a shipped one ({names}) nor a file.")
    text = path.read_text(encoding="utf-8").rstrip()
    found = {match.group(1) for match in _TOKEN.finditer(text) if match.group(1)}
    for wrong, say in ((FIELDS - found, "lacks"), (found - FIELDS, "has the unknown")):
        if wrong:
            fields = ", ".join(f"{{{field}}}" for field in sorted(wrong))
            raise PersodpoError(f"Template {path} {say} field {fields}; it needs exactly {', '.join(sorted(FIELDS))}.")
    return text


def render(template: str, personas: Sequence[str], context: str, settings: Prompts) -> str:
    """Fill a template for one dialogue.

    Args:
        template: Text from `load_template`.
        personas: The persona sentences.
        context: The turns, one a line, each led by its speaker.
        settings: The word limit, and how the sentences are joined: ``as_released`` without a space between them
            (audit A10), ``corrected`` one a line.

    Returns:
        The prompt.
    """
    corrected = settings.personas == "corrected"
    joined = "\n".join(f"- {sentence}" for sentence in personas) if corrected else "".join(personas)
    values = {"personas": joined, "context": context, "max_words": str(settings.max_words)}
    return _TOKEN.sub(lambda match: values[match[1]] if match[1] else match[0][0], template)
