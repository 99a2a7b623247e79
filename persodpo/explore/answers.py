"""A dialogue and its answers in, HTML out in which model text stays text: persona words and broken JSON are marked."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from persodpo.completions import KEY
from persodpo.method import SIGNALS
from persodpo.plots.metrics import metric_label
from persodpo.plots.style import SKY, VERMILLION
from persodpo.scoring.persona import STOP_WORDS

_WORD = re.compile(r"\w+")
_DECODER = json.JSONDecoder()
_GRID = "display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 8px; max-width: 900px;"
_CARD = "border: 1px solid #9A9A9A; padding: 6px; overflow-wrap: anywhere; text-align: left;"
#: Two dollars in a text are money, and no formula.
_NO_MATHS = "tex2jax_ignore mathjax_ignore"
_RAW = "white-space: pre-wrap; margin: 4px 0;"


@dataclass(frozen=True)
class Damage:
    """Where a completion is not the one JSON object that was asked for.

    Attributes:
        spans: Start and end of each stretch that does not belong, in order.
        reason: What is wrong; empty if nothing is.
    """

    spans: tuple[tuple[int, int], ...]
    reason: str


def find_damage(completion: str) -> Damage:
    """Find what keeps a completion from being one JSON object with the key and nothing around it.

    Args:
        completion: The generated text, whatever it is.

    Returns:
        The damage; a string that never ends is damaged where it breaks off.
    """
    start, end = completion.find("{"), len(completion)
    if start < 0:
        return Damage(((0, end),), "no JSON object")
    before = ((0, start),) if completion[:start].strip() else ()
    try:
        found, stop = _DECODER.raw_decode(completion, start)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return Damage((*before, (end, end)), "breaks off inside its text")
        place = min(error.pos, end)
        return Damage((*before, (place, end)), f"not JSON from here on: {error.msg.lower()}")
    except RecursionError:
        return Damage(((0, end),), "nested too deeply to be read")
    except ValueError:
        return Damage(((0, end),), "holds a number too long to be read")
    after = ((stop, end),) if completion[stop:].strip() else ()
    reasons = [
        *(["text before its object"] if before else []),
        *(["goes on after its object"] if after else []),
        *([] if KEY in found else [f'has no key "{KEY}"']),
    ]
    return Damage((*before, *after), ", ".join(reasons))


def persona_words(personas: Collection[str]) -> frozenset[str]:
    """Return the words of persona sentences that say something, in lower case."""
    return frozenset(word.casefold() for text in personas for word in _WORD.findall(text)) - STOP_WORDS


def highlighted(text: str, words: Collection[str]) -> str:
    """Return text as HTML with some words set off.

    Args:
        text: Any text; it is escaped.
        words: Words in lower case.
    """
    pieces, at = [], 0
    for match in _WORD.finditer(text):
        pieces.append(html.escape(text[at : match.start()]))
        word = html.escape(match[0])
        marked = match[0].casefold() in words
        pieces.append(f'<b style="background-color: {SKY}55">{word}</b>' if marked else word)
        at = match.end()
    return "".join([*pieces, html.escape(text[at:])])


def with_damage(completion: str, damage: Damage) -> str:
    """Return a completion as HTML with its damage marked and named."""
    pieces, at = [], 0
    for start, end in damage.spans:
        stretch = html.escape(completion[start:end]) or "✂"
        pieces.append(html.escape(completion[at:start]))
        pieces.append(f'<del style="text-decoration: none; background-color: {VERMILLION}44">{stretch}</del>')
        at = end
    pieces.append(html.escape(completion[at:]))
    reason = f"<em>JSON damaged: {html.escape(damage.reason)}</em>"
    return f'<p>{reason}</p><div style="{_RAW}"><code>{"".join(pieces)}</code></div>'


def dialogue_html(dialogue: dict[str, Any], answers: pd.DataFrame) -> str:
    """Return a dialogue and its answers side by side.

    Args:
        dialogue: A row of the dialogues table.
        answers: Its responses with their scores, one row a model, in the order to show.

    Returns:
        HTML that is safe to show, at most 900 pixels wide.
    """
    personas = _list(dialogue["personas"])
    words = persona_words(personas)
    sentences = "".join(f"<li>{highlighted(text, words)}</li>" for text in personas)
    turns = "<br>".join(html.escape(turn) for turn in (dialogue["context"] or "").splitlines())
    cards = "".join(_card(row, words) for row in answers.to_dict("records"))
    name = html.escape(dialogue["dialogue_id"])
    head = f"<h4>{name}</h4><p><b>Persona</b></p><ul>{sentences}</ul><p><b>Context</b></p><p>{turns}</p>"
    reference = f"<p><b>Reference</b></p><p>{html.escape(dialogue['reference'])}</p>" if dialogue["reference"] else ""
    return (
        f'<div class="{_NO_MATHS}" style="max-width: 900px">{head}{reference}<div style="{_GRID}">{cards}</div></div>'
    )


def _list(personas: Sequence[str] | None) -> list[str]:
    return [] if personas is None else list(personas)


def _card(row: dict[Any, Any], words: Collection[str]) -> str:
    """Return one model's answer: what was read, its scores, and the completion where it is damaged."""
    response, completion = row["response"], row["completion"]
    text = highlighted(response, words) if response is not None else "<em>nothing could be read</em>"
    damage = find_damage(completion) if completion is not None else Damage((), "")
    raw = with_damage(completion, damage) if damage.reason else ""
    outcome = "read" if row["outcome"] == "ok" else f"failed: {row['outcome']}"
    heading = f"<p><b>{html.escape(row['model'])}</b> ({html.escape(outcome)})</p>"
    return f'<div style="{_CARD}">{heading}<p>{text}</p>{_scores(row)}{raw}</div>'


def _scores(row: dict[Any, Any]) -> str:
    """Return a line of scores."""
    if pd.isna(row.get("quality")):
        return "<p><em>not scored</em></p>"
    signals = ", ".join(f"{metric_label(name)} {row[name]:.2f}" for name in SIGNALS)
    note = ", metrics at their worst as it failed" if row["imputed"] else ""
    return f"<p><b>Quality {row['quality']:.3f}</b> ({signals}{note})</p>"
