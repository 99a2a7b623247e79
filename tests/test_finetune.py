"""Fine-tuning of scorers: published file formats, counted gaps, measured accuracy, nothing pickled, nothing half made."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scorer_models import T5_WORDS, counting_bert, counting_t5
from test_cli import run
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

from persodpo.errors import PersodpoError
from persodpo.scoring import finetune_scorer as module
from persodpo.scoring.checkpoints import Checkpoint
from persodpo.scoring.coherence import CoherenceScorer
from persodpo.scoring.finetune_scorer import RECORD, finetune_scorer, own_randomness
from persodpo.scoring.nli_data import Examples, read_examples, split
from persodpo.scoring.nli_model import CLASSES, NliModel
from persodpo.scoring.scorer_card import FineTuning, Report

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = FineTuning(epochs=8, learning_rate=2e-2, batch_size=16, max_length=32, seed=1)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_each_format_is_read_as_it_is_published(tmp_path):
    snli = write(
        tmp_path / "snli.jsonl",
        {"sentence1": "A man runs.", "sentence2": "He moves.", "gold_label": "entailment", "pairID": "1"},
        {"sentence1": "A man runs.", "sentence2": "He eats.", "gold_label": "-"},
        {"sentence1": "A man runs.", "sentence2": "He sits.", "gold_label": "contradiction"},
    )
    found = read_examples([snli], "snli")
    assert found.inputs == (("A man runs.", "He moves."), ("A man runs.", "He sits."))
    assert (found.labels, found.skipped) == (("entailment", "contradiction"), 1)

    sick = tmp_path / "SICK.txt"
    for label in ("entailment_judgment", "entailment_label"):
        sick.write_text(
            f'pair_ID\tsentence_A\tsentence_B\trelatedness_score\t{label}\n1\tA "dog\tA cat\t1.0\tNEUTRAL\n'
        )
        assert read_examples([sick], "sick") == Examples((('A "dog', "A cat"),), ("neutral",))

    dnli = tmp_path / "dialogue_nli_dev.jsonl"
    rows = [
        {"sentence1": "i swim", "sentence2": "i hate water", "label": label, "id": "x", "dtype": "y", "triple1": []}
        for label in ("negative", "positive", "neutral")
    ]
    dnli.write_text(json.dumps(rows))
    assert read_examples([dnli, dnli], "dialogue_nli").labels == ("contradiction", "entailment", "neutral") * 2

    plain = write(tmp_path / "plain.jsonl", {"a": "x", "b": "y", "c": "Entailment"}, {"a": "x", "b": "y", "c": ""})
    assert read_examples([plain], "jsonl", ("a", "b", "c")) == Examples((("x", "y"),), ("entailment",), 1)
    asked = write(tmp_path / "asked.jsonl", {"response": "r", "context": "c", "label": "yes"})
    assert read_examples([asked], "coherence") == Examples((("r", "c"),), ("Yes",))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"sentence1": "a", "sentence2": "b"}', "snli", "line 1 has no text under gold_label; format snli needs"),
        ('\n{"sentence1": "a", "sentence2": "b", "gold_label": 2}', "snli", "line 2 has no text under gold_label"),
        (
            '{"sentence1": "a", "sentence2": "b", "gold_label": "maybe"}',
            "snli",
            "label 'maybe' is none of contradiction",
        ),
        ('{"sentence1": "a", "sente', "snli", "line 1 is not JSON .*may be cut off"),
        ('{"sentence1": "a", "sentence2": "b", "gold_label": "-"}', "snli", "no row has a label"),
        ('{"sentence1": "a"}', "dialogue_nli", "must hold one JSON list of objects with sentence1, sentence2, label"),
        ('[{"sentence1": "a", "sentence2": "b", "label": "x"}]', "dialogue_nli", "entry 1: label 'x' is none of"),
        ("[3]", "dialogue_nli", "entry 1 has no text under sentence1, sentence2, label"),
        ("a,b\n1,2\n", "sick", "line 2 has no text under sentence_A, sentence_B, entailment_judgment"),
        ('{"response": "a", "context": "b", "label": "neutral"}', "coherence", "label 'neutral' is none of Yes, No"),
        ("", "xml", "There is no format 'xml'; there are snli, sick"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, text, kind, message):
    (tmp_path / "data").write_text(text)
    with pytest.raises(PersodpoError, match=message):
        read_examples([tmp_path / "data"], kind)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "data").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "data", tmp_path / "nowhere"):
        with pytest.raises(PersodpoError, match="cannot be read as text"):
            read_examples([path], "jsonl")


@given(
    premises=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30).filter(lambda p: len(set(p)) > 1),
    share=st.floats(0.01, 0.99), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_split_keeps_premises_together_and_loses_nothing(premises, share, seed):
    whole = Examples(tuple((p, str(n)) for n, p in enumerate(premises)), ("neutral",) * len(premises), 3)
    train, test = split(whole, share, seed)
    assert sorted(train.inputs + test.inputs) == sorted(whole.inputs)
    assert train
    assert test
    assert not {p for p, _ in train.inputs} & {p for p, _ in test.inputs}
    assert (train.skipped, test.skipped) == (3, 0)
    assert split(whole, share, seed) == (train, test)


def test_one_premise_cannot_be_split():
    with pytest.raises(PersodpoError, match="name a held-out file"):
        split(Examples((("a", "x"), ("a", "y")), ("neutral", "neutral")), 0.5, 0)


def learnable(count: int, seed: int = 0) -> list[dict]:
    """The hypothesis's word gives the label."""
    draw = random.Random(seed)
    word = {"contradiction": "deny", "neutral": "x", "entailment": "agree"}
    labels = draw.choices(CLASSES, k=count)
    return [{"premise": f"x {n}", "hypothesis": word[label], "label": label} for n, label in enumerate(labels)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A BERT without a head."""
    folder = counting_bert(tmp_path_factory.mktemp("base"))
    config = BertConfig.from_pretrained(folder)
    config.hidden_size, config.num_attention_heads, config.id2label = 16, 2, {0: "LABEL_0", 1: "LABEL_1"}
    with own_randomness(3):
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [*learnable(160), {"premise": "x", "hypothesis": "x", "label": "-"}]
    return write(tmp_path_factory.mktemp("data") / "plain.jsonl", *rows)


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("tuned") / "scorer"
    return folder, finetune_scorer([data], "jsonl", base, folder, settings=QUICK)


def test_a_classifier_learns_and_its_report_is_what_it_does(tuned, data):
    folder, report = tuned
    whole = read_examples([data], "jsonl")
    _, test = split(whole, QUICK.held_out, QUICK.seed)
    values, _ = NliModel(Checkpoint(str(folder)), max_length=32).values(list(test.inputs))
    right = np.array([CLASSES.index(label) - 1 for label in test.labels])
    assert report.accuracy == pytest.approx((values == right).mean())
    assert report.accuracy > 0.9 > report.majority
    assert (report.examples + report.held_out, report.skipped, report.cut) == (160, 1, 0)
    confusion = np.zeros((3, 3), dtype=int)
    for label, value in zip(test.labels, values, strict=True):
        confusion[report.labels.index(label), report.labels.index(CLASSES[value + 1])] += 1
    assert confusion.tolist() == [list(row) for row in report.confusion]


def test_the_folder_is_a_checkpoint_with_a_card_and_nothing_that_runs_code(tuned, data):
    folder, report = tuned
    names = {path.name for path in folder.rglob("*")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", RECORD} <= names
    assert not [name for name in names if re.search(r"\.(bin|pt|pkl|pth)$|^\.training|checkpoint", name)]
    assert json.loads((folder / "config.json").read_text())["id2label"] == dict(zip("012", CLASSES, strict=True))
    text = (folder / "README.md").read_text()
    assert f"**{report.accuracy:.4f}**" in text
    assert f"{report.examples:,} examples to learn from, {report.held_out:,} held out; 1 rows without a label" in text
    for label, row in zip(report.labels, report.confusion, strict=True):
        assert f"| {label} | {' | '.join(map(str, row))} |" in text
    assert json.loads((folder / RECORD).read_text())["data"].keys() == {data.name}
    assert [path.name for path in folder.parent.iterdir()] == ["scorer"]


def test_same_seed_same_weights_and_the_process_draws_on(base, data, tuned, tmp_path):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - what the Trainer seeds
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    finetune_scorer([data], "jsonl", base, tmp_path / "again", settings=QUICK)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    same = [(folder / "model.safetensors").read_bytes() for folder in (tuned[0], tmp_path / "again")]
    assert same[0] == same[1]


def test_the_best_weights_are_kept_not_the_last(base, data, tmp_path):
    """A rate that rises to ruin: the evaluation in between was better than the end."""
    held_out = write(tmp_path / "held.jsonl", *learnable(40, seed=9))
    seen = []
    run_ = module.Trainer.evaluate

    def spy(self, *args, **kwargs):
        found = run_(self, *args, **kwargs)
        seen.append(found["eval_accuracy"])
        if len(seen) == 2:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.zero_()
        return found

    module.Trainer.evaluate = spy
    try:
        report = finetune_scorer(
            [data], "jsonl", base, tmp_path / "s", settings=FineTuning(8, 2e-2, 16, 32, 1), held_out=[held_out]
        )
    finally:
        module.Trainer.evaluate = run_
    assert report.held_out == 40
    assert report.accuracy == pytest.approx(max(seen))
    assert max(seen[:2]) > seen[-1]


def test_a_known_order_of_classes_is_kept(tmp_path, data):
    counting_bert(tmp_path / "base", ("positive", "neutral", "negative"))
    report = finetune_scorer(
        [data], "jsonl", str(tmp_path / "base"), tmp_path / "out", settings=FineTuning(1, 0.0, 16, 32, 1)
    )
    assert report.labels == ("entailment", "neutral", "contradiction")
    assert report.accuracy == 1.0  # it knew before, so another order would have turned the answers round


def test_a_yes_no_model_learns_coherence(tmp_path):
    folder = counting_t5(tmp_path / "base")
    config = T5Config(
        vocab_size=len(T5_WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with own_randomness(1):
        T5ForConditionalGeneration(config).save_pretrained(folder)
    draw = random.Random(0)
    fits = [draw.random() < 0.5 for _ in range(120)]
    rows = [
        {"response": "good" if fit else "x", "context": f"User1: {n}", "label": "Yes" if fit else "no"}
        for n, fit in enumerate(fits)
    ]
    data = write(tmp_path / "asked.jsonl", *rows)
    settings = FineTuning(epochs=10, learning_rate=1e-2, batch_size=16, max_length=64, seed=1)
    report = finetune_scorer([data], "coherence", str(folder), tmp_path / "out", settings=settings)
    assert report.labels == ("Yes", "No")
    assert report.accuracy > 0.9 > report.majority
    scored = CoherenceScorer(Checkpoint(str(tmp_path / "out"))).score([("good", "User1: 1"), ("x", "User1: 1")])
    assert scored.values[0] > 0.5 > scored.values[1]


def test_what_is_cut_is_counted_and_a_limit_above_the_models_refused(tmp_path, base):
    rows = [{"premise": f"x {n}", "hypothesis": "x " * (40 if n < 7 else 1), "label": "neutral"} for n in range(40)]
    data = write(tmp_path / "d.jsonl", *rows)
    report = finetune_scorer([data], "jsonl", base, tmp_path / "out", settings=FineTuning(0.1, 1e-3, 16, 32, 1))
    assert report.cut == 7
    with pytest.raises(PersodpoError, match="takes 64 tokens, not 65"):
        finetune_scorer([data], "jsonl", base, tmp_path / "out", settings=FineTuning(max_length=65))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["cut"] == 7


def test_nothing_is_half_made_and_nothing_of_others_lost(tmp_path, base, data, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PersodpoError, match="something other than a fine-tuned scorer"):
        finetune_scorer([data], "jsonl", base, tmp_path / "mine", settings=QUICK)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full)
    with pytest.raises(PersodpoError, match="is full"):
        finetune_scorer([data], "jsonl", base, tmp_path / "new", settings=FineTuning(0.1, 1e-3, 16, 32, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_base_that_is_not_there_is_one_sentence(tmp_path, data):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PersodpoError, match="holds no model"):
        finetune_scorer([data], "jsonl", str(tmp_path / "empty"), tmp_path / "out", settings=QUICK)


@pytest.mark.slow
def test_the_command_reports_and_refuses_in_one_sentence(tmp_path, base, data):
    given = ["--base", base, "--output", str(tmp_path / "out"), "--max-length", "32", "--epochs", "0.2"]
    done = run("finetune-scorer", str(data), "--format", "jsonl", *given)
    assert "held-out examples right" in done.stdout, done.stderr
    assert "1 rows without a label skipped" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    refused = run("finetune-scorer", str(data), "--format", "snli", *given)
    assert refused.returncode == 1
    assert "line 1 has no text under sentence1, sentence2, gold_label" in refused.stderr
    assert "Traceback" not in refused.stderr
