"""Coherence: the published input format, hand-computed shares, cuts, and independence of batch and padding."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scorer_models import T5_WORDS, counting_t5
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from persodpo.errors import PersodpoError
from persodpo.scoring import coherence
from persodpo.scoring.coherence import CoherenceScorer, write_input
from persodpo.scoring.models import Checkpoint
from persodpo.scoring.score import Item

pytestmark = pytest.mark.usefixtures("one_thread")

ITEM = Item(("I like x.", "I have x."), "User1: x good\nUser2: x", "gold", "good x")
#: Tokens of the coherence question up to the response, and with all marks; each is another than "good".
HEAD = 12
FRAME = HEAD + 4


def items(*texts: tuple[str, str]) -> list[Item]:
    """Return items of these responses and histories."""
    return [Item((), history, "", response) for response, history in texts]


def share(good: int, rest: int) -> float:
    return 1 / (1 + math.exp(-math.sqrt(2) * good / math.hypot(good, rest)))


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return Checkpoint(str(counting_t5(tmp_path_factory.mktemp("t5"))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A T5 with random weights, so that every token's place matters."""
    folder = counting_t5(tmp_path_factory.mktemp("random"))
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(T5_WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return Checkpoint(str(folder))


def test_the_share_of_yes_is_the_one_computed_by_hand(counting):
    scorer = CoherenceScorer(counting)
    # Two of "good", and "x", "User1:", "x", "User2:", "x" besides the question.
    scored = scorer.score([ITEM, ITEM._replace(response="x")])
    assert scored.values == pytest.approx([share(2, FRAME + 5), share(1, FRAME + 5)], abs=1e-6)
    assert scored.values.dtype == np.float64
    assert scored.unread.tolist() == [0, 0]


def test_the_input_is_the_published_checkpoints():
    text, history = write_input("a reply", "User1: hi\nUser2: ho")
    assert text == (
        "question: Is this a coherent response given the dialogue history? </s> response: a reply </s> dialogue history: "
        "User1: hi\nUser2: ho\n\n"
    )
    assert text[history.start : history.stop] == "User1: hi\nUser2: ho"


def released_way(checkpoint: Checkpoint, text: str) -> float:
    """One text at a time, the softmax over the whole vocabulary, as UniEval defines the score."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.name)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint.name)
    encoded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=torch.tensor([[4]])
        ).logits
    yes, no = torch.softmax(logits[0, 0], dim=0)[[T5_WORDS.index("Yes"), T5_WORDS.index("No")]].tolist()
    return yes / (yes + no)


def made_up(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    said = lambda most: " ".join(draw.choices(["good", "x", "Yes", "No", "zzz"], k=draw.randint(0, most)))  # noqa: E731
    return [
        (said(9), "\n".join(f"User{n % 2 + 1}: {said(12)}" for n in range(draw.randint(1, 6)))) for _ in range(count)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 300, 10**6])
def test_scores_follow_their_texts_whatever_the_order_batch_and_padding(trained, batch_tokens):
    texts = made_up(24)
    alone = [released_way(trained, write_input(*given)[0]) for given in texts]
    assert np.ptp(alone) > 0.01
    order = random.Random(1).sample(range(len(texts)), len(texts))
    scorer = CoherenceScorer(trained, batch_tokens=batch_tokens)
    found = scorer.score(items(*(texts[n] for n in order)))
    assert found.values == pytest.approx([alone[n] for n in order], abs=1e-5)


def test_equal_inputs_are_run_once(trained, monkeypatch):
    seen = []
    run = coherence.run
    monkeypatch.setattr(
        coherence, "run", lambda loaded, rows, *rest: seen.append(len(rows)) or run(loaded, rows, *rest)
    )
    texts = made_up(3)
    scored = CoherenceScorer(trained).score(items(*texts, *texts[::-1]))
    assert seen == [3]
    assert scored.values[:3].tolist() == scored.values[:2:-1].tolist()


@given(good=st.integers(0, 6), rest=st.integers(0, 6))
def test_the_oldest_turns_are_cut_and_counted(counting, good, rest):
    """Of the history "x x x ... good good ..." as much of the end stays as fits."""
    room = 5
    history = " ".join(["x"] * rest + ["good"] * good)
    scored = CoherenceScorer(counting, max_length=FRAME + 1 + room).score(items(("x", history)))
    kept = min(good, room)
    left = min(rest, room - kept)
    assert scored.values[0] == pytest.approx(share(kept, FRAME + 1 + left), abs=1e-6)
    lost = max(0, good + rest - room)
    assert scored.unread[0] == pytest.approx(lost / (FRAME + 1 + good + rest))


def test_a_response_longer_than_the_model_loses_its_end(counting):
    scored = CoherenceScorer(counting, max_length=20).score(items(("good " * 50, "x good")))
    assert scored.values[0] == pytest.approx(share(20 - HEAD - 1, HEAD + 1), abs=1e-6)
    assert scored.unread[0] == pytest.approx(1 - 20 / (FRAME + 52))


def test_empty_texts_are_scored_and_nothing_is_nothing(counting):
    assert CoherenceScorer(counting).score(items(("", ""))).values == pytest.approx([share(0, FRAME)])
    assert len(CoherenceScorer(counting).score([]).values) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["<pad>", "</s>", "<unk>", "Yes", "x", "good"],
        ["<pad>", "</s>", "<unk>", "x", "No", "good"],
        ["<pad>", "</s>", "<unk>", "x", "y", "good"],
    ],
)
def test_a_tokenizer_without_yes_and_no_is_refused(tmp_path, words):
    counting_t5(tmp_path, words)
    with pytest.raises(PersodpoError, match="no single, different tokens for Yes and No"):
        CoherenceScorer(Checkpoint(str(tmp_path))).score(items(("x", "x")))


def test_yes_in_two_pieces_is_refused(tmp_path, counting):
    counting_t5(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PersodpoError, match="single, different tokens"):
        CoherenceScorer(Checkpoint(str(tmp_path))).score(items(("x", "x")))


def test_weights_outside_safetensors_are_refused(tmp_path):
    counting_t5(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PersodpoError, match=r"no weights in safetensors.*convert it once"):
        CoherenceScorer(Checkpoint(str(tmp_path))).score(items(("x", "x")))


def test_damaged_or_unfit_checkpoints_are_one_sentence(tmp_path):
    counting_t5(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(PersodpoError, match=r"Model '.*damaged' cannot be loaded"):
        CoherenceScorer(Checkpoint(str(tmp_path / "damaged"))).score(items(("x", "x")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PersodpoError, match=r"empty holds no model \(there is no config.json\)"):
        _ = CoherenceScorer(Checkpoint(str(tmp_path / "empty"))).key


def test_values_that_are_not_finite_are_refused(tmp_path):
    counting_t5(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(PersodpoError, match="values that are not finite"):
        CoherenceScorer(Checkpoint(str(tmp_path))).score(items(("x", "x")))


def test_the_key_follows_the_files_and_settings_and_nothing_else(tmp_path):
    first, second = (str(counting_t5(tmp_path / name)) for name in ("first", "second"))
    before = CoherenceScorer(Checkpoint(first)).key
    assert before == CoherenceScorer(Checkpoint(second)).key
    (tmp_path / "second" / "README.md").write_text("a card")
    assert before == CoherenceScorer(Checkpoint(second)).key
    assert CoherenceScorer(Checkpoint(first), max_length=9).key != before
    assert CoherenceScorer(Checkpoint(first), batch_tokens=7).key == before
    config = tmp_path / "second" / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 1', '"num_heads": 2'))
    assert CoherenceScorer(Checkpoint(second)).key != before


def test_a_model_on_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def cached(name, file, revision):
        assert (name, file) == ("someone/model", "config.json")
        return str(tmp_path / {None: "abc", "v2": "def"}[revision] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert Checkpoint("someone/model").key == "someone/model@abc"
    assert Checkpoint("someone/model", "v2").commit == "def"

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        PersodpoError, match="'someone/other' is neither a folder nor reachable on the Hugging Face Hub"
    ):
        _ = Checkpoint("someone/other").key
