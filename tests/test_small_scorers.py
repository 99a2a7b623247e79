"""Small scorers: honest examples, learned above chance, made once, whole or not there."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persodpo.errors import PersodpoError
from persodpo.runfolder import sha256
from persodpo.scoring import small
from persodpo.scoring.checkpoints import Checkpoint
from persodpo.scoring.coherence import CoherenceScorer
from persodpo.scoring.finetune_scorer import RECORD
from persodpo.scoring.nli import CScorer
from persodpo.scoring.nli_model import CLASSES, NliModel
from persodpo.scoring.scorers import Item
from persodpo.scoring.small import SmallScorers, SmallVectors, make_small_scorers
from persodpo.scoring.small_examples import (
    coherence_examples,
    inference_examples,
    plain_words,
    turns,
    understand,
)
from persodpo.scoring.small_models import SmallModel, coherence_marks, coherence_tokenizer, denials, pair_tokenizer

THINGS = [
    "castles", "bridges", "rivers", "museums", "gardens", "trains", "ships", "churches", "mountains", "lakes", "temples",
    "paintings", "battles", "kings", "horses", "islands", "towers", "caves", "forests", "markets",
]  # fmt: skip
SETTINGS = SmallScorers(
    coherence=SmallModel(
        vocabulary=600, hidden_size=32, intermediate_size=32, max_length=64, examples=400, batch_size=16, learning_rate=2e-3
    ),
    nli=SmallModel(
        vocabulary=600, hidden_size=64, intermediate_size=64, max_length=48, examples=3240, batch_size=16, learning_rate=3e-3
    ),
    vectors=SmallVectors(size=16, epochs=60, minimum_count=1),
    held_out=0.1,
    seed=3,
)  # fmt: skip


def dialogues(count: int, seed: int = 0) -> pd.DataFrame:
    """Each about two things that its personas name."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        one, two = draw.sample(THINGS, 2)
        place = f"{draw.choice('bdfgklm')}{draw.choice('aeiou')}{draw.choice('rnt')}{draw.choice('aeiou')}land"
        context = (
            f"User1: What are these {one}?\nUser2: These old {one} stand in {place}, near the {two}.\n"
            f"User1: Are there {two} in {place}?"
        )
        reference = f"Yes, the {two} of {place} are near the {one}, which you like."
        rows.append((f"d{number}", [f"I like {one}.", f"I want to visit {place}."], context, reference))
    return pd.DataFrame(rows, columns=["dialogue_id", "personas", "context", "reference"])


DIALOGUES = dialogues(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def made(folder):
    return make_small_scorers(DIALOGUES, folder, SETTINGS, progress=False)


@pytest.mark.parametrize("name", ["coherence", "nli", "vectors"])
@pytest.mark.usefixtures("made")
def test_each_is_clearly_above_chance_and_says_so(folder, name):
    found = json.loads((folder / name / RECORD).read_text())
    assert found["accuracy"] > found["majority"] + 0.2
    assert found["held_out"] > 50
    assert f"{found['accuracy']:.4f}" in (folder / name / "README.md").read_text()


def test_a_scorer_of_them_tells_known_cases_apart(made):
    held = dialogues(40, seed=9)
    scorer = CoherenceScorer(Checkpoint(str(made.coherence)))
    own = [(r, c) for r, c in zip(held["reference"], held["context"], strict=True)]
    other = [(r, c) for r, c in zip(held["reference"], np.roll(held["context"], 1), strict=True)]
    values = scorer.score(own + other)[0]
    assert (values[:40] > values[40:]).mean() > 0.8
    c_score = CScorer(NliModel(Checkpoint(str(made.nli))))
    said = [
        c_score.texts(Item((f"I like {thing}.",), "", "", response))
        for thing in THINGS
        for response in (f"I like {thing}.", f"I do not like {thing}.", f"I like {THINGS[THINGS.index(thing) - 1]}.")
    ]
    values = c_score.score(said)[0].reshape(-1, 3)
    assert (values == [1, -1, 0]).mean() > 0.8


def test_word_vectors_are_word2vecs_own_format(made):
    from gensim.models import KeyedVectors

    vectors = KeyedVectors.load_word2vec_format(str(made.vectors), binary=True)
    assert vectors.vector_size == 16
    assert {"castles", "like"} <= set(vectors.key_to_index)


def test_nothing_pickled_is_left(made, folder):
    allowed = {".json", ".safetensors", ".md"}
    names = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in names} - allowed == {".bin"}
    assert [path for path in names if path.suffix == ".bin"] == [made.vectors]
    assert sorted(path.name for path in folder.iterdir()) == ["coherence", "nli", "vectors"]


def test_they_are_reused_until_something_changes(made, folder, monkeypatch):
    made_now = []
    monkeypatch.setattr(small, "_learn", lambda *_: made_now.append("model") or {})
    make_small_scorers(DIALOGUES.copy(), folder, SETTINGS, progress=False)
    assert not made_now
    other = replace(SETTINGS, vectors=replace(SETTINGS.vectors, size=8))
    before = sha256(made.vectors)
    make_small_scorers(DIALOGUES, folder, other, progress=False)
    assert not made_now
    assert sha256(made.vectors) != before
    make_small_scorers(DIALOGUES, folder, SETTINGS, progress=False)
    assert sha256(made.vectors) == before


