"""C score and UE score: classes whatever their order, the released texts to the letter, corrections, refusals."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scorer_models import counting_bert, randomised, words_only
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from persodpo.errors import PersodpoError
from persodpo.scoring.score import Item
from persodpo.scoring.signals import CLASSES, CScorer, NliModel, UEScorer, label_order, last_user_turn

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = "User1: x\nUser2: x x\nUser1: agree x\nmore x"


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return str(counting_bert(tmp_path_factory.mktemp("bert")))


def model(source, **settings) -> NliModel:
    return NliModel(str(source), **{"max_length": 64, **settings})


def item(personas=(), response="x", *, context="", reference="") -> Item:
    return Item(tuple(personas), context, reference, response)


def one(scorer, *items: Item) -> list[float]:
    return scorer.score(items).values.tolist()


def test_c_score_looks_at_each_persona_sentence(counting):
    scorer = CScorer(model(counting))
    cases = {
        ("x", "agree"): 1, ("x", "deny"): -1, ("agree", "deny"): -1, ("x", "x"): 0, ("agree", "agree"): 1, (): 0,
    }  # fmt: skip
    assert one(scorer, *(item(personas) for personas in cases)) == list(cases.values())
    assert one(scorer, item(("x",), "deny"), item(("agree",), "deny")) == [-1, 0]


class Spied(NliModel):
    """Keeps what it was asked."""

    def values(self, inputs):
        self.asked = list(inputs)
        return super().values(inputs)


def test_as_released_joins_persona_and_response_into_one_text(counting):
    spied = Spied(counting, max_length=64)
    given = item(("I like x.", "I have agree"), "agree x", context=CONTEXT, reference="gold deny")
    assert one(CScorer(spied, "as_released"), given) == [1]
    assert spied.asked == [("I like x.I have agree agree x",)]
    # Persona and response agree; gold answer and response have one word each way.
    assert one(UEScorer(spied, "as_released"), given) == [1]
    assert spied.asked == [("gold deny [SEP] agree x",), ("I like x.I have agree [SEP] agree x",)]


def test_each_distinct_input_is_run_once(counting):
    spied = Spied(counting, max_length=64)
    one(CScorer(spied), *(item(["agree", "x"], response) for response in ("x", "deny", "x")))
    assert len(spied.asked) == 4


def test_ue_score_counts_the_persona_first_and_the_query_second(counting):
    asked = lambda query, *personas: item(personas, context=f"User1: {query}")  # noqa: E731
    cases = [
        asked("agree", "x", "agree"), asked("x", "agree", "deny"), asked("agree", "x"), asked("agree"),
        item(["agree"], context="User2: agree"), asked("deny", "agree"),
    ]  # fmt: skip
    assert one(UEScorer(model(counting)), *cases) == [2, 1, 0, 0, 1, 1]
    cases = [item([persona], reference=gold) for persona, gold in (("agree", "agree"), ("agree", "x"), ("x", "agree"))]
    assert one(UEScorer(model(counting), "as_released"), *cases) == [2, 1, 0]


def test_the_query_is_the_last_turn_of_the_user():
    assert last_user_turn(CONTEXT) == "agree x\nmore x"
    assert last_user_turn("User1: a\nUser2: b") == "a"
    assert last_user_turn("User2: b") == last_user_turn("") == ""


@pytest.mark.parametrize("way", ["as_released", "corrected"])
def test_without_a_persona_or_a_query_nothing_follows(counting, way):
    cases = [item(), item(["agree", " "]), item([""], context="User1: agree"), item(["x"], context="User2: x")]
    assert one(CScorer(model(counting), way), *cases) == [0, 1, 0, 0]
    assert one(UEScorer(model(counting), way), *cases) == [0, 1, 0, 0]
    assert one(CScorer(model(counting), "corrected"), item()) == [0]


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES,
        ("neutral", "entailment", "contradiction"),
        ("positive", "neutral", "negative"),
        ("ENTAILMENT", "Neutral", "Contradiction"),
    ],
)
def test_classes_are_read_by_name_whatever_their_order(tmp_path, labels):
    counting_bert(tmp_path, labels)
    assert one(CScorer(model(tmp_path)), item(["deny"]), item(["x"]), item(["agree"])) == [-1, 0, 1]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("a", "b"), "calls its outputs a, b, not contradiction, neutral, entailment"),
        (("neutral", "neutral", "entailment"), "calls its outputs neutral, neutral, entailment, not"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), r"calls its outputs LABEL_0, LABEL_1, LABEL_2, not .* in id2label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(own, message):
    with pytest.raises(PersodpoError, match=message):
        label_order(dict(enumerate(own)), "some/model")


def logits(found: NliModel, inputs: list[tuple[str, ...]]) -> np.ndarray:
    rows, _ = found.tokens(inputs, found.max_length)
    return found.run(rows, lambda batch: found.loaded.model(**batch).logits)


@pytest.fixture(scope="module")
def random_bert(tmp_path_factory):
    folder = counting_bert(tmp_path_factory.mktemp("random"))
    return randomised(folder, BertForSequenceClassification, layers=2)


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    said = lambda: " ".join(draw.choices(["agree", "deny", "x", "z"], k=draw.randint(0, 20)))  # noqa: E731
    return [(said(), said()) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 150])
def test_logits_follow_their_texts_whatever_the_order_batch_and_padding(random_bert, batch_tokens):
    texts = pairs(24)
    tokenizer = AutoTokenizer.from_pretrained(random_bert)
    stock = AutoModelForSequenceClassification.from_pretrained(random_bert)
    with torch.no_grad():
        alone = [stock(**tokenizer([one], [other], return_tensors="pt")).logits[0].numpy() for one, other in texts]
    assert np.ptp(alone, axis=0).max() > 0.1
    order = random.Random(1).sample(range(len(texts)), len(texts))
    found = logits(model(random_bert, batch_tokens=batch_tokens), [texts[n] for n in order])
    assert np.abs(found - np.array(alone)[order]).max() < 1e-5


def test_pairs_tell_their_sides_apart(random_bert):
    """Sentence pairs carry token types; one joined text does not."""
    found = model(random_bert)
    assert np.abs(logits(found, [("agree", "x")]) - logits(found, [("agree [SEP] x",)])).max() > 1e-4


@pytest.mark.parametrize("end", ["<end>", None])
def test_a_classifier_without_a_padding_token_is_padded_with_its_end_or_refused(tmp_path, end):
    """A random GPT-2 classifies by the last token of a text (case F5)."""
    tokenizer = words_only(["agree", "deny", "x", "<end>"], "x")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="x", eos_token=end, model_max_length=64
    ).save_pretrained(tmp_path)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=64, id2label=dict(enumerate(CLASSES)),
        initializer_range=0.5,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    found = model(tmp_path)
    if end is None:
        with pytest.raises(PersodpoError, match="no token to pad with"):
            found.values([("x",)])
        return
    texts = [(("agree x " * count).strip(),) for count in (1, 4, 9)]
    alone = np.concatenate([logits(found, [text]) for text in texts])
    assert np.abs(logits(found, texts) - alone).max() < 1e-5
    assert np.ptp(alone, axis=0).max() > 1e-3


@given(extra=st.integers(0, 8))
def test_long_inputs_lose_their_end_and_are_counted(counting, extra):
    """A text of 12 tokens fits 14 with its marks; what comes after it is cut."""
    found = model(counting, max_length=14)
    text = " ".join(["deny"] * 10 + ["agree"] * extra)
    scored = CScorer(found, "as_released").score([item(["x"], text)])
    assert scored.unread[0] == pytest.approx(max(0.0, 1 - 14 / (13 + extra)))
    assert scored.values[0] == -1
    values, cut = found.values([(" ".join(["x"] * 40), "agree")])
    assert (values.tolist(), cut.tolist()) == ([1], [pytest.approx(1 - 14 / 44)])
    _, cut = NliModel(str(counting)).values([(" ".join(["x"] * 100), "agree")])
    assert cut.tolist() == [pytest.approx(1 - 64 / 104)], "it takes 64 tokens, fewer than 210"


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    config = BertConfig.from_pretrained(counting_bert(tmp_path))
    BertModel(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(PersodpoError, match=r"no trained weights for classifier.bias; name the checkpoint of a fine"):
        one(CScorer(model(tmp_path)), item(["x"]))
