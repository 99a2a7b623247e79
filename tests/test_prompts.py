"""Prompts: every field filled once, no text mistaken for a field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persodpo.config import load_profile
from persodpo.errors import PersodpoError
from persodpo.prompts import FIELDS, load_template, render

SETTINGS = load_profile("release").prompts


def test_the_plain_template_asks_for_what_is_read():
    prompt = render(load_template("plain"), ["I like art.", "I sing."], "User1: Hi?", SETTINGS)
    assert "I like art.I sing." in prompt
    assert "User1: Hi?" in prompt
    assert "at most 110 words" in prompt
    example = prompt.splitlines()[-1]
    assert json.loads(example) == {"response": "your reply"}


def test_corrected_puts_one_sentence_on_each_line():
    corrected = load_profile("release", ["prompts.personas=corrected"]).prompts
    assert "- I like art.\n- I sing.\n" in render(
        load_template("plain"), ["I like art.", "I sing."], "User1: Hi", corrected
    )


@given(st.lists(st.text(), min_size=1, max_size=5), st.text())
def test_text_is_never_searched_for_fields(personas, context):
    template = "{personas}|{context}|{max_words}|{{}}"
    tricky = [*personas, "{context}{max_words}"]
    assert render(template, tricky, context, SETTINGS) == "".join(tricky) + f"|{context}|110|{{}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{personas} {context}", "lacks field {max_words}"),
        ("{personas}{context}{max_words}{limit}", "unknown field {limit}"),
    ],
)
def test_templates_with_wrong_fields_are_refused(tmp_path, text, words):
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(PersodpoError) as refused:
        load_template(str(path))
    assert words in str(refused.value)
    assert all(field in str(refused.value) for field in FIELDS)


def test_unknown_template():
    with pytest.raises(PersodpoError, match=r"neither a shipped one \(chain_of_thought, plain\) nor a file"):
        load_template("fancy")
