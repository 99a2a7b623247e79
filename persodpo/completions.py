"""Completion text in, response and outcome class out; no text makes a reading fail.

Two readings. ``as_released`` follows the authors' notebooks: the first brace span that parses as JSON and holds the key
counts as an answer, wherever it stands. ``strict`` asks what the prompt asks: one JSON object and nothing after it.
The outcome of a failure says what went wrong, in the order in which the classes are listed in `OUTCOMES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pandas as pd

from persodpo.files import without_surrogates

KEY = "response"

#: Outcome classes. ``api_error`` is set by generation, ``unknown`` where a failure's completion was not published.
OUTCOMES = (
    "ok", "empty", "loop", "echo", "truncated", "missing_key", "malformed", "no_json", "api_error", "unknown",
)  # fmt: skip

#: What a template shows in the place of the answer; a response that repeats it answers nothing. The first is the
#: published template's, as 17 published responses repeat it (audit A11), the second that of `persodpo/templates`.
PLACEHOLDERS = ("provide the personalized natural language response here", "your reply")

_OPENED = re.compile(rf'"{KEY}"\s*:\s*"')
_CLOSED = re.compile(r'"\s*\}')
#: What a reasoning model thinks before it answers; a block that is never closed is all that there is. Some templates open it
#: in the prompt: then a completion that starts otherwise than with a brace is such a block up to where it is closed.
_REASONING = re.compile(r"\A\s*(?:<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|[^{\s].*?</think(?:ing)?>)", re.DOTALL)
_DECODER = json.JSONDecoder()
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
#: Han and kana; Thai, Lao, Burmese and Khmer; punctuation of the former.
_HAN = r"\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_THAI = r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3"
_MARKS = r"\u3000-\u303f\u30fb-\u30ff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_UNSPACED = re.compile(f"[{_HAN}{_THAI}]")
_WORD = re.compile(rf"[{_HAN}]|[{_THAI}]{{1,4}}|[^\s{_HAN}{_THAI}{_MARKS}]+")
_LOOP_WINDOW = 16
_LOOP_MINIMUM, _LOOP_MAXIMUM = 80, 100_000


class Reading(NamedTuple):
    """The answer in a completion, or the text recovered from a failure, and one of `OUTCOMES`."""

    response: str | None
    outcome: str


def read_completion(completion: str | None, reading: Literal["as_released", "strict"] = "as_released") -> Reading:
    """Read a completion, of which None or white space is ``empty``; never raises, whatever the text."""
    if completion is None or not completion.strip():
        return Reading(None, "empty")
    text = without_surrogates(completion)
    return (_read_as_released if reading == "as_released" else _read_strictly)(text)


def _read_as_released(text: str) -> Reading:
    """Take the first brace span that parses and holds the key; otherwise recover what was opened."""
    for span in _brace_spans(text):
        decoded = _decode(json.loads, span)
        if isinstance(decoded, dict) and KEY in decoded:
            answer = _answer(decoded[KEY])
            return answer._replace(outcome="echo") if _is_dots(answer.response) else answer
    return Reading(_recover(text), _failure(text))


def _read_strictly(text: str) -> Reading:
    """Take exactly one JSON object; text may precede it, nothing may follow it, and what a model thinks is no answer."""
    text = without_reasoning(text)
    first = _first_object(text)
    if first is None:
        return Reading(_recover(text), _failure(text))
    value, rest = first
    answer = _answer(value[KEY])
    if answer.response is None:
        return answer
    if is_echo(answer.response):
        return Reading(answer.response, "echo")
    if is_loop(answer.response) or (rest and is_loop(text)):
        return Reading(answer.response, "loop")
    return Reading(answer.response, "malformed" if rest else "ok")


def read_completions(frame: pd.DataFrame, reading: Literal["as_released", "strict"]) -> pd.DataFrame:
    """Return ``frame`` with response and outcome as read from its completion column."""
    readings = [read_completion(text, reading) for text in frame["completion"]]
    response = pd.Series([reading.response for reading in readings], index=frame.index, dtype=object)
    return frame.assign(response=response, outcome=[reading.outcome for reading in readings])


def write_completion(response: str) -> str:
    """Return a response as the one JSON object that a prompt asks for."""
    return json.dumps({KEY: response}, ensure_ascii=False)


def count_words(text: str) -> int:
    """Count words as the released method does: what white space separates."""
    return len(text.split())


def count_words_of_any_script(text: str) -> int:
    """Count words also where no space parts them (correction B2): each Han character or kana, four letters of Thai."""
    return sum(1 for _ in _WORD.finditer(text)) if _UNSPACED.search(text) else count_words(text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: what ends with a mark before white space, or with the text."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def repeats_sentence(text: str) -> bool:
    """Tell whether a text says a sentence twice, word for word."""
    parts = sentences(text)
    return len(set(parts)) < len(parts)


def without_reasoning(text: str) -> str:
    """Return a completion without the block of reasoning (``<think>...</think>``) that it starts with."""
    return _REASONING.sub("", text, count=1)


def is_one_object(completion: str | None) -> bool:
    """Tell whether a completion is exactly one JSON object with the key and nothing after it, whatever it says."""
    first = _first_object(without_reasoning(completion or ""))
    return first is not None and not first[1]


def _first_object(text: str) -> tuple[dict[str, Any], str] | None:
    """Decode from the first brace on; return an object with the key and what follows it, None if there is none."""
    start = text.find("{")
    decoded = _decode(_DECODER.raw_decode, text[start:]) if start >= 0 else None
    if decoded is None or KEY not in decoded[0]:
        return None
    return decoded[0], text[start + decoded[1] :].strip()


def is_echo(response: str) -> bool:
    """Tell whether a response only repeats a template's placeholder."""
    words = " ".join(re.findall(r"[a-z0-9]+", response.casefold()))
    return _is_dots(response) or any(words == p or words.startswith(p + " in ") for p in PLACEHOLDERS)


