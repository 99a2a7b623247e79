"""Prompts: every field filled once, no text mistaken for a field."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persodpo.config import load_profile
from persodpo.errors import PersodpoError
from persodpo.generation.requests import as_messages
from persodpo.prompts import (
    answer_keys,
    load_system,
    load_template,
    render,
    template_digest,
    token_budget,
)

SETTINGS = load_profile("release").prompts


@pytest.mark.parametrize(("lines", "personas"), [(False, "I like art.I sing."), (True, "- I like art.\n- I sing.\n")])
def test_the_plain_template_asks_for_what_is_read(lines, personas):
    """Persona sentences joined as released, and one a line under correction A10a."""
    prompt = render(load_template("plain"), ["I like art.", "I sing."], "User1: Hi?", SETTINGS, persona_lines=lines)
    assert all(words in prompt for words in (personas, "User1: Hi?", "at most 110 words"))
    assert json.loads(prompt.splitlines()[-1]) == {"response": "your reply"}


@given(st.lists(st.text(), min_size=1, max_size=5), st.text())
def test_text_is_never_searched_for_fields(personas, context):
    template = "{personas}|{context}|{max_words}|{{}}"
    tricky = [*personas, "{context}{max_words}"]
    assert render(template, tricky, context, SETTINGS) == "".join(tricky) + f"|{context}|110|{{}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{personas} {context}", "lacks field {max_words}; it needs exactly context, max_words, personas"),
        (
            "{personas}{context}{max_words}{limit}",
            "unknown field {limit}; it needs exactly context, max_words, personas",
        ),
        ("{personas}{context}{max_words}", 'never asks for the key "response"'),
    ],
)
def test_templates_that_cannot_be_filled_or_read_are_refused(tmp_path, text, words):
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(PersodpoError, match=re.escape(words)):
        load_template(str(path))


@pytest.mark.parametrize("name", ["fancy", "x" * 5_000, "x\0y", "."])
def test_files_that_are_no_template_are_one_sentence(tmp_path, name):
    with pytest.raises(PersodpoError, match=r"neither a shipped one \(brief, chain_of_thought, plain\) nor a file"):
        load_template(name)
    (tmp_path / "latin.txt").write_bytes("ü {personas}".encode("latin-1"))
    with pytest.raises(PersodpoError, match="is not UTF-8"):
        load_template(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    ("name", "keys", "tokens"),
    [("plain", ["response"], (110, 236)), ("chain_of_thought", ["reasoning", "response"], (220, 472))],
)
def test_a_template_names_its_keys_and_has_a_budget_for_each(name, keys, tokens):
    template = load_template(name)
    assert list(answer_keys(template)) == keys
    assert list(json.loads(render(template, ["I sing."], "User1: Hi?", SETTINGS).splitlines()[-1])) == keys
    assert tuple(token_budget(template, 110, fits_words=fits) for fits in (False, True)) == tokens


def test_the_system_message_tells_the_limit():
    """The published one went out with its field unfilled (audit A9)."""
    system = load_system(SETTINGS)
    assert "at most 110 words" in system
    assert "{" not in system
    assert as_messages("Hi", system) == ({"role": "system", "content": system}, {"role": "user", "content": "Hi"})
    assert as_messages("Hi", None) == ({"role": "user", "content": "Hi"},)


def test_the_digest_follows_every_wording():
    assert len({template_digest(*words) for words in [("a",), ("b",), ("a", "s"), ("a", "t")]}) == 4