@pytest.mark.slow
def test_the_same_dialogues_give_the_same_bytes_on_any_number_of_threads(made, tmp_path):
    torch.manual_seed(8)
    before = torch.random.get_rng_state()
    torch.set_num_threads(2)
    again = make_small_scorers(DIALOGUES, tmp_path, SETTINGS, progress=False)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(before, torch.random.get_rng_state())
    for first, second in ((made.coherence, again.coherence), (made.nli, again.nli)):
        assert sha256(first / "model.safetensors") == sha256(second / "model.safetensors")
        assert sha256(first / "tokenizer.json") == sha256(second / "tokenizer.json")
    assert sha256(made.vectors) == sha256(again.vectors)


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    quick = replace(SETTINGS, **{part: replace(getattr(SETTINGS, part), examples=16) for part in ("coherence", "nli")})
    few = DIALOGUES.iloc[:12]
    made = make_small_scorers(few, tmp_path, quick, progress=False)
    before = sha256(made.coherence / "model.safetensors")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(small, "finetune", fail)
    with pytest.raises(PersodpoError, match="is full"):
        make_small_scorers(few, tmp_path, replace(quick, seed=4), progress=False)
    assert sha256(made.coherence / "model.safetensors") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coherence", "nli", "vectors"]


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    with pytest.raises(PersodpoError, match="at least 10 dialogues to learn from, not 9"):
        make_small_scorers(DIALOGUES.iloc[:9], tmp_path, SETTINGS)
    strange = DIALOGUES.iloc[:20].assign(personas=[["Blue."]] * 20)
    with pytest.raises(PersodpoError, match="No persona sentence"):
        make_small_scorers(strange, tmp_path, SETTINGS)
    (tmp_path / "vectors").mkdir(exist_ok=True)
    (tmp_path / "vectors" / "notes.txt").write_text("mine")
    with pytest.raises(PersodpoError, match="something other than a small scorer"):
        make_small_scorers(DIALOGUES.iloc[:12], tmp_path, SETTINGS)


@given(seed=st.integers(0, 50), count=st.integers(2, 12))
def test_coherence_examples_give_nothing_away_but_the_fit(seed, count):
    """Each history has one Yes and one No; a reply never is lent to its own dialogue."""
    rows = dialogues(count, seed).assign(reference=[f"reply {n}" for n in range(count)])
    found = coherence_examples(rows, seed)
    by_history: dict[str, list[str]] = {}
    for (_, history), label in zip(found.inputs, found.labels, strict=True):
        by_history.setdefault(history, []).append(label)
    assert all(Counter(labels)["Yes"] == Counter(labels)["No"] for labels in by_history.values())
    true = {pair for pair, label in zip(found.inputs, found.labels, strict=True) if label == "Yes"}
    assert set(zip(rows["reference"], rows["context"], strict=True)) <= true
    for (reply, history), label in zip(found.inputs, found.labels, strict=True):
        if label == "No" and reply.startswith("reply"):
            assert (reply, history) not in true


def test_persona_sentences_are_understood():
    found = understand(
        [["I like old castles.", "I don't like rain!", "Blue."], ["I’ve never been to Spain.", "I live in Rome."]]
    )
    assert [(c.dialogue, c.stance, c.positive, c.thing) for c in found] == [
        (0, 0, True, "old castles"), (0, 0, False, "rain"), (1, 3, False, "spain"), (1, 4, True, "rome"),
    ]  # fmt: skip


def test_inference_examples_are_balanced_and_follow_their_label():
    found = inference_examples(DIALOGUES, 1)
    assert Counter(found.labels) == dict.fromkeys(CLASSES, len(found) // 3)
    denying = set(denials())
    shares = {}
    for label in CLASSES:
        own = [pair for pair, given_ in zip(found.inputs, found.labels, strict=True) if given_ == label]
        shares[label] = np.mean([bool(denying & set(plain_words(hypothesis))) for _, hypothesis in own])
        thing = [next(t for t in [*THINGS, "land"] if t in premise) for premise, _ in own]
        named = [word in hypothesis for word, (_, hypothesis) in zip(thing, own, strict=True) if word != "land"]
        # What is said or denied is named; what is unrelated hardly ever, and then in a fact.
        assert np.mean(named) == 1.0 if label != "neutral" else np.mean(named) < 0.3
        differ = [bool(denying & set(plain_words(p))) != bool(denying & set(plain_words(h))) for p, h in own]
        if label != "neutral":
            assert np.mean(differ) == (label == "contradiction")
    # Denial alone says little: it stands under every label.
    assert max(shares.values()) - min(shares.values()) < 0.35


def test_turns_go_on_over_lines():
    assert turns("User1: a\nb\nUser2: c") == ["User1: a\nb", "User2: c"]


def test_marks_and_answers_are_single_tokens():
    tokenizer = coherence_tokenizer(["yes no question history northern yesterday"] * 3, 300)
    for word in (*coherence_marks(), "Yes", "No"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.tokenize("Northern")[0] != "No"
    pairs = pair_tokenizer(["I don't like it", "I dont like it"], 300, 64)
    assert pairs("don't")["input_ids"] == pairs("dont")["input_ids"] == pairs("don’t")["input_ids"]
    assert pairs("a", "b")["token_type_ids"][-1] == 1