def _is_dots(response: str | None) -> bool:
    """Tell whether a response is the ellipsis that stands for an answer, in a prompt or in a model's thoughts."""
    return response is not None and not response.strip(" .…")


def is_loop(text: str) -> bool:
    """Tell whether more than half of a text repeats itself, by its distinct windows of 16 characters.

    A passage that stands three times has two thirds of its windows repeated, natural prose almost none. Texts under 80
    characters are too short to tell.
    """
    if len(text) < _LOOP_MINIMUM:
        return False
    text = text[:_LOOP_MAXIMUM]
    windows = [text[start : start + _LOOP_WINDOW] for start in range(len(text) - _LOOP_WINDOW + 1)]
    return len(set(windows)) < len(windows) / 2


def _answer(value: Any) -> Reading:
    """Accept only text that is not blank as an answer."""
    if not isinstance(value, str):
        return Reading(None, "malformed")
    value = without_surrogates(value)
    return Reading(value, "ok") if value.strip() else Reading(None, "empty")


def _brace_spans(text: str) -> list[str]:
    """Return the shortest ``{...}`` spans from left to right; each brace that opens has one that closes, so it is fast."""
    return re.findall(r"\{[^}]*\}", text[: text.rfind("}") + 1])


def _decode(decode: Callable[[str], Any], text: str) -> Any:
    """Decode JSON; None if it is none (too deep a nesting and too long a number included)."""
    try:
        return decode(text)
    except (ValueError, RecursionError):
        return None


def _recover(text: str) -> str | None:
    """Return what follows the first opened answer, without the debris at its ends; None if none was opened."""
    opened = _OPENED.search(text)
    if not opened:
        return None
    return text[opened.end() :].strip('"\n{} ').rstrip(".… ").strip() or None


def _failure(text: str) -> str:
    """Name the class of a completion that could not be read."""
    if is_loop(text):
        return "loop"
    recovered = _recover(text)
    if recovered and is_echo(recovered):
        return "echo"
    opened = _OPENED.search(text)
    if opened:
        return "malformed" if _CLOSED.search(text, opened.end()) else "truncated"
    objects = [value for span in _brace_spans(text) if isinstance(value := _decode(json.loads, span), dict)]
    if objects:
        return "missing_key" if all(KEY not in value for value in objects) else "malformed"
    return "malformed" if f'"{KEY}"' in text else "no_json"
