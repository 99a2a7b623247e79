"""Coherence: the published input format, hand-computed shares, cuts, independence of batch; which checkpoints are read."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_models import T5_WORDS, counting_t5
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from persodpo.errors import PersodpoError
from persodpo.scoring.models import Checkpoint
from persodpo.scoring.score import Item
from persodpo.scoring.signals import CoherenceScorer, write_input

pytestmark = pytest.mark.usefixtures("one_thread")

#: Tokens of the coherence question up to the response, and with all marks; each is another than "good".
HEAD = 12
FRAME = HEAD + 4


def items(*texts: tuple[str, str]) -> list[Item]:
    """Return items of these responses and histories."""
    return [Item(("I like x.",), history, "gold", response) for response, history in texts]


def scorer_of(folder, max_length: int = 1024, batch_tokens: int = 8192) -> CoherenceScorer:
    scorer = CoherenceScorer(str(folder), batch_tokens)
    scorer.max_length = max_length
    return scorer


def share(good: int, rest: int) -> float:
    return 1 / (1 + math.exp(-math.sqrt(2) * good / math.hypot(good, rest)))


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return counting_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A T5 with random weights, so that every token's place matters."""
    folder = counting_t5(tmp_path_factory.mktemp("random"))
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(T5_WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_share_of_yes_is_the_one_computed_by_hand(counting):
    """One or two of "good", and "x", "User1:", "x", "User2:", "x" besides the question."""
    history = "User1: x good\nUser2: x"
    scored = scorer_of(counting).score(items(("good x", history), ("x", history), ("", "")))
    assert scored.values == pytest.approx([share(2, FRAME + 5), share(1, FRAME + 5), share(0, FRAME)], abs=1e-6)
    assert scored.values.dtype == np.float64
    assert scored.unread.tolist() == [0, 0, 0]


def test_the_input_is_the_published_checkpoints():
    text, history = write_input("a reply", "User1: hi\nUser2: ho")
    assert text == (
        "question: Is this a coherent response given the dialogue history? </s> response: a reply </s> dialogue history: "
        "User1: hi\nUser2: ho\n\n"
    )
    assert text[history.start : history.stop] == "User1: hi\nUser2: ho"


def released_way(folder, text: str) -> float:
    """One text at a time, the softmax over the whole vocabulary, as UniEval defines the score."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([[4]])).logits
    yes, no = torch.softmax(logits[0, 0], dim=0)[[T5_WORDS.index("Yes"), T5_WORDS.index("No")]].tolist()
    return yes / (yes + no)


@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_scores_follow_their_texts_whatever_the_order_batch_and_padding(trained, batch_tokens):
    draw = random.Random(0)
    said = lambda most: " ".join(draw.choices(["good", "x", "Yes", "No", "zzz"], k=draw.randint(0, most)))  # noqa: E731
    texts = [(said(9), "\n".join(f"User{n % 2 + 1}: {said(12)}" for n in range(draw.randint(1, 6)))) for _ in range(24)]
    alone = [released_way(trained, write_input(*given)[0]) for given in texts]
    assert np.ptp(alone) > 0.01
    order = random.Random(1).sample(range(len(texts)), len(texts))
    found = scorer_of(trained, batch_tokens=batch_tokens).score(items(*(texts[n] for n in order)))
    assert found.values == pytest.approx([alone[n] for n in order], abs=1e-5)


@settings(max_examples=30)
@given(good=st.integers(0, 6), rest=st.integers(0, 6))
def test_the_oldest_turns_are_cut_and_counted(counting, good, rest):
    """Of the history "x x x ... good good ..." as much of the end stays as fits."""
    room = 5
    history = " ".join(["x"] * rest + ["good"] * good)
    scored = scorer_of(counting, max_length=FRAME + 1 + room).score(items(("x", history)))
    kept = min(good, room)
    assert scored.values[0] == pytest.approx(share(kept, FRAME + 1 + min(rest, room - kept)), abs=1e-6)
    assert scored.unread[0] == pytest.approx(max(0, good + rest - room) / (FRAME + 1 + good + rest))


def test_a_response_longer_than_the_model_loses_its_end(counting):
    scored = scorer_of(counting, max_length=20).score(items(("good " * 50, "x good")))
    assert scored.values[0] == pytest.approx(share(20 - HEAD - 1, HEAD + 1), abs=1e-6)
    assert scored.unread[0] == pytest.approx(1 - 20 / (FRAME + 52))


@pytest.mark.parametrize("words", [["Yes", "x", "good"], ["x", "No", "good"], ["x", "y", "good"], T5_WORDS[3:]])
def test_a_tokenizer_without_single_tokens_for_yes_and_no_is_refused(tmp_path, words):
    counting_t5(tmp_path, [*T5_WORDS[:3], *words])
    if words == T5_WORDS[3:]:  # both are there, but Yes comes in two pieces
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        pieces = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": pieces}))
    with pytest.raises(PersodpoError, match="no single, different tokens for Yes and No"):
        scorer_of(tmp_path).score(items(("x", "x")))


def test_damaged_or_unfit_checkpoints_are_one_sentence(tmp_path):
    counting_t5(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(PersodpoError, match=r"Model '.*damaged' cannot be loaded"):
        scorer_of(tmp_path / "damaged").score(items(("x", "x")))
    torch.save({}, tmp_path / "damaged" / "pytorch_model.bin")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    with pytest.raises(PersodpoError, match=r"no weights in safetensors.*convert it once"):
        scorer_of(tmp_path / "damaged").score(items(("x", "x")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PersodpoError, match=r"empty holds no model \(there is no config.json\)"):
        _ = scorer_of(tmp_path / "empty").key
    model = T5ForConditionalGeneration.from_pretrained(counting_t5(tmp_path / "infinite"))
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "infinite")
    with pytest.raises(PersodpoError, match="values that are not finite"):
        scorer_of(tmp_path / "infinite").score(items(("x", "x")))


def test_the_key_follows_the_files_and_settings_and_nothing_else(tmp_path):
    first, second = (counting_t5(tmp_path / name) for name in ("first", "second"))
    before = scorer_of(first).key
    (second / "README.md").write_text("a card")
    assert scorer_of(second).key == scorer_of(first, batch_tokens=7).key == before
    assert scorer_of(first, max_length=9).key != before
    config = second / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 1', '"num_heads": 2'))
    assert scorer_of(second).key != before


def test_a_model_on_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name, file, revision):
        return str(tmp_path / name / (revision or "abc") / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Checkpoint("someone/model").digest == "someone/model@abc"
    assert Checkpoint("someone/model@def").digest == "someone/model@def"

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        PersodpoError, match="'someone/other' is neither a folder nor reachable on the Hugging Face Hub"
    ):
        _ = Checkpoint("someone/other").digest
