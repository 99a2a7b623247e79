"""Reading completions: hand-made cases, equivalence to the released pattern, and any text at all."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persodpo.completions import (
    OUTCOMES,
    Reading,
    count_words,
    count_words_of_any_script,
    is_loop,
    is_one_object,
    read_completion,
)

GOOD = '{"response": "Hello there."}'
CUT = '{\n  "response": "The tower was built in 1889 and'


@pytest.mark.parametrize(
    ("text", "released", "strict"),
    [
        (GOOD, ("Hello there.", "ok"), ("Hello there.", "ok")),
        (f"Sure:\n{GOOD}\n", ("Hello there.", "ok"), ("Hello there.", "ok")),
        (f"{GOOD} Hope that helps!", ("Hello there.", "ok"), ("Hello there.", "malformed")),
        (f"{GOOD}\n{GOOD}", ("Hello there.", "ok"), ("Hello there.", "malformed")),
        (CUT, ("The tower was built in 1889 and", "truncated"), ("The tower was built in 1889 and", "truncated")),
        ('{"response": "Good one... "', ("Good one", "truncated"), ("Good one", "truncated")),
        ('{"response": "a "quoted" word"}', ('a "quoted" word', "malformed"), ('a "quoted" word', "malformed")),
        ('{"response": "a {b} c"}', ("a {b} c", "malformed"), ("a {b} c", "ok")),
        ('{"answer": "Hello"}', (None, "missing_key"), (None, "missing_key")),
        ("Just text.", (None, "no_json"), (None, "no_json")),
        ("", (None, "empty"), (None, "empty")),
        (" \n\t", (None, "empty"), (None, "empty")),
        (None, (None, "empty"), (None, "empty")),
        ('{"response": ""}', (None, "empty"), (None, "empty")),
        ('{"response": 7}', (None, "malformed"), (None, "malformed")),
        ('{"response": null}', (None, "malformed"), (None, "malformed")),
        ('{"response": "x\\ud800y"}', ("x\ufffdy", "ok"), ("x\ufffdy", "ok")),
        ('{"response": "x\\ud83d\\ude00y"}', ("x😀y", "ok"), ("x😀y", "ok")),
        ("}\n" * 100, (None, "loop"), (None, "loop")),
        ('{"response": "your reply"}', ("your reply", "ok"), ("your reply", "echo")),
        ('<think>It is {"response": "..."}.</think>{"response": "Final."}', ("...", "echo"), ("Final.", "ok")),
        ('It is {"response": "x"}.\n</think>\n{"response": "Final."}', ("x", "ok"), ("Final.", "ok")),
        ('<think>It is {"response": "x"}', ("x", "ok"), (None, "no_json")),
        ('{"response": "a </think> b"}', ("a </think> b", "ok"), ("a </think> b", "ok")),
    ],
)
def test_hand_made_completions(text, released, strict):
    assert read_completion(text) == Reading(*released)
    assert read_completion(text, "strict") == Reading(*strict)


def test_one_object_is_about_form_not_content_and_loops_need_repetition_not_length():
    assert is_one_object('{"response": "your reply"}')
    assert not is_one_object(f"{GOOD} and more")
    assert not is_one_object(None)
    assert is_loop("I like the sea. " * 6)
    assert not is_loop(" ".join(f"word{n}" for n in range(200)))
    assert not is_loop("ha" * 20)


JSON_LIKE = st.lists(
    st.sampled_from(
        ['{"response"', ": ", '"', "{", "}", "response", "\\", "\n", "a b", "1e999", "[", "]", ",", "…", "\ud800"]
    ),
    max_size=40,
).map("".join)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.one_of(st.text(), JSON_LIKE, st.text(alphabet='{}"response:\\ \n')))
@example("[" * 100_000)
@example("{" * 100_000)
@example('{"response": ' * 5_000)
@example('{"response": ' + "[" * 50_000)
@example('{"response": ' + "9" * 10_000 + "}")
def test_no_text_makes_a_reading_fail(text):
    for reading in ("as_released", "strict"):
        response, outcome = read_completion(text, reading)
        assert outcome in OUTCOMES
        assert response is None or (response.strip() and response.encode())
        assert outcome != "ok" or response is not None
        assert outcome not in {"empty", "no_json", "missing_key"} or response is None


@settings(max_examples=1_000)
@given(JSON_LIKE)
def test_as_released_takes_the_spans_of_the_released_pattern(text):
    """The linear scan finds what the pattern ``{.*?}`` (dot matches newline) finds."""
    first = None
    for span in re.findall(r"\{.*?\}", text, re.DOTALL):
        try:
            found = json.loads(span)
        except ValueError:
            continue
        if isinstance(found, dict) and "response" in found:
            first = found["response"]
            break
    response, outcome = read_completion(text)
    if isinstance(first, str) and first.strip():
        assert (response, outcome) == (first.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), "ok")
    else:
        assert outcome != "ok"


@given(st.text().filter(str.strip))
def test_what_is_written_as_json_reads_back(text):
    clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert read_completion(json.dumps({"response": text}), "strict").response == clean


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0), ("It is a church, isn't it?", 6), (" two\u00a0words\n", 2), ("Straße — 12 km", 4),
        ("你好世界", 4), ("你好，世界。", 4), ("ABC你好", 3), ("東京タワー is high", 6),
        ("고궁에 갑니다", 2), ("สวัสดีครับ", 3),
    ],
)  # fmt: skip
def test_words_of_scripts_without_spaces_are_counted_by_rule(text, words):
    """Han and kana one each, Thai and the like one for four letters; elsewhere what white space separates."""
    assert count_words_of_any_script(text) == words


@given(st.text(st.characters(max_codepoint=0x0DFF)))
def test_elsewhere_words_are_what_white_space_separates(text):
    assert count_words_of_any_script(text) == count_words(text) == len(text.split())
