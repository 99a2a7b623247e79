"""Dialogues from their files: FoCus's own JSON, the released CSV files, and persona sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persodpo import dialogues, stages
from persodpo.config import with_overrides
from persodpo.errors import PersodpoError
from persodpo.files import RELEASE_VARIABLE
from persodpo.runfolder import RunFolder


def focus_entry(number: int, words: int = 4) -> dict:
    """Make one FoCus dialogue of two utterances; the second holds the whole dialogue."""
    turns = ["Where is **this**?", "It's the tower.\r", "Who built it?", " ".join(["word"] * words)]
    return {
        "dialogID": f"D{number}",
        "persona": [f"I like place {number}.", "I've a dog.", "I am 9.", "I sing.", "I cook."],
        "utterance": [
            {"dialogue1": turns[:2]},
            {"persona_grounding2": [True], "dialogue1": turns[:2], "dialogue2": turns},
        ],
    }


def focus_file(folder: Path, entries: list) -> Path:
    path = folder / "focus.json"
    path.write_text(json.dumps({"data": entries}))
    return path


def test_focus_json_takes_the_last_dialogue_and_cleans_markers(tmp_path):
    table = dialogues.focus_json(focus_file(tmp_path, [focus_entry(1)]), "valid")
    row = table.iloc[0]
    assert list(table.columns) == dialogues.COLUMNS
    assert row["dialogue_id"] == "D1"
    assert row["context"] == "User1: Where is this?\nUser2: Its the tower.\nUser1: Who built it?"
    assert row["reference"] == "word word word word"
    assert row["personas"][1] == "Ive a dog."


def test_the_stage_filters_train_dialogues_then_samples_as_pandas_does(tmp_path, profile):
    """No published file is needed: FoCus's own JSON, sampled as the authors did."""
    for split, count in (("train", 30), ("valid", 4)):
        entries = [focus_entry(n, words=111 if n % 3 == 0 else 110) for n in range(count)]
        (tmp_path / f"{split}_focus.json").write_text(json.dumps({"data": entries}))
    focus = with_overrides(profile, [f"dialogues.source={tmp_path}", "dialogues.train_size=7"])
    stages.make(focus, "dialogues")
    table = RunFolder(focus).read("dialogues")
    kept = pd.Series([f"D{n}" for n in range(30) if n % 3])
    assert table.query("split == 'train'")["dialogue_id"].tolist() == kept.sample(n=7, random_state=44).tolist()
    assert table.query("split == 'valid'")["dialogue_id"].tolist() == ["D0", "D1", "D2", "D3"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not FoCus JSON"),
        ("[]", "not FoCus JSON"),
        ('{"data": null}', "not FoCus JSON"),
        ('{"data": ' + "[" * 100_000, "not FoCus JSON"),
        ('{"data": {"a": 1}}', "dialogue number 1"),
        (json.dumps({"data": [{"dialogID": "D1"}]}), "dialogue number 1"),
        (json.dumps({"data": [{**focus_entry(1), "utterance": []}]}), "dialogue number 1"),
        (json.dumps({"data": [{**focus_entry(1), "utterance": [{"dialogue1": ["only"]}]}]}), "'D1' needs"),
        (json.dumps({"data": [focus_entry(1), focus_entry(1)]}), "'D1' stands twice"),
    ],
)
def test_broken_focus_json_is_named(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(PersodpoError, match=words):
        dialogues.focus_json(path, "train")
    with pytest.raises(PersodpoError, match="lower train_size"):
        dialogues.focus_json(focus_file(tmp_path, [focus_entry(1)]), "train", size=2)


@pytest.mark.parametrize(
    ("joined", "sentences"),
    [
        ("I love art.I have a dog.", ["I love art.", "I have a dog."]),
        ("I am from the U.S.A.I like parks.", ["I am from the U.S.A.", "I like parks."]),
        ("I know Washington D.C. well.I sing.", ["I know Washington D.C. well.", "I sing."]),
        ("I love Fiat S.p.A. cars.Im 9.", ["I love Fiat S.p.A. cars.", "Im 9."]),
        ('I like "What now?".I sing!', ['I like "What now?".', "I sing!"]),
        ("I like history,I enjoy wine.", ["I like history,", "I enjoy wine."]),
        ("I like SuntōI am here.", ["I like Suntō", "I am here."]),
    ],
)
def test_persona_sentences_are_found_again(joined, sentences):
    assert dialogues.split_personas(joined, expected=len(sentences)) == sentences


@given(st.text(), st.one_of(st.none(), st.integers(1, 6)))
def test_splitting_loses_nothing(joined, expected):
    assert "".join(dialogues.split_personas(joined, expected)) == joined


@pytest.mark.skipif(not os.environ.get(RELEASE_VARIABLE), reason=f"{RELEASE_VARIABLE} is not set: no published files")
def test_published_files():
    folder = Path(os.environ[RELEASE_VARIABLE])
    for split, count in (("train", 1500), ("valid", 1000)):
        table = dialogues.published_focus(folder / f"Prompts/FoCus-{split}.csv", split)
        assert len(table) == count
        assert (table["personas"].map(len) == 5).all()
        assert not table["reference"].str.startswith("User2").any()
